"""The suites that the verb eval asks, each of which gives a document."""

import dataclasses
import math
import string
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuppence import subjects
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder, find
from tuppence.live import Live, duration
from tuppence.subjects import Who

Document = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What `--tasks` names: suites of ours in their order, and tasks of the harness."""

    own: tuple[str, ...]
    harness: tuple[str, ...]

    @property
    def suites(self) -> tuple[str, ...]:
        """The harness as one."""
        return (*self.own, "lm_eval") if self.harness else self.own


@dataclass(frozen=True)
class Scene:
    """Who is asked for what, and where the answers are kept."""

    args: Namespace
    asked: Asked
    who: Who
    live: Live
    out: Path

    @property
    def subject(self) -> Any:
        """As suites ask."""
        return self.who.subject(self.args.precision or "fp32")

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Shows how many items have their answers."""
        began, first = time.monotonic(), [-1]

        def told(done: int, of: int) -> None:
            if first[0] < 0:
                first[0] = done
            new, seconds = done - first[0], time.monotonic() - began
            left = f"  {duration(seconds / new * (of - done))} left" if new else ""
            self.live.show(f"{name}: {done:,} of {of:,}{left}")

        return told


def _bpb(scene: Scene) -> Document:
    from tuppence.evals import identity
    from tuppence.evals.text_loss import text_loss

    if not scene.args.val:
        return _own_bpb(scene)
    data, subject = val_of(scene.args), scene.subject
    told = scene.progress("bpb")
    found = text_loss(subject, data, batch=scene.args.batch, told=told, ranks=scene.who.ranks)
    fields = identity.fields(data, sequence_len=subject.context)
    fields |= {"tokenizer_sha256": subject.identity["tokenizer_sha256"]}
    fields |= {"val_tokens": found.of_tokens}
    return _loss_document(found, fields, subject)


