"""What is asked: every key, every wrong value, and documents that come back as they were."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from tuppence import config, recipes
from tuppence.config import Budget, DataPlan, Plan, Run, from_json, override, to_json
from tuppence.errors import UserError
from tuppence.plan.hardware import Calibration
from tuppence.plan.options import options
from tuppence.plan.prices import price_book
from tuppence.plan.solve import solve


def refused(text: str, run: Run | None = None) -> str:
    """The message with which `text` is refused."""
    with pytest.raises(UserError) as refusal:
        override(run or Run(), [text])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def sample_of(hint: Any) -> tuple[str, Any]:
    """Some text of a type, and what it means."""
    kind = next(a for a in typing.get_args(hint) if a is not types.NoneType)
    return {
        bool: ("on", True),
        int: ("4e3", 4000),
        float: ("2.5e-1", 0.25),
        str: ("words = 'and' ünï", "words = 'and' ünï"),
    }[kind]


KEYS = config.keys()
ASSIGNABLE = [key for key in KEYS if key != "recipe"]


# ---------------------------------------------------------------- key=value


@pytest.mark.parametrize("key", ASSIGNABLE)
def test_every_key_round_trips(key: str) -> None:
    text, value = sample_of(KEYS[key])
    run = override(Run(), [f"{key}={text}"])
    assert config.asked(run) == {key: value}
    assert type(config.asked(run)[key]) is type(value)
    assert from_json(Run, to_json(run)) == run
    assert override(run, [f"{key}=none"]) == Run()


def test_all_keys_at_once_round_trip() -> None:
    words = [f"{key}={sample_of(KEYS[key])[0]}" for key in ASSIGNABLE]
    run = dataclasses.replace(override(Run(), words), recipe="mine.py:small")
    assert config.asked(run).keys() == KEYS.keys()
    assert from_json(Run, to_json(run)) == run


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("budget.usdd=1", "did you mean budget.usd?"),
        ("n_layers=4", "did you mean model.n_layer?"),
        ("learning_rate=1e-3", "did you mean train.learning_rate?"),
        ("train.lerning_rate=1e-3", "did you mean train.learning_rate?"),
        ("zzz=1", f"there are: {', '.join(KEYS)}"),
    ],
)
def test_an_unknown_key_offers_the_nearest(typed: str, near: str) -> None:
    message = refused(typed)
    assert message.startswith(f"{typed}: no key {typed.partition('=')[0]!r}")
    assert near in message


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("model.n_layer=four", "model.n_layer=four: not a whole number"),
        ("model.n_layer=4.6", "model.n_layer=4.6: not a whole number; the nearest is 5"),
        ("model.n_layer=inf", "model.n_layer=inf: not a finite number"),
        ("budget.usd=$2", "budget.usd=$2: not a number"),
        ("budget.usd=nan", "budget.usd=nan: not a finite number"),
        ("model.bias=maybe", "model.bias=maybe: not a yes or no; write on or off"),
        ("model.n_layer", "'model.n_layer' is not key=value"),
        ("recipe=quickstart", "recipe=quickstart: name the recipe without recipe="),
    ],
)
def test_a_wrong_type_says_which_value(typed: str, complaint: str) -> None:
    assert refused(typed).startswith(complaint)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("train.seed=4e3", 4000),
        ("train.seed=-1", -1),
        ("train.seed=9007199254740993", 9007199254740993),  # 2^53 + 1: not through a float
        ("model.bias=1", True),
        ("model.bias=FALSE", False),
    ],
)
def test_ways_to_write_a_value(typed: str, value: int) -> None:
    key = typed.partition("=")[0]
    found = config.asked(override(Run(), [typed]))[key]
    assert (found, type(found)) == (value, type(value))


def test_a_budget_replaces_the_recipes_whole_budget() -> None:
    asked = Run(budget=Budget(usd=1.0, steps=10))
    assert override(asked, ["budget.hours=2"]).budget == Budget(hours=2.0)
    both = override(asked, ["model.n_layer=1", "budget.hours=2", "budget.tokens=4e3"])
    assert both.budget == Budget(hours=2.0, tokens=4000)
    assert override(asked, ["model.n_layer=1"]).budget == asked.budget
    assert override(asked, ["budget.usd=none"]).budget == Budget()


# ---------------------------------------------------------------- JSON


@pytest.fixture
def small_plan(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> Plan:
    return solve(small_run, data_plan, calibration)


def changed(document: str, path: str, value: Any) -> str:
    """The document with another value at a dotted path; without it where the value is `...`."""
    data = json.loads(document)
    *groups, leaf = path.split(".")
    inside = data
    for group in groups:
        inside = inside[group]
    inside[leaf] = value
    if value is ...:
        del inside[leaf]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("bugdet", {}, "Plan: no key 'bugdet'; did you mean budget?"),
        ("model.n_layers", 1, "Plan.model: no key 'n_layers'; did you mean n_layer?"),
        ("model.n_layer", "4", 'Plan.model.n_layer: "4" is not int'),
        ("model.n_layer", True, "Plan.model.n_layer: true is not int"),
        ("model.n_layer", ..., "Plan.model: the key 'n_layer' is missing"),
        ("model.bias", 1, "Plan.model.bias: 1 is not bool"),
        ("budget.usd", False, "Plan.budget.usd: false is not float"),
        ("model", None, "Plan.model: null is not an object"),
        ("warnings", {}, "Plan.warnings: {} is not "),
        ("warnings", [{"code": "x"}], "Plan.warnings[0]: the key 'message' is missing"),
        ("predicted.phase_seconds", {"train": None}, "Plan.predicted.phase_seconds.train: null"),
    ],
)
def test_a_wrong_document_is_named(small_plan: Plan, path: str, value: Any, complaint: str) -> None:
    with pytest.raises(UserError) as refusal:
        from_json(Plan, changed(to_json(small_plan), path, value))
    assert str(refusal.value).startswith(complaint)


def test_a_plan_round_trips(small_plan: Plan) -> None:
    again = from_json(Plan, to_json(small_plan))
    assert again == small_plan
    assert to_json(again) == to_json(small_plan)  # with the very types that it says
    assert isinstance(again.warnings, tuple)
    assert from_json(Plan, changed(to_json(again), "budget.usd", 2)).budget.usd == 2.0
    with pytest.raises(UserError, match="not JSON"):
        from_json(Plan, to_json(again)[:-3])


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", list(recipes.all_recipes()))
def test_every_recipe_round_trips_and_plans_on_the_price_book(
    name: str, data_plan: DataPlan
) -> None:
    run = recipes.get(name)
    assert run.recipe == name
    assert from_json(Run, to_json(run)) == run
    words = [f"{k}={v}" for k, v in config.asked(run).items() if k != "recipe"]
    assert override(Run(recipe=name), words) == run  # what it asks can be typed
    tokenizer = run.data.tokenizer or "gpt2"
    text = dataclasses.replace(data_plan, tokenizer=tokenizer, vocab_size=17, train_tokens=10**10)
    rich = dataclasses.replace(run, budget=dataclasses.replace(run.budget, usd=1e5))
    assert options(rich, text, price_book())[0].fits


@pytest.mark.parametrize("name", ["shakespeare", "quickstart", "gpt2_124m"])
def test_every_recipe_for_this_machine_plans_here(
    name: str, data_plan: DataPlan, calibration: Calibration
) -> None:
    run = recipes.get(name)
    text = dataclasses.replace(
        data_plan,
        tokenizer=run.data.tokenizer or "gpt2",
        vocab_size=50257 if run.data.tokenizer == "gpt2" else 65,
        train_tokens=10**9,
    )
    server = dataclasses.replace(
        calibration, memory_gib=64.0, matmul_tflops={"fp32": 10.0, "bf16": 100.0}
    )
    plan = solve(run, text, server)
    assert plan.name == name
    assert from_json(Plan, to_json(plan)) == plan


OWN = """
from tuppence.config import Budget, Model, Run

