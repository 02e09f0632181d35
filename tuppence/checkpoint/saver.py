"""Saving beside training: the step waits for a copy in memory, a thread does the rest.

    save()   wait for the save before ▶ copy into host buffers ▶ return
    thread   make room ▶ write the part ▶ [rank 0: gather, seal, fence, rename, last, retain, event]
                                        ▶ [a rank beside the lead's machine: send it (bucket/relay)]

Whatever goes wrong in the thread is raised by the next save, check or wait, once: there is no save
that failed and was not told.
"""

import contextlib
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tuppence.bucket import Relay
from tuppence.bucket.relay import PATIENCE_SECONDS as RELAY_SECONDS
from tuppence.checkpoint import writing
from tuppence.checkpoint.fence import Fence
from tuppence.checkpoint.layout import (
    KINDS,
    Files,
    State,
    name_of,
    point,
    pointer_to,
    shard,
    sidecar,
    step_of,
    weights_sha256,
)
from tuppence.checkpoint.pieces import Pieces, room_for, staged
from tuppence.checkpoint.retention import (
    Retention,
    aside_name,
    enforce,
    is_dead,
    make_room,
    sweep,
)
from tuppence.checkpoint.tensors import Image
from tuppence.errors import Fault
from tuppence.folder import RunFolder

Job = Callable[[], None] | None  # None ends the thread


