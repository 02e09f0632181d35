"""What files hold besides plain text: xz streams, byte order marks, columns of every kind."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from small_corpora import TEXTS, child, file_of, jsonl, made, peak_mib, texts

from tuppence.errors import UserError
from tuppence.text import columns, formats
from tuppence.text.documents import Bad, Document, documents_of
from tuppence.text.formats import Item, Meter, read_items
from tuppence.text.slices import Part

BOM = b"\xef\xbb\xbf"


def items(path: Path, *, text_field: str = "text", part: Part | None = None) -> list[Item]:
    of = part or Part(0)
    return list(read_items(file_of(path), of, text_field=text_field, meter=Meter()))


def documents(path: Path, *, text_field: str = "text") -> list[str]:
    """The text of each document; of a bad one what is said."""
    found = documents_of(items(path, text_field=text_field), [file_of(path)], text_field=text_field)
    return [each.text if isinstance(each, Document) else each.message for each in found]


# ---------------------------------------------------------------- xz


@pytest.mark.parametrize("zeros", [0, 4, 200_000])
def test_streams_of_xz_follow_one_another(tmp_path: Path, zeros: int) -> None:
    content = jsonl(texts(300))
    path = tmp_path / "c.jsonl.xz"
    streams = [lzma.compress(part) for part in (content[:5000], b"", content[5000:])]
    path.write_bytes(b"".join(stream + b"\0" * zeros for stream in streams))
    assert [item.content for item in items(path)] == content.splitlines()


STREAM = lzma.compress(jsonl(texts(50)))
DAMAGE = {
    "a second header": STREAM + STREAM[:7] + b"?" + STREAM[8:],
    "a second magic": STREAM + b"?" + STREAM[1:],
    "a second stream that ends early": STREAM + STREAM[:-9],
    "something else behind": STREAM + b"trailing garbage",
    "a little behind": STREAM + b"\0\0\0\0x",
    "an index": STREAM[:-30] + bytes([STREAM[-30] ^ 1]) + STREAM[-29:],
    "nothing": b"",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_damaged_xz_is_not_half_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.jsonl.xz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"c\.jsonl\.xz: its \.xz data is truncated or damaged"):
        items(path)


def test_xz_is_decompressed_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.txt.xz"
    path.write_bytes(lzma.compress(bytes(50_000_000)))
    with path.open("rb") as raw:
        blocks = formats._blocks(file_of(path), raw)
        assert len(next(blocks)) <= formats.BLOCK_BYTES


# ---------------------------------------------------------------- byte order marks


@pytest.mark.parametrize("compression", ["", ".xz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, compression: str) -> None:
    rows, text = BOM + jsonl(TEXTS), BOM + "one text \ufeff".encode()
    pack = lzma.compress if compression else bytes
    for name, content in (("c.jsonl", rows), ("c.txt", text), ("none.jsonl", BOM + b"\n")):
        (tmp_path / f"{name}{compression}").write_bytes(pack(content))
    assert documents(tmp_path / f"c.jsonl{compression}") == TEXTS
    assert documents(tmp_path / f"c.txt{compression}") == ["one text \ufeff"]
    assert documents(tmp_path / f"none.jsonl{compression}") == []


def test_lines_behind_a_byte_order_mark_are_in_one_part(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(BOM + jsonl(TEXTS))
    for of in (2, 3, 7, 100):
        found = [item.content for nth in range(of) for item in items(path, part=Part(0, nth, of))]
        assert found == jsonl(TEXTS).splitlines()


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 4, 1000])
def test_a_byte_order_mark_of_a_long_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(formats, "WHOLE_TEXT_BYTES", 500)
    monkeypatch.setattr(formats, "BLOCK_BYTES", block_bytes)
    text = "\ufefflong text " * 100
    path = tmp_path / "c.txt"
    path.write_bytes(BOM + text.encode())
    found = items(path)
    assert isinstance(found[0].content, str)
    assert "".join(str(item.content) for item in found) == text


# ---------------------------------------------------------------- columns


def parquet(path: Path, *, group_rows: int = 1 << 20, **fields: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(fields), path, row_group_size=group_rows)
    return path


KINDS = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
    "string_view": pyarrow.string_view(),
    "binary_view": pyarrow.binary_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_column_of_text_of_every_kind(tmp_path: Path, kind: Any) -> None:
    rows = [*TEXTS, None, *TEXTS]
    cells = pyarrow.array([None if row is None else row.encode() for row in rows])
    path = parquet(
        tmp_path / "c.parquet", n=range(len(rows)), text=cells.cast(pyarrow.string()).cast(kind)
    )
    assert pyarrow.parquet.read_schema(path).field("text").type == kind
    assert documents(path) == [*TEXTS, f"{path}: row 4: the text is null", *TEXTS]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    cells = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary())
    path = parquet(tmp_path / "c.parquet", text=cells)
    assert documents(path) == ["good", f"{path}: row 2: not UTF-8 at byte 3 (0xe9)"]


def test_a_field_in_a_field(tmp_path: Path) -> None:
    rows = [{"n": 1, "in": {"text": text}} for text in TEXTS]
    path = parquet(tmp_path / "c.parquet", meta=[*rows, None, {"n": 2, "in": None}])
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"meta": row}) + "\n" for row in [*rows, None]))
    assert documents(path, text_field="meta.in.text")[:-2] == TEXTS
    assert documents(path, text_field="meta.in.text")[-1].endswith("row 5: the text is null")
    assert documents(lines, text_field="meta.in.text")[:-1] == TEXTS
    assert "'meta.in.text' is missing" in documents(lines, text_field="meta.in.text")[-1]
    with pytest.raises(UserError, match=r"no field 'meta\.text'; it has meta\.n, meta\.in\.text:"):
        items(path, text_field="meta.text")
    with pytest.raises(UserError, match=r"field 'meta\.in' holds struct<.*>, not strings"):
        items(path, text_field="meta.in")


def test_a_name_with_a_dot_in_it(tmp_path: Path) -> None:
    """It is a name first; and `text` is not all that begins with it."""
    path = parquet(
        tmp_path / "c.parquet",
        **{"text.x": ["a"], "text": ["b"], "meta": [{"text": "c"}], "meta.text": ["d"]},
    )
    lines = tmp_path / "c.jsonl"
    lines.write_text(json.dumps({"meta": {"text": "c"}, "meta.text": "d", "text": "b"}))
    assert documents(path, text_field="text.x") == ["a"]
    for each in (path, lines):
        assert documents(each) == ["b"]
        assert documents(each, text_field="meta.text") == ["d"]


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    arrays = [pyarrow.array(TEXTS)] * 3
    table = pyarrow.Table.from_arrays(arrays, names=["text", "text", "other"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match=r"c\.parquet: 2 fields are called 'text'; rename them"):
        items(path)
    assert documents(path, text_field="other") == TEXTS


def test_of_many_names_some_are_told(tmp_path: Path) -> None:
    names = {f"c{number}": [number] for number in range(1500)}
    path = parquet(tmp_path / "c.parquet", **names)
    with pytest.raises(UserError, match=r"it has c0, c1, .*, c11 and 1,488 more: choose") as caught:
        items(path)
    assert len(str(caught.value)) < 400
    lines = tmp_path / "c.jsonl"
    lines.write_text(json.dumps(names) + "\n" + json.dumps({"a\nb" + "x" * 1000: 1}))
    many, long = documents(lines)
    assert "the line has c0, c1, " in many
    assert "c11 and 1,488 more: choose one with data.text_field" in many
    assert long.endswith(f"has a b{'x' * 57}: choose one with data.text_field")


def test_of_long_texts_few_rows_are_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "BATCH_BYTES", 10_000)
    sizes: list[int] = []
    right = formats.cells_of

    def seen(batch: Any, *args: Any, **options: Any) -> Any:
        sizes.append(batch.num_rows)
        return right(batch, *args, **options)

    monkeypatch.setattr(formats, "cells_of", seen)
    short = [f"{number:06}" for number in range(600)]
    long = [f"{number}" * 1000 for number in range(1000, 1010)]
    longer = [f"{number}" * 9000 for number in range(1000, 1003)]
    meta = [{"text": text} for text in [*short, *long, *longer]]
    every = pyarrow.table({"text": [*short, *long, *longer], "meta": meta})
    path = tmp_path / "c.parquet"
    with pyarrow.parquet.ParquetWriter(path, every.schema) as writer:
        for start, stop in ((0, 600), (600, 610), (610, 613)):
            writer.write_table(every.slice(start, stop - start))
    for text_field in ("text", "meta.text"):
        sizes.clear()
        assert documents(path, text_field=text_field) == [*short, *long, *longer]
        assert sizes[:3] == [256, 256, 88], text_field
        assert sizes[-3:] == [1, 1, 1], text_field
        assert sizes[3:-3] == [2] * 5, text_field


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_cell_that_is_too_long_is_not_copied(tmp_path: Path) -> None:
    """The library holds it three times, and nobody here does."""
    path = parquet(tmp_path / "c.parquet", text=["x" * 150_000_000, *TEXTS])
    asked: dict[str, Any] = {"on_bad": "skip", "val_tokens": 1}
    peak = peak_mib(child(path, tmp_path / "out", workers=1, **asked))
    assert peak < 150 + 3.2 * 143
    bad = made(path, tmp_path / "out", **asked).manifest.bad_named
    assert bad["too_long"].endswith("row 1 is 150,000,000 bytes long, and 33,554,432 are the most")


# ---------------------------------------------------------------- JSON that is not lines


ARRAYS = {
    "in one line": '[{"text": "a"}, {"text": "b"}]',
    "over many lines": '[\n{"text": "a"},\n{"text": "b"}\n]',
    "an object over many lines": '{\n "text": "hello"\n}',
}


@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS)
def test_an_array_is_told_how_to_become_lines(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    said = documents(path)[0]
    assert "line 1 " in said
    assert "jq -c '.[]'" in said
    path.write_text('{"text": "no end\n')
    assert "jq" not in documents(path)[0]


def test_a_large_array_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MOST_BYTES", 100)
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{"text": "x" * 200}]) + "\n" + json.dumps({"text": "x" * 200}))
    first, second = documents(path)
    assert "line 1 is 214 bytes long" in first
    assert "jq -c '.[]'" in first
    assert "line 2 is 212 bytes long" in second
    assert "jq" not in second


def test_what_a_field_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": null}\n{"id": 1, "text": 2, "body": "x"}\n{"id": 1}\n')
    (file, found) = file_of(path), items(path)
    said = [
        each.message.removeprefix(f"{path}: ")
        for each in documents_of(found, [file], text_field="text")
        if isinstance(each, Bad)
    ]
    assert said == [
        "line 1: field 'text' is null, not a string",
        "line 2: field 'text' is 2, not a string; the line has also id, body: choose one with "
        "data.text_field",
        "line 3: field 'text' is missing; the line has id: choose one with data.text_field",
    ]
