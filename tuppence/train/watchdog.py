"""A rank that has stopped moving is named, with where it hung, and the run exits for a restart.

    main thread      at("forward", step)       notes where it is; costs a microsecond
    poster thread    every tick: own note ──▶ store ──▶ the others' notes
    watcher thread   main thread still for `seconds`: its stack to stderr, who hung ──▶ told, exit

One rank that hangs leaves all others waiting in a collective, so all of them stand still; who is
at the earliest place, or posts nothing any more (stopped, dead, cut off), is the one to look at.
Rank 0 says so first and the others follow; they would say it themselves were rank 0 the one.
The watcher uses no store and takes no lock of the main thread's: a store whose server is stopped
blocks its callers for ever, whatever their time limit. It counts only time in which it lived
itself, so that a process that was paused, or kept from the interpreter lock, is not blamed
for what it slept through; a thread that never gives up that lock is for the other ranks to name.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch

from tuppence import config
from tuppence.errors import Fault

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
BETWEEN = ("start", "load", "rehearse", "evaluate", "save")  # steps, in this order
WITHIN = ("data", "forward", "reduce", "update")  # a step
AFTER = ("finish", "done")
ORDER = {place: i for i, place in enumerate(BETWEEN + WITHIN + AFTER)}
TICK_SECONDS = 1.0
SILENT_TICKS = 3.5  # without a new post: some may come late
GRACE_TICKS = 4.0  # by which the other ranks let rank 0 speak first
LAST_WORDS_SECONDS = 5.0  # what a full pipe or a lost disk may take from the exit


class Note(NamedTuple):
    """Where a main thread is, how many seconds it may stay, and since when, on both clocks."""

    place: str
    step: int
    seconds: float
    moved_at: float
    monotonic: float


@dataclass(frozen=True)
class Post:
    """What one rank tells the others: where it is, since when by its wall clock. Posts count."""

    rank: int
    place: str
    step: int
    host: str
    pid: int
    moved_at: float
    number: int

    @property
    def order(self) -> tuple[int, int]:
        return self.step, ORDER[self.place]

    @property
    def where(self) -> str:
        within = self.place in WITHIN
        return f"{self.place} of step {self.step + 1}" if within else f"{self.place} at {self.step}"


class Watchdog:
    """Watches this process's main thread (the one that makes it), and knows the other ranks'.

    As a context it also ends a stall that ends as an error: a collective that fails after a long
    wait because the rank it waited for, or one that waited too, has left.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        store: Any,
        seconds: float,
        told: Callable[[str], None],
        leave: Callable[[], NoReturn] = lambda: os._exit(EXIT_CODE),
    ) -> None:
        """`store` is torch.distributed's, None in a world of one. `told` gets the one line, in a
        thread of its own and on every rank that leaves; then `leave` is called."""
        assert (store is None) == (world == 1), world
        self.rank, self.world, self.seconds = rank, world, seconds
        self._told, self._leave = told, leave
        self._main, self._host, self._pid = threading.get_ident(), socket.gethostname(), os.getpid()
        self._tick = min(TICK_SECONDS, seconds / 8)
        self._note = Note("start", 0, seconds, time.time(), time.monotonic())
        self._closed, self._leaving = threading.Event(), threading.Lock()
        self._board = None if store is None else _Board(rank, world, store)
        self._poster = threading.Thread(target=self._keep_posting, name="watchdog post")
        self._poster.daemon = True
        if self._board:
            self._poster.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, place: str, step: int, *, seconds: float | None = None) -> None:
        """The main thread is about to do this, with `step` steps done.

        `seconds` is how long it may take where that is more than usual (compiling, a long save).
        All ranks must then say so, for they wait together.
        """
        assert place in ORDER, place
        self._note = Note(place, step, seconds or self.seconds, time.time(), time.monotonic())

    def close(self) -> None:
        """All is done; the others hear of it, so that nobody misses this rank."""
        self.at("done", self._note.step)
        self._closed.set()
        if self._board:
            self._poster.join(2 * self._tick)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        waited = time.monotonic() - self._note.monotonic
        cause = error.__cause__ if isinstance(error, Fault) else error
        known = isinstance(cause, Fault | torch.OutOfMemoryError)
        if isinstance(cause, RuntimeError) and not known and waited >= self._note.seconds / 2:
            self._end(f"{type(cause).__name__} after {waited:.0f} s: {_first_line(cause)}")
        self.close()

    def message(self) -> str:
        """Who hangs where and who waits for it, as far as this rank knows."""
        mine = self._post()
        if self._board is None:
            return describe(Known([mine]), now=time.time())
        limit = SILENT_TICKS * self._tick
        return describe(self._board.known(mine, silent_seconds=limit), now=time.time())

    # ------------------------------------------------------------ the two threads

    def _keep_posting(self) -> None:
        """Rank 0 reads what the others post all the time; they do once they are in doubt."""
        assert self._board is not None
        while not self._closed.is_set():
            doubt = time.monotonic() - self._note.monotonic > self._note.seconds / 2
            self._board.exchange(self._post(), read=self.rank == 0 or doubt)
            self._closed.wait(self._tick)
        self._board.exchange(self._post(), read=False)

    def _watch(self) -> None:
        """Count how long the same note stands, in ticks that this thread itself has lived."""
        seen, still, last = self._note, 0.0, time.monotonic()
        grace = GRACE_TICKS * self._tick if self.rank else 0.0
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            still += min(now - last, 2 * self._tick)
            last = now
            if self._note is not seen:
                seen, still = self._note, 0.0
            if still >= seen.seconds + grace:
                self._end()

    def _post(self) -> Post:
        note, number = self._note, self._board.number if self._board else 0
        return Post(self.rank, note.place, note.step, self._host, self._pid, note.moved_at, number)

    def _end(self, reason: str = "") -> None:
        """Say who hung and leave, once, whatever the saying costs."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(2 * LAST_WORDS_SECONDS)  # the other thread is leaving
            return
        words = threading.Thread(target=self._last_words, args=(reason,), daemon=True)
        words.start()
        words.join(LAST_WORDS_SECONDS)
        self._leave()

    def _last_words(self, reason: str) -> None:
        message = self.message() + (f" ({reason})" if reason else "")
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        text = f"rank {self.rank}, process {self._pid}, its main thread:\n{stack}{message}\n"
        with contextlib.suppress(OSError):  # not sys.stderr: the main thread may hold its lock
            os.write(2, text.encode(errors="replace"))
        self._told(message)


# ---------------------------------------------------------------- what ranks know of each other


@dataclass(frozen=True)
class Known:
    """Last posts by rank; of whom nothing new is heard; who never posted; the store's trouble."""

    posts: list[Post]
    silent: list[int] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)
    trouble: str = ""


