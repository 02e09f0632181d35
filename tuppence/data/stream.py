"""The stream of tokens: each slice of an input into its files, from wherever it stands.

    for window in slices: ids = workers(window);  slice file += ids;  stop at the cap

A slice that was finished before is not read again; one that was begun is read from its start, and
encoded from the window after the last certain one.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from tuppence.data.encode import Encoded, Job, encode_all
from tuppence.data.shelf import Shelf
from tuppence.data.work import Done, SliceWriter, done_of
from tuppence.errors import UserError
from tuppence.text.formats import Meter
from tuppence.text.inputs import check_unchanged
from tuppence.text.slices import Slice
from tuppence.text.windows import Window, windows_of

Say = Callable[[int, int], None]  # bytes read, tokens made


@dataclass(frozen=True)
class Stream:
    """What is to be read, how, and where it goes. `mine` are the slices that this machine makes."""

    slices: list[Slice]
    mine: Sequence[int]
    job: Job
    shelf: Shelf
    shard_tokens: int
    bands: int
    on_bad: str
    workers: int
    say: Say
    _known: list[int] = field(default_factory=lambda: [0])

    def done(self) -> list[Done]:
        """How far each slice is, whoever made it."""
        return [self._done(number) for number in range(len(self.slices))]

    def fill(self, wanted: int | None) -> None:
        """Make this machine's slices, as far as `wanted` tokens of the whole stream need them.

        Raises UserError for a broken document that is not to be skipped, and for a file that
        cannot be read; what came before it is kept.
        """
        meter, read = Meter(), deque[int]()
        writer: SliceWriter | None = None
        tokens = before = 0
        windows = self._windows(wanted, meter, read)
        encoding = encode_all(windows, self.job, workers=self.workers)
        try:
            for encoded in encoding:
                if writer is None or writer.done.slice != encoded.slice:
                    self._end(writer, all_=True)
                    self._end_read(read, before=encoded.slice)
                    writer = self._writer(encoded.slice)
                    before = self._tokens_before(encoded.slice)
                self._refuse(encoded, writer)
                writer.append(encoded)
                tokens = before + writer.done.tokens
                self.say(meter.done_bytes, tokens)
                if wanted is not None and tokens >= wanted:
                    break
            full = wanted is not None and tokens >= wanted
            if not full:
                self.say(meter.done_bytes, tokens)
            self._end(writer, all_=not full)
            self._end_read(read, before=0 if full else len(self.slices))
            for number in self.mine:  # a kill came when it had all that is wanted of it
                done = self._done(number)
                if done.windows and not done.finished:
                    self._end(self._writer(number), all_=False)
        finally:
            encoding.close()
            windows.close()
            if writer is not None:
                writer.close()

    def _windows(
        self, wanted: int | None, meter: Meter, read: deque[int]
    ) -> Generator[Window, None, None]:
        """What is left to encode; `read` gets the slices that were read to their end."""
        for number in self.mine:
            if wanted is not None:
                self.shelf.look()
            done = self._done(number)
            if done.all:
                spans = (part.span(self.job.files[part.file].bytes) for part in self.slices[number])
                meter.finished_bytes += sum(end - start for start, end in spans)
                continue
            if wanted is not None and self._tokens_before(number + 1) >= wanted:
                return
            windows = windows_of(
                self.slices[number],
                number,
                self.job.files,
                text_field=self.job.text_field,
                cut=self.job.tokenizer.cut,
                meter=meter,
            )
            yield from itertools.islice(windows, done.windows, None)
            read.append(number)

    def _refuse(self, encoded: Encoded, writer: SliceWriter) -> None:
        if encoded.bad and self.on_bad == "refuse":
            writer.commit()
            remedy = "mend it, or leave such documents out: data.on_bad=skip"
            raise UserError(f"{encoded.bad[0].message}; {remedy}")

    def _writer(self, number: int) -> SliceWriter:
        for part in self._done(number).parts:
            self.shelf.need(part.file, part.sha256)
        return SliceWriter(
            self.shelf.folder,
            number,
            dtype=self.job.dtype,
            shard_tokens=self.shard_tokens,
            bands=self.bands,
            check=functools.partial(self._check, number),
        )

    def _check(self, number: int) -> None:
        """Raises Fault where a file that this slice comes from has changed."""
        for part in self.slices[number]:
            check_unchanged(self.job.files[part.file])

    def _end(self, writer: SliceWriter | None, *, all_: bool) -> None:
        if writer is not None:
            self.shelf.finished(writer.finish(all_=all_))

    def _end_read(self, read: deque[int], *, before: int) -> None:
        """End the slices that gave no window: there is nothing in them, or nothing new."""
        while read and read[0] < before:
            number = read.popleft()
            if not self._done(number).all:
                self._end(self._writer(number), all_=True)

    def _tokens_before(self, number: int) -> int:
        """Of the slices before this one, as far as is known here."""
        known = self._known  # the tokens of the first i slices, which are through
        while len(known) <= number and (done := self._done(len(known) - 1)).all:
            known.append(known[-1] + done.tokens)
        first = min(number, len(known) - 1)
        return known[first] + sum(self._done(earlier).tokens for earlier in range(first, number))

    def _done(self, number: int) -> Done:
        return done_of(self.shelf.folder, number)
