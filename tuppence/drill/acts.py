"""What a drill does to copies of a run, and what it asks of each.

Every act ends with the run at its end: the evidence of that, beside the uninterrupted run's, is
the verdict. An act that fails in a way nobody thought of is a row that says so.
"""

import os
import random
import signal
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tuppence import checkpoint, config
from tuppence.checkpoint import tensors
from tuppence.checkpoint.layout import KINDS, MANIFEST, STATE, files_of, pointer_to
from tuppence.drill.processes import Ended, Processes, phase_of
from tuppence.drill.scene import Evidence, Scene, difference, events, evidence, hashes, rewrite
from tuppence.errors import Fault, Overtaken
from tuppence.folder import RunFolder
from tuppence.train.watchdog import EXIT_CODE

STALL_SECONDS = 3.0  # or as long as so many steps:
STALL_STEPS = 20


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    act: str
    done: str
    survived: str
    ok: bool


class Drilled(Exception):
    """What did not survive, in a line."""


class Drill:
    """The acts, which share the uninterrupted run's evidence."""

    def __init__(self, scene: Scene, *, kills: int, seed: int) -> None:
        self.scene, self.kills, self.chance = scene, kills, random.Random(seed)
        self.exact = scene.plan.machine.deterministic
        self.whole: Evidence | None = None

    def rows(self) -> Iterator[Row]:
        """One after the other; the first says whether there is anything to compare with."""
        yield from self._guarded("uninterrupted", "left alone", self.straight)
        if self.whole is None:
            return
        yield from self._guarded("killed", f"kill -9, {self.kills} times", self.killed)
        yield from self._guarded("stopped", "SIGTERM", self.stopped)
        if not self.scene.folder("half").exists():
            return
        yield from self.torn()
        yield from self._guarded("filled", "disk full while it saves", self.filled)
        yield from self._guarded("poisoned", "newest weights NaN, right hashes", self.poisoned)
        yield from self.two_writers()
        yield from self._guarded("stalled", "the folder's disk hangs", self.stalled)

    def _guarded(self, act: str, done: str, perform: Callable[[], str]) -> Iterator[Row]:
        self.scene.say(f"drill: {act}: {done}")
        try:
            yield Row(act, done, perform(), ok=True)
        except (Drilled, Fault, OSError, ValueError, KeyError) as error:
            yield Row(act, done, str(error) or repr(error), ok=False)
        finally:
            self.scene.drop(act)

    # ------------------------------------------------------------ how a run ends

    def straight(self) -> str:
        folder = self.scene.fresh("uninterrupted")
        self._end("uninterrupted")
        self.whole = found = evidence(folder)
        if len(found.steps) != self.scene.steps:
            raise Drilled(f"{len(found.steps)} of {self.scene.steps} steps were taken")
        last = found.steps[self.scene.steps][0]
        return f"{len(found.steps)} steps, last loss {last:.4f}" if last else "no loss at the end"

    def _end(self, case: str) -> Ended:
        """Start it (again) and let it come to its end."""
        with self.scene.start(case) as started:
            ended = started.wait()
        if ended.code:
            raise Drilled(f"exit {ended.code}: {_last(ended)}")
        return ended

    def _same(self, case: str) -> str:
        """The end of a case against the uninterrupted run's."""
        assert self.whole is not None
        odd = difference(self.whole, evidence(self.scene.folder(case)), exact=self.exact)
        if odd:
            raise Drilled(f"the run is another one: {odd}")
        return "bitwise the same run" if self.exact else "the same tokens, losses within 1%"

    def _resumed(self, case: str) -> str:
        """Go on to the end: from where, and whether it is the same run."""
        self._end(case)
        step = [e["step"] for e in self.scene.folder(case).rows("events") if e["code"] == "resume"]
        if not step:
            raise Drilled("it began anew")
        return f"went on from step {step[-1]}: {self._same(case)}"

    def _at(self, share: float) -> int:
        return max(1, round(share * self.scene.steps))

    # ------------------------------------------------------------ the acts

    def killed(self) -> str:
        """At random steps, after a random part of what such a step and its save take."""
        folder, phases = self.scene.fresh("killed"), []
        each = self.scene.plan.predicted.step_seconds.mid
        for number in range(self.kills):
            share = 0.85 * (number + self.chance.random()) / self.kills
            with self.scene.start("killed") as started:
                if not started.reach(folder.path, self._at(share)):
                    raise Drilled(f"it ended before its kill: {_last(started.wait())}")
                time.sleep(self.chance.uniform(0, each))
                phases.append(phase_of(folder.path, started.pids[0]) or "start")
                started.kill()
        where = ", ".join(f"{count} in {phase}" for phase, count in Counter(phases).items())
        return f"{self._resumed('killed')} ({where})"

    def stopped(self) -> str:
        """Its folder, stopped but whole, is what the next acts start from."""
        folder = self.scene.fresh("stopped")
        with self.scene.start("stopped") as started:
            if not started.reach(folder.path, self._at(0.6)):
                raise Drilled(f"it ended before the signal: {_last(started.wait())}")
            started.send(signal.SIGTERM)
            ended = started.wait()
        if ended.code != 128 + signal.SIGTERM:
            raise Drilled(f"exit {ended.code}, not {128 + signal.SIGTERM}: {_last(ended)}")
        self.scene.copy("half", of="stopped")
        return f"saved, exit {ended.code}; {self._resumed('stopped')}"

    def torn(self) -> Iterator[Row]:
        """Every newer checkpoint is damaged in a way of its own; one start passes over them all."""
        self.scene.say("drill: torn: files of checkpoints cut short, flipped, missing, empty")
        folder = self.scene.copy("torn", of="half")
        newest = list(reversed(checkpoint.by_age(folder)))[: len(DAMAGES)]
        done = [(path.name, what) for path, what in zip(newest, DAMAGES, strict=False)]
        for path, damage in zip(newest, DAMAGES.values(), strict=False):
            damage(path)
        try:
            after = self._resumed("torn")
        except (Drilled, Fault) as error:
            after = f"lost: {error}"
        told = {event["path"] for event in events(folder, "checkpoint_damaged")}
        for name, what in done:
            seen = "passed over, loudly" if name in told else "not seen"
            ok = name in told and not after.startswith("lost")
            yield Row("torn", f"{what} ({name})", f"{seen}; {after}", ok)
        self.scene.drop("torn")

    def filled(self) -> str:
        """No file can grow beyond half of what a checkpoint's largest needs."""
        folder = self.scene.copy("filled", of="half")
        before, newest = hashes(folder), checkpoint.by_age(folder)[-1]
        largest = max(file.bytes for file in checkpoint.manifest(newest).files.values())
        with self.scene.start("filled", file_bytes=largest // 2) as started:
            ended = started.wait()
        if ended.code != Fault.exit_code or not ended.says("cannot save"):
            raise Drilled(f"exit {ended.code}: {_last(ended)}")
        self._all_there(folder, before)
        if self.scene.ranks == 1 and len(ended.lines) != 1:
            raise Drilled(f"it said {len(ended.lines)} lines, not one")
        return (
            f"one line, exit 1, every checkpoint intact; with room again {self._resumed('filled')}"
        )

    def poisoned(self) -> str:
        """The hashes are right, so that only the numbers can tell."""
        folder = self.scene.copy("poisoned", of="half")
        newest = checkpoint.by_age(folder)[-1]
        poison(folder, newest)
        before = hashes(folder)
        with self.scene.start("poisoned") as started:
            ended = started.wait()
        skipped = len(events(folder, "step_skipped"))
        if ended.code == 0:
            return self._rewound(folder, skipped)
        if ended.code != Fault.exit_code or not events(folder, "stopped_by_guard"):
            raise Drilled(f"exit {ended.code}: {_last(ended)}")
        self._all_there(folder, before)
        checkpoint.drop_later(folder, checkpoint.step_of(newest) - 1)
        return (
            f"{skipped} steps skipped, then stopped with one line, older checkpoints intact; with "
            f"{newest.name} deleted it {self._resumed('poisoned')}"
        )

    def _rewound(self, folder: RunFolder, skipped: int) -> str:
        back = events(folder, "rewind")
        losses = [row["loss"] for row in folder.latest("metrics")]
        if not back or None in losses:
            raise Drilled("it ended with losses that are not finite")
        return (
            f"{skipped} steps skipped, then back to step {back[-1]['step']} with other data; every "
            f"loss that counts is finite"
        )

    def _all_there(self, folder: RunFolder, before: dict[str, str]) -> None:
        now = hashes(folder)
        lost = sorted(name for name, sha256 in before.items() if now.get(name) != sha256)
        if lost:
            raise Drilled(f"{lost[0]} is gone or changed")

    def two_writers(self) -> Iterator[Row]:
        """A second process, and then a second attempt, on the folder of one that is paused."""
        folder = self.scene.fresh("two writers")
        with self.scene.start("two writers") as first:
            there = first.reach(folder.path, self._at(0.4))
            first.send(signal.SIGSTOP)
            done = "a second process on its folder"
            yield from self._guarded_on(first, done, there, lambda: self._refused())
            done = "a newer attempt takes the run over"
            yield from self._guarded_on(first, done, there, lambda: self._fenced(first, folder))
        self.scene.drop("two writers")

    def _guarded_on(
        self, first: Processes, done: str, there: bool, perform: Callable[[], str]
    ) -> Iterator[Row]:
        self.scene.say(f"drill: two writers: {done}")
        try:
            if not there:
                raise Drilled("the first process had ended")
            yield Row("two writers", done, perform(), ok=True)
        except (Drilled, Fault) as error:
            yield Row("two writers", done, str(error), ok=False)

    def _refused(self) -> str:
        with self.scene.start("two writers", ranks=1) as second:
            ended = second.wait()
        if ended.code != 2 or not ended.says("another process is writing"):
            raise Drilled(f"exit {ended.code}: {_last(ended)}")
        return "refused with one line, exit 2"

    def _fenced(self, first: Processes, folder: RunFolder) -> str:
        """A paused attempt wakes up and finds the run taken: as one does that was given up for
        lost."""
        before = hashes(folder)
        checkpoint.claim(folder, 2)
        first.send(signal.SIGCONT)
        ended = first.wait()
        if ended.code != Overtaken.exit_code or not ended.says("has taken"):
            raise Drilled(f"exit {ended.code}: {_last(ended)}")
        now = hashes(folder)
        if now != before:
            raise Drilled("the older attempt wrote a checkpoint")
        return f"the older one wrote nothing more, exit 4; then {self._resumed('two writers')}"

    def stalled(self) -> str:
        """The heartbeat is made a pipe that nobody reads: whoever writes it waits for ever, as on
        a network disk whose server is gone."""
        wait = max(STALL_SECONDS, STALL_STEPS * self.scene.plan.predicted.step_seconds.mid)
        folder = self.scene.fresh("stalled", stall_seconds=wait)
        beat, aside = folder.file(".heartbeat"), folder.file(".pipe")
        with self.scene.start("stalled") as started:
            if not started.reach(folder.path, self._at(0.4)):
                raise Drilled(f"it ended before the stall: {_last(started.wait())}")
            while started.alive():  # a beat that was under way takes the pipe's place
                if not _is_pipe(beat):
                    os.mkfifo(aside)
                    os.replace(aside, beat)
                started.rest()
            ended = started.wait()
        for path in (beat, folder.file("heartbeat.json")):
            if _is_pipe(path):
                path.unlink()
        if ended.code != EXIT_CODE or not ended.says("hung in"):
            raise Drilled(f"exit {ended.code}: {_last(ended)}")
        return f"named after {wait:.0f} s, exit {ended.code}; {self._resumed('stalled')}"


def _is_pipe(path: Path) -> bool:
    with suppress(OSError):
        return stat.S_ISFIFO(path.lstat().st_mode)
    return False


def _last(ended: Ended) -> str:
    """What it said last, for a person who has to find out why."""
    lines = ended.lines or ended.text.splitlines() or ["it said nothing"]
    return lines[-1].removeprefix("tuppence: ")[:300]


# ---------------------------------------------------------------- harm


def _cut_short(path: Path) -> None:
    file = files_of(path, "model")[0]
    rewrite(file, file.read_bytes()[: file.stat().st_size // 2])


def _flipped(path: Path) -> None:
    file = files_of(path, "optimizer")[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    rewrite(file, bytes(content))


def _missing(path: Path) -> None:
    (path / STATE).unlink()


def _empty(path: Path) -> None:
    rewrite(path / MANIFEST, b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut short": _cut_short,
    "one bit of the moments flipped": _flipped,
    "state.json missing": _missing,
    "checkpoint.json empty": _empty,
}


def poison(folder: RunFolder, path: Path) -> None:
    """Make every weight of a checkpoint NaN, with the hashes that such a file has."""
    manifest = checkpoint.manifest(path)
    files = dict(manifest.files)
    for file in files_of(path, KINDS[0]):
        content = bytearray(file.read_bytes())
        for entry in tensors.entries_of(file)[0].values():
            end = entry.at + entry.spec.nbytes
            content[entry.at : end] = b"\xff" * entry.spec.nbytes  # NaN in every float format
        rewrite(file, bytes(content))
        files[file.name] = checkpoint.File(checkpoint.file_sha256(file), len(content))
    told = checkpoint.Manifest(manifest.version, manifest.attempt, files)
    rewrite(path / MANIFEST, config.to_json(told).encode())
    checkpoint.point(folder, "last", pointer_to(path))
