"""Who is asked by the verbs eval and sample: a checkpoint of a run, or a model of transformers."""

import functools
import math
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tuppence import host
from tuppence.config import Plan
from tuppence.errors import UserError
from tuppence.folder import RunFolder
from tuppence.pipeline import run_of, say

T = TypeVar("T")

LOOP = ("recurrence", "exit_kl", "exit_whole")  # options of a looped model


@dataclass(frozen=True)
class Who:
    """`told` begins every result, `name` names the folder that results go to, below `home`.

    `subject` is the model in a precision. A run has a `plan`, and its `folder`.
    """

    told: dict[str, Any]
    name: str
    home: Path
    ranks: Any
    subject: Callable[[str], Any]
    tokenizer: Any = None
    plan: Plan | None = None
    folder: RunFolder | None = None


def of_run(args: Namespace) -> Who:
    """A run's checkpoint. Raises UserError where there is none such."""
    folder = run_of(args, args.checkpoint)
    plan = folder.plan()
    from tuppence import checkpoint, ranks
    from tuppence.evals.running import led
    from tuppence.evals.subject import identity_of
    from tuppence.evals.subject import of_run as asked
    from tuppence.train.calibrate import pick_device

    together = ranks.join(pick_device() if plan.machine.device == "cuda" else "cpu")
    name = led(together, "checkpoint", lambda: checkpoint.choose(folder, args.checkpoint).name)
    path = folder.checkpoints / name
    model, tokenizer, device = loaded(folder, plan, path, args)
    loop = _loop_of(plan, args)
    context, weights = plan.model.sequence_len, checkpoint.weights_sha256(path)

    @functools.cache
    def subject(precision: str) -> Any:
        return asked(
            workers_of(model, device, precision, cores=_cores(device)),
            tokenizer,
            context=context,
            identity=identity_of(weights, tokenizer, context=context, precision=precision)
            | ({"loop": loop} if loop else {}),
        )

    return Who(
        told={"run": str(folder.path), "checkpoint": name, "step": checkpoint.step_of(path)},
        name=name,
        home=folder.file("evaluations"),
        ranks=together,
        subject=subject,
        tokenizer=tokenizer,
        plan=plan,
        folder=folder,
    )


def of_transformers(args: Namespace) -> Who:
    """A folder, a model of the Hub or a .gguf file. The lead reads it first: it may be fetched."""
    from tuppence import ranks
    from tuppence.evals import foreign
    from tuppence.train.calibrate import pick_device

    device = pick_device()
    together = ranks.join(device)

    def read(precision: str) -> Any:
        return foreign.of_transformers(
            args.hf,
            precision=precision,
            device=device,
            cores=_cores(device),
            say=say if together.lead else lambda text: None,
        )

    subject = functools.cache(lambda precision: lead_first(together, "model", read, precision))
    identity = subject(args.precision or "fp32").identity
    name = identity["name"]
    slug = re.sub(r"[^\w.@-]+", "--", name)
    return Who(
        told={"model": args.hf, "checkpoint": name, "step": None},
        name=f"{slug}-{identity['weights_sha256'][:8]}",  # every export is named hf
        home=Path("evaluations"),
        ranks=together,
        subject=subject,
    )


def _loop_of(plan: Plan, args: Namespace) -> dict[str, Any]:
    """The options of a looped model that change what it answers."""
    loop = {key: value for key in LOOP if (value := getattr(args, key)) not in (None, False)}
    usual = max(1, round(plan.model.loop.mean_recurrence)) if plan.model.loop else None
    return {key: value for key, value in loop.items() if (key, value) != ("recurrence", usual)}


def lead_first(ranks: Any, name: str, get: Callable[..., T], *given: Any) -> T:
    """What each rank gets for itself, the lead before the others: it may have to download it."""
    from tuppence.evals.running import led

    kept: list[T] = []

    def first() -> None:
        kept.append(get(*given))

    led(ranks, name, first)
    return kept[0] if kept else get(*given)


def loaded(folder: RunFolder, plan: Plan, path: Path, args: Namespace) -> tuple[Any, Any, str]:
    """A run's model with a checkpoint's weights, its tokenizer, and the device that it is on."""
    from tuppence import checkpoint
    from tuppence.model import build
    from tuppence.model.documents import document_end
    from tuppence.tokenizer.spec import load_tokenizer
    from tuppence.train.calibrate import pick_device

    device = pick_device() if plan.machine.device == "cuda" else "cpu"
    tokenizer = load_tokenizer(folder.tokenizer)
    end = document_end(plan.data, tokenizer.end_of_text)
    attention = plan.machine.attention
    model = build(plan.model, attention=attention, device=device, document_end=end)
    checkpoint.load(path, model)
    _set_loop(model, args)
    return model, tokenizer, device


def workers_of(model: Any, device: str, precision: str, *, cores: int) -> Any:
    """The model on so many cores, or on a GPU."""
    from tuppence.workers import Workers

    count = cores if device == "cpu" else 1
    return Workers(model, count=count, device=device, precision=precision)


def _cores(device: str) -> int:
    """Of this rank."""
    return max(1, host.usable_cores() // host.local_world()) if device == "cpu" else 1


def _set_loop(model: Any, args: Namespace) -> None:
    """How many iterations a looped model runs. Raises UserError for what cannot be."""
    from tuppence.model.looped import Looped

    asked = {"--recurrence": args.recurrence, "--exit-kl": args.exit_kl}
    given = [f"{key} {value:g}" for key, value in asked.items() if value is not None]
    given += ["--exit-whole"] if args.exit_whole else []
    if not given:
        return
    if not isinstance(model, Looped):
        raise UserError(f"{given[0]}: only a looped model has iterations; leave it out")
    if args.exit_kl is not None and model.loop.mixture_of_depths:
        raise UserError(f"--exit-kl {args.exit_kl:g}: a model with mixture of depths does not stop")
    if args.exit_kl is None and args.exit_whole:
        raise UserError("--exit-whole: say --exit-kl too, when outputs agree")
    if args.exit_kl is not None and not 0 <= args.exit_kl < math.inf:
        raise UserError(f"--exit-kl {args.exit_kl:g}: a number of nats, not below zero")
    if args.recurrence is not None and args.recurrence < 1:
        raise UserError(f"--recurrence {args.recurrence}: at least 1")
    model.recurrence = args.recurrence or model.recurrence
    model.exit_kl, model.exit_whole = args.exit_kl, args.exit_whole
