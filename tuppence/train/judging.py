"""Evaluating and sampling during a run, and what follows from it."""

import math
import time
from dataclasses import replace
from typing import Any

from tuppence.data.loader import val_windows
from tuppence.evals.generate import generate
from tuppence.evals.loss import Evaluation, val_loss
from tuppence.ranks import ALONE
from tuppence.train.saving import save, stop_if_asked
from tuppence.train.setup import Trainer


def evaluate(trainer: Trainer, *, deadline: float) -> None:
    """Evaluate and sample; a better loss than ever is saved as `best`."""
    started = time.monotonic()
    trainer.at("evaluate")
    with trainer.meter.phase("evaluate"):
        result = _val_loss(trainer, deadline)
        if result is None:
            message = "the budget left no time for one batch of the evaluation"
            trainer.folder.event("eval_skipped", message, step=trainer.state.step)
            return
        trainer.state = state = replace(trainer.state, evaluation_due=False)
        if not math.isfinite(result.loss):  # the weights are broken: the guard's next steps tell
            message = f"val loss {result.loss} after step {state.step}: it is not counted"
            trainer.folder.event("eval_not_finite", message, step=state.step)
            trainer.live.say(message)
            trainer.lead.forget()
            return
        row = {"step": state.step, "attempt": state.attempt, "split": "val", "loss": result.loss}
        row |= {"bpb": result.bpb, "tokens": result.tokens, "of_tokens": result.of_tokens}
        row |= {"progress": state.progress, "usd": trainer.meter.usd(), "seconds": result.seconds}
        trainer.folder.append("evals", row)
        bits = f" ({result.bpb:.4f} bits/byte)" if result.bpb is not None else ""
        trainer.live.say(f"step {state.step:,}: val loss {result.loss:.4f}{bits}")
        _sample(trainer, deadline)
    if math.isinf(deadline):  # one that was not cut short says what the last one will take
        trainer.pace.evaluation_took(time.monotonic() - started)
    trainer.lead.forget()
    whole = result.tokens == result.of_tokens  # a part is not compared with the whole
    if state.best_val_loss is None or (whole and result.loss < state.best_val_loss):
        trainer.state = replace(state, best_step=state.step, best_val_loss=result.loss)
        save(trainer)
        trainer.saver.point("best", state.step)


def _val_loss(trainer: Trainer, deadline: float) -> Evaluation | None:
    plan = trainer.plan
    windows = val_windows(
        trainer.place.data,
        sequence_len=plan.model.sequence_len,
        max_tokens=plan.cadence.eval_tokens,
    )

    def between() -> None:
        trainer.at("evaluate")
        stop_if_asked(trainer, now=True)

    return val_loss(
        trainer.workers,
        windows.batches(plan.cadence.eval_batch),
        of_tokens=windows.tokens,
        token_bytes=trainer.tokenizer.token_bytes(),
        deadline=deadline,
        tick=between,
        ranks=trainer.ranks,
    )


def _sample(trainer: Trainer, deadline: float) -> None:
    """Let the model speak, and keep what it says."""
    plan, tokenizer, ranks = trainer.plan, trainer.tokenizer, trainer.ranks
    together = trainer.parallel.how == "fsdp"  # nobody has the weights for himself
    if not plan.cadence.sample_tokens:
        return
    trainer.at("evaluate", long=True)  # on every rank: those that do not sample wait
    if not (ranks.lead or together):
        return
    ids = generate(
        trainer.workers,
        trainer.prompt,
        new_tokens=plan.cadence.sample_tokens,
        context=plan.model.sequence_len,
        seed=plan.step.seed,
        stop=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
        deadline=deadline,
        ranks=ranks if together else ALONE,
    )
    trainer.at("evaluate")
    row: dict[str, Any] = {"step": trainer.state.step, "attempt": trainer.state.attempt}
    row |= {"prompt": tokenizer.decode(trainer.prompt), "text": tokenizer.decode(ids)}
    trainer.folder.append("samples", {**row, "temperature": 0.8, "seed": plan.step.seed})
