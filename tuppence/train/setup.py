"""What a run needs before its first step: the model on its ranks, the newest checkpoint in it."""

import contextlib
import dataclasses
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tuppence import checkpoint
from tuppence.checkpoint import Retention, Saver, State
from tuppence.config import Plan
from tuppence.data.loader import Loader, val_windows
from tuppence.errors import DoesNotFit, UserError
from tuppence.evals import identity
from tuppence.folder import RunFolder
from tuppence.ledger import Meter, worked
from tuppence.live import Live
from tuppence.model import build
from tuppence.model.documents import document_end
from tuppence.ranks import Ranks
from tuppence.tokenizer.spec import Tokenizer, load_tokenizer
from tuppence.train.draws import work_of
from tuppence.train.feed import Feed
from tuppence.train.gauges import Gauges
from tuppence.train.interrupt import Interrupt
from tuppence.train.lead import Lead
from tuppence.train.optim import optimizers_of
from tuppence.train.pace import Pace
from tuppence.train.parallel import Parallel, recompute
from tuppence.train.place import Place, first_weights, found_on, restore
from tuppence.train.rehearsal import rehearse, sizes
from tuppence.train.suites import Suite, load
from tuppence.train.tracking import Tracker, trackers
from tuppence.train.watchdog import Watchdog
from tuppence.workers import Workers

START_SECONDS = 1800.0  # that a rank may stand still where it compiles and allocates
FIRST_STATE = State(
    step=0,
    tokens=0,
    tokens_sha=hashlib.sha256(b"").hexdigest(),
    progress=0.0,
    finished=False,
    evaluation_due=False,
    began_seconds=0.0,
    bad_steps=0,
    best_step=None,
    best_val_loss=None,
    attempt=1,
    saved_at=0.0,
    micro_batch=0,
    losses=(),
    norms=(),
    skipped_batches=0,
    rewound_steps=0,
    trouble_step=0,
    back_to=0,
)


@dataclass
class Trainer:
    """What the loop holds: the plan's things built, where the run is, and why the last skipped step
    was skipped. `measure` is what a val loss is of (evals/identity.py)."""

    plan: Plan
    place: Place
    meter: Meter
    pace: Pace
    lead: Lead
    live: Live
    watchdog: Watchdog
    feed: Feed
    tokenizer: Tokenizer
    workers: Workers
    parallel: Parallel
    optimizers: list[torch.optim.Optimizer]
    saver: Saver
    prompt: list[int]
    suites: list[Suite]
    measure: dict[str, Any]
    gauges: Gauges
    trackers: list[Tracker]
    state: State
    saved_step: int = -1
    skipped: str = ""

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return self.place.folder

    @property
    def ranks(self) -> Ranks:
        """This process among its peers."""
        return self.place.ranks

    def record(self, name: str, row: dict[str, Any]) -> None:
        """Append a line of metrics, evals or samples, and tell whoever else follows the run."""
        self.folder.append(name, row)
        for tracker in self.trackers:
            tracker.tell(name, row)

    def close(self) -> None:
        """Nothing more comes: end the threads that feed and tell."""
        self.feed.close()
        if self.trackers:
            with contextlib.suppress(OSError):  # on a full disk the first error is the one to tell
                self.meter.switch("save")
        for tracker in self.trackers:
            tracker.close()

    def at(self, where: str, *, long: bool = False) -> None:
        """Tell the watchdog. What compiles or allocates may take `long`: an attempt's first step,
        and every step of a compiled loop, whose iterations differ."""
        machine, model = self.plan.machine, self.plan.model
        long = long or not self.pace.warm or (machine.compile and model.loop is not None)
        self.watchdog.at(where, self.state.step, seconds=START_SECONDS if long else None)


