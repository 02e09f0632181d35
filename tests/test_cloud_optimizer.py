"""SkyPilot's own optimizer, on a small catalog and told how long our plan takes, agrees with us.

catalogs ──refresh──▶ price book ──options──▶ the planner's choice ─┐
    └───── SkyPilot: any of the machines, seconds from the plan ────┴─ the same machine
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sky_catalogs
import yaml
from launches import launch_of, planned
from sky_env import ask, sky_python

from tuppence import planning
from tuppence.cloud import clouds
from tuppence.cloud.launch import Launch, Rented
from tuppence.cloud.machines import rented, words_of
from tuppence.cloud.tasks import documents, yaml_text
from tuppence.config import Budget, override
from tuppence.errors import DoesNotFit, UserError
from tuppence.plan.options import Option, option_of
from tuppence.plan.prices import Book

pytestmark = pytest.mark.slow

RECIPES = (
    ["nanogpt_openwebtext"],
    ["nanogpt_4b_tokens"],
    ["looped_546m"],
    ["llmc_gpt2_124m"],
    ["gpt2_124m", "data.source=openwebtext"],
    ["auto", "data.source=fineweb_10bt"],
    ["shakespeare", "budget.usd=1"],
    ["shakespeare_looped", "budget.usd=1"],
    ["quickstart"],
)
SHAPES = (
    [],
    ["machine.spot=off"],
    ["machine.spot=on"],
    ["machine.gpu=A10G", "machine.gpu_count=1"],
    ["machine.gpu=A100", "machine.gpu_count=1"],
    ["machine.gpu=A100", "machine.gpu_count=8"],
    ["machine.gpu=A100", "machine.gpu_count=8", "machine.spot=on"],
    ["machine.gpu=H100", "machine.gpu_count=1"],
    ["machine.gpu=H100", "machine.gpu_count=8", "machine.spot=off"],
    ["machine.gpu=H100", "machine.gpu_count=8", "machine.nodes=2"],
    ["machine.cloud=aws"],
    ["machine.cloud=lambda"],
)
ENABLED = list(sky_catalogs.CLOUDS)
LEAST_CASES = 80  # of recipes and shapes that fit


@dataclass(frozen=True)
class Case:
    """A recipe on a shape: our plan, our tasks."""

    words: list[str]
    plan: planning.Planned
    launch: Launch

    @property
    def chosen(self) -> Rented:
        """The machine that would be launched first."""
        return next(s for s in self.launch.stages if "train" in s.does).machines[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    sky_python()
    home = tmp_path_factory.mktemp("sky")
    with pytest.MonkeyPatch.context() as patch:  # a module's fixtures come before a test's own
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        yield home


@pytest.fixture(scope="module")
def book(home: Path) -> Book:
    return sky_catalogs.book(sky_catalogs.write(home))


@pytest.fixture(scope="module")
def cases(book: Book) -> list[Case]:
    """Every recipe on every shape that it fits."""
    found = []
    for recipe in RECIPES:
        for shape in SHAPES:
            words = [*recipe, *shape]
            try:
                plan = planned(words, book)
                found.append(Case(words, plan, launch_of(words, book, plan=plan)))
            except (DoesNotFit, UserError):
                continue
    return found


@pytest.fixture(scope="module")
def answers(home: Path, cases: list[Case]) -> dict[str, list[dict[str, Any]]]:
    """By question, an answer for each case; all from one process, as its imports take seconds."""
    asked = {
        "told our seconds": [among(case) for case in cases],
        "told no seconds": [among(case) | {"seconds": {}} for case in wide(cases)],
        "as launched": [resolving(case.launch) for case in distinct(cases)],
        "last machines alone": [resolving(last_alone(case.launch)) for case in distinct(cases)],
        "caps": [capped("instance_type", "p4d.24xlarge"), capped("accelerators", "A100:8")],
        "features": [{"verb": "features", "features": ["autodown", "multi-node"]}],
    }
    found = iter(ask(home, [question for each in asked.values() for question in each]))
    return {kind: [next(found) for _ in each] for kind, each in asked.items()}


# ---------------------------------------------------------------- asked of the library


def among(case: Case) -> dict[str, Any]:
    """The training task with every machine of the plan to choose from, in no order; and the seconds
    that the whole work takes on each, by our plan."""
    task = documents(case.launch)[-1]
    kept = ("disk_size", "autostop", "job_recovery")
    shared = {k: v for k, v in task["resources"].items() if k in kept}
    machines, seconds = [], {}
    for option in rivals(same_work(case)):
        machine = rented(option.seller)
        card = f"{machine.accelerator}:{machine.gpu_count}"
        machines.append(
            {
                "infra": f"{machine.cloud}/{machine.region}",
                "instance_type": machine.instance_type,
                "accelerators": card,
                "use_spot": machine.spot,
            }
        )
        terms = "spot" if machine.spot else "on_demand"
        assert option.usd is not None
        # Its prices lack disks, buckets and preparation: they are put into the time.
        key = f"{machine.cloud}/{machine.instance_type}/{card}/{terms}"
        seconds[key] = option.usd.mid / machine.usd_per_hour / option.nodes * 3600
    nodes = case.launch.stages[-1].nodes
    named = {"name": task["name"], "num_nodes": nodes, "run": "true"}
    text = yaml_text([named | {"resources": {"any_of": machines} | shared}], case.launch)
    return {"verb": "resolve", "yaml": text, "seconds": {task["name"]: seconds}, "enabled": ENABLED}


def same_work(case: Case) -> list[Option]:
    """All machines that can do the work of the choice, at what it costs on each. Under a budget of
    dollars all cost the same, and the choice is the one that does the most: the same question asked
    from behind."""
    run, chosen = case.plan.run, case.plan.options[0]
    fitting = [option for option in case.plan.options if option.fits]
    if run.budget.usd is None and run.budget.hours is None:
        return fitting
    assert chosen.tokens is not None
    sized = override(run, list(words_of(run, chosen)))
    fixed = replace(sized, budget=Budget(tokens=round(chosen.tokens.mid)))
    found = [option_of(fixed, case.plan.data, case.plan.book, o.seller) for o in fitting]
    return [option for option in found if option.fits]


def rivals(options: list[Option]) -> list[Option]:
    """The best few, and the cheapest by the hour: each takes the optimizer 20 ms."""
    by_hour = sorted(options, key=lambda option: option.seller.usd_per_hour)
    return list({id(o): o for o in [*options[:8], *by_hour[:4]]}.values())


def wide(cases: list[Case]) -> list[Case]:
    """Some of those that several kinds of card could do."""

    def kinds(case: Case) -> int:
        return len({option.gpu.name for option in case.plan.options if option.fits})

    return [case for case in cases if kinds(case) > 3][::3]


def distinct(cases: list[Case]) -> list[Case]:
    """One of those whose tasks ask for the same machines."""
    by_machines = {
        tuple((s.name, s.machines, s.nodes) for s in case.launch.stages): case for case in cases
    }
    return list(by_machines.values())


def resolving(launch: Launch) -> dict[str, Any]:
    return {"verb": "resolve", "yaml": yaml_text(documents(launch), launch), "enabled": ENABLED}


def last_alone(launch: Launch) -> Launch:
    """As if all but the last machine of each stage could not be had."""
    stages = tuple(replace(stage, machines=stage.machines[-1:]) for stage in launch.stages)
    return replace(launch, stages=stages)


def capped(key: str, value: str) -> dict[str, Any]:
    resources = {"infra": "aws", key: value, "max_hourly_cost": 5.0}
    text = yaml.safe_dump({"name": "t", "resources": resources, "run": "true"})
    return {"verb": "resolve", "yaml": text, "enabled": ENABLED}


def only(answer: dict[str, Any]) -> dict[str, Any]:
    (taken,) = answer["tasks"].values()
    return dict(taken)


def test_the_optimizer_takes_the_planners_choice(
    cases: list[Case], answers: dict[str, list[dict[str, Any]]]
) -> None:
    """Told our seconds, out of all machines of the catalog on all terms."""
    assert len(cases) >= LEAST_CASES
    for case, answer in zip(cases, answers["told our seconds"], strict=True):
        taken, chosen = only(answer), case.chosen
        for key in ("cloud", "region", "instance_type", "spot"):
            assert taken[key] == getattr(chosen, key), (case.words, key, taken, chosen)
        assert taken["usd_per_hour"] == pytest.approx(chosen.usd_per_hour)


def test_an_hour_for_each_machine_would_take_others(
    cases: list[Case], answers: dict[str, list[dict[str, Any]]]
) -> None:
    """Why the time is told: without it SkyPilot takes the cheapest hour, not the cheapest job."""
    found = list(zip(wide(cases), answers["told no seconds"], strict=True))
    other = [case for case, a in found if only(a)["instance_type"] != case.chosen.instance_type]
    assert len(other) > len(found) / 2


def test_our_tasks_resolve_to_the_planners_choice(
    cases: list[Case], answers: dict[str, list[dict[str, Any]]]
) -> None:
    """As they are launched, ordered and with no seconds told: each stage to its first machine."""
    for case, answer in zip(distinct(cases), answers["as launched"], strict=True):
        for stage in case.launch.stages:
            taken, first = answer["tasks"][f"{case.launch.name}-{stage.name}"], stage.machines[0]
            got = (taken["cloud"], taken["region"], taken["instance_type"], taken["spot"])
            assert got == (first.cloud, first.region, first.instance_type, first.spot), case.words
            assert taken["usd_per_hour"] == pytest.approx(first.usd_per_hour)


def test_every_last_runner_up_can_be_had_by_itself(
    cases: list[Case], answers: dict[str, list[dict[str, Any]]]
) -> None:
    """It is a machine of the catalog, at our price, for as many nodes."""
    for case, answer in zip(distinct(cases), answers["last machines alone"], strict=True):
        for stage in last_alone(case.launch).stages:
            taken, last = answer["tasks"][f"{case.launch.name}-{stage.name}"], stage.machines[0]
            assert (taken["cloud"], taken["instance_type"]) == (last.cloud, last.instance_type)
            assert taken["usd_per_hour"] == pytest.approx(last.usd_per_hour)


# ---------------------------------------------------------------- facts of the library


def test_what_clouds_lack_is_what_the_library_says(
    answers: dict[str, list[dict[str, Any]]],
) -> None:
    (found,) = answers["features"]
    assert found["autodown"] == sorted(clouds.NO_AUTODOWN)
    assert found["multi-node"] == sorted(clouds.ONE_NODE)


def test_a_cap_is_heeded_where_no_instance_type_is_named(
    answers: dict[str, list[dict[str, Any]]],
) -> None:
    """And not where one is: what tasks.py says of max_hourly_cost."""
    named, by_card = answers["caps"]
    assert only(named)["usd_per_hour"] > 5.0
    assert by_card["error"]["type"] == "ResourcesUnavailableError"
