"""The suites that the verb eval asks, each of which is made ready and then gives a document."""

import dataclasses
import functools
import math
import string
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Ready:
    """A suite of which nothing is missing: `ask` takes the time.

    `known` is what its result is going to say, as far as it may not differ from another's; `file`
    is how its result is named.
    """

    file: str
    ask: Callable[[], Document]
    known: Document = field(default_factory=dict)


def _bpb(scene: Scene) -> Ready:
    """A run's own text in its own windows; the text of `--val` is kept under its own name."""
    from tuppence.evals import identity

    who, val = scene.who, scene.args.val
    if val:
        data, subject = val_of(scene.args), scene.subject
        fields = identity.fields(data, sequence_len=subject.context)
        fields |= {"tokenizer_sha256": subject.identity["tokenizer_sha256"], "val": val}
    else:
        assert who.plan is not None, "only a run has a val split of its own"
        data = _shards_of(who.folder)
        fields = identity.fields(data, sequence_len=who.plan.model.sequence_len)
    known = {k: fields[k] for k in ("metric_version", "tokenizer_sha256", "val_sha256")}
    ask = functools.partial(_text_bpb if val else _own_bpb, scene, data, fields)
    return Ready(bpb_file(fields["val_sha256"]) if val else "bpb", ask, known)


def bpb_file(val_sha256: str) -> str:
    """The name of a result on a text that is not the model's own."""
    return f"bpb_{val_sha256[:8]}"


def _text_bpb(scene: Scene, data: Path, fields: Document) -> Document:
    """Of any model on any text, which it reads with its own tokenizer."""
    from tuppence.evals.text_loss import text_loss

    subject, told = scene.subject, scene.progress("bpb")
    found = text_loss(subject, data, batch=scene.args.batch, told=told, ranks=scene.who.ranks)
    return _loss_document(found, fields | {"val_tokens": found.of_tokens}, subject)


def _own_bpb(scene: Scene, data: Path, fields: Document) -> Document:
    """Of a run on its own val split, window by window as in training."""
    from tuppence.data.loader import val_windows
    from tuppence.evals.loss import val_loss

    plan = scene.who.plan
    assert plan is not None
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


def _shards_of(folder: RunFolder | None) -> Path:
    assert folder is not None, "only a run has a val split of its own"
    recorded = folder.read_json("env.json")
    data = Path(recorded["data_folder"]) if recorded else Path("?")
    if not (data / "manifest.json").exists():
        raise UserError(f"the shards of this run are not at {data}; tuppence prepare makes them")
    return data


def _core(scene: Scene) -> Ready:
    from tuppence.evals import bundle, core

    args, subject, ranks = scene.args, scene.subject, scene.who.ranks
    _check_text(subject, "core")
    found = subjects.lead_first(
        ranks, "core", lambda: bundle.core_bundle(args.core_data, say=scene.live.say)
    )
    most = args.max_per_task
    tasks = core.tasks(found, subject.text, context=subject.context, max_per_task=most)
    suite = core.suite(found, max_per_task=most)

    def ask() -> Document:
        judged, told = _run(scene, "core", tasks, suite)
        return core.summary(found, judged, max_per_task=most) | told

    return Ready("core", ask, suite)


def _hellaswag(scene: Scene) -> Ready:
    from tuppence.evals import bundle, hellaswag

    args, subject = scene.args, scene.subject
    _check_text(subject, "hellaswag")
    rows = subjects.lead_first(
        scene.who.ranks,
        "hellaswag",
        lambda: bundle.hellaswag_rows(args.hellaswag_data, say=scene.live.say),
    )
    tasks = hellaswag.tasks(rows, subject.text, max_items=args.max_per_task)
    suite = hellaswag.suite(rows)

    def ask() -> Document:
        judged, told = _run(scene, "hellaswag", tasks, suite)
        return hellaswag.summary(judged, sha256=rows.sha256) | told

    return Ready("hellaswag", ask, suite | {"n": sum(task.count for task in tasks)})


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
    from tuppence.evals.running import journal_of, run

    path, say = scene.out / f"{name}.jsonl", scene.live.say
    subject, started = scene.subject, time.monotonic()
    counts: list[int] = []
    show = scene.progress(name)

    def told(done: int, of: int) -> None:
        counts.append(done)
        show(done, of)

    judged = run(
        subject,
        tasks,
        journal=path,
        suite=suite,
        batch=scene.args.batch,
        ranks=scene.who.ranks,
        told=told,
        say=say,
    )
    now = {"asked": counts[-1] - counts[0], "seconds": time.monotonic() - started}
    kept = {"journal": journal_of(path, subject, suite, say).path.name}
    return judged, _identity(subject) | kept | now


def _sample(scene: Scene) -> Ready:
    return Ready("samples", functools.partial(_samples, scene))


def _samples(scene: Scene) -> Document:
    """The lead alone: they are few."""
    from tuppence.evals import samples
    from tuppence.evals.running import led

    plan, started = scene.who.plan, time.monotonic()
    own = plan.cadence.sample_prompt if plan is not None else None

    def said() -> Document:
        found = samples.samples(scene.subject, own=own)
        return {"rows": found.rows, "left_out": found.left_out}

    told: Document = {"metric": "samples", "version": samples.VERSION, "own_prompt": own}
    told |= led(scene.who.ranks, "samples", said)
    for prompt in told["left_out"]:
        scene.live.say(f"sample: {prompt!r} is left out, which this tokenizer cannot encode")
    return told | _identity(scene.subject) | {"seconds": time.monotonic() - started}


def _lm_eval(scene: Scene) -> Ready:
    return Ready("lm_eval", functools.partial(_harness, scene))


def _harness(scene: Scene) -> Document:
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
    from tuppence.evals.identity import WHO

    return {key: subject.identity[key] for key in WHO if key in subject.identity}


SUITES: dict[str, Callable[[Scene], Ready]] = {
    "bpb": _bpb,
    "core": _core,
    "hellaswag": _hellaswag,
    "sample": _sample,
    "lm_eval": _lm_eval,
}