def set_up(
    plan: Plan, place: Place, meter: Meter, live: Live, interrupt: Interrupt, watchdog: Watchdog
) -> Trainer:
    """Build what was planned, spread it over the ranks, and take up where the run stands.

    Raises DoesNotFit where the planned device is not here, or no micro-batch fits it.
    """
    device, ranks, folder = plan.machine.device, place.ranks, place.folder
    if device == "cuda" and not torch.cuda.is_available():
        raise DoesNotFit(f"this run was planned on {plan.machine.name}; no CUDA GPU is here now")
    torch.set_num_threads(plan.machine.threads if plan.step.workers == 1 else 1)
    tokenizer = load_tokenizer(place.data / "tokenizer")
    prompt = prompt_ids(plan, tokenizer, place.data)
    end = document_end(plan.data, tokenizer.end_of_text)
    fence, found = found_on(place)
    built = _built(plan, ranks, fresh=found is None, end=end)
    state = FIRST_STATE if found is None else checkpoint.state_of(found)
    wanted = state.micro_batch or plan.step.micro_batch
    micro = _micro_batch(plan, place, built, wanted)
    if micro < wanted and built.parallel.how == "fsdp":
        # a pass that broke off leaves FSDP2 wrong
        built = _built(plan, ranks, fresh=found is None, end=end)
    _say_packing(place, built, plan.machine.device)
    measure = identity.fields(place.data, sequence_len=plan.model.sequence_len)
    if found is None:
        state = replace(state, began_seconds=meter.seconds())
        _say_start(plan, place)
    else:
        restore(found, built.parallel, built.optimizers)
        live.say(_say_resume(place, state))
        state = _comparable(place, state, measure)
    work = work_of(plan, state.skipped_batches)
    pace = Pace(plan, meter, began=state.began_seconds, work=work)
    cadence = plan.cadence
    if not (folder.tokenizer / "tokenizer.json").exists() and ranks.lead:
        folder.tokenizer.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder.tokenizer)
    return Trainer(
        plan=plan,
        place=place,
        meter=meter,
        pace=pace,
        lead=Lead(ranks, pace, interrupt),
        live=live,
        watchdog=watchdog,
        feed=_feed(plan, place, live),
        tokenizer=tokenizer,
        workers=built.workers,
        parallel=built.parallel,
        optimizers=built.optimizers,
        saver=Saver(
            folder,
            attempt=place.attempt,
            keep=Retention(cadence.keep_last, cadence.keep_every_steps, cadence.keep_bytes),
            rank=ranks.rank,
            world=ranks.world,
            committed=place.committed,
            fence=fence,
            relay=place.relay,
        ),
        prompt=prompt,
        suites=load(plan, tokenizer, say=live.say),
        measure=measure,
        gauges=Gauges(plan, folder, live.say, silent=not ranks.lead),
        trackers=trackers(plan, folder, live.say, step=state.step) if ranks.lead else [],
        state=replace(state, attempt=place.attempt, micro_batch=micro),
        saved_step=state.step if state.step else -1,
    )


def _feed(plan: Plan, place: Place, live: Live) -> Feed:
    """This rank's batches. What a bucket has to say is an event of the run as well."""

    def say(message: str) -> None:
        place.folder.event("data", message)
        live.say(message)

    loader = Loader(
        place.data,
        sequence_len=plan.model.sequence_len,
        batch_size=plan.step.batch_sequences,
        seed=plan.step.seed,
        say=say,
    )
    return Feed(loader, ranks=place.ranks, device=plan.machine.device)


@dataclass(frozen=True)
class _Built:
    """A model on its ranks and cores, and what moves it."""

    parallel: Parallel
    workers: Workers
    optimizers: list[torch.optim.Optimizer]


def _built(plan: Plan, ranks: Ranks, *, fresh: bool, end: int | None) -> _Built:
    """The model as planned, a fresh one with its first weights. What is spread by rows is filled in
    the machine's memory and then cut, so that no GPU ever holds it whole."""
    how = _how(plan, ranks)
    device = "cpu" if how == "fsdp" else plan.machine.device
    attention = plan.machine.attention
    model = build(plan.model, attention=attention, device=device, document_end=end)
    if fresh:
        first_weights(model, plan, ranks)
    if plan.machine.activation_checkpointing:
        recompute(model)
    compiled = plan.machine.compile
    if compiled and how == "fsdp":
        for block in model.blocks():
            block.compile()
    parallel = Parallel(
        model,
        how=how,
        ranks=ranks,
        precision=plan.machine.precision,
        device=plan.machine.device,
    )
    workers = Workers(
        torch.compile(model) if compiled and how != "fsdp" else model,  # type: ignore[arg-type]
        count=1 if how == "fsdp" else plan.step.workers,
        device=plan.machine.device,
        precision=plan.machine.precision,
    )
    return _Built(parallel, workers, optimizers_of(model, plan.optimizer, workers, parallel))


