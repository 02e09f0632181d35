"""A launch as SkyPilot's tasks: what they say, how they read, and that the library takes them."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sky_catalogs
import yaml
from launches import KIT, STORE, launch_of, of, planned
from sky_env import ask, sky_python

from tuppence import recipes
from tuppence.cloud.clouds import ANY
from tuppence.cloud.launch import Launch, Rented, Stage
from tuppence.cloud.tasks import KIT as KIT_FOLDER
from tuppence.cloud.tasks import documents, yaml_text
from tuppence.config import Budget
from tuppence.files import asset
from tuppence.plan.prices import price_book

Document = dict[str, Any]


def machine(**values: Any) -> Rented:
    plain = Rented(
        cloud="aws",
        region="us-east-1",
        instance_type="p4d.24xlarge",
        accelerator="A100",
        gpu_count=8,
        vcpus=96,
        memory_gib=1152,
        spot=False,
        usd_per_hour=20.0,
        price="on demand, aws us-east-1 2026",
    )
    return replace(plain, **values)


def cpu(**values: Any) -> Rented:
    return machine(
        **{"instance_type": "c5.2xlarge", "accelerator": None, "gpu_count": 0, "vcpus": 8.0}
        | {"memory_gib": 16.0, "usd_per_hour": 0.34}
        | values
    )


def stage(*machines: Rented, name: str = "train", **values: Any) -> Stage:
    plain = Stage(name, (name,), machines or (machine(),), 1, 7200.0, 40.0, 120.5)
    return replace(plain, **values)


def chain(**values: Any) -> Launch:
    return of(stage(cpu(), name="prepare", seconds=1000.0, usd=0.2), stage(), **values)


def last(launch: Launch) -> Document:
    return documents(launch)[-1]


# ---------------------------------------------------------------- resources


def test_the_choice_stands_first_and_the_runners_up_in_order() -> None:
    machines = (
        machine(),
        machine(cloud="lambda", instance_type="gpu_8x_a100"),
        machine(region="x"),
    )
    found = last(of(stage(*machines)))["resources"]
    assert [m["infra"] for m in found["ordered"]] == [
        "aws/us-east-1",
        "lambda/us-east-1",
        "aws/x",
    ]
    assert found["ordered"][0]["instance_type"] == "p4d.24xlarge"
    assert found["ordered"][0]["accelerators"] == "A100:8"
    assert found["disk_size"] == 121


def test_a_machine_alone_stands_in_the_resources_themselves() -> None:
    found = last(of(stage()))["resources"]
    assert "ordered" not in found
    assert found["infra"] == "aws/us-east-1"


@pytest.mark.parametrize(("usd", "cap"), [(20.0, 22.0), (0.34, 0.374), (1.0001, 1.101)])
def test_the_cap_is_a_tenth_above_the_price(usd: float, cap: float) -> None:
    found = last(of(stage(machine(usd_per_hour=usd))))["resources"]
    assert found["max_hourly_cost"] == pytest.approx(cap)


def test_a_card_at_ones_own_price_is_sought_on_every_cloud() -> None:
    """Guide 004: 8 H100 at $32, wherever."""
    quoted = machine(cloud=ANY, region=None, instance_type=None, usd_per_hour=32.0)
    found = last(of(stage(quoted)))
    assert "infra" not in found["resources"]
    assert found["resources"]["accelerators"] == "A100:8"
    assert found["resources"]["max_hourly_cost"] == pytest.approx(35.2)
    (price,) = json.loads(found["envs"]["TUPPENCE_PRICES"])
    assert price["cloud"] is None
    assert price["usd_per_hour"] == 32.0


def test_a_cluster_has_no_spot_machines_no_disks_and_no_prices() -> None:
    own = machine(cloud="slurm", region="lab/long", instance_type=None)
    part = replace(own, accelerator=None, gpu_count=0, vcpus=8.0, memory_gib=16.0)
    first, second = documents(of(stage(part, name="prepare"), stage(own)))
    assert set(second["resources"]) == {"infra", "accelerators", "autostop", "job_recovery"}
    assert second["resources"]["infra"] == "slurm/lab/long"
    assert first["resources"]["cpus"] == "8+"
    assert first["resources"]["memory"] == "16+"
    assert json.loads(second["envs"]["TUPPENCE_PRICES"])[0]["region"] == "lab"


def test_a_recovery_never_goes_back_to_the_machine_that_failed() -> None:
    on_demand, spot = (last(of(stage(machine(spot=s))))["resources"] for s in (False, True))
    assert on_demand["use_spot"] is False
    assert spot["use_spot"] is True
    for each in (on_demand, spot):
        assert each["job_recovery"]["strategy"] == "EAGER_NEXT_REGION"


def test_what_is_wrong_or_out_of_money_is_not_restarted() -> None:
    """2: wrong words; 3: does not fit; 1: a fault, tried again in place; 124: the money is spent.
    SkyPilot restarts the codes that are named without limit."""
    for task in documents(chain()):
        recovery = task["resources"]["job_recovery"]
        assert recovery["max_restarts_on_errors"] == 0
        assert not {0, 1, 2, 3, 124, 137} & set(recovery["recover_on_exit_codes"])


def test_every_machine_ends_itself() -> None:
    for task in documents(chain()):
        assert task["resources"]["autostop"] == {"idle_minutes": 10, "down": True}


def test_an_image_is_for_all_machines() -> None:
    assert last(chain(image="docker:me/gpu"))["resources"]["image_id"] == "docker:me/gpu"


# ---------------------------------------------------------------- a task


def test_names_nodes_and_prices() -> None:
    launch = replace(of(stage(machine(spot=True), nodes=2)), name="my-run")
    (task,) = documents(launch)
    assert task["name"] == "my-run-train"
    assert task["num_nodes"] == 2
    assert json.loads(task["envs"]["TUPPENCE_PRICES"]) == [
        {
            "cloud": "aws",
            "region": "us-east-1",
            "instance_type": "p4d.24xlarge",
            "accelerator": "A100",
            "gpu_count": 8,
            "spot": True,
            "usd_per_hour": 20.0,
        }
    ]


def test_secrets_are_names_without_values() -> None:
    launch = chain(secrets=("WANDB_API_KEY", "HF_TOKEN"))
    for task in documents(launch):
        assert task["secrets"] == {"WANDB_API_KEY": None, "HF_TOKEN": None}
    assert "secrets" not in last(chain())


def test_the_kit_is_copied_from_a_bucket_and_no_bucket_is_made() -> None:
    """A mount that is a mapping names a bucket, which SkyPilot makes where it is missing."""
    assert last(chain())["file_mounts"] == {KIT_FOLDER: f"{STORE}/kit/{KIT}"}
    shared = last(chain(store="/shared/tuppence"))
    assert "file_mounts" not in shared
    assert f"bash /shared/tuppence/kit/{KIT}/node.sh" in shared["run"]


def test_the_first_of_several_tasks_packs_the_environment() -> None:
    first, second = documents(chain())
    assert "--pack" in first["setup"]
    assert "--torch cu128" in first["setup"]
    assert "--pack" not in second["setup"] + second["run"] + first["run"]
    assert "--torch" not in second["setup"]  # its own driver is asked
    assert "--pack" not in last(of(stage()))["setup"]
    first, _ = documents(chain(python="/opt/python"))
    assert "--python /opt/python" in first["setup"]
    assert "--pack" not in first["setup"]
    assert "--torch" not in first["setup"]
    assert "--extras" not in first["setup"]


def test_an_old_card_among_the_candidates_gets_wheels_that_know_it() -> None:
    launch = of(stage(cpu(), name="prepare"), stage(machine(), machine(accelerator="V100")))
    assert "--torch cu126" in documents(launch)[0]["setup"]


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (Budget(usd=5.0), ["--budget-usd", "5"]),
        (Budget(usd=0.125, hours=2.0), ["--budget-usd", "0.125", "--budget-hours", "2"]),
        (Budget(steps=100), []),
    ],
)
def test_the_dead_man_timer_is_told_the_budget(budget: Budget, options: list[str]) -> None:
    called = arguments(last(of(stage(), budget=budget))["run"])
    found = [w for i, w in enumerate(called) if "--budget" in w or "--budget" in called[i - 1]]
    assert found == options


def test_a_stage_without_a_budget_has_a_limit_of_its_own() -> None:
    first, second = documents(chain())
    called = arguments(first["run"])
    assert called[called.index("--limit") + 1] == "prepare=6800"  # 1,800 s + 5 x 1,000 s
    assert "--limit" not in second["run"]


def arguments(script: str) -> list[str]:
    """The words of a script's call, as bash reads them."""
    return shlex.split(script.replace("\\\n", " "), comments=False)


