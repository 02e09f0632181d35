"""`tuppence drill`: the copy, the evidence, and the whole of it on a small run."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from checkpoints import save
from families import on_one_thread
from forked import Forked, command
from known import know_this_machine
from small_runs import DEPTH, GPT2, WORDS

from tuppence import checkpoint, config, drill, recipes
from tuppence.config import DataPlan, Run
from tuppence.drill import acts, processes, scene
from tuppence.drill.processes import Processes, last_step
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder
from tuppence.pipeline import asked
from tuppence.plan.hardware import Calibration

one_thread = pytest.fixture(scope="module", autouse=True)(on_one_thread)


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, calibration: Calibration, data_plan: DataPlan
) -> Path:
    """A folder with a finished run in runs/small and its shards in data/."""
    place = tmp_path_factory.mktemp("drill")
    words = [w for w in WORDS if not w.startswith(("data.", "train.sample"))]
    words = ["name=small", *words, *DEPTH]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        know_this_machine(calibration, data_plan, [words])
        done = Forked(command, ["train", "shakespeare", *words], cwd=place)
    assert done.wait() == 0, done.communicate()
    return place


@pytest.fixture
def run(place: Path) -> RunFolder:
    return RunFolder(place / "runs/small")


@pytest.fixture
def staged(run: RunFolder, tmp_path: Path) -> scene.Scene:
    return scene.staged(run, work=tmp_path, say=lambda text: None, steps=20, ranks=None)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def checkpoint_of(folder: RunFolder, step: int, *, value: float = 1.0) -> Path:
    """A checkpoint of one small matrix."""
    model = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.constant_(model.weight, value)
    fields = {"step": step, "losses": (), "norms": (), "tokens_sha": "", "progress": 0.5}
    known = {f.name: fields.get(f.name, 0) for f in dataclasses.fields(checkpoint.State)}
    state = checkpoint.State(**{**known, "finished": False, "evaluation_due": False})
    save(folder, model, (), state)
    return folder.checkpoints / checkpoint.name_of(step)


# ---------------------------------------------------------------- the words


@pytest.mark.parametrize(
    "words",
    [
        ["shakespeare", "name=a", "budget.usd=0.5", "train.seed=7"],
        ["shakespeare_looped", "model.lora_rank=0", "train.sample_prompt=ROMEO:"],
        ["shakespeare", "model.exportable=none", "train.decay=none", *GPT2],
    ],
)
def test_the_words_of_a_run_ask_for_that_run(words: list[str], tmp_path: Path) -> None:
    args = Namespace(words=words, runs=str(tmp_path), fresh=False)
    wanted = asked(args)
    again = asked(Namespace(words=scene.words_of(wanted), runs=str(tmp_path), fresh=False))
    assert config.asked(again) == config.asked(wanted)


def test_what_a_recipe_says_and_the_run_does_not_is_unset() -> None:
    run = dataclasses.replace(Run(name="x", recipe="shakespeare"), train=config.Train(seed=3))
    words = scene.words_of(run)
    assert "train.seed=3" in words
    assert "train.learning_rate=none" in words
    assert config.override(recipes.get(words[0]), words[1:]).train == run.train


# ---------------------------------------------------------------- the copy


def test_the_copy_is_the_runs_own_plan_with_fewer_steps(
    staged: scene.Scene, run: RunFolder
) -> None:
    theirs, ours = run.plan(), staged.plan
    assert ours.model == theirs.model
    assert ours.optimizer == theirs.optimizer
    assert ours.data == theirs.data
    assert staged.steps == 20
    assert ours.cadence.save_every_steps == 2
    assert ours.cadence.keep_last == scene.KEPT


def test_damage_to_a_copy_reaches_nothing_that_is_linked(staged: scene.Scene) -> None:
    made = staged.fresh("half")
    path = checkpoint_of(made, 4)
    before = content(made.path)
    for damage in acts.DAMAGES.values():
        copy = staged.copy("torn", of="half")
        damage(copy.checkpoints / path.name)
        with pytest.raises(Fault):
            checkpoint.verify(copy.checkpoints / path.name)
        staged.drop("torn")
    copy = staged.copy("poisoned", of="half")
    acts.poison(copy, copy.checkpoints / path.name)
    assert content(made.path) == before


def test_poison_is_not_a_number_and_verifies(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    path = checkpoint_of(folder, 4)
    acts.poison(folder, path)
    checkpoint.verify(path)
    assert checkpoint.choose(folder, "last") == path
    weights = checkpoint.consolidated(path)
    assert all(weight.isnan().all() for weight in weights.values())


@pytest.mark.parametrize("steps", [1, scene.LEAST_STEPS - 1])
def test_too_few_steps_are_refused(run: RunFolder, tmp_path: Path, steps: int) -> None:
    with pytest.raises(UserError, match=f"--steps {steps}: at least"):
        drill.drill(run, work=tmp_path, say=print, steps=steps)


def test_a_run_without_its_shards_is_refused(run: RunFolder, tmp_path: Path) -> None:
    bare = RunFolder(tmp_path / "bare")
    bare.path.mkdir()
    for name in ("run.json", "plan.json"):
        bare.file(name).write_bytes(run.file(name).read_bytes())
    with pytest.raises(UserError, match=r"shards of .*bare are not at"):
        drill.drill(bare, work=tmp_path / "work", say=print)


def test_the_workplace_goes_unless_it_is_kept(run: RunFolder) -> None:
    with drill.workplace(run, keep=False) as gone:
        (gone / "x").write_text("x")
        assert gone.parent == run.path.parent.resolve()
    assert not gone.exists()
    with drill.workplace(run, keep=True) as kept:
        pass
    assert kept.exists()
    kept.rmdir()


# ---------------------------------------------------------------- the evidence

WHOLE = scene.Evidence({1: (2.0, 1.0, "a"), 2: (1.5, 1.0, "b")}, {2: 1.6}, "w")
OTHERS = {
    "a step is missing": ({"steps": {1: (2.0, 1.0, "a")}}, "1 steps, not 2", True),
    "an evaluation is missing": ({"evals": {}}, "evaluations at steps", True),
    "other tokens": ({"steps": {**WHOLE.steps, 2: (1.5, 1.0, "c")}}, "from step 2", True),
    "last bit of a loss": (
        {"steps": {**WHOLE.steps, 2: (math.nextafter(1.5, 2), 1.0, "b")}},
        "at step 2",
        False,
    ),
    "a norm": ({"steps": {**WHOLE.steps, 2: (1.5, 1.1, "b")}}, "at step 2", False),
    "a loss beyond the bound": ({"steps": {**WHOLE.steps, 2: (1.6, 1.0, "b")}}, "at step 2", True),
    "no loss": ({"steps": {**WHOLE.steps, 2: (None, 1.0, "b")}}, "at step 2", True),
    "a val loss": ({"evals": {2: 1.7}}, "val loss 1.7, not 1.6", True),
    "weights": ({"weights": "v"}, "other weights", False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_seen(name: str) -> None:
    change, said, beyond_the_bound = OTHERS[name]
    other = dataclasses.replace(WHOLE, **change)
    exact, bounded = (scene.difference(WHOLE, other, exact=e) for e in (True, False))
    assert said.split(",")[0] in exact
    assert bool(bounded) == beyond_the_bound
    assert scene.difference(WHOLE, WHOLE, exact=True) == ""


# ---------------------------------------------------------------- processes


def test_a_process_that_hangs_is_killed_and_said(tmp_path: Path) -> None:
    started = Processes(["calibrate"], ranks=1, environment={}, log=tmp_path / "log", patience=0.0)
    with pytest.raises(Fault, match="hung"):
        started.wait()
    assert not started.alive()


def test_last_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    assert last_step(tmp_path) is None
    lines = [json.dumps({"step": step, "text": "x" * 300}) for step in range(1, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "te')
    assert last_step(tmp_path) == 29


# ---------------------------------------------------------------- all of it


class Told(list[str]):
    """What was said."""

    def __call__(self, text: str) -> None:
        self.append(text)


class Started:
    """The drill's processes: the first as they are, those that follow forked, which costs less."""

    STDOUT, DEVNULL = subprocess.STDOUT, subprocess.DEVNULL

    def __init__(self) -> None:
        self.count = 0

    def Popen(
        self, argv: list[str], *, stdout: BinaryIO, preexec_fn: Any, **options: Any
    ) -> Forked | subprocess.Popen[bytes]:
        self.count += 1
        if self.count == 1:
            return subprocess.Popen(argv, stdout=stdout, preexec_fn=preexec_fn, **options)
        python, m, name, *words = argv
        assert (python, m, name) == (sys.executable, "-m", "tuppence")
        log = Path(stdout.name)
        return Forked(command, words, env=options["env"], out=log, err=log, before=preexec_fn)


@pytest.fixture(scope="module")
def drilled(place: Path) -> dict[str, object]:
    run, said = RunFolder(place / "runs/small"), Told()
    before = content(place)
    with drill.workplace(run, keep=False) as work, pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "subprocess", Started())
        told = drill.drill(run, work=work, say=said, steps=20, kills=2)
    return {**told, "said": said, "untouched": content(place) == before}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "done", "survived"),
    [
        ("uninterrupted", "left alone", "20 steps"),
        ("killed", "kill -9, 2 times", "bitwise the same run"),
        ("stopped", "SIGTERM", "saved, exit 143; went on from"),
        ("torn", "weights cut short", "passed over, loudly; went on from"),
        ("torn", "one bit of the moments flipped", "passed over, loudly; went on from"),
        ("torn", "state.json missing", "passed over, loudly; went on from"),
        ("torn", "checkpoint.json empty", "passed over, loudly; went on from"),
        ("filled", "disk full", "one line, exit 1, every checkpoint intact; with room again"),
        ("poisoned", "newest weights NaN", "5 steps skipped, then stopped with one line"),
        ("two writers", "a second process", "refused with one line, exit 2"),
        ("two writers", "a newer attempt", "the older one wrote nothing more, exit 4; then"),
        ("stalled", "disk hangs", "named after 3 s, exit 75; went on from"),
    ],
)
def test_it_survives(drilled: dict[str, object], act: str, done: str, survived: str) -> None:
    rows = [r for r in drilled["rows"] if r["act"] == act and r["done"].startswith(done)]
    rows = rows or [r for r in drilled["rows"] if r["act"] == act and done in r["done"]]
    assert len(rows) == 1, drilled["rows"]
    assert survived in rows[0]["survived"]
    assert rows[0]["ok"]


@pytest.mark.slow
def test_the_run_itself_is_untouched_and_the_table_says_all(drilled: dict[str, object]) -> None:
    assert drilled["untouched"]
    assert drilled["survived"]
    text = drill.as_text(drilled)
    assert text.endswith("12 of 12 survived (20 steps, compared bit for bit)")
    assert json.loads(json.dumps(drilled["rows"])) == drilled["rows"]


def test_what_is_lost_is_said(staged: scene.Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends as another one is a row that is not ok, and no act is left out for it."""
    drilled = acts.Drill(staged, kills=1, seed=0)
    drilled.whole = WHOLE
    folder = staged.fresh("stopped")
    checkpoint_of(folder, 4)
    monkeypatch.setattr(drilled, "_end", lambda case: None)
    folder.event("resume", "from step 4", attempt=2, step=4)
    rows = list(drilled._guarded("stopped", "SIGTERM", lambda: drilled._resumed("stopped")))
    folder.close()
    assert [row.ok for row in rows] == [False]
    assert "the run is another one: 0 steps, not 2" in rows[0].survived
    table = {"rows": [dataclasses.asdict(rows[0])], "bitwise": True, "steps": 20}
    assert drill.as_text(table).startswith("LOST  stopped")
