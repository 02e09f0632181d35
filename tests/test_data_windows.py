"""How an input is cut: slices by size, parts of a file, windows, long texts in pieces."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_corpora import (
    SMALL,
    file_of,
    jsonl,
    made,
    pack,
    parquet,
    shrink,
    stream_of,
    texts,
    write,
)

from tuppence.data import traits
from tuppence.data.lengths import Lengths
from tuppence.errors import UserError
from tuppence.text import formats
from tuppence.text.documents import Document, documents_of
from tuppence.text.formats import Item, Meter, TooLong, read_items
from tuppence.text.inputs import InputFile
from tuppence.text.reading import documents, has_one_document, sampled
from tuppence.text.slices import SLICE_BYTES, Part, slices_of
from tuppence.text.windows import WINDOW_BYTES, Window, windows_of


def items(path: Path, *, nth: int = 0, of: int = 1) -> list[Item]:
    part = Part(0, nth, of)
    return list(read_items(file_of(path), part, text_field="text", meter=Meter()))


def windows(files: list[InputFile]) -> list[Window]:
    return [
        window
        for number, slice_ in enumerate(slices_of(files))
        for window in windows_of(
            slice_, number, files, text_field="text", cut="before_space", meter=Meter()
        )
    ]


# ---------------------------------------------------------------- slices


def sized(name: str, megabytes: int) -> InputFile:
    kind, _, compression = name.partition(".")[2].partition(".")
    return InputFile(name, name, kind, compression, megabytes << 20)


def test_slices_follow_sizes() -> None:
    assert SLICE_BYTES == 64 << 20
    files = [
        sized("a.parquet", 200),
        sized("b.jsonl", 20),
        sized("c.txt", 40),
        sized("d.parquet", 5),
        sized("e.jsonl", 65),
        sized("f.jsonl.zst", 300),
        sized("g.txt", 300),
        sized("h.parquet", 64),
    ]
    assert slices_of(files) == [
        *[(Part(0, nth, 4),) for nth in range(4)],
        (Part(1), Part(2)),
        (Part(3),),
        (Part(4, 0, 2),),
        (Part(4, 1, 2),),
        (Part(5),),  # what is compressed, and a text, cannot be entered in the middle
        (Part(6),),
        (Part(7),),
    ]
    assert slices_of([]) == []


def test_files_added_behind_leave_earlier_slices_alone() -> None:
    files = [sized(f"{i}.jsonl", size) for i, size in enumerate([30, 30, 90, 1, 70, 10, 64])]
    for count in range(1, len(files)):
        before, after = slices_of(files[:count]), slices_of(files)
        assert after[: len(before) - 1] == before[:-1]
        assert after[len(before) - 1][: len(before[-1])] == before[-1]


# ---------------------------------------------------------------- parts of a file

LINES = {
    "plain": jsonl(texts(40)),
    "no newline at the end": jsonl(texts(40)).rstrip(b"\n"),
    "crlf": jsonl(texts(40)).replace(b"\n", b"\r\n"),
    "blank lines": b"\n\n" + jsonl(texts(20)).replace(b"\n", b"\n \n\n") + b"\n\n",
    "a line longer than parts": jsonl(["a", "b" * 3000, "c", "d" * 1000, "e"]),
    "one line": jsonl(["alone"]),
    "one byte lines": b"1\n2\n3\n4",
}


@pytest.mark.parametrize("content", LINES.values(), ids=LINES)
def test_every_line_is_in_one_part(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    whole = [item.content for item in items(path)]
    assert whole == [line for line in content.split(b"\n") if line.strip()]
    for of in [*range(2, 12), 97, len(content), len(content) + 3]:
        parts = [items(path, nth=nth, of=of) for nth in range(of)]
        assert [item.content for part in parts for item in part] == whole, of
    for item in itertools.chain(*parts):  # its place is where it begins
        at = int(item.place.removeprefix("the line at byte ").replace(",", ""))
        assert isinstance(item.content, bytes)
        assert content[at:].startswith(item.content)


def test_lines_are_numbered_as_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"a":1}\n\n\r\n{"b":2}')
    assert [item.place for item in items(path)] == ["line 2", "line 5"]


@pytest.mark.parametrize("compression", ["", "gz", "xz", "zst"])
def test_lines_cross_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    content = jsonl(texts(60))
    path = tmp_path / f"a.jsonl{'.' * bool(compression)}{compression}"
    path.write_bytes(pack(content, compression))
    for block_bytes in (1, 7, 64, 1000):
        monkeypatch.setattr(formats, "BLOCK_BYTES", block_bytes)
        assert [item.content for item in items(path)] == content.splitlines()


@pytest.mark.parametrize("block_bytes", [10, 100, 5000])
def test_only_the_length_of_a_long_line_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(formats, "MOST_BYTES", 100)
    monkeypatch.setattr(formats, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 100 + b"\n" + b"y" * 101 + b"\n" + b"z" * 4000 + b"\nend\n")
    found = items(path)
    assert [item.content for item in found] == [b"x" * 100, TooLong(101), TooLong(4000), b"end"]
    assert [item.place for item in found] == ["line 1", "line 2", "line 3", "line 4"]
    third = items(path, nth=1, of=20)
    assert [item.content for item in third] == []
    assert items(path, nth=19, of=20)[-1].place == f"the line at byte {101 + 102 + 4001:,}"


@pytest.mark.parametrize(("rows", "group_rows"), [(100, 7), (100, 100), (5, 1), (1, 1)])
def test_every_row_is_in_one_part(tmp_path: Path, rows: int, group_rows: int) -> None:
    content = texts(rows)
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(content, group_rows=group_rows))
    whole = items(path)
    assert [item.content for item in whole] == [text.encode() for text in content]
    assert [item.place for item in whole] == [f"row {i + 1}" for i in range(rows)]
    for of in (2, 3, 8, 40):  # more parts than groups: some have no rows
        assert [item for nth in range(of) for item in items(path, nth=nth, of=of)] == whole


# ---------------------------------------------------------------- windows


def test_windows_end_with_the_item_that_fills_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    names = ["a.jsonl", "b.jsonl", "c.parquet", "d.jsonl.gz"]
    for number, name in enumerate(names):
        write(tmp_path / name, texts(90, seed=number))
    files = [file_of(tmp_path / name) for name in names]
    found = windows(files)
    assert len({window.slice for window in found}) > 3
    for number, group in itertools.groupby(found, key=lambda window: window.slice):
        of_slice = list(group)
        assert [window.number for window in of_slice] == list(range(len(of_slice))), number
        for window in of_slice:
            sizes = [item.bytes() for item in window.items]
            assert sum(sizes[:-1]) < SMALL["windows.WINDOW_BYTES"]
            assert sum(sizes) >= SMALL["windows.WINDOW_BYTES"] or window is of_slice[-1]
    expected = [text for seed in range(4) for text in texts(90, seed=seed)]
    read = [
        document.text
        for window in found
        for document in documents_of(window.items, files, text_field="text")
        if isinstance(document, Document)
    ]
    assert read == expected


def test_items_that_hold_nothing_fill_a_window_too(tmp_path: Path) -> None:
    """A million empty lines of JSON are small on disk, and must not be large in memory."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" * 200_000)
    found = windows([file_of(path)])
    assert max(len(window.items) for window in found) <= WINDOW_BYTES // 200 + 1
    assert sum(len(window.items) for window in found) == 200_000


