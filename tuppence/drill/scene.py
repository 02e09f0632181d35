"""The copy that is drilled, and the evidence that two runs are one.

    work/data/           links to the run's shards
    work/CASE/NAME/      a run folder: the run's own plan with fewer steps and more saves

The original's folder is only read. Every case starts from run.json and plan.json alone or from a
copy of another case, with the same words, so that nothing is planned or prepared again.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuppence import checkpoint, config, recipes
from tuppence.config import Budget, Plan, Run
from tuppence.drill.processes import Processes
from tuppence.errors import UserError
from tuppence.folder import RunFolder

STEPS = 30
LEAST_STEPS = 20
SAVES = 10  # in a run of a drill, at least
KEPT = 5  # checkpoints: one for each way to damage one, and one to go on from
LIMIT_SECONDS = 1200.0  # what a drill may take before it takes fewer steps
PATIENCE_SECONDS, PATIENCE_STEPS = 300.0, 10.0
BOUND = 0.01  # of a loss, where the machine does not repeat itself bit for bit


@dataclass(frozen=True)
class Evidence:
    """What must not depend on interruptions: loss, gradient norm and token hash by step; loss by
    evaluated step; the hash of the last weights."""

    steps: dict[int, tuple[float | None, float | None, str]]
    evals: dict[int, float]
    weights: str


@dataclass(frozen=True)
class Scene:
    """What every case shares. `plan` is the drill's; `source` the run that it was made of."""

    source: RunFolder
    run: Run
    plan: Plan
    ranks: int
    work: Path
    say: Callable[[str], None]
    patience: float  # seconds after which a process that has not ended hangs

    @property
    def steps(self) -> int:
        steps = self.plan.step.max_steps
        assert steps is not None
        return steps

    def folder(self, case: str) -> RunFolder:
        return RunFolder(self.work / case / str(self.run.name))

    def fresh(self, case: str, *, stall_seconds: float | None = None) -> RunFolder:
        """A run folder in which nothing was done."""
        made, plan = self.folder(case), self.plan
        if stall_seconds is not None:
            cadence = dataclasses.replace(plan.cadence, stall_seconds=stall_seconds)
            plan = dataclasses.replace(plan, cadence=cadence)
        made.path.mkdir(parents=True)
        made.write_json("run.json", dataclasses.asdict(self.run))
        made.write_json("plan.json", dataclasses.asdict(plan))
        return made

    def copy(self, case: str, of: str) -> RunFolder:
        """A case as another one stands. Files of checkpoints are never written again: they are
        linked, so that a large model's do not fill the disk."""
        made, there = self.folder(case), self.folder(of).checkpoints

        def put(source: str, target: str) -> None:
            whole = Path(source).parent.parent == there
            (_link if whole else shutil.copy2)(source, target)

        shutil.copytree(self.folder(of).path, made.path, copy_function=put)
        return made

    def start(
        self, case: str, *, ranks: int | None = None, file_bytes: int | None = None
    ) -> Processes:
        """`tuppence train` with the run's words, in a case's folder."""
        return Processes(
            [
                "train",
                *words_of(self.run),
                *("--runs", str(self.work / case)),
                *("--data", str(self.work / "data")),
            ],
            ranks=ranks or self.ranks,
            environment={**os.environ, "XDG_CACHE_HOME": str(self.work / "cache")},
            log=self.work / f"{case}-{time.monotonic_ns()}.log",
            file_bytes=file_bytes,
            patience=self.patience,
        )

    def drop(self, case: str) -> None:
        """Make room."""
        shutil.rmtree(self.work / case, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def staged(
    folder: RunFolder,
    *,
    work: Path,
    say: Callable[[str], None],
    steps: int | None,
    ranks: int | None,
) -> Scene:
    """The scene for a run folder. Raises UserError for a run that cannot be drilled here."""
    asked, plan = folder.run(), folder.plan()
    recorded = folder.read_json("env.json")
    data = Path(recorded["data_folder"]) if recorded else Path("?")
    if not (data / "manifest.json").exists():
        raise UserError(
            f"the shards of {folder.path} are not at {data}; tuppence prepare makes them, and the "
            f"drill needs them"
        )
    if steps is not None and steps < LEAST_STEPS:
        raise UserError(f"--steps {steps}: at least {LEAST_STEPS}, or there is little to interrupt")
    (work / "data").mkdir(parents=True)
    (work / "data" / data.name).symlink_to(data.resolve(), target_is_directory=True)
    count = steps or _affordable_steps(plan)
    run = dataclasses.replace(
        asked,
        budget=Budget(steps=count),
        train=dataclasses.replace(asked.train, sample_prompt=None),
    )
    here = ranks or plan.step.ranks // plan.machine.nodes
    if here < 1 or plan.step.batch_sequences % here:
        raise UserError(
            f"--ranks {here}: the run's batch of {plan.step.batch_sequences} sequences cannot be "
            f"shared by so many; give a number that divides it"
        )
    patience = PATIENCE_SECONDS + PATIENCE_STEPS * count * plan.predicted.step_seconds.mid
    return Scene(folder, run, _shortened(plan, count), here, work, say, patience)


def _affordable_steps(plan: Plan) -> int:
    each = RUNS * plan.predicted.step_seconds.mid
    return max(LEAST_STEPS, min(STEPS, int(LIMIT_SECONDS / each)))


STARTS = 17  # processes that a drill starts, and
RUNS = 7  # whole runs' worth of steps that they take, about


def expected_seconds(scene: Scene) -> float:
    """About how long a drill takes, from what the run's plan expected."""
    told, cadence = scene.plan.predicted, scene.plan.cadence
    evaluation = told.eval_seconds * cadence.eval_tokens / scene.source.plan().cadence.eval_tokens
    one_run = scene.steps * told.step_seconds.mid + SAVES * (evaluation / 2 + told.save_seconds)
    return STARTS * told.phase_seconds.get("provision", 5.0) + RUNS * one_run


def needed_bytes(scene: Scene) -> int:
    """The room that the drill's checkpoints take at most: of the run that was stopped half way, and
    of the case at hand."""
    return 2 * (KEPT + 3) * scene.plan.predicted.checkpoint_bytes


def _shortened(plan: Plan, steps: int) -> Plan:
    """The plan with so many steps, saves and evaluations every few of them, no compiling."""
    every = max(1, steps // SAVES)
    tokens = 2 * plan.cadence.eval_batch * plan.model.sequence_len
    cadence = dataclasses.replace(
        plan.cadence,
        eval_every_steps=2 * every,
        eval_every_progress=None,
        eval_tokens=min(plan.cadence.eval_tokens, tokens),
        save_every_steps=every,
        save_every_seconds=None,
        keep_last=KEPT,
        keep_every_steps=None,
        keep_bytes=None,
        sample_prompt=None,
        sample_tokens=0,
        eval_growth=None,
        early_stop=False,
        target_loss=None,
    )
    return dataclasses.replace(
        plan,
        budget=Budget(steps=steps),
        step=dataclasses.replace(plan.step, max_steps=steps),
        machine=dataclasses.replace(plan.machine, compile=False),
        cadence=cadence,
    )


def words_of(run: Run) -> list[str]:
    """The words that ask for a run: its recipe, what differs from it, `none` for what it lacks."""
    spec = run.recipe or recipes.DEFAULT
    asked, base = config.asked(run), config.asked(recipes.get(spec))
    words = [f"{key}={value}" for key, value in asked.items() if key != "recipe"]
    gone = [key for key in base if key not in asked and not key.startswith("budget.")]
    return [spec, *words, *(f"{key}=none" for key in gone)]


# ---------------------------------------------------------------- evidence


def evidence(folder: RunFolder) -> Evidence:
    """Of a finished run."""
    last = checkpoint.pointer(folder, "last")
    return Evidence(
        {r["step"]: (r["loss"], r["grad_norm"], r["tokens_sha"]) for r in folder.latest("metrics")},
        {r["step"]: r["loss"] for r in folder.latest("evals")},
        last.sha256 if last else "",
    )


def difference(one: Evidence, other: Evidence, *, exact: bool) -> str:
    """What differs first, in words; empty where nothing does. Where not `exact`, losses may differ
    by BOUND, and the weights as they do."""
    if one.steps.keys() != other.steps.keys():
        return f"{len(other.steps)} steps, not {len(one.steps)}"
    if one.evals.keys() != other.evals.keys():
        return f"evaluations at steps {sorted(other.evals)}, not {sorted(one.evals)}"
    for step, (loss, norm, sha) in one.steps.items():
        if sha != other.steps[step][2]:
            return f"other tokens from step {step} on"
        if exact and (loss, norm) != other.steps[step][:2]:
            return f"loss {other.steps[step][0]}, not {loss}, at step {step}"
        if not exact and _far(loss, other.steps[step][0]):
            return f"loss {other.steps[step][0]} is over {BOUND:.0%} from {loss} at step {step}"
    for step, val in one.evals.items():
        if (val != other.evals[step]) if exact else _far(val, other.evals[step]):
            return f"val loss {other.evals[step]}, not {val}, at step {step}"
    return "other weights" if exact and one.weights != other.weights else ""


def _far(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is not b
    return abs(a - b) > BOUND * abs(a)


def hashes(folder: RunFolder) -> dict[str, str]:
    """The hash in checkpoint.json of every file of every complete checkpoint that verifies."""
    found: dict[str, str] = {}
    for path in checkpoint.complete(folder):
        checkpoint.verify(path)
        files = checkpoint.manifest(path).files
        found |= {f"{path.name}/{name}": file.sha256 for name, file in files.items()}
    return found


def events(folder: RunFolder, code: str) -> list[dict[str, Any]]:
    """What happened under a code, oldest first."""
    return [event for event in folder.rows("events") if event["code"] == code]


def rewrite(path: Path, content: bytes) -> None:
    """Give a file other content without touching what else is linked to it."""
    aside = path.with_name(f".{path.name}.aside")
    aside.write_bytes(content)
    os.replace(aside, path)


def rewrite_json(path: Path, value: Any) -> None:
    rewrite(path, json.dumps(value).encode())
