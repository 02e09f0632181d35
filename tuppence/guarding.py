"""Launches that run: where they stand, what they say, how they are ended, who looks after them.

    launch.json ─▶ SkyPilot's jobs and meter, the run's ledger on the store ─▶ Standing
                                                      cap.py says what must be done ─▶ cancel, down

`guard` needs nothing but launch.json: any machine that has it, and SkyPilot's state, may guard.
What it did stands in RUNS/NAME/guard.jsonl, what was seen last in standing.json.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuppence import bucket
from tuppence.cloud import cap, ending, noted, ssh, standing_text, store_made
from tuppence.cloud import record as records
from tuppence.cloud import sky as skypilot
from tuppence.cloud import standing as standings
from tuppence.cloud.record import Record
from tuppence.cloud.sky import Cluster, Job, Look, Sky, Unreachable
from tuppence.cloud.standing import Inside, Standing
from tuppence.errors import DoesNotFit, Fault, UserError
from tuppence.folder import RunFolder, write_text
from tuppence.live import Live
from tuppence.pipeline import say as say_so
from tuppence.store import Away, is_url
from tuppence.watch.standing import Follower

Document = dict[str, Any]
Say = Callable[[str], None]

SEEN = "standing.json"
EVERY_SECONDS = 30.0  # between looks: each takes SkyPilot some seconds of this machine
LEAST_SECONDS, MOST_SECONDS = 1.0, 3600.0
FOLLOW_SECONDS = 15.0
NOTHING = Look((), (), (), ())


# ---------------------------------------------------------------- one launch, looked at


class Watched:
    """A launch that is looked at again and again."""

    def __init__(self, folder: Path, sky: Sky | None) -> None:
        self.folder, self.sky = folder, sky
        self._onlooker: bucket.Onlooker | None = None
        self._follower: Follower | None = None
        self._inside: Inside | None = None

    @property
    def record(self) -> Record:
        """As it is now: a launch, or a stop, may be writing it."""
        found = records.read(self.folder)
        assert found is not None
        return found

    def look(self, *, refresh: bool = False) -> Standing:
        """Where it stands now. Raises Unreachable where SkyPilot gives no answer."""
        record = self.record
        names = [job.name for job in record.jobs]
        seen = self.sky.look(names, refresh=refresh) if self.sky and names else NOTHING
        return self.made(record, seen)

    def made(self, record: Record, seen: Look) -> Standing:
        """The same, of what SkyPilot said already."""
        now = time.time()
        found = standings.standing(record, seen, self.inside(record), now=now)
        try:
            write_text(self.folder / SEEN, json.dumps(found.document(), indent=2) + "\n")
        except OSError as error:  # what must be done does not wait for a disk
            say_so(f"{self.folder / SEEN}: {error.strerror}: not written")
        return found

    def inside(self, record: Record) -> Inside | None:
        """What the run says of itself; as it was seen last where the store is away. None: there is
        no run there yet."""
        try:
            self._inside = _inside(self._read(record))
        except (UserError, Away, FileNotFoundError):
            pass
        except (Fault, OSError) as error:  # damaged, or caught in the middle of a change
            say_so(f"{record.name}: {error}")
        return self._inside

    def _read(self, record: Record) -> Any:
        url = record.run_url
        if not is_url(url):
            if not RunFolder(Path(url)).exists():
                raise FileNotFoundError(url)
            self._follower = self._follower or Follower(RunFolder(Path(url)))
            return self._follower.read()
        self._onlooker = self._onlooker or bucket.onlooker(url, brief=True)
        folder = self._onlooker.look()
        self._follower = self._follower or Follower(folder, remote=True)
        self._follower.seen_at = time.time()
        return self._follower.read()


def _inside(seen: Any) -> Inside:
    """Of a run's own standing what a launch is told by."""
    names = ("state", "said", "step", "progress", "val_loss", "usd", "usd_per_hour", "alive_at")
    return Inside(**{name: getattr(seen, name) for name in (*names, "seconds_left")})


