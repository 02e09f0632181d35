"""Batches made ahead: while a step is computed, a thread makes the next one.

    thread   memory map ──one copy──▶ rows of batch n + 1, their hash       on a GPU: pinned rows
    loop     ask(n), take ──▶ rows of batch n on the device, sent beside other work

Which batch comes is for the loop to say. Usually it is the one after the last; where it is not (the
run went back), what was made is dropped: a batch is a function of its number alone.
"""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tuppence.data.loader import Loader, rolling_sha
from tuppence.ranks import Ranks

BUFFERS = 2  # one is filled while the other is sent
LAST_SECONDS = 2.0  # for the thread to end: one that waits for a network ends with the process


class Batch(NamedTuple):
    """The stream's hash with this batch, of which only the lead knows, and this rank's rows of it:
    int64 [batch / ranks, T + 1] on the device."""

    tokens_sha: str
    rows: Tensor


@dataclass
class Buffer:
    """Rows of a batch where they are made. They may be written again once they are `sent`."""

    rows: Tensor
    sent: torch.cuda.Event | None = None


Made = Future[tuple[str, Buffer]]


class Feed:
    """One rank's batches. The thread starts with the first one asked for; `close` ends it."""

    def __init__(self, loader: Loader, *, ranks: Ranks, device: str) -> None:
        self.loader, self._ranks, self._device = loader, ranks, device
        self._rows = loader.rows(ranks.world)
        self.waited = 0.0  # seconds, for the batch asked for last
        self._asked: tuple[int, str] | None = None
        self._made: Made = Future()
        self._queue: queue.SimpleQueue[tuple[int, str, Made] | None] = queue.SimpleQueue()
        self._pinned = self._pinned_buffers() if device == "cuda" else None
        self._thread: threading.Thread | None = None

    def ask(self, number: int, tokens_sha: str) -> None:
        """Begin this batch, unless it is begun. `tokens_sha` is the stream's hash before it."""
        self.waited = 0.0
        if self._asked == (number, tokens_sha):
            return
        self._asked, self._made = (number, tokens_sha), Future()
        self._queue.put((number, tokens_sha, self._made))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
            self._thread.start()

    def there(self, *, within: float) -> bool:
        """Whether the batch asked for is made, or cannot be, in so many seconds at the latest."""
        if not self._made.done():
            began = time.monotonic()
            wait([self._made], within)
            self.waited += time.monotonic() - began
        return self._made.done()

    def take(self) -> Batch:
        """The batch asked for; the one after it is begun. Raises what the making of it raised."""
        assert self._asked is not None, "ask first"
        tokens_sha, buffer = self._made.result()
        rows, waited = self._sent(buffer), self.waited
        self.ask(self._asked[0] + 1, tokens_sha)
        self.waited = waited
        return Batch(tokens_sha, rows)

    def close(self) -> None:
        """End the thread; what it makes is dropped."""
        self._queue.put(None)
        self.loader.close()
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        while (asked := self._queue.get()) is not None:
            number, tokens_sha, made = asked
            try:
                made.set_result(self._make(number, tokens_sha))
            except BaseException as error:  # the loop's, when it takes the batch
                made.set_exception(error)

    def _make(self, number: int, tokens_sha: str) -> tuple[str, Buffer]:
        buffer = self._buffer()
        rows = buffer.rows.numpy()
        self.loader.fill(rows, number, rank=self._ranks.rank)
        return rolling_sha(tokens_sha, rows) if self._ranks.lead else tokens_sha, buffer

    def _buffer(self) -> Buffer:
        """Memory for a batch: on a CPU new, for the step keeps it; on a GPU pinned, in turns."""
        if self._pinned is None:
            return Buffer(torch.empty(self._shape, dtype=torch.int64))
        buffer = next(self._pinned)
        if buffer.sent is not None:
            buffer.sent.synchronize()
        return buffer

    # ------------------------------------------------------------ the loop's thread

    @property
    def _shape(self) -> tuple[int, int]:
        """The lead makes the whole batch, for its hash; the others what they train on."""
        count = self.loader.batch_size if self._ranks.lead else self._rows
        return count, self.loader.sequence_len + 1

    def _pinned_buffers(self) -> Iterator[Buffer]:
        """As on disk, so that a token crosses the bus in two bytes; ids above fit into int32."""
        dtype = torch.uint16 if self.loader.dtype == np.uint16 else torch.int32
        rows = [torch.empty(self._shape, dtype=dtype, pin_memory=True) for _ in range(BUFFERS)]
        return cycle([Buffer(each) for each in rows])

    def _sent(self, buffer: Buffer) -> Tensor:
        """This rank's rows on the device, widened there; the loop's stream is not waited for."""
        rows = buffer.rows[: self._rows]
        if self._device != "cuda":
            return rows
        there = rows.to(self._device, non_blocking=True)
        buffer.sent = buffer.sent or torch.cuda.Event()  # type: ignore[no-untyped-call]
        buffer.sent.record()
        return there.long()
