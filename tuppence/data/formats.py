"""Read text out of one file: .txt, .jsonl or .parquet, plain or as .gz, .xz or .zst.

A file is read as a stream of (text, ends_document). A .txt file is one document and arrives in
blocks of a megabyte, so that a large one never lies in memory; a line of JSONL or a row of
parquet is a document.

    bytes ──decompress──▶ blocks ──decode or split into lines──▶ (text, ends_document)

Whatever is wrong with a file is said once, with its name and the place.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from tuppence.errors import UserError

KINDS = ("txt", "jsonl", "parquet")
COMPRESSIONS = ("gz", "xz", "zst")
BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 64

Text = tuple[str, bool]


@dataclass(frozen=True)
class InputFile:
    """One file to read; `shown` is its name in messages and manifests, as the person wrote it."""

    path: Path
    shown: str
    kind: str
    compression: str  # one of COMPRESSIONS, or "" for none


@dataclass
class Meter:
    """How many bytes of the input files, as they lie on disk, have been read so far."""

    finished_bytes: int = 0
    reading: BinaryIO | None = field(default=None, repr=False)

    @property
    def done_bytes(self) -> int:
        return self.finished_bytes + (self.reading.tell() if self.reading else 0)


class _Readable(Protocol):
    def read(self, n: int, /) -> bytes: ...


def kind_of(name: str) -> tuple[str, str] | None:
    """(kind, compression) told from a file's name, or None where it is of no kind known here."""
    parts = name.lower().split(".")
    compression = parts.pop() if parts[-1] in COMPRESSIONS else ""
    return (parts[-1], compression) if len(parts) > 1 and parts[-1] in KINDS else None


def read_texts(file: InputFile, *, text_field: str, meter: Meter) -> Iterator[Text]:
    """The file's texts, each with whether it ends its document. Raises UserError for a bad file."""
    try:
        raw = file.path.open("rb")
    except OSError as error:
        raise UserError(f"{file.shown}: cannot be opened ({error.strerror}); check it") from None
    meter.reading = raw
    try:
        if file.kind == "parquet":
            yield from _parquet_texts(file, raw, text_field=text_field)
        elif file.kind == "jsonl":
            yield from _jsonl_texts(file, _blocks(file, raw), text_field=text_field)
        else:
            yield from _txt_texts(file, _blocks(file, raw))
        meter.finished_bytes += file.path.stat().st_size
    finally:
        meter.reading = None
        raw.close()


def _decompressed(raw: BinaryIO, compression: str) -> _Readable:
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
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


def _txt_texts(file: InputFile, blocks: Iterator[bytes]) -> Iterator[Text]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read_bytes = 0
    for block in blocks:
        yield _decode(file, decoder, block, read_bytes=read_bytes), False
        read_bytes += len(block)
    yield _decode(file, decoder, b"", read_bytes=read_bytes, final=True), True


def _decode(
    file: InputFile,
    decoder: codecs.IncrementalDecoder,
    block: bytes,
    *,
    read_bytes: int,
    final: bool = False,
) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        # error.object is the block with the few bytes in front of it that the last one left over
        at = read_bytes - (len(error.object) - len(block)) + error.start
        raise UserError(_not_utf8(file, f"byte {at:,}", error)) from None


def _not_utf8(file: InputFile, place: str, error: UnicodeDecodeError) -> str:
    bad = error.object[error.start]
    return f"{file.shown}: not UTF-8 at {place} (0x{bad:02x}); convert the file to UTF-8"


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newline. A line longer than many blocks is joined once, not per block."""
    parts: list[bytes] = []
    for block in blocks:
        first, newline, rest = block.partition(b"\n")
        parts.append(first)
        if newline:
            yield b"".join(parts)
            *whole, last = rest.split(b"\n")
            yield from whole
            parts = [last]
    if any(parts):
        yield b"".join(parts)


def _jsonl_texts(file: InputFile, blocks: Iterator[bytes], *, text_field: str) -> Iterator[Text]:
    for number, line in enumerate(_lines(blocks), start=1):
        if line.strip():
            yield _json_text(file, number, line, text_field=text_field), True


def _json_text(file: InputFile, number: int, line: bytes, *, text_field: str) -> str:
    place = f"line {number:,}"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = f"{place}, byte {error.start:,} of the line"
        raise UserError(_not_utf8(file, where, error)) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file.shown}: {place} is not JSON ({error}); mend or drop it") from None
    if not isinstance(row, dict):
        raise UserError(
            f"{file.shown}: {place} holds {_json_name(row)}, not an object; "
            f'each line must look like {{"{text_field}": "..."}}'
        )
    return _text_of(file, place, row, text_field=text_field, escaped=b"\\u" in line)


def _text_of(
    file: InputFile, place: str, row: dict[str, Any], *, text_field: str, escaped: bool
) -> str:
    text = row.get(text_field)
    if isinstance(text, str):
        # only an escape such as \ud800 can put half a character into a string
        if escaped and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(
                f"{file.shown}: {place} has half a surrogate pair (an escape \\ud800 to \\udfff), "
                "which is no character; mend or drop the line"
            )
        return text
    if text_field in row:
        raise UserError(
            f"{file.shown}: {place}: field {text_field!r} is {_json_name(text)}, not a string; "
            "choose another with text_field"
        )
    there = ", ".join(row) or "no fields at all"
    raise UserError(
        f"{file.shown}: {place} has no field {text_field!r}; it has {there}: "
        "choose one with data.text_field"
    )


def _json_name(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), f"{value!r}")


def _parquet_texts(file: InputFile, raw: BinaryIO, *, text_field: str) -> Iterator[Text]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as spool:
        # parquet is read from its end, so one that was compressed as a whole must lie open first
        source = _spooled(file, raw, spool) if file.compression else raw
        try:
            table = pyarrow.parquet.ParquetFile(source)
            _check_column(file, table.schema_arrow, text_field=text_field)
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                yield from ((_parquet_text(file, cell), True) for cell in batch[0].to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{file.shown}: not a whole parquet file ({reason}); fetch or write it again"
            ) from None


def _spooled(file: InputFile, raw: BinaryIO, spool: Any) -> BinaryIO:
    for block in _blocks(file, raw):
        spool.write(block)
    spool.seek(0, io.SEEK_SET)
    return cast(BinaryIO, spool)


def _check_column(file: InputFile, schema: Any, *, text_field: str) -> None:
    if text_field not in schema.names:
        raise UserError(
            f"{file.shown}: row 1 has no field {text_field!r}; it has {', '.join(schema.names)}: "
            "choose one with data.text_field"
        )
    kind = str(schema.field(text_field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise UserError(
            f"{file.shown}: field {text_field!r} holds {kind}, not strings; "
            "choose another with text_field"
        )


def _parquet_text(file: InputFile, cell: str | None) -> str:
    if cell is None:
        raise UserError(f"{file.shown}: a row's text is null; drop such rows")
    return cell
