"""Runs that start from other weights: their keys, their first loss, and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, built, model_plan
from safetensors.torch import save_file
from small_runs import DEPTH, GPT2, LOOPED, WORDS, best_model, finished, text_ids

from tuppence import cli, config, host, origin, pipeline, planning, spending
from tuppence.config import DataPlan, InitPlan, Model, Plan, Run, Train
from tuppence.data.loader import Loader
from tuppence.data.prepare import prepare
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256
from tuppence.folder import RunFolder
from tuppence.hub.load import load_into, plan_of
from tuppence.model import Family, build
from tuppence.origin import Origin, keys_of, merged
from tuppence.plan.hardware import Calibration
from tuppence.tokenizer.spec import build_tokenizer
from tuppence.train import draws
from tuppence.train.step import micro_batches, train_step
from tuppence.workers import Workers

FAMILY_WORDS = {"gpt2": [*GPT2, "model.bias=on"], "depth": DEPTH, "looped": LOOPED}
Runs = Callable[..., RunFolder]
Command = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return prepare(source="shakespeare", tokenizer="char", root=root).folder


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    calibration: Calibration,
    data_plan: DataPlan,
    shards: Path,
) -> Runs:
    """A finished run of a family; trained once."""
    made: dict[str, RunFolder] = {}

    def run(family: str = "gpt2") -> RunFolder:
        if family not in made:
            path = tmp_path_factory.mktemp("runs") / "first"
            made[family] = finished(path, FAMILY_WORDS[family], data_plan, shards, calibration)
        return made[family]

    return run


@pytest.fixture
def tuppence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    calibration: Calibration,
    shards: Path,
) -> Iterator[Command]:
    """Runs one command line with --json on a machine that is known; code, document, stderr."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(host, "settle_threads", lambda threads: {})
    monkeypatch.setattr(host, "process_start", time.time)
    monkeypatch.setattr(pipeline, "device_of", lambda run: "cpu")
    known = [calibration, None, None]
    solved = pipeline._solved
    for module in (spending, planning):
        monkeypatch.setattr(module, "solved", lambda run, data, **_: solved(run, data, *known))

    def tuppence(*words: str) -> tuple[int, dict[str, Any], str]:
        code = cli.main([*words, "--json", "--data", str(shards.parent)])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    yield tuppence
    gc.unfreeze()
    torch.set_num_threads(host.usable_cores())


def onward(where: object, *words: str) -> list[str]:
    """The words of a run of one step from the weights in a folder."""
    kept = [word for word in WORDS if not word.startswith(("model.", "budget."))]
    return ["train", *kept, f"train.init_from={where}", "budget.steps=1", "name=on", *words]


def first_loss(model: Family, plan: Plan, shards: Path) -> float:
    """What a model loses on the first batch of `plan`, as a training step has it."""
    size = {"sequence_len": plan.model.sequence_len, "batch_size": plan.step.batch_sequences}
    batch = Loader(shards, seed=plan.step.seed, **size).batch(0)
    micro = micro_batches(
        batch,
        micro_batch=plan.step.micro_batch,
        device="cpu",
        keys=draws.keys_of(plan, 0),
        recurrence=draws.recurrence_of(plan, 0),
    )
    workers = Workers(model, count=1, device="cpu", precision="fp32")
    return train_step(workers, [], micro, factor=0.0, grad_clip=1.0).loss


@pytest.mark.parametrize("family", FAMILY_WORDS)
def test_the_first_loss_is_that_of_the_weights(
    family: str, runs: Runs, tuppence: Command, shards: Path
) -> None:
    run = runs(family)
    assert tuppence("export", str(run.path), "--out", "out")[0] == 0
    assert tuppence("import", "out", "--name", "back")[0] == 0
    found = []
    for number, where in enumerate((run.path, "imports/back")):
        code, _, err = tuppence(*onward(where, f"name=on{number}"))
        assert code == 0, err
        assert "other_tokenizer" not in err
        assert f"starts    from the weights in {where}" in err
        on = RunFolder(Path("runs") / f"on{number}")
        plan = on.plan()
        assert plan.init == InitPlan(str(where), origin.read(str(where)).sha256)
        assert plan.predicted.val_loss is None
        assert on.run().train.init_from == str(where)
        begun = next(e for e in on.rows("events") if e["code"] == "start")
        assert (begun["init_from"], begun["init_sha256"]) == (str(where), plan.init.sha256)
        assert str(where) in begun["message"]
        found.append(on.latest("metrics")[0]["loss"])
    assert found == [first_loss(best_model(run), plan, shards)] * 2
    untrained = built(plan.model, seed=plan.step.seed)
    assert found[0] != first_loss(untrained, plan, shards)