class _Board:
    """Where ranks post, in the store. `exchange` is one thread's, `known` any's."""

    def __init__(self, rank: int, world: int, store: Any) -> None:
        self.rank, self.world, self.number = rank, world, 0
        self._store = store.clone()  # one for each thread: a call that waits holds the store
        self._seen: dict[int, tuple[Post, float]] = {}  # and since when, by this rank's clock
        self._absent: list[int] = []
        self._answered, self._error, self._asking = time.monotonic(), "", False

    def exchange(self, mine: Post, *, read: bool) -> None:
        """Post, and read what the others have posted."""
        self._asking = True
        try:
            self._store.set(_key(self.rank), json.dumps(asdict(mine)))
            there = [r for r in range(self.world) if read and self._has(r)]
            texts = self._store.multi_get([_key(r) for r in there]) if there else []
        except Exception as error:  # whatever it is, the store is out of reach
            self._error = _first_line(error)
            return
        self._answered, self._error, self._asking = time.monotonic(), "", False
        self.number += 1
        if read:
            self._absent = sorted({*range(self.world)} - {*there})
        for rank, text in zip(there, texts, strict=True):
            post = config.from_json(Post, text.decode())
            if rank not in self._seen or self._seen[rank][0].number != post.number:
                self._seen = {**self._seen, rank: (post, self._answered)}

    def known(self, mine: Post, *, silent_seconds: float) -> Known:
        """`mine` is this rank's place now. While the store is out of reach nobody is silent."""
        now, seen = time.monotonic(), self._seen
        others = {rank: it for rank, it in seen.items() if rank != self.rank}
        posts = sorted([mine, *(post for post, _ in others.values())], key=lambda p: p.rank)
        unanswered = now - self._answered
        if unanswered > silent_seconds and (self._asking or self._error):
            return Known(posts, trouble=self._error or f"silent for {unanswered:.0f} s")
        silent = [
            rank
            for rank, (post, since) in sorted(others.items())
            if post.place != "done" and now - since > silent_seconds
        ]
        return Known(posts, silent, self._absent)

    def _has(self, rank: int) -> bool:
        return rank in self._seen or bool(self._store.check([_key(rank)]))


def _key(rank: int) -> str:
    return f"watchdog/{rank}"


def describe(known: Known, *, now: float) -> str:
    """One line: who is behind the others or silent, and who waits where. `now` is a wall clock."""
    suspects = _suspects(known)
    named = [p for p in known.posts if p in suspects or p.rank in known.silent]
    parts = [_hung(p, now, silent=p.rank in known.silent) for p in named]
    parts += [f"rank {rank} never came" for rank in known.absent]
    if known.trouble:
        parts.append(
            f"the store that ranks meet in does not answer ({known.trouble}): "
            f"rank 0's node is stopped, gone or cut off"
        )
    waiting = [p for p in known.posts if p not in named]
    if not parts:
        parts.append("every rank answers and none is behind: look at the network between them")
    for where in sorted({p.where for p in waiting}):
        ranks = [p.rank for p in waiting if p.where == where]
        it = "waits" if len(ranks) == 1 else "wait"
        parts.append(f"{_ranks(ranks)} {it} in {where}")
    return "; ".join(parts)


def _suspects(known: Known) -> list[Post]:
    """Those at the earliest place; of them the silent ones, if any. Nobody, where all are there or
    somebody else is known to be missing."""
    first = min(p.order for p in known.posts)
    earliest = [p for p in known.posts if p.order == first]
    silent = [p for p in earliest if p.rank in known.silent]
    if len(known.posts) == 1 and not known.absent and not known.trouble:
        return earliest
    together = len(earliest) == len(known.posts)
    return silent or ([] if together or known.absent or known.trouble else earliest)


def _hung(post: Post, now: float, *, silent: bool) -> str:
    ago = max(0.0, now - post.moved_at)
    what = "stopped answering" if silent else "hung"
    return (
        f"rank {post.rank} (node {post.host}, pid {post.pid}) {what} in {post.where}, "
        f"seen last {ago:.0f} s ago"
    )


def _ranks(ranks: Iterable[int]) -> str:
    numbers: Sequence[str] = [str(rank) for rank in ranks]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
