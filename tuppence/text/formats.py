"""Read documents out of one file: .txt, .jsonl or .parquet, plain or as .gz, .xz or .zst.

    bytes ──decompress──▶ blocks ──lines, rows or the whole──▶ items

An item is a document as it lies there, with its place; `documents` looks inside, in another
process. A line of JSONL and a row of parquet are documents, and so is a .txt file: a large one
comes as a row of pieces, so that it never lies in memory. What is wrong with a whole file is an
error here; what is wrong with one document is for whoever looks at it.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import lzma
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from tuppence.errors import UserError
from tuppence.text.columns import cells_of, rows_at_once, text_path
from tuppence.text.inputs import InputFile, check_unchanged
from tuppence.text.slices import Part
from tuppence.text.xz import Xz
from tuppence.tokenizer.pieces import Cut, Piece, recut

BLOCK_BYTES = 1 << 20
MOST_BYTES = 1 << 25  # of one line or row
MOST_WHOLE = 1 << 22  # characters of a text that a tokenizer must see whole: it takes 500 MB
WHOLE_TEXT_BYTES = 1 << 22  # a longer .txt comes in pieces
BOM = b"\xef\xbb\xbf"  # what some editors write at the beginning of a file; it is no text
ITEM_BYTES = 200  # that Python takes for an item besides what is in it


class TooLong(NamedTuple):
    """What stands for a document that is longer than MOST_BYTES: its length."""

    bytes: int


class Item(NamedTuple):
    """A document as it was read, or a stretch of a long one from character `offset` on.

    `content` is a line of JSON or a text as bytes, a stretch of a long text as a string, or None
    for a cell without one. `place` says where in the file it is, for people.
    """

    file: int
    place: str
    content: bytes | str | TooLong | None
    offset: int = 0
    last: bool = True

    @property
    def whole(self) -> bool:
        """Whether this is all of its document."""
        return self.last and not self.offset

    def bytes(self) -> int:
        """About how much room it takes."""
        held = len(self.content) if isinstance(self.content, bytes | str) else 0
        return ITEM_BYTES + held


@dataclass
class Meter:
    """How many bytes of the input files, as they lie there, have been read so far."""

    finished_bytes: int = 0
    reading: BinaryIO | None = field(default=None, repr=False)
    span: tuple[int, int] = (0, 0)  # of the part that is being read

    @property
    def done_bytes(self) -> int:
        start, end = self.span
        here = min(self.reading.tell(), end) - start if self.reading else 0
        return self.finished_bytes + max(0, here)


class _Readable(Protocol):
    def read(self, n: int, /) -> bytes: ...


def open_input(file: InputFile) -> BinaryIO:
    """The file, open for reading and seekable. Raises UserError where it cannot be opened, Fault
    where it has changed."""
    if file.remote:
        from tuppence.text import remote

        return remote.opened(file)
    check_unchanged(file)
    try:
        return open(file.path, "rb")
    except OSError as error:
        raise UserError(f"{file.shown}: cannot be opened ({error.strerror}); check it") from None


def read_items(
    file: InputFile, part: Part, *, text_field: str, cut: Cut = "anywhere", meter: Meter
) -> Iterator[Item]:
    """The items of one part of a file, in order. `cut` says where a long text may be cut.

    Raises UserError for a file that cannot be read, or not as what it says it is.
    """
    with open_input(file) as raw:
        start, end = part.span(file.bytes)
        meter.reading, meter.span = raw, (start, end)
        try:
            if file.kind == "parquet":
                yield from _rows(file, raw, part, text_field=text_field)
            elif file.kind == "jsonl":
                yield from _json_lines(file, raw, part)
            else:
                yield from _text(file, raw, part, cut=cut)
            meter.finished_bytes += end - start
        finally:
            meter.reading = None


# ---------------------------------------------------------------- bytes


def _decompressed(raw: BinaryIO, compression: str) -> _Readable:
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == "xz":
        return Xz(raw)
    if compression == "zst":
        import pyarrow

        return cast(_Readable, pyarrow.input_stream(raw, compression="zstd"))
    return raw


def _blocks(file: InputFile, raw: BinaryIO) -> Iterator[bytes]:
    """The file's bytes after decompression, a megabyte at a time."""
    stream = _decompressed(raw, file.compression)
    while True:
        try:
            block = stream.read(BLOCK_BYTES)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            what = f"its .{file.compression} data is truncated or damaged" * bool(file.compression)
            raise UserError(
                f"{file.shown}: {what or 'cannot be read'} ({error}); fetch or write it again"
            ) from None
        if not block:
            return
        yield block


# ---------------------------------------------------------------- lines


def _json_lines(file: InputFile, raw: BinaryIO, part: Part) -> Iterator[Item]:
    """Lines that are not blank; those that begin in this part of the file."""
    start, end = part.span(file.bytes)
    raw.seek(max(0, start - 1))  # where a newline stands before `start`, a line begins there
    lines = _lines(_blocks(file, raw), at=max(0, start - 1))
    if start:
        next(lines, None)
    for number, (at, found) in enumerate(lines, start=1):
        line = found.removeprefix(BOM) if at == 0 and isinstance(found, bytes) else found
        if part.of > 1 and at >= end:
            return
        if isinstance(line, TooLong) or (line and not line.isspace()):
            place = f"line {number:,}" if part.of == 1 else f"the line at byte {at:,}"
            yield Item(part.file, place, line)