def small() -> Run:
    return Run(budget=Budget(usd=1.0))

def named() -> Run:
    return Run(name="other", budget=Budget(usd=2.0))

def wrong():
    return {"budget": {"usd": 1.0}}

def needs(width) -> Run:
    return Run()

def fails() -> Run:
    return Run(budget=Budget(dollars=1))

def mistyped() -> Run:
    return Run(model=Model(n_layer="4"))

def _hidden() -> Run:
    return Run()
"""
NAME_ONE = "name one of its functions: small, named, wrong, needs, fails, mistyped"


def test_ones_own_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    own = f"{tmp_path}/mine.py"
    small = Run(name="small", recipe=f"{own}:small", budget=Budget(usd=1.0))
    assert recipes.get(f"{own}:small") == small
    assert recipes.get(f"{own}:named").name == "other"
    (tmp_path / "single.py").write_text(OWN[: OWN.index("def named")])
    assert recipes.get(f"{tmp_path}/single.py").name == "small"  # the only one needs no name


@pytest.mark.parametrize(
    ("text", "function", "complaint"),
    [
        (OWN, ":absent", NAME_ONE),
        (OWN, ":_hidden", NAME_ONE),
        (OWN, ":wrong", "wrong returned dict, not tuppence.config.Run"),
        (OWN, ":needs", "needs must be callable without arguments"),
        (OWN, ":fails", "fails fails with TypeError: "),
        (OWN, ":mistyped", 'mistyped returned Run.model.n_layer: "4" is not int'),
        ("def small(:\n", ":small", "mine.py fails with SyntaxError"),
        ("raise ValueError('two\\nlines')", ":small", "mine.py fails with ValueError: two lines"),
        ("import no_such_mod\n", "", "mine.py fails with ModuleNotFoundError"),
        (None, ":small", "there is no file"),
    ],
)
def test_a_wrong_recipe_of_ones_own(
    tmp_path: Path, text: str | None, function: str, complaint: str
) -> None:
    own = tmp_path / "mine.py"
    if text is not None:
        own.write_text(text)
    with pytest.raises(UserError) as refusal:
        recipes.get(f"{own}{function}")
    assert complaint in str(refusal.value)
    assert str(own) in str(refusal.value)
    assert "\n" not in str(refusal.value)