WORDS = (
    "my_recipe.py:small",
    "data.source=texts of mine/*.txt",
    'train.sample_prompt=it\'s $HOME `pwd` "quoted" \\n',
    "name=run",
    *(f"model.key_{i}={i}" for i in range(20)),
)


@pytest.mark.parametrize("which", ["setup", "run"])
def test_bash_hands_node_sh_the_words_as_they_are(which: str, tmp_path: Path) -> None:
    kit = tmp_path / "a store" / "kit" / KIT
    kit.mkdir(parents=True)
    (kit / "node.sh").write_text('printf "%s\\0" "$@"\n')
    launch = chain(store=str(tmp_path / "a store"), words=WORDS, tasks="core,lm_eval:piqa")
    launch = replace(launch, stages=(*launch.stages, stage(name="eval")))
    for task, each in zip(documents(launch), launch.stages, strict=True):
        script = task[which]
        assert script.startswith("set -euo pipefail\n")
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        called = done.stdout.split("\0")[:-1]
        assert called[0] == ("setup" if which == "setup" else each.name)
        assert called[called.index("--store") + 1] == str(tmp_path / "a store")
        assert called[called.index("--name") + 1] == "run"
        if which == "run":
            assert tuple(called[called.index("--") + 1 :]) == WORDS
            assert ("--tasks" in called) is (each.name == "eval")