class Saver:
    """One rank's saves of one attempt, which must have claimed the run (fence.claim).

    Every rank calls `save` for the same steps in the same order. On rank 0 a save is done when it
    is committed, on others when their part is on disk. `committed` is called with each checkpoint
    that was committed, in the thread. `fence` is the one that `claim` gave; without it, it is that
    of the claim which is there. With a `relay` other ranks' parts may come over a bucket; a rank
    that is given one has no folder in common with rank 0, and sends its part.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        attempt: int,
        keep: Retention,
        rank: int = 0,
        world: int = 1,
        committed: Callable[[Path], None] = lambda path: None,
        fence: Fence | None = None,
        relay: Relay | None = None,
        patience: float | None = None,
    ) -> None:
        self.folder, self.attempt, self.keep = folder, attempt, keep
        self.rank, self.world, self.committed = rank, world, committed
        self.fence = fence or Fence(folder, attempt)
        self.relay = relay
        self.patience = patience or (RELAY_SECONDS if relay else writing.PATIENCE_SECONDS)
        self.seconds = 0.0  # of the last whole save, from its start to its commit
        self._number = 0
        self._images: dict[str, Image] = {}
        self._errors: list[Exception] = []
        self._jobs: queue.Queue[Job] = queue.Queue()
        # a daemon: a process that ends on a fault does not wait for ranks that are gone
        threading.Thread(target=self._work, name="saver", daemon=True).start()

    def save(self, model: Pieces, optimizer: Pieces, state: State) -> float:
        """Copy into host buffers, which are kept, and let the thread write them.

        Returns the seconds of stall. A save that is still being written is waited for; what went
        wrong with it is raised here, and this one is not begun.
        """
        started = time.monotonic()
        self._number += 1  # also of one that is not begun: ranks must count alike
        self.wait()
        for kind, pieces in zip(KINDS, (model, optimizer), strict=True):
            self._images[kind] = staged(pieces, self._images.get(kind))
        number = self._number
        self._jobs.put(lambda: self._save(state, number, started))
        return time.monotonic() - started

    def prepare(self, model: Pieces, optimizer: Pieces) -> None:
        """Make the host buffers in the thread, so that the first save, too, copies into memory
        that was touched. It is for when the moments are there: after the first step."""
        self._jobs.put(lambda: self._touch(model, optimizer))

    def point(self, name: str, step: int) -> None:
        """Point `name` at the checkpoint of a step, once every save before is done."""
        if self.rank == 0:
            self._jobs.put(lambda: self._point(name, step))

    def wait(self) -> None:
        """Until everything is written. Raises the Fault of what was not."""
        self._jobs.join()
        self.check()

    def close(self) -> None:
        """`wait`, and let thread and buffers go."""
        try:
            self.wait()
        finally:
            self._jobs.put(None)

    def check(self) -> None:
        """Raise the Fault of a save that failed since the last look."""
        if self._errors:
            raise self._errors.pop(0)

    @property
    def _is_beside(self) -> bool:
        return self.relay is not None and self.rank > 0

    # ------------------------------------------------------------ in the thread

    def _work(self) -> None:
        while job := self._jobs.get():
            try:
                job()
            except Exception as error:  # raised again by whoever looks next
                self._errors.append(error)
            finally:
                self._jobs.task_done()

    def _save(self, state: State, number: int, started: float) -> None:
        name = aside_name(name_of(state.step), self.attempt, self.fence.token, number)
        aside = self.folder.checkpoints / name
        try:
            self.fence.check()
            final = self._write(aside, state, number)
            self._keep(final, number, started)
        except (OSError, Fault) as error:
            self._give_up(aside, error)
            self.fence.check()  # taken over: that is why, whatever else failed
            kept = "the lead's machine has the last good one" if self._is_beside else None
            raise Fault(writing.cannot_save(self.folder, state.step, error, kept=kept)) from error
        self.seconds = time.monotonic() - started
        if self.rank == 0:
            self.committed(final)

    def _write(self, aside: Path, state: State, number: int) -> Path:
        """This rank's part; on rank 0 the commit too. Where the checkpoint is or will be."""
        if self.rank == 0:
            self._make_room(number)
        files = writing.write_part(aside, self._images, rank=self.rank, world=self.world)
        if self.rank == 0:
            return self._commit(aside, state, files)
        writing.tell(aside, writing.Part(files, None), rank=self.rank, world=self.world)
        if self.relay is not None:
            self._sweep(number - 2)  # another rank of this machine may still be at the one before
            self.relay.send(aside, [*files, sidecar(self.rank, self.world)])
        return self.folder.checkpoints / name_of(state.step)

    def _touch(self, model: Pieces, optimizer: Pieces) -> None:
        for kind, pieces in zip(KINDS, (model, optimizer), strict=True):
            self._images[kind] = room_for(pieces, self._images.get(kind))
            self._images[kind].data.zero_()

    def _make_room(self, number: int) -> None:
        self._sweep(number - 1)
        if self.relay is not None:  # of the one before the mirror may still make a copy
            self.relay.sweep(self._dead(number - 2))
        mine = sum(len(i.header) + i.data.numel() for i in self._images.values())
        make_room(self.folder, self.keep, mine * self.world)

    def _sweep(self, number: int) -> None:
        sweep(self.folder, self._dead(number))

    def _dead(self, number: int) -> Callable[[Path], bool]:
        mine = (self.attempt, self.fence.token, number)
        return lambda path: is_dead(path, *mine)

    def _commit(self, aside: Path, state: State, files: Files) -> Path:
        def check() -> None:
            self.fence.check()
            if self.relay is not None:
                self.relay.bring(aside, [sidecar(r, self.world) for r in range(1, self.world)])

        files |= writing.gather(aside, world=self.world, seconds=self.patience, check=check)
        writing.seal(aside, state, files, attempt=self.attempt, world=self.world)
        self.fence.check()
        final = writing.commit(self.folder, aside, state.step)
        self.fence.check()
        point(self.folder, "last", pointer_to(final))
        return final

    def _keep(self, final: Path, number: int, started: float) -> None:
        """What follows a commit, which stands whatever becomes of this."""
        if self.rank:
            return
        step, sha256 = step_of(final), weights_sha256(final)
        enforce(self.folder, self.keep)
        self._sweep(number)
        seconds = time.monotonic() - started
        self.folder.event("save", f"step {step}", step=step, sha256=sha256, seconds=seconds)

    def _give_up(self, aside: Path, error: Exception) -> None:
        """Leave nothing of a save that failed. Rank 0 hears of it from the others' sidecars."""
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            return
        reason = getattr(error, "strerror", None) or str(error)
        with contextlib.suppress(OSError, Fault):  # then rank 0 waits in vain, and says for whom
            for kind in KINDS:
                (aside / shard(kind, self.rank, self.world)).unlink(missing_ok=True)
            writing.tell(aside, writing.Part({}, reason), rank=self.rank, world=self.world)
            if self.relay is not None:
                self.relay.send(aside, [sidecar(self.rank, self.world)], patience=0.0)

    def _point(self, name: str, step: int) -> None:
        self.fence.check()
        try:
            point(self.folder, name, pointer_to(self.folder.checkpoints / name_of(step)))
        except OSError as error:
            raise Fault(writing.cannot_save(self.folder, step, error)) from error