def _lines(blocks: Iterator[bytes], *, at: int) -> Iterator[tuple[int, bytes | TooLong]]:
    """Lines without their newline, each with where it begins. Of one that is too long only the
    length is kept; one that is longer than many blocks is joined once, not per block."""
    parts: list[bytes] = []
    length = 0
    for block in blocks:
        *ends, rest = block.split(b"\n")
        for end in ends:
            length += len(end)
            yield at, _joined([*parts, end], length)
            at, parts, length = at + length + 1, [], 0
        length += len(rest)
        parts = [*parts, rest] if length <= MOST_BYTES else []
    if length:
        yield at, _joined(parts, length)


def _joined(parts: list[bytes], length: int) -> bytes | TooLong:
    return b"".join(parts) if length <= MOST_BYTES else TooLong(length)


# ---------------------------------------------------------------- rows


def _rows(file: InputFile, raw: BinaryIO, part: Part, *, text_field: str) -> Iterator[Item]:
    """The text of each row of this part's row groups."""
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as spool:
        # parquet is read from its end, so one that was compressed as a whole must lie open first
        source = _spooled(file, raw, spool) if file.compression else raw
        try:
            table = pyarrow.parquet.ParquetFile(source, buffer_size=BLOCK_BYTES)
            path = text_path(file, table.schema_arrow, text_field=text_field)
            n = table.num_row_groups
            groups = [-(-index * n // part.of) for index in (part.nth, part.nth + 1)]
            sizes = [table.metadata.row_group(g).num_rows for g in range(groups[0])]
            numbers = itertools.count(sum(sizes) + 1)
            for group in range(*groups):
                for cell, number in zip(_cells(table, group, path), numbers, strict=False):
                    content = TooLong(cell) if isinstance(cell, int) else cell
                    yield Item(part.file, f"row {number:,}", content)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{file.shown}: not a whole parquet file ({reason}); fetch or write it again"
            ) from None


def _cells(table: Any, group: int, path: list[str]) -> Iterator[bytes | int | None]:
    """The text of each row of a row group; of one that is too long its length."""
    column = ".".join(path)
    for batch in table.iter_batches(
        batch_size=rows_at_once(table.metadata.row_group(group), column),
        row_groups=[group],
        columns=[column],
        use_threads=False,
    ):
        yield from cells_of(batch, path, most_bytes=MOST_BYTES)


def _spooled(file: InputFile, raw: BinaryIO, spool: Any) -> BinaryIO:
    for block in _blocks(file, raw):
        spool.write(block)
    spool.seek(0, io.SEEK_SET)
    return cast(BinaryIO, spool)


# ---------------------------------------------------------------- texts


def _text(file: InputFile, raw: BinaryIO, part: Part, *, cut: Cut) -> Iterator[Item]:
    """A text that is not long as it lies there, a longer one in pieces."""
    blocks = _blocks(file, raw)
    held: list[bytes] = []
    held_bytes = 0
    for block in blocks:
        held.append(block)
        held_bytes += len(block)
        if held_bytes > WHOLE_TEXT_BYTES:
            break
    else:
        yield Item(part.file, "", b"".join(held).removeprefix(BOM))
        return
    decoded = _decoded(file, itertools.chain(held, blocks))
    for piece in recut(_checked(file, decoded, cut=cut), cut=cut):
        yield Item(part.file, "", piece.text, piece.offset, piece.last)


def _decoded(file: InputFile, blocks: Iterator[bytes]) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read_bytes = offset = 0
    begun = False
    for block in itertools.chain(blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # error.object is the block with the few bytes before it that the last one left over
            at = read_bytes - (len(error.object) - len(block)) + error.start
            bad = error.object[error.start]
            raise UserError(
                f"{file.shown}: not UTF-8 at byte {at:,} (0x{bad:02x}); convert the file to UTF-8 "
                f"(data.on_bad=skip leaves out no text above {WHOLE_TEXT_BYTES:,} bytes: it is "
                "written while it is read)"
            ) from None
        if text and not begun:
            text, begun = text.removeprefix("\ufeff"), True
        yield Piece(text, 0, offset, not block)
        read_bytes, offset = read_bytes + len(block), offset + len(text)


def _checked(file: InputFile, pieces: Iterator[Piece], *, cut: Cut) -> Iterator[Piece]:
    """The pieces; a text that must be held whole may not be too long for that."""
    for piece in pieces:
        if cut == "nowhere" and piece.offset > MOST_WHOLE:
            raise UserError(
                f"{file.shown}: longer than {MOST_WHOLE:,} characters, and this tokenizer must see "
                "a text whole; split the file"
            )
        yield piece