def test_every_option_is_one_that_node_sh_knows() -> None:
    """Its own list of words is where a call ends with exit code 2."""
    known = asset("node.sh").read_text()
    launch = chain(budget=Budget(usd=1, hours=2), tasks="core")
    launch = replace(launch, stages=(*launch.stages, stage(name="eval")))
    scripts = [t[w] for t in documents(launch) for w in ("setup", "run")]
    scripts += [last(chain(python="/p"))["setup"]]
    for script in scripts:
        called = arguments(script)[5:]
        called = called[: called.index("--")] if "--" in called else called
        for word in called:
            if word.startswith("--"):
                assert f"      {word}) " in known, word


# ---------------------------------------------------------------- YAML


def test_the_text_reads_back_as_the_tasks() -> None:
    launch = chain(words=WORDS, secrets=("WANDB_API_KEY",))
    docs = documents(launch)
    text = yaml_text(docs, launch)
    assert list(yaml.safe_load_all(text)) == [{"name": "run"}, *docs]
    (task,) = documents(of(stage()))
    assert list(yaml.safe_load_all(yaml_text([task], of(stage())))) == [task]


def test_the_text_is_for_people() -> None:
    """Scripts are blocks; the plan's numbers stand above."""
    launch = chain(budget=Budget(usd=50.0))
    text = yaml_text(documents(launch), launch)
    assert "run: |\n  set -euo pipefail\n  bash /tmp/tuppence/kit/node.sh train \\\n" in text
    head = text[: text.index("name:")]
    assert all(line.startswith("# ") for line in head.splitlines())
    for said in ("$40.20 in all", "usd=50", "2.00 h", "on demand, aws us-east-1 2026", "a test"):
        assert said in head
    assert max(len(line) for line in text.splitlines() if "TUPPENCE_PRICES" not in line) < 160


# ---------------------------------------------------------------- the real library