def test_a_run_goes_on_without_the_weights_it_started_from(runs: Runs, tuppence: Command) -> None:
    shutil.copytree(runs().path, "source")
    words = onward("source", "budget.steps=4", "train.save_every=2")
    assert tuppence(*words)[0] == 0
    run = RunFolder(Path("runs/on"))
    before = [row["loss"] for row in run.latest("metrics")]
    shutil.rmtree("source")
    shutil.rmtree(run.checkpoints / "step_00000004")
    lines = run.file("events.jsonl").read_text().splitlines(keepends=True)
    run.file("events.jsonl").write_text("".join(x for x in lines if '"code": "end"' not in x))
    code, _, err = tuppence(*words)
    assert code == 0, err
    assert [row["loss"] for row in run.latest("metrics")] == before
    assert [e["step"] for e in run.rows("events") if e["code"] == "resume"] == [2]
    code, document, _ = tuppence(*words, "--fresh")
    assert code == 2
    assert "train.init_from=source: no such folder" in document["error"]["message"]


def test_weights_that_changed_since_the_plan(runs: Runs, tuppence: Command) -> None:
    shutil.copytree(runs().path, "source")
    plan = best_model(runs())
    path = origin.weights_of("source") / "model.safetensors"
    init = origin.pinned("source")
    load_into(plan, init)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(Fault, match=r"has changed since the run was planned.*--fresh"):
        load_into(plan, init)
    path.unlink()
    with pytest.raises(Fault, match="is missing"):
        load_into(plan, init)


def test_the_model_of_the_weights_replaces_the_recipes(runs: Runs) -> None:
    where = str(runs().path)
    recipe = Run(model=Model(family="gpt2", n_layer=4, n_embd=64))
    run = origin.started(config.override(recipe, [f"train.init_from={where}"]))
    assert (run.model.n_layer, run.model.n_embd, run.model.vocab_size) == (2, 32, 65)
    assert config.override(recipe, ["train.init_from=none"]).model == recipe.model
    own = dataclasses.replace(recipe, train=Train(init_from=where))
    with pytest.raises(UserError, match=r"model.n_layer=4: the weights in .* have 2; leave it"):
        origin.started(own)


@pytest.mark.parametrize(
    "words",
    [
        ["machine.gpu=cpu", "data.source=shakespeare", "data.tokenizer=char"],
        ["machine.gpu=A10G", "data.source=openwebtext", "model.vocab_size=50257"],
    ],
)
def test_a_plan_promises_no_loss(words: list[str], runs: Runs, tuppence: Command) -> None:
    def planned(*more: str) -> dict[str, Any]:
        code, document, _ = tuppence("plan", "gpt2_124m", "budget.usd=1", *words, *more)
        assert code == 0
        return document

    document = planned(f"train.init_from={runs().path}")
    assert document["run"]["model.n_embd"] == 32
    assert {option["loss"] for option in document["options"] if option["fits"]} == {None}
    said = {w["code"]: w["message"] for w in document["warnings"]}
    assert "starts from trained weights" in said["loss_unknown"]
    if words[0] != "machine.gpu=cpu":  # a law is known there
        assert any(option["loss"] for option in planned()["options"])


# ---------------------------------------------------------------- keys

TINY = {"n_head": 4, "n_embd": 32, "sequence_len": 16}
TIED = Model(family="gpt2", n_layer=2, vocab_size=50, bias=True, tied_head=True, **TINY)
UNTIED = dataclasses.replace(TIED, tied_head=False)
PLAIN = Model(family="depth", n_layer=2, n_kv_head=4, vocab_size=50, value_embeddings=False, **TINY)
LOOPS = keys_of(model_plan(**SMALL["looped"]))

