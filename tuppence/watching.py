"""`tuppence watch` and `tuppence runs`: what is going on, here or on a bucket.

    folder ──(every few seconds, only what is new)──▶ Standing, Curve ──▶ screen | lines | JSON

The screen is a process of its own that only reads: a run does not know that it is watched.
"""

import functools
import shutil
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tuppence import bucket, report
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder, find
from tuppence.live import PLAIN_SECONDS, duration, printable
from tuppence.pipeline import say
from tuppence.report import history
from tuppence.report.money import amount, share
from tuppence.report.text import headline
from tuppence.watch import screen, standing
from tuppence.watch.alive import is_at_it
from tuppence.watch.braille import Curve, curve_of
from tuppence.watch.standing import Standing

Document = dict[str, Any]

HERE_SECONDS, BUCKET_SECONDS = 2.0, 30.0  # between looks, where --every does not say
LEAST_SECONDS, MOST_SECONDS = 0.1, 86400.0
DRAW_SECONDS = 2.0  # between drawings, where looking is rarer: ages and clocks go on
CURVE_SHARE = 0.01  # of a core, that reading the curve of a long run may take
AT_ONCE = 8  # runs of a bucket that are asked for together
SHOWN = "█▏░▒●◆⠿┤│×…‖■"  # what a terminal must be able to show
COLOURS = {
    **{"": "", "bold": "bold", "dim": "dim", "good": "green", "warn": "yellow", "bad": "bold red"},
    **{"train": "cyan", "val": "bold magenta", "promise": "green"},
}
HINTS = {True: "Ctrl-C leaves; the run goes on", False: "watched on until Ctrl-C leaves"}
GONE = ("stopped", "failed", "dead")  # and nothing more comes, unless somebody goes on with it


class Watched:
    """A run that is looked at again and again: where it stands, and its curve."""

    def __init__(self, folder: RunFolder, onlooker: bucket.Onlooker | None = None) -> None:
        self.folder, self.onlooker = folder, onlooker
        self.note = ""  # why what is shown is not of now
        self._follower = standing.Follower(folder, remote=onlooker is not None)
        self._reader = history.Reader(folder)
        self._due, self._looks = 0.0, 0

    def look(self) -> Standing:
        """Bring and read what is new. Raises Fault where a file is damaged."""
        if self.onlooker is not None:
            try:
                self.onlooker.look()
                self._follower.seen_at, self.note = time.time(), ""
            except bucket.Away as error:
                if not self.folder.exists():
                    raise UserError(f"{error}; check the network, then try again") from error
                self.note = f"{error}: this is what was seen last"
        self.now = self._follower.read()
        return self.now

    def curve(self) -> Curve:
        """Read so often that it is a small share of the time: a month of steps takes a moment."""
        started = time.monotonic()
        if started >= self._due:
            losses = [(r["step"], r["loss"]) for r in self._follower.evals if r.get("loss")]
            self._curve = curve_of(self._reader.read(), losses, self.now.best_step)
            self._looks += 1
            if self._looks > 1:  # the first reads all there is, and says nothing of the next
                self._due = started + (time.monotonic() - started) / CURVE_SHARE
        return self._curve

    def frame(self, width: int, height: int, *, live: bool = False) -> list[screen.Line]:
        """What a screen of this size shows; `live`: again and again."""
        hint = HINTS[self.now.running] if live and self.now.state != "finished" else ""
        return screen.frame(
            self.now, self.curve(), width=width, height=height, note=self.note, hint=hint
        )


def _watched(args: Namespace) -> Watched:
    """The run that a person means. One that this machine trains to a bucket is watched here."""
    url = args.run
    if not bucket.is_url(url):
        if not bucket.is_url(args.runs):
            return Watched(find(args.run, Path(args.runs)))
        url = f"{args.runs.rstrip('/')}/{args.run}"
    runs, _, name = url.rstrip("/").rpartition("/")
    here = RunFolder(bucket.local_root(runs) / name)
    if here.exists() and is_at_it(here):
        return Watched(here)
    onlooker = bucket.onlooker(url)
    return Watched(onlooker.folder, onlooker)


# ---------------------------------------------------------------- the verb


def watch(args: Namespace) -> Document:
    """A live view of a run until it has finished, or until Ctrl-C; in a pipe until it is gone.
    Raises Fault where it is dead or has failed by then."""
    if args.every is not None and not LEAST_SECONDS <= args.every <= MOST_SECONDS:
        most = f"{LEAST_SECONDS:g} to {MOST_SECONDS:g} seconds"
        raise UserError(f"--every {args.every:g}: name {most}")
    seen = _watched(args)
    seen.look()
    if args.json:
        return seen.now.document()
    if args.once:
        size = shutil.get_terminal_size()
        whole = screen.as_text(seen.frame(size.columns, size.lines - 1))
        print(whole if _has_letters() else screen.plain(seen.now, note=seen.note))
        return {}
    every = args.every or (BUCKET_SECONDS if seen.onlooker else HERE_SECONDS)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, signal.default_int_handler
            )  # leave the terminal as it was
        _show(seen, every)
    except KeyboardInterrupt:
        return {}
    if seen.now.state in ("dead", "failed"):
        raise Fault(f"{seen.now.name}: {seen.now.state}: {seen.now.said}")
    if seen.now.state == "finished":
        print(f"receipt   {_headline(seen.folder)}")
    return {}


def _has_letters() -> bool:
    """Whether what is printed may have the letters of a screen."""
    try:
        SHOWN.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True