def test_a_long_text_has_windows_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "WHOLE_TEXT_BYTES", 300_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 50_000)
    long = "some words and more. " * 50_000
    for name, text in (("a", "short"), ("b", long), ("c", long), ("d", "end")):
        (tmp_path / f"{name}.txt").write_text(text)
    files = [file_of(tmp_path / f"{name}.txt") for name in "abcd"]
    found = windows(files)
    assert [{item.file for item in window.items} for window in found] == [{0}, {1}, {2}, {3}]
    pieces = found[1].items
    assert "".join(str(item.content) for item in pieces) == long
    assert [item.last for item in pieces] == [False] * (len(pieces) - 1) + [True]
    for first, second in itertools.pairwise(pieces):
        assert second.offset == first.offset + len(str(first.content))


@pytest.mark.parametrize("tokenizer", ["gpt2", "char", "byte"])
def test_a_text_in_pieces_has_the_ids_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    rng = random.Random(1)
    words = ["the", "naïve", "日本語", "😀", "it's", "  ", "\n\n", "\t x", "10,000", "\r\n", "—"]
    text = " ".join(rng.choices(words, k=150_000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    whole = made(tmp_path / "a.txt", tmp_path / "whole", tokenizer=tokenizer)
    monkeypatch.setattr(formats, "WHOLE_TEXT_BYTES", 100_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 33_331)  # cuts characters in two
    shrink(monkeypatch)
    pieces = made(tmp_path / "a.txt", tmp_path / "pieces", tokenizer=tokenizer)
    assert stream_of(pieces) == stream_of(whole)
    assert pieces.manifest.documents == whole.manifest.documents == 1
    assert pieces.manifest.bytes == whole.manifest.bytes == len(text.encode())


class Sips:
    """A stream that gives less than is asked for, as those of other machines do."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def read(self, n: int) -> bytes:
        return self._file.read(min(n, 999))


def test_what_is_long_does_not_depend_on_how_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "WHOLE_TEXT_BYTES", 300_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 50_000)
    monkeypatch.setattr(formats, "_decompressed", lambda raw, packing: Sips(raw.read()))
    path = tmp_path / "a.txt"
    for size, whole in ((300_000, True), (300_001, False)):
        path.write_bytes(b"words and " * (size // 10) + b"x" * (size % 10))
        assert items(path)[0].whole == whole


def test_a_text_that_must_be_seen_whole_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "WHOLE_TEXT_BYTES", 1000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 500)
    monkeypatch.setattr(formats, "MOST_WHOLE", 5000)
    path = tmp_path / "a.txt"

    def read() -> list[Item]:
        part = Part(0)
        return list(
            read_items(file_of(path), part, text_field="text", cut="nowhere", meter=Meter())
        )

    path.write_text("ab " * 1500)
    assert [(item.whole, item.content) for item in read()] == [(True, "ab " * 1500)]
    path.write_text("ab " * 3000)
    with pytest.raises(UserError, match=r"a\.txt: longer than 5,000 characters.*split the file"):
        read()


# ---------------------------------------------------------------- other readers


def test_one_document_or_more(tmp_path: Path) -> None:
    def single(*names: str) -> bool:
        return has_one_document([file_of(tmp_path / name) for name in names])

    write(tmp_path / "a.txt", ["x"])
    write(tmp_path / "b.txt", ["x"])
    write(tmp_path / "one.jsonl", ["x"])
    write(tmp_path / "two.parquet", ["x", "y"])
    (tmp_path / "bad.jsonl").write_text('not json\n{"text": "x"}\n')
    assert single("a.txt")
    assert single("one.jsonl")
    assert single("bad.jsonl")  # what is broken counts for nothing
    assert not single("a.txt", "b.txt")
    assert not single("a.txt", "one.jsonl")
    assert not single("two.parquet")


def test_a_sample_comes_from_all_over_and_all_is_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, **{"slices.SLICE_BYTES": 100})
    content = texts(300)
    file = file_of(write(tmp_path / "a.jsonl", content))
    assert len(slices_of([file])) > 100
    assert list(sampled([file], chars=10**9)) == content
    assert [document.text for document in documents([file])] == content
    some = list(sampled([file], chars=2000))
    assert len(some) < 100
    assert content.index(some[0]) < 30
    assert content.index(some[-1]) > 200


def test_every_character_of_a_large_corpus_has_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, **{"slices.SLICE_BYTES": 60, "windows.WINDOW_BYTES": 60})
    content = [f"{chr(0x100 + i)} and more words" for i in range(80)]
    prepared = made(write(tmp_path / "a.jsonl", content), tmp_path, tokenizer="char")
    assert prepared.manifest.documents == 80


# ---------------------------------------------------------------- statistics


def test_lengths_are_those_of_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    content = [*texts(400), "", "x" * 5000]
    path = write(tmp_path / "a.jsonl", content)
    found = made(path, tmp_path, on_bad="skip").manifest.lengths
    counts = sorted(len(text.encode()) + 1 for text in content if text)
    assert found["shortest"] == counts[0]
    assert found["longest"] == counts[-1]
    for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        exact = counts[min(int(share * len(counts)), len(counts) - 1)]
        assert exact / 2 < found[name] < exact * 2, name


def test_lengths_add_up_in_any_order() -> None:
    counts = np.array([1, 2, 3, 4, 7, 8, 1023, 1024])
    whole = Lengths().plus(counts)
    assert whole.powers == (1, 2, 2, 1, 0, 0, 0, 0, 0, 1, 1)
    assert Lengths().plus(counts[:3]).plus(counts[3:]) == whole
    assert Lengths().plus(counts[5:]).merged(Lengths().plus(counts[:5])) == whole
    assert whole.merged(Lengths()) == Lengths().merged(whole) == whole
    assert whole.quantile(0.0) == 1
    assert whole.quantile(1.0) == 1024
    assert 4 <= whole.quantile(0.5) < 8
    assert Lengths().quantile(0.5) == 0


@pytest.mark.skipif(not traits.can_tell_languages(), reason="needs pycld2")
def test_languages_are_those_of_the_first_of_each_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(traits, "LANGUAGE_SAMPLE", 4)
    kinds = {
        "en": "The rain fell on the old town and nobody minded, for it was the end of summer.",
        "de": "Der Regen fiel auf die alte Stadt, und niemand störte sich daran.",
        "fr": "La pluie tombait sur la vieille ville et personne ne s'en souciait vraiment.",
        "ru": "Дождь падал на старый город, и никто не возражал: лето кончалось.",
        "un": "0123",
    }
    rng = random.Random(3)
    drawn = [rng.choice(list(kinds)) for _ in range(200)]
    path = write(tmp_path / "a.jsonl", [f"{kinds[kind]}\x00 {i}" for i, kind in enumerate(drawn)])
    prepared = made(path, tmp_path)
    counted: Counter[str] = Counter()
    for window in windows([file_of(path)]):
        for item in window.items[:4]:
            assert isinstance(item.content, bytes)
            number = int(json.loads(item.content)["text"].rpartition(" ")[2])
            counted[drawn[number]] += 1
    assert prepared.manifest.languages == {
        name: round(n / counted.total(), 4) for name, n in counted.most_common()
    }
    monkeypatch.setattr(traits, "can_tell_languages", lambda: False)
    assert made(path, tmp_path / "unasked").manifest.languages is None