FITS = [
    (TIED, ["model.vocab_size=64"]),
    (TIED, ["model.sequence_len=8"]),
    (TIED, ["model.tied_head=off"]),
    (TIED, ["model.dropout=0.1"]),
    (TIED, ["model.n_layer=2", "model.bias=on"]),
    (UNTIED, ["model.tied_head=off"]),
    (PLAIN, ["model.sequence_len=8"]),
    (PLAIN, ["model.sequence_len=64"]),
    (PLAIN, ["model.window_pattern=L"]),
    (PLAIN, ["model.exportable=on"]),
    (dataclasses.replace(PLAIN, n_embd=128, n_head=1), ["model.depth=2"]),
    (PLAIN, ["model.depth=2", "model.n_embd=32"]),
    (LOOPS, ["model.backprop_depth=2"]),
    (LOOPS, ["model.mean_recurrence=4"]),
    (LOOPS, ["model.sequence_len=64"]),
]


@pytest.mark.parametrize(("given", "words"), FITS, ids=[" ".join(words) for _, words in FITS])
def test_what_may_be_asked_of_weights(given: Model, words: list[str]) -> None:
    asked = config.override(Run(), words).model
    found = merged(asked, given, "there")
    for key, value in dataclasses.asdict(found).items():
        wanted = getattr(asked, key)
        assert value == (getattr(given, key) if wanted is None else wanted)


REFUSED = [
    (TIED, "model.family=depth", "gpt2"),
    (TIED, "model.n_layer=3", "2"),
    (TIED, "model.n_head=2", "4"),
    (TIED, "model.n_embd=64", "32"),
    (TIED, "model.bias=off", "True"),
    (TIED, "model.vocab_size=49", "50, and it cannot be smaller"),
    (TIED, "model.sequence_len=32", "16 learned positions, and it cannot be larger"),
    (UNTIED, "model.tied_head=on", "False"),
    (PLAIN, "model.n_kv_head=2", "4"),
    (PLAIN, "model.value_embeddings=on", "False"),
    (PLAIN, "model.window_pattern=SL", "no windows"),
    (PLAIN, "model.depth=2", "model.n_layer=2 and model.n_embd=32"),
    (LOOPS, "model.n_recurrent=1", "2"),
    (LOOPS, "model.mixture_of_depths=on", "False"),
]


@pytest.mark.parametrize(("given", "word", "theirs"), REFUSED, ids=[word for _, word, _ in REFUSED])
def test_what_the_weights_are_not(given: Model, word: str, theirs: str) -> None:
    with pytest.raises(UserError) as error:
        merged(config.override(Run(), [word]).model, given, "there")
    key, _, _ = word.partition("=")
    assert f"{key}=" in str(error.value)
    assert f"the weights in there have {theirs}" in str(error.value)


@pytest.mark.parametrize("family", SMALL)
def test_the_keys_of_a_plan_ask_for_it(family: str) -> None:
    plan = model_plan(**SMALL[family])
    assert plan_of(keys_of(plan)) == plan


# ---------------------------------------------------------------- weights


def kept(folder: Path, model: torch.nn.Module, plan: Any) -> InitPlan:
    """An import of a model's weights."""
    folder.mkdir()
    save_file({n: p.detach() for n, p in model.named_parameters()}, folder / "model.safetensors")
    sha256 = file_sha256(folder / "model.safetensors")
    made = Origin(1, "a test", plan.family, keys_of(plan), sha256)
    (folder / "import.json").write_text(json.dumps(made.document()))
    assert origin.read(str(folder)) == made
    return InitPlan(str(folder), sha256)


def test_new_tokens_are_the_mean_of_the_old(tmp_path: Path) -> None:
    keys = {**SMALL["depth"], "value_embeddings": True}
    plan = model_plan(**keys)
    small = built(plan, seed=4)
    init = kept(tmp_path / "kept", small, plan)
    large = build(model_plan(vocab_size=53, **keys))
    load_into(large, init)
    old, new = dict(small.named_parameters()), dict(large.named_parameters())
    tables = [name for name in old if old[name].shape != new[name].shape]
    assert {name.partition(".")[0] for name in tables} == {"wte", "lm_head", "value_embeddings"}
    for name in old:
        assert torch.equal(new[name][: len(old[name])], old[name])
        if name in tables:
            mean = old[name].mean(0).expand(3, -1)
            torch.testing.assert_close(new[name][50:], mean)