def _own_bpb(scene: Scene) -> Document:
    """Of a run on its own val split, window by window as in training."""
    from tuppence.data.loader import val_windows
    from tuppence.evals import identity
    from tuppence.evals.loss import val_loss

    plan, folder = scene.who.plan, scene.who.folder
    assert plan is not None
    assert folder is not None
    data = _shards_of(folder)
    windows = val_windows(data, sequence_len=plan.model.sequence_len)
    size, told = scene.args.batch or plan.cadence.eval_batch, scene.progress("bpb")
    subject = scene.who.subject(scene.args.precision or plan.machine.precision)
    batches = -(-len(windows.starts) // size)
    each = len(subject.workers) * scene.who.ranks.world
    done = [0]

    def tick() -> None:
        done[0] = min(batches, done[0] + each)
        told(done[0], batches)

    found = val_loss(
        subject.workers,
        windows.batches(size),
        of_tokens=windows.tokens,
        token_bytes=scene.who.tokenizer.token_bytes(),
        tick=tick,
        ranks=scene.who.ranks,
    )
    assert found is not None, "without a deadline every batch is scored"
    fields = identity.fields(data, sequence_len=plan.model.sequence_len)
    return _loss_document(found, fields, subject)


def _loss_document(found: Any, fields: Document, subject: Any) -> Document:
    if not math.isfinite(found.loss):
        raise Fault(f"the loss is {found.loss}: the weights are broken; take another --checkpoint")
    told = {"metric": "bpb", "split": "val", **dataclasses.asdict(found), **fields}
    return told | _identity(subject)


def val_of(args: Namespace) -> Path:
    """The shards that `--val` names: a folder of them, or those of a run."""
    folder = Path(args.val)
    if (folder / "manifest.json").exists():
        return folder
    try:
        return _shards_of(find(args.val, Path(args.runs)))
    except UserError as error:
        raise UserError(f"--val {args.val}: neither prepared shards nor a run ({error})") from None


def _shards_of(folder: RunFolder) -> Path:
    recorded = folder.read_json("env.json")
    data = Path(recorded["data_folder"]) if recorded else Path("?")
    if not (data / "manifest.json").exists():
        raise UserError(f"the shards of this run are not at {data}; tuppence prepare makes them")
    return data


def _core(scene: Scene) -> Document:
    from tuppence.evals import bundle, core

    args, subject, ranks = scene.args, scene.subject, scene.who.ranks
    _check_text(subject, "core")
    found = subjects.lead_first(
        ranks, "core", lambda: bundle.core_bundle(args.core_data, say=scene.live.say)
    )
    most = args.max_per_task
    tasks = core.tasks(found, subject.text, context=subject.context, max_per_task=most)
    judged, told = _run(scene, "core", tasks, core.suite(found, max_per_task=most))
    return core.summary(found, judged, max_per_task=most) | told


def _hellaswag(scene: Scene) -> Document:
    from tuppence.evals import bundle, hellaswag

    args, subject = scene.args, scene.subject
    _check_text(subject, "hellaswag")
    rows = subjects.lead_first(
        scene.who.ranks,
        "hellaswag",
        lambda: bundle.hellaswag_rows(args.hellaswag_data, say=scene.live.say),
    )
    tasks = hellaswag.tasks(rows, subject.text, max_items=args.max_per_task)
    judged, told = _run(scene, "hellaswag", tasks, hellaswag.suite(rows))
    return hellaswag.summary(judged, sha256=rows.sha256) | told


def _check_text(subject: Any, name: str) -> None:
    """Refuse a tokenizer that lacks common characters before anything is downloaded."""
    try:
        subject.text.encode_batch([string.printable])
    except UserError as error:
        raise UserError(
            f"{name} cannot be read with this model's tokenizer ({error}); train with "
            f"data.tokenizer=gpt2, byte or bpe:N"
        ) from None


def _run(scene: Scene, name: str, tasks: Any, suite: Document) -> tuple[Any, Document]:
    """Every item asked that no journal has; what a result says besides its score."""
    from tuppence.evals.running import run

    subject, started = scene.subject, time.monotonic()
    counts: list[int] = []
    show = scene.progress(name)

    def told(done: int, of: int) -> None:
        counts.append(done)
        show(done, of)

    judged = run(
        subject,
        tasks,
        journal=scene.out / f"{name}.jsonl",
        suite=suite,
        batch=scene.args.batch,
        ranks=scene.who.ranks,
        told=told,
        say=scene.live.say,
    )
    now = {"asked": counts[-1] - counts[0], "seconds": time.monotonic() - started}
    return judged, _identity(subject) | now


def _sample(scene: Scene) -> Document:
    """The lead alone: they are few."""
    from tuppence.evals import samples
    from tuppence.evals.running import led

    plan, started = scene.who.plan, time.monotonic()
    own = plan.cadence.sample_prompt if plan is not None else None

    def said() -> Document:
        found = samples.samples(scene.subject, own=own)
        return {"rows": found.rows, "left_out": found.left_out}

    told = {"metric": "samples", "version": samples.VERSION, "own_prompt": own}
    told |= led(scene.who.ranks, "samples", said)
    return told | _identity(scene.subject) | {"seconds": time.monotonic() - started}


def _lm_eval(scene: Scene) -> Document:
    from tuppence.evals import harness

    args, started = scene.args, time.monotonic()
    found = harness.run(
        scene.subject,
        scene.asked.harness,
        include=args.lm_eval_include,
        limit=args.max_per_task,
        batch=args.batch,
        ranks=scene.who.ranks,
        tick=lambda: scene.live.show(f"lm_eval: {duration(time.monotonic() - started)}"),
    )
    return found | _identity(scene.subject) | {"seconds": time.monotonic() - started}


def _identity(subject: Any) -> Document:
    keys = ("weights_sha256", "tokenizer_sha256", "precision", "context", "loop")
    return {key: subject.identity[key] for key in keys if key in subject.identity}


SUITES: dict[str, Callable[[Scene], Document]] = {
    "bpb": _bpb,
    "core": _core,
    "hellaswag": _hellaswag,
    "sample": _sample,
    "lm_eval": _lm_eval,
}