def _show(seen: Watched, every: float) -> None:
    """On a terminal a screen, else lines."""
    if not sys.stdout.isatty():
        return _lines(seen, every)
    if not _has_letters():
        say(f"this terminal shows {sys.stdout.encoding} only: lines in place of a screen")
        return _lines(seen, every)
    try:
        import rich  # noqa: F401
    except ImportError:
        say("rich is not installed (pip install rich): lines in place of a screen")
        return _lines(seen, every)
    return _screen(seen, every)


def _screen(seen: Watched, every: float) -> None:
    """Renew the screen until the run has finished."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    looked = time.monotonic()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            lines = seen.frame(console.width, console.height, live=True)
            parts = [[(text, COLOURS[style]) for text, style in line] for line in lines]
            rows = [Text.assemble(*row, no_wrap=True, end="") for row in parts]
            live.update(Text("\n").join(rows), refresh=True)
            if seen.now.state == "finished":
                return
            time.sleep(min(every, DRAW_SECONDS))
            if time.monotonic() - looked >= every - 1e-3:
                looked = time.monotonic()
                seen.look()


def _lines(seen: Watched, every: float) -> None:
    """A line when there is something new, until the run has finished; in a pipe, where nobody sits
    to go on with it, until it is gone."""
    told: Any = None
    when = -PLAIN_SECONDS
    ends = ("finished",) if sys.stdout.isatty() else ("finished", *GONE)
    while True:
        now, over = seen.now, seen.now.state in ends
        new = (now.state, now.doing, now.step, now.usd, now.events, seen.note)
        if new != told and (over or time.monotonic() - when >= PLAIN_SECONDS):
            print(screen.plain(now, note=seen.note), flush=True)
            told, when = new, time.monotonic()
        if over:
            return
        time.sleep(every)
        seen.look()


def _headline(folder: RunFolder) -> str:
    """The receipt's, which the run may be writing just now."""
    try:
        return headline(folder.read_json("receipt.json"))
    except (Fault, KeyError, TypeError):  # not there yet, or of an older version
        return headline(report.build(folder, history.read(folder)))


# ---------------------------------------------------------------- the list


def runs(args: Namespace) -> Document:
    """The runs that are here or on a bucket, the newest last."""
    found = _on_bucket(args.runs) if bucket.is_url(args.runs) else _here(Path(args.runs))
    rows = sorted(found, key=lambda row: (row["began_at"] or 0.0, row["name"]))
    if not args.json:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in _table([_cells(row) for row in rows], width):
            print(line)
        if not rows:
            print(f"no runs in {args.runs.rstrip('/')}/; tuppence run makes one")
    return {"runs": rows}


def _here(root: Path) -> list[Document]:
    folders = [RunFolder(path.parent) for path in root.glob("*/run.json")]
    return [_row(each, functools.partial(standing.read, each)) for each in folders]


def _on_bucket(url: str) -> list[Document]:
    root = url.rstrip("/")

    def row(name: str) -> Document:
        onlooker = bucket.onlooker(f"{root}/{name}", brief=True)

        def read() -> Standing:
            return standing.Follower(onlooker.look(), remote=True).read()

        return _row(onlooker.folder, read)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(row, bucket.names(root)))


def _row(folder: RunFolder, read: Callable[[], Standing]) -> Document:
    """What is told of a run; of one that cannot be read why."""
    name = folder.path.name
    try:
        found = read()
    except (Fault, UserError, OSError) as error:
        at = folder.file("run.json")
        began = at.stat().st_mtime if at.exists() else None
        unknown: Document = {"usd": None, "val_loss": None, "began_at": began}
        return {"name": name, "state": "damaged", "finished": False, "said": str(error), **unknown}
    told = found.document()
    keys = ("state", "said", "attempt", "step", "tokens", "usd", "hours", "limits", "seconds_left")
    more = ("val_loss", "val_bpb", "best_val_loss", "began_at", "alive_at", "node", "machine")
    return {
        **{"name": name, "finished": found.state == "finished"},
        **{key: told[key] for key in (*keys, *more, "resume")},
        "progress": found.limits[0]["fraction"] if found.limits else found.progress,
    }


def _cells(row: Document) -> list[str]:
    """A run as columns of text."""
    if row["state"] == "damaged":
        return [printable(row["name"]), "damaged", printable(row["said"])]
    most = row["limits"][0] if row["limits"] else None
    paid = [] if most and most["kind"] == "usd" else [amount("usd", row["usd"])]
    loss, bits = row["val_loss"], row["val_bpb"]
    val = "" if loss is None else f"val {loss:.4f}" + (f" ({bits:.3f} bpb)" if bits else "")
    alive = row["alive_at"]
    return [
        printable(row["name"]),
        row["state"],
        f"{row['progress']:.1%}",
        ", ".join([*([share(most)] if most else []), *paid]),
        duration(row["hours"] * 3600),
        val,
        "" if alive is None else f"{duration(max(0.0, time.time() - alive))} ago",
        row["machine"] or "",
    ]


def _table(rows: list[list[str]], width: int | None) -> list[str]:
    """Columns under each other, cut to the width of a screen; a sentence is no column."""
    columns = zip(*(row for row in rows if len(row) > 3), strict=True)
    sizes = [max(map(len, column)) for column in columns]
    sizes[:1] = [max((len(row[0]) for row in rows), default=0)]
    lines = []
    for row in rows:
        first = [row[0].ljust(sizes[0]), *row[1:]]
        padded = [cell.ljust(size) for cell, size in zip(row, sizes, strict=False)]
        text = "  ".join(padded if len(row) > 3 else first).rstrip()
        lines.append(text if width is None or len(text) <= width else text[: width - 1] + "…")
    return lines