CHARACTERS = "0123456789+-*= \n."  # 17, of guide 004's sums
BY_HAND = ({"wanted": ("prepare",)}, {"wanted": ("train",), "prepared": True})
LLMC = "llmc_gpt2_124m"
A100, H100 = "machine.gpu=A100", "machine.gpu=H100"
GUIDES: tuple[tuple[list[str], Document], ...] = (
    (["nanogpt_openwebtext"], {}),
    (["nanogpt_openwebtext"], {"wanted": ("prepare",)}),
    (["nanogpt_4b_tokens", "machine.instance_type=g5.8xlarge"], {}),
    (["looped_546m", H100, "machine.gpu_count=1"], {}),
    (
        ["looped_546m", H100, "machine.gpu_count=8"],
        {"wanted": ("prepare", "train", "eval"), "tasks": "core,bpb,sample"},
    ),
    ([LLMC], {"apart": False}),
    *(([LLMC, A100, "machine.gpu_count=8"], asked) for asked in BY_HAND),
    ([LLMC, A100, "machine.gpu_count=8"], {"apart": True}),
    ([LLMC, A100, "machine.gpu_count=1"], {}),
    ([LLMC, H100, "machine.gpu_count=8"], {}),
    ([LLMC], {}),
    ([LLMC, "machine.spot=on"], {}),
    ([LLMC, H100, "machine.gpu_count=8", "machine.nodes=2"], {}),
    (["depth_1000usd", "data.source={sums}"], {}),
)


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.txt"
    path.write_text("".join(f"{i}+{i}={2 * i}. 1-1=0 2*3=6\n" for i in range(60_000)))
    assert set(path.read_text()) <= set(CHARACTERS)
    return path


def every_launch(sums: Path) -> list[Launch]:
    """All recipes as they come, and the guides' shapes, on the package's price book."""
    plain = {"gpt2_124m": "openwebtext", "auto": "fineweb_10bt", "depth_1000usd": str(sums)}
    small = {"shakespeare": "budget.usd=1", "shakespeare_looped": "budget.usd=1"}
    asked: list[tuple[list[str], Document]] = []
    for name in recipes.all_recipes():
        words = [name, *([f"data.source={plain[name]}"] if name in plain else [])]
        asked.append(([*words, *([small[name]] if name in small else [])], {}))
    book, found = price_book(), []
    for words, wanted in [*asked, *GUIDES]:
        words = [word.format(sums=sums) for word in words]
        launch = launch_of(words, book, plan=planned(words, book), **wanted)
        found.append(replace(launch, secrets=("WANDB_API_KEY",), tasks=wanted.get("tasks")))
    return found


@pytest.mark.slow
def test_skypilot_takes_every_recipe_and_every_shape_of_the_guides(
    tmp_path: Path, sums: Path
) -> None:
    """And reads in them what we meant."""
    sky_python()
    sky_catalogs.write(tmp_path)
    launches = every_launch(sums)
    texts = [yaml_text(documents(launch), launch) for launch in launches]
    broken = [with_a_field(documents(launches[0]), *where) for where in ((), ("resources",))]
    asked = [{"verb": "tasks", "yaml": t, "secrets": ["WANDB_API_KEY"]} for t in texts + broken]
    *found, at_task, at_resources = ask(tmp_path, asked, WANDB_API_KEY="not in any file")
    for launch, answer in zip(launches, found, strict=True):
        assert "error" not in answer, (launch.words, answer)
        for task, read, each in zip(documents(launch), answer["tasks"], launch.stages, strict=True):
            check(task, read, each)
    for refused in (at_task, at_resources):
        assert "unsupported field" in refused["error"]["message"]


def with_a_field(docs: list[Document], *where: str) -> str:
    """The tasks with a field that SkyPilot does not know, to see that it looks."""
    place = docs[0]
    for key in where:
        place = place[key]
    place["budget_usd"] = 5
    return yaml.safe_dump_all(docs)


def check(task: Document, read: Document, wanted: Stage) -> None:
    """What SkyPilot read of one task."""
    assert (read["name"], read["nodes"]) == (task["name"], wanted.nodes)
    assert read["ordered"] is (len(wanted.machines) > 1)
    for got, meant in zip(read["machines"], wanted.machines, strict=True):
        assert got["cloud"] == (None if meant.cloud == ANY else meant.cloud)
        assert (got["region"], got["instance_type"]) == (meant.region, meant.instance_type)
        cards = {meant.accelerator: meant.gpu_count} if meant.accelerator else None
        assert got["accelerators"] == cards
        assert got["spot"] is meant.spot
        assert got["cap"] == pytest.approx(1.1 * meant.usd_per_hour, abs=0.002)
    assert read["recovery"]["max_restarts_on_errors"] == 0
    assert read["autostop"]["down"] is True
    assert read["secrets"] == ["WANDB_API_KEY"]
    assert read["mounts"] == task["file_mounts"]
    assert read["storage"] == []  # which would make a bucket
    assert (read["setup"], read["run"]) == (task["setup"], task["run"])