def test_fewer_positions_and_a_head_of_its_own(tmp_path: Path) -> None:
    plan = model_plan(n_layer=2, bias=True)
    tied = built(plan, seed=4)
    init = kept(tmp_path / "kept", tied, plan)
    model = build(model_plan(n_layer=2, bias=True, sequence_len=8, tied_head=False))
    load_into(model, init)
    assert model.lm_head.weight is not model.wte.weight
    idx = text_ids(50, length=8)
    with torch.no_grad():
        assert torch.equal(model(idx), tied(idx))


def test_more_positions_where_they_are_rotary(tmp_path: Path) -> None:
    plan = model_plan(**SMALL["looped"])
    short = built(plan, seed=4)
    init = kept(tmp_path / "kept", short, plan)
    model = build(model_plan(**SMALL["looped"], sequence_len=64))
    load_into(model, init)
    with torch.no_grad():
        assert torch.equal(model(text_ids(50)), short(text_ids(50)))
        assert model(text_ids(50, length=64)).isfinite().all()


# ---------------------------------------------------------------- what is refused


def test_folders_that_hold_no_weights(runs: Runs, tuppence: Command) -> None:
    def line(where: str) -> str:
        code, document, _ = tuppence(*onward(where))
        assert code == 2
        assert not Path("runs").exists()
        message: str = document["error"]["message"]
        return message

    assert "train.init_from=nowhere: no such folder; tuppence import" in line("nowhere")
    Path("gpt2").mkdir()
    assert "gpt2: neither an import nor a run; tuppence import gpt2" in line("gpt2")
    shutil.copytree(runs().path, "young")
    Path("young/checkpoints/best.json").unlink()
    assert "train.init_from=young: this run has no best checkpoint yet" in line("young")
    Path("young/plan.json").unlink()
    assert "young has no plan.json yet" in line("young")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 1, "model": {"width": 3}}'])
def test_a_damaged_import(text: str, tuppence: Command) -> None:
    Path("imports/x").mkdir(parents=True)
    Path("imports/x/import.json").write_text(text)
    code, document, _ = tuppence(*onward("imports/x"))
    assert code == 1
    assert "imports/x/import.json is damaged" in document["error"]["message"]


# ---------------------------------------------------------------- tokenizers


def test_other_tokens_are_warned_of(runs: Runs, tuppence: Command) -> None:
    code, _, err = tuppence(*onward(runs().path, "data.tokenizer=byte", "model.vocab_size=257"))
    assert code == 0, err
    assert "warning   the weights in" in err
    assert "data.tokenizer=" in err
    assert "[other_tokenizer]" in err
    assert "other_tokenizer" in {e["code"] for e in RunFolder(Path("runs/on")).rows("events")}


def test_a_larger_vocabulary_than_the_tokenizers_is_kept(runs: Runs, tuppence: Command) -> None:
    words = onward(runs().path, "data.tokenizer=char:" + "abc", "data.source=abc.txt")
    Path("abc.txt").write_text("abcabbacca" * 200)
    code, _, err = tuppence(*words)
    assert code == 0, err
    assert RunFolder(Path("runs/on")).plan().model.vocab_size == 65
    code, document, _ = tuppence(*onward(runs().path, "data.tokenizer=byte", "name=more"))
    assert code == 2
    assert "model.vocab_size=65: the tokenizer has 257 tokens" in document["error"]["message"]


def test_the_same_tokens_in_another_spelling_are_the_same(tmp_path: Path) -> None:
    texts = ["to be or not to be " * 20]
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    build_tokenizer("bpe:260", texts=lambda: iter(texts)).save(tmp_path / "there" / "tokenizer")
    rules = json.loads((tmp_path / "there/tokenizer/tokenizer.json").read_text())
    here = tmp_path / "here" / "tokenizer.json"
    here.write_text(json.dumps(rules, indent=4))
    assert origin.other_tokenizer(str(tmp_path / "there"), tmp_path / "here") is None
    rules["model"]["vocab"]["t"] = 299
    here.write_text(json.dumps(rules))
    found = origin.other_tokenizer(str(tmp_path / "there"), tmp_path / "here")
    assert found is not None
    assert found.code == "other_tokenizer"
    assert origin.other_tokenizer(str(tmp_path), tmp_path / "here") is None  # it has none
    here.write_text("{")
    with pytest.raises(Fault, match="is damaged"):
        origin.other_tokenizer(str(tmp_path / "there"), tmp_path / "here")