def seen_before(folder: Path) -> Document | None:
    """What was seen last; None where nothing was, or it cannot be read."""
    try:
        found = json.loads((folder / SEEN).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# ---------------------------------------------------------------- guarded


class Guard:
    """Looks at one launch, tells what there is to tell, and does what must be done."""

    def __init__(self, folder: Path, sky: Sky, *, say: Say = say_so) -> None:
        self.watched, self.sky, self.say = Watched(folder, sky), sky, say
        self.told = {str(row.get("key")) for row in noted.events(folder)}
        self.away, self.seen = "", False

    def step(self) -> Standing | None:
        """One look and what follows from it; None where nobody answers now. A network that is down
        ends no guard: the trainer's own clock goes on."""
        record = self.watched.record
        try:
            seen = self.watched.look()
            self._back(record)
            self._act(record, seen)
        except (UserError, DoesNotFit, Fault, Away) as error:
            if not (self.seen or isinstance(error, Unreachable)):
                raise  # it never worked
            if not self.away:
                self._tell(record, "away", "", f"{error}; going on asking")
            self.away = str(error)
            return None
        self.seen = True
        return seen

    def _back(self, record: Record) -> None:
        if self.away:
            self.away = ""
            self._tell(record, "back", "", "SkyPilot answers again")

    def _act(self, record: Record, seen: Standing) -> None:
        ended = {row.cluster: row.end_at for row in seen.jobs if row.finished and row.end_at}
        for act in cap.acts(record.launch, seen, told=self.told, ended_at=ended, now=seen.seen_at):
            if act.cancel:
                for job in record.jobs:
                    self.sky.cancel(job.name)
            if act.down:
                self.sky.down(act.down)
            if act.key not in self.told:
                self._tell(record, act.code, act.key, act.message, usd=seen.usd)

    def _tell(self, record: Record, code: str, key: str, text: str, **more: Any) -> None:
        _note(self.watched.folder, code, key, text, **more)
        if key:
            self.told.add(key)
        self.say(f"{record.name}: {text}")


def watch_launch(
    folder: Path, sky: Sky, *, say: Say | None = None, every: float = FOLLOW_SECONDS
) -> Standing:
    """Follow and guard a launch until it is over and nothing of it is left."""
    live = Live()
    guard = Guard(folder, sky, say=say or live.say)
    while True:
        seen = guard.step()
        if seen is not None:
            live.show(standing_text.line(seen))
            if seen.over and not seen.held:
                live.clear()
                return seen
        time.sleep(every)


def guard(args: Namespace) -> Document:
    """Look after one launch or all: until all are over, or once."""
    every = EVERY_SECONDS if args.every is None else args.every
    if not LEAST_SECONDS <= every <= MOST_SECONDS:
        raise UserError(f"--every {every:g}: {LEAST_SECONDS:g} to {MOST_SECONDS:g} seconds")
    if args.run and records.find(args.run, Path(args.runs))[1].kind == "ssh":
        say_so(f"{args.run}: by ssh: the timer on its machine guards it; tuppence status shows it")
        return {"launches": [ssh.ssh_status(records.find(args.run, Path(args.runs))[1])]}
    guards: dict[Path, Guard] = {}
    damaged: set[Path] = set()
    live = Live(silent=args.json)
    while True:
        for folder in _guarded(args, damaged):
            if folder not in guards:
                guards[folder] = Guard(folder, _sky_of(args, folder), say=live.say)
        seen = {folder: each.step() for folder, each in guards.items()}
        known = [each for each in seen.values() if each is not None]
        if args.once or all(each and each.over and not each.held for each in seen.values()):
            live.clear()
            for each in known:
                say_so(standing_text.line(each))
            if not guards:
                say_so(f"no launch of {args.runs}/ is going on: there is nothing to guard")
            return {"launches": [each.document() for each in known]}
        live.show(
            "; ".join(standing_text.line(each) for each in known if not each.over)
            or "nobody answers"
        )
        time.sleep(every)


def _guarded(args: Namespace, damaged: set[Path]) -> list[Path]:
    """Folders of the launches that are meant; of all only those that may be going on."""
    if args.run:
        return [records.find(args.run, Path(args.runs))[0]]
    on = ("planned", "started")
    found = _launches(Path(args.runs), damaged)
    return [f for f, r in found if r.kind == "sky" and r.state in on and r.jobs]


def _launches(runs: Path, damaged: set[Path]) -> list[tuple[Path, Record]]:
    """All whose launch.json can be read; of another it is told once, and the rest goes on."""
    found = []
    for folder in records.launches(runs):
        try:
            record = records.read(folder)
        except (Fault, UserError) as error:
            if folder not in damaged:
                say_so(f"{folder / records.FILE} is passed over: {error}")
            damaged.add(folder)
            continue
        if record is not None:
            found.append((folder, record))
    return found


def _sky_of(args: Namespace, folder: Path) -> Sky:
    record = records.read(folder)
    assert record is not None
    return skypilot.found(args.sky or record.sky)


# ---------------------------------------------------------------- status


def status(args: Namespace) -> Document:
    """What runs, what it has cost so far and will cost: one launch in full, or a line for each."""
    runs = Path(args.runs)
    named = [records.find(args.run, runs)[0]] if args.run else None
    folders = named or [folder for folder, _ in _launches(runs, set())]
    found = [_standing_of(args, folder, alone=bool(args.run)) for folder in folders]
    if not args.json:
        for each in found:
            print("\n".join(standing_text.page(each) if args.run else [standing_text.row(each)]))
        if not found:
            print(f"nothing was launched from {runs}/; tuppence launch does")
    return {"launches": found}


def _standing_of(args: Namespace, folder: Path, *, alone: bool) -> Document:
    """Of what is over, unless it is asked for by name, what was seen last."""
    record = records.read(folder)
    assert record is not None
    before, note = seen_before(folder), ""
    try:
        if record.kind == "ssh":
            return {"kind": "ssh", "name": record.name, **ssh.ssh_status(record)}
        if before is None or alone or record.state in ("planned", "started"):
            sky = _sky_of(args, folder) if record.jobs else None
            before = Watched(folder, sky).look().document()
    except (Fault, UserError, Away) as error:
        note = f"not of now: {error}"
    found = before or {"name": record.name, "state": "unknown"}
    more: Document = {"kind": record.kind, "note": note, "store": record.launch.store}
    if alone:
        more |= {"storage": _storage(record), "budget": vars(record.launch.budget)}
    return {**found, **more}


def _storage(record: Record) -> Document:
    """What lies on the store and costs by the month; why where that is not known."""
    try:
        found = store_made.stored(record.launch)
    except (UserError, Away, Fault) as error:
        return {"bytes": None, "usd_per_month": None, "note": str(error)}
    return {"bytes": found.total, "usd_per_month": found.usd_per_month, "note": ""}


# ---------------------------------------------------------------- logs


def logs(args: Namespace) -> Document:
    """What the machines say: of the stage that runs, or of the last one."""
    if args.tail is not None and args.tail < 1:
        raise UserError(f"--tail {args.tail}: a number of lines")
    folder, record = records.find(args.run, Path(args.runs))
    if record.kind == "ssh":
        ssh.ssh_logs(record, follow=args.follow, tail=args.tail, out=sys.stdout.buffer)
        return {}
    sky = _sky_of(args, folder)
    rows = [row for job in record.jobs for row in sky.queue(job.name)]
    row = _row_of(args, record, rows)
    going = any(not each.finished for each in rows if each.job_id == row.job_id)
    if not (row.finished or args.follow or row.status == "RUNNING"):  # SkyPilot would wait for it
        raise UserError(
            f"{row.task} is {row.status.lower()}: nothing can be read now; --follow waits for it"
        )
    sky.logs(row, ended=row.finished and going, follow=args.follow, tail=args.tail)
    return {}


def _row_of(args: Namespace, record: Record, rows: Sequence[Job]) -> Job:
    """The newest task of the stage that is asked for, else the one that runs, else the last that
    ran. Raises UserError."""
    stages = {stage.name: stage for stage in record.launch.stages}
    if args.stage and args.stage not in stages:
        raise UserError(f"--stage {args.stage}: {record.name} has {', '.join(stages)}")
    begun = [row for row in rows if row.start_at is not None]
    if args.stage:
        begun = [row for row in begun if standings.is_of(row, stages[args.stage])]
    if not begun:
        what = f"{args.stage} of {record.name}" if args.stage else record.name
        raise UserError(f"{what} has not begun; tuppence status {record.name} shows what is done")
    return ([row for row in begun if not row.finished] or begun)[-1]


# ---------------------------------------------------------------- stop


def stop(args: Namespace) -> Document:
    """End a launch and every machine of it, and see that none is left."""
    folder, record = records.find(args.run, Path(args.runs))
    _confirm(args, record)
    if record.kind == "ssh":
        found = ssh.ssh_stop(record, clean=bool(getattr(args, "clean", False)))
        say_so(f"{record.name}: stopped; nothing of it runs on {record.ssh['host']}")
        records.write(folder, replace(record, state=_ended(record.state)))
        return {"name": record.name, "kind": "ssh", **found}
    sky = _sky_of(args, folder) if record.jobs else None
    seen = _end(folder, sky) if sky else None
    if sky is None:
        records.write(folder, replace(record, state=_ended(record.state)))
        say_so(f"{record.name}: nothing was started")
    deleted = _deleted(record, args) if args.bucket else {}
    storage = _storage(record)
    if text := standing_text.stays(record.name, record.launch.store, storage):
        say_so(text)
    usd = None if seen is None else seen.usd
    return {"name": record.name, "usd": usd, "deleted": deleted, "storage": storage}


def _end(folder: Path, sky: Sky) -> Standing:
    """Raises Fault where something is left, with what ends it."""
    seen = ending.end(folder, sky, say=say_so)
    watched = Watched(folder, sky)
    found = watched.made(watched.record, seen)
    if there := ending.left(seen):
        by_hand = ending.by_hand(sky, there)
        raise Fault(f"{found.name}: still there: {', '.join(there)}; {by_hand}")
    say_so(f"{found.name}: nothing is left running; it has cost ${found.usd:.4f} in all")
    say_controllers(found.controllers)
    say_so(f"SkyPilot's API server may run on: `{sky.tool} api stop` ends one of this machine")
    return found


def _confirm(args: Namespace, record: Record) -> None:
    """Ends are asked about where somebody sits; what deletes must be said twice everywhere."""
    if args.yes or not (args.bucket or sys.stdin.isatty()):
        return
    if not sys.stdin.isatty():
        raise UserError(f"--bucket deletes what {record.name} stored: add --yes")
    also = f", and delete what it made on {record.launch.store}" if args.bucket else ""
    sys.stderr.write(f"end {record.name} and its machines{also}? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was stopped")


def end(folder: Path, sky: Sky, *, say: Say = say_so, why: str = "") -> list[str]:
    """End a launch without asking: what is left of it, which is nothing as a rule. Raises
    Unreachable where SkyPilot gives no answer."""
    if why:
        _note(folder, "end", "", why)
    return ending.left(ending.end(folder, sky, say=say))


def _note(folder: Path, code: str, key: str, text: str, **more: Any) -> None:
    """Note it, where there is room: a full disk is no reason to leave a machine running."""
    try:
        noted.note(folder, code, key, text, **more)
    except OSError as error:
        say_so(f"{folder / noted.FILE}: {error.strerror}: not noted: {text}")


def _ended(state: str) -> str:
    return "finished" if state == "finished" else "stopped"


def say_controllers(controllers: Sequence[Cluster]) -> None:
    """What SkyPilot itself still has running, and how that ends."""
    for text in standing_text.controllers(controllers):
        say_so(text)


def _deleted(record: Record, args: Namespace) -> dict[str, int]:
    """Delete what the launch made on the store."""
    gone = store_made.delete(record, data=bool(getattr(args, "shards", False)))
    what = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in gone.items()) or "nothing"
    say_so(f"{record.name}: deleted on {record.launch.store}: {what}")
    return gone