def _how(plan: Plan, ranks: Ranks) -> str:
    """The planned parallelism; where there are other ranks than were planned, what that means."""
    if ranks.world == 1:
        return "none"
    return "zero1" if plan.machine.parallel == "none" else plan.machine.parallel


def _micro_batch(plan: Plan, place: Place, built: _Built, wanted: int) -> int:
    """The micro-batch that divides this rank's rows and, on a GPU, fits its memory."""
    ranks = place.ranks
    rows = plan.step.batch_sequences // ranks.world
    if rows * ranks.world != plan.step.batch_sequences:
        raise UserError(
            f"the batch of {plan.step.batch_sequences} sequences cannot be shared by "
            f"{ranks.world} processes; start as many as divide it"
        )
    micro = sizes(wanted, rows)[0]
    if plan.machine.device == "cuda":
        micro = rehearse(
            built.workers,
            plan,
            micro_batch=micro,
            rows=rows,
            agree=ranks.all,
            optimizers=built.optimizers,
        )
    if micro != wanted:
        message = f"micro-batches of {micro} sequences, not {wanted}: as many as divide and fit"
        place.folder.event("micro_batch", message, micro_batch=micro)
    return micro


def _comparable(place: Place, state: State, measure: dict[str, Any]) -> State:
    """Where the best loss is of another measure than this attempt's, no loss is better or worse."""

    def reason() -> str | None:
        rows = place.folder.latest("evals")
        best = next((row for row in rows if row["step"] == state.best_step), None)
        if best is None or "metric_version" not in best:  # of a version that had one measure
            return None
        return identity.refuse(best, {**best, **measure})

    found = place.ranks.told("comparable", reason)
    if found is None:
        return state
    message = f"the best loss so far, of step {state.best_step}, is not compared: {found}"
    place.folder.event("best_not_comparable", message, step=state.best_step)
    return replace(state, best_val_loss=None, points=())


def _say_start(plan: Plan, place: Place) -> None:
    details = {} if plan.init is None else dataclasses.asdict(plan.init)
    details = {f"init_{'from' if k == 'path' else k}": v for k, v in details.items()}
    message = "from the beginning"
    if plan.init is not None:
        message = f"from the weights in {plan.init.path}"
    place.folder.event("start", message, attempt=place.attempt, step=0, **details)


def _say_packing(place: Place, built: _Built, device: str) -> None:
    documents = built.parallel.model.documents
    note = None if documents is None else documents.note(device)
    if note is not None:
        place.folder.event("packing", note)


def _say_resume(place: Place, state: State) -> str:
    """Record from where, and what of the attempt before is lost: steps, and what they cost."""
    lost = [row for row in place.folder.latest("metrics") if row["step"] > state.step]
    bill = (row for row in place.folder.rows("ledger") if row["attempt"] == place.attempt - 1)
    usd = worked(bill, state.saved_at).usd if lost else 0.0
    message = f"from step {state.step}"
    if lost:
        steps, are = ("one step", "is") if len(lost) == 1 else (f"{len(lost)} steps", "are")
        message += f"; {steps} after it (${usd:.4f}) {are} lost and done again"
    details = {"step": state.step, "saved_at": state.saved_at, "lost_steps": len(lost)}
    place.folder.event("resume", message, attempt=place.attempt, lost_usd=usd, **details)
    return f"resuming {message} (attempt {place.attempt})"


def prompt_ids(plan: Plan, tokenizer: Tokenizer, data_folder: Path) -> list[int]:
    """The tokens that samples continue: of the prompt asked for, or of a newline.

    Where the tokenizer has no newline it is the first token of the val split. Raises UserError for
    a prompt that cannot be encoded, before any money is spent on training.
    """
    asked = plan.cadence.sample_prompt
    try:
        ids: list[int] = tokenizer.encode("\n" if asked is None else asked).tolist()
    except UserError as error:
        if asked is not None:
            raise UserError(f"train.sample_prompt={asked!r}: {error}") from None
        ids = []
    if asked is not None and not ids:
        raise UserError("train.sample_prompt is empty; give a character, or leave it out")
    if ids:
        return ids
    first = val_windows(data_folder, sequence_len=1, max_tokens=1)
    return [int(next(first.batches(1))[0][0, 0])]
