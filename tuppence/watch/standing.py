"""Where a run stands, from its folder alone: while it runs, and after it was killed.

heartbeat.json ─ is anyone at it?     ledger ─ dollars     metrics' end ─ pace, loss, speed
events ─ how it ended, what happened  evals ─ val, best    plan ─ of how much

running    a process that lives on this node; or of another node, whose beat is recent
finished   it has come to its end
stopped    by a signal, and saved              failed     by an error that it told
dead       killed: the beat was left behind    unstarted  nothing was charged yet
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuppence.config import Interval, Plan, Run
from tuppence.errors import Fault
from tuppence.folder import RunFolder
from tuppence.live import duration, threads
from tuppence.report.evidence import commands
from tuppence.report.money import limits_of
from tuppence.watch.alive import is_here, lives
from tuppence.watch.tails import Replaced, Tail
from tuppence.watch.tempo import means, seconds_left

Document = dict[str, Any]

SILENT_SECONDS = 180.0  # of another node's beat, where the plan does not grant a stall more
MIRROR_SECONDS = 60.0  # more, where the beat comes through a bucket
PACE_STEPS = 1000  # of which the pace is told, at most
METRICS_BYTES = 256 << 10  # of the files' ends, as much as is told of
EVENTS_BYTES = 1 << 20
SAMPLES_BYTES = 64 << 10
EVENTS_KEPT = 30
ORDINARY = ("save", "start", "resume", "end", "upload", "preflight")
ENDINGS = ("stopped", "failed", "stalled", "stopped_by_guard")
BEAT: dict[str, Any] = {  # what a heartbeat says
    **dict.fromkeys(("start", "end", "usd"), (int, float)),
    **{"attempt": int, "phase": str, "node": str},
}


@dataclass(frozen=True)
class Standing:
    """Where a run stands. None: not known yet, or not to be known.

    `said` is what there is to say of the state; `doing` is the phase that is charged now. `limits`
    (report/money.py) begins with the one of which most is spent. `loss`, `tokens_per_second`,
    `mfu`, `data_wait` (a share) are over the last steps; `seconds_left` and `ends_at` by the recent
    pace and the budget. `stopping` is the event of an early stop whose anneal is on.
    """

    name: str
    state: str
    said: str
    doing: str | None
    attempt: int
    node: str | None
    alive_at: float | None
    began_at: float | None
    step: int
    tokens: int
    progress: float
    epochs: float | None
    usd: float
    hours: float
    usd_per_hour: float | None
    price_source: str | None
    limits: tuple[Document, ...]
    promised_usd: float | None
    promised_hours: float | None
    promised_loss: Interval | None
    seconds_left: float | None
    ends_at: float | None
    loss: float | None
    val_loss: float | None
    val_error: float | None
    val_bpb: float | None
    val_step: int | None
    best_step: int | None
    best_val_loss: float | None
    lr: float | None
    tokens_per_second: float | None
    mfu: float | None
    peak_tflops: float | None
    memory_gib: float | None
    data_wait: float | None
    machine: str | None
    saved_at: float | None
    saved_step: int | None
    stopping: Document | None
    events: tuple[Document, ...]
    sample: Document | None
    resume: str | None

    @property
    def running(self) -> bool:
        return self.state == "running"

    def document(self) -> Document:
        """For `--json`."""
        return dataclasses.asdict(self)


def read(folder: RunFolder) -> Standing:
    """Where a run stands now. Raises Fault naming the file where one is damaged."""
    return Follower(folder).read()


class Follower:
    """Tells again and again where a run stands; of lines that grow it reads only what is new.

    `remote`: the folder is a copy, brought from a bucket from time to time, last at `seen_at`.
    """

    def __init__(self, folder: RunFolder, *, remote: bool = False) -> None:
        self.folder, self.remote = folder, remote
        self.seen_at: float | None = None
        self._begin()

    def _begin(self) -> None:
        lines = {"metrics": METRICS_BYTES, "events": EVENTS_BYTES, "samples": SAMPLES_BYTES}
        names = ("ledger", "metrics", "events", "evals", "samples")
        self._tails = {
            name: Tail(self.folder.file(f"{name}.jsonl"), within=lines.get(name)) for name in names
        }
        self._asked: Run | None = None
        self._plan: Plan | None = None
        self._stamp: tuple[int, int] | None = None
        self._beat: Document | None = None
        self._charged = [0.0, 0.0]  # dollars, seconds
        self._bill: Document = {}  # the last row of the ledger
        self._began: float | None = None
        self._recent: deque[Document] = deque(maxlen=PACE_STEPS)
        self._events: deque[Document] = deque(maxlen=EVENTS_KEPT)
        self._ended, self._peak_gib = False, None
        self._ending: Document | None = None
        self._saved: Document = {}
        self._stopping: Document | None = None
        self.evals: list[Document] = []  # that count
        self._sample: Document | None = None

    def read(self) -> Standing:
        """Where it stands. Raises Fault naming the file where one is damaged."""
        try:
            self._look()
        except Replaced:  # a run that was begun anew
            self._begin()
            self._look()
        return self._told()

    def _look(self) -> None:
        self._beat = self._last_beat()  # before the ledger: an interval that closes counts once
        stamp = _stamp(self.folder.file("plan.json"))
        if self._asked is None and self.folder.exists():
            self._asked = self.folder.run()
        if stamp is not None and stamp != self._stamp:
            self._plan, self._stamp = self.folder.plan(), stamp
        new = {name: tail.rows() for name, tail in self._tails.items()}
        for name, rows in new.items():
            try:
                self._fold(name, rows)
            except (KeyError, TypeError) as error:
                path = self.folder.file(f"{name}.jsonl")
                raise Fault(f"{path} is damaged: a line lacks {error}") from None
        resumed = any(event["code"] in ("start", "resume") for event in new["events"])
        if new["evals"] or resumed:
            self.evals = self.folder.latest("evals")

    def _fold(self, name: str, rows: Iterable[Document]) -> None:
        for row in rows:
            if name == "ledger":
                self._charge(row)
            elif name == "metrics":
                self._step(row)
            elif name == "events":
                self._event(row)
            elif name == "samples" and not row.get("fixed"):
                self._sample = row

    def _charge(self, row: Document) -> None:
        self._charged[0] += row["usd"]
        self._charged[1] += row["end"] - row["start"]
        self._began = row["start"] if self._began is None else self._began
        self._bill = row

    def _step(self, row: Document) -> None:
        last = self._recent[-1] if self._recent else row
        if row["attempt"] != last["attempt"] or row["step"] < last["step"]:
            self._recent.clear()  # resumed, or gone back
        self._recent.append(row)

    def _event(self, row: Document) -> None:
        code = row["code"]
        if code in ("start", "resume"):
            self._ending = None
        elif code == "end":
            self._ended, self._peak_gib = True, row.get("peak_memory_gib")
        elif code in ENDINGS:
            self._ending = row
        elif code == "save":
            self._saved = row
        elif code == "early_stop":
            self._stopping = row
        if code not in ORDINARY:
            self._events.append(row)

    # ------------------------------------------------------------ what that comes to

    def _told(self) -> Standing:
        plan, beat = self._plan, self._beat
        state, said = self._state(beat)
        usd, seconds = self._charged
        if beat and _key(beat) != _key(self._bill):
            usd, seconds = usd + beat["usd"], seconds + beat["end"] - beat["start"]
        step, tokens, progress = self._where()
        limits = self._limits(usd=usd, hours=seconds / 3600, tokens=tokens, steps=step)
        price = (beat or self._bill).get("usd_per_hour")
        left = None
        if beat and state == "running":
            left = seconds_left(
                limits,
                list(self._recent),
                self._stopping,
                progress=progress,
                charged=seconds,
                usd_per_hour=price,
                since=max(0.0, time.time() - beat["end"]),
                promised=plan.predicted.hours.mid * 3600 if plan else None,
            )
        last = self._recent[-1] if self._recent else {}
        best, val = self._best(), self.evals[-1] if self.evals else {}
        name = self.folder.path.resolve().name
        return Standing(
            name=name,
            state=state,
            said=said,
            doing=beat["phase"] if beat and state == "running" else None,
            attempt=(beat or self._bill).get("attempt", 0),
            node=(beat or self._bill).get("node"),
            alive_at=(beat or self._bill).get("end"),
            began_at=(beat or {}).get("start") if self._began is None else self._began,
            step=step,
            tokens=tokens,
            progress=1.0 if state == "finished" else progress,
            epochs=tokens / plan.data.train_tokens if plan else None,
            usd=usd,
            hours=seconds / 3600,
            usd_per_hour=price,
            price_source=plan.machine.price_source if plan else None,
            limits=limits,
            promised_usd=plan.predicted.usd.mid if plan else None,
            promised_hours=plan.predicted.hours.mid if plan else None,
            promised_loss=plan.predicted.val_loss if plan else None,
            seconds_left=left,
            ends_at=None if left is None else time.time() + left,
            val_loss=val.get("loss"),
            val_error=val.get("error"),
            val_bpb=val.get("bpb"),
            val_step=val.get("step"),
            best_step=best.get("step"),
            best_val_loss=best.get("loss"),
            lr=last.get("lr"),
            peak_tflops=plan.machine.peak_tflops if plan else None,
            memory_gib=self._peak_gib or last.get("memory_gib"),
            machine=machine_of(plan) if plan else None,
            saved_at=self._saved.get("time"),
            saved_step=self._saved.get("step"),
            stopping=self._stopping,
            events=tuple(self._events),
            sample=self._sample,
            resume=self._resume(state, name),
            **means(list(self._recent)),
        )

    def _resume(self, state: str, name: str) -> str | None:
        """What goes on with it; of a copy under another name it would go on with the original."""
        if self._plan is None or state in ("running", "finished") or self._plan.name != name:
            return None
        return commands(self.folder, self._plan, finished=False)["resume"]

    def _last_beat(self) -> Document | None:
        """The interval that is open, or was when a kill came; empty where it is damaged."""
        try:
            beat: Any = self.folder.read_json("heartbeat.json")
        except FileNotFoundError:  # gone in this moment
            return None
        except Fault:
            return {}
        if beat is None:
            return None
        sound = isinstance(beat, dict) and all(isinstance(beat.get(k), v) for k, v in BEAT.items())
        return beat if sound else {}

    def _state(self, beat: Document | None) -> tuple[str, str]:
        if self._ended:
            lost = self._recent and not self._bill
            return "finished", "its ledger is gone: nobody knows what it cost" if lost else ""
        ending = self._ending
        if ending is not None and (not beat or beat["attempt"] <= ending.get("attempt", math.inf)):
            code = "stopped" if ending["code"] == "stopped" else "failed"
            return code, str(ending.get("message", ""))  # a full disk may keep the beat
        if beat is not None:
            return self._alive(beat) if beat else ("dead", "its last heartbeat is damaged")
        if not self._bill:
            return "unstarted", "nothing was charged yet"
        return "stopped", "its process left before the end"

    def _alive(self, beat: Document) -> tuple[str, str]:
        """Of a process that left its beat: whether it is still at it."""
        seen_at = time.time() if self.seen_at is None else self.seen_at
        node, pid, silent = beat["node"], beat.get("pid", 0), max(0.0, seen_at - beat["end"])
        if not self.remote and is_here(beat):
            there = lives(pid, before=beat["end"])
            if there is not None:
                gone = f"process {pid} is gone: killed, or the machine went down"
                return ("running", "") if there else ("dead", gone)
        granted = self._plan.cadence.stall_seconds if self._plan else 0.0
        patience = max(SILENT_SECONDS, granted) + self.remote * MIRROR_SECONDS
        if silent <= patience:
            return "running", ""
        return "dead", f"nothing was heard from {node or 'its machine'} for {duration(silent)}"

    def _where(self) -> tuple[int, int, float]:
        """Step, tokens and progress: as the last step says, else the last save or evaluation."""
        if self._recent:
            last = self._recent[-1]
            return last["step"], last["tokens"], last["progress"]
        rows = [row for row in (self._saved, *self.evals[-1:]) if row]
        row = max(rows, key=lambda row: int(row["step"]), default={"step": 0})
        tokens = row["step"] * self._plan.step.batch_tokens if self._plan else 0
        return row["step"], tokens, row.get("progress", 0.0)

    def _limits(self, **spent: float) -> tuple[Document, ...]:
        asked = self._plan or self._asked
        if asked is None:
            return ()
        return tuple(limits_of(asked, **spent, events=[self._stopping] if self._stopping else []))

    def _best(self) -> Document:
        """Step and loss of the best checkpoint, or of the best evaluation where none is named."""
        try:
            named = self.folder.read_json("checkpoints/best.json") or {}
        except Fault:
            named = {}
        found = [row for row in self.evals if row["step"] == named.get("step")]
        if found or named:
            return found[-1] if found else {"step": named.get("step")}
        rows = [row for row in self.evals if isinstance(row.get("loss"), float)]
        return min(rows, key=lambda row: row["loss"], default={})


def _key(row: Document) -> tuple[Any, Any]:
    return row.get("attempt"), row.get("start")


def machine_of(plan: Plan) -> str:
    """The machine, and how much of it a run uses."""
    ranks = plan.step.ranks
    if plan.machine.device == "cpu":
        return f"{plan.machine.name}, {threads(plan.machine.threads * ranks)}"
    return f"{plan.machine.name}, {ranks} GPU{'s' if ranks > 1 else ''}"


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino
