"""Documents that cannot be used: named with their place, refused or left out, never half there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from small_corpora import (
    TEXTS,
    child,
    contents,
    documents_of,
    hashes,
    made,
    parquet,
    peak_mib,
    shrink,
    texts,
    write,
)

from tuppence.errors import UserError
from tuppence.text import documents, formats

GOOD = [f"a good document, number {i}" for i in range(6)]


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


# what stands in the third line, why it is bad, what is said of it
LINES: dict[str, tuple[bytes, str, str]] = {
    "not utf-8": (b'{"text": "caf\xe9"}', "not_utf8", r"line 3: not UTF-8 at byte 13 \(0xe9\)"),
    "cut utf-8": (b'{"text": "\xe6\x97"}', "not_utf8", r"line 3: not UTF-8 at byte 10 \(0xe6\)"),
    "nul bytes": (b"\x00\x00\x00", "not_json", "line 3 is not JSON"),
    "empty": (line(""), "empty", "line 3 is empty"),
    "not json": (b'{"text": "abc', "not_json", r"line 3 is not JSON \(Unterminated string.*\)"),
    "words": (b"once upon a time", "not_json", r"line 3 is not JSON \(Expecting value.*\)"),
    "a list": (b'["text"]', "no_text", r'line 3 holds a list, not an object; .*\{"text": "..."\}'),
    "a number": (b"12", "no_text", "line 3 holds 12, not an object"),
    "null": (b"null", "no_text", "line 3 holds null, not an object"),
    "no field": (
        b'{"body": "x", "id": 1}',
        "no_text",
        "line 3: field 'text' is missing; the line has body, id: choose one with data.text_field",
    ),
    "no fields": (b"{}", "no_text", "line 3: field 'text' is missing; the line has no fields"),
    "a null text": (b'{"text": null}', "no_text", "line 3: field 'text' is null, not a string"),
    "a number for text": (b'{"text": 3.5}', "no_text", "line 3: field 'text' is 3.5, not a string"),
    "a list of texts": (b'{"text": ["x"]}', "no_text", "line 3: field 'text' is a list, not a"),
    "half a character": (rb'{"text": "a\ud83d"}', "not_utf8", "line 3 has half a surrogate pair"),
    "too deep": (b"[" * 14_000 + b"]" * 14_000, "not_json", r"line 3 is not JSON \(.*recursion"),
    "too many digits": (
        b'{"text": "x", "n": ' + b"7" * 5000 + b"}",
        "not_json",
        r"line 3 is not JSON \(.*4300 digits",
    ),
    "too long": (line("x" * 40_000), "too_long", "line 3 is 40,012 bytes long, and 30,000 are the"),
}


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents may have 30,000 bytes here."""
    for module in (formats, documents):
        monkeypatch.setattr(module, "MOST_BYTES", 30_000)


def refused(path: Path, root: Path, **asked: Any) -> str:
    """What is said; it is one line, and nothing that could be taken for a corpus is there."""
    with pytest.raises(UserError) as caught:
        made(path, root, **asked)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500
    assert all(found.suffix == ".partial" for found in root.glob("*/"))
    return said


@pytest.mark.usefixtures("most")
@pytest.mark.parametrize("name", LINES)
def test_a_bad_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shrink(monkeypatch, **{"slices.SLICE_BYTES": 1 << 30, "windows.WINDOW_BYTES": 500})
    bad, why, says = LINES[name]
    path, root = tmp_path / "c.jsonl", tmp_path / "out"
    rows = [line(GOOD[0]), line(GOOD[1]), bad, *[line(text) for text in GOOD[2:]]]
    path.write_bytes(b"\n".join(rows) + b"\n")
    said = refused(path, root)
    assert re.search(rf"c\.jsonl: {says}", said), said
    assert "data.on_bad=skip" in said
    prepared = made(path, root, on_bad="skip")  # which goes on from there
    assert sorted(documents_of(prepared)) == GOOD
    assert prepared.manifest.documents == len(GOOD)
    assert prepared.manifest.bad == {why: 1}
    assert list(prepared.manifest.bad_named) == [why]
    assert re.search(says, prepared.manifest.bad_named[why])
    clean = write(tmp_path / "clean.jsonl", GOOD)
    assert prepared.manifest.bytes == made(clean, root).manifest.bytes
    said = refused_again(path, root)
    assert "leaves out 1 broken documents" in said


def refused_again(path: Path, root: Path) -> str:
    """What is there was made by leaving some out; who does not want that is told."""
    with pytest.raises(UserError) as caught:
        made(path, root)
    return str(caught.value)


ROWS: dict[str, tuple[list[str | None], str, str]] = {
    "null": ([GOOD[0], None, *GOOD[1:]], "no_text", "row 2: the text is null"),
    "empty": ([*GOOD[:5], "", GOOD[5]], "empty", "row 6 is empty"),
    "too long": ([*GOOD, "é" * 20_000], "too_long", "row 7 is 40,000 bytes long, and 30,000"),
}


@pytest.mark.usefixtures("most")
@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row(tmp_path: Path, name: str) -> None:
    rows, why, says = ROWS[name]
    path, root = tmp_path / "c.parquet", tmp_path / "out"
    path.write_bytes(parquet(rows, group_rows=2))
    said = refused(path, root)
    assert f"c.parquet: {says}" in said
    prepared = made(path, root, on_bad="skip")
    assert sorted(documents_of(prepared)) == GOOD
    assert prepared.manifest.bad == {why: 1}


def test_a_column_that_is_not_there_is_of_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", GOOD, field="body")
    for on_bad in ("refuse", "skip"):
        said = refused(path, tmp_path / "out", on_bad=on_bad)
        assert "row 1 has no field 'text'; it has id, body: choose one with data.text_field" in said
    said = refused(path, tmp_path / "out", text_field="id")
    assert "field 'id' holds int64, not strings" in said
    assert sorted(documents_of(made(path, tmp_path / "out", text_field="body"))) == GOOD


def test_bad_texts(tmp_path: Path) -> None:
    folder, root = tmp_path / "texts", tmp_path / "out"
    folder.mkdir()
    for number, text in enumerate(GOOD):
        (folder / f"{number}.txt").write_text(text)
    (folder / "2b.txt").write_bytes("café".encode("latin-1"))
    (folder / "4b.txt").write_bytes(b"")
    assert r"texts/2b.txt: not UTF-8 at byte 3 (0xe9)" in refused(folder, root)
    (folder / "2b.txt").unlink()
    assert r"texts/4b.txt is empty" in refused(folder, root)
    (folder / "2b.txt").write_bytes("café".encode("latin-1"))
    prepared = made(folder, root, on_bad="skip")
    assert sorted(documents_of(prepared)) == GOOD
    assert prepared.manifest.bad == {"not_utf8": 1, "empty": 1}


@pytest.mark.parametrize("on_bad", ["refuse", "skip"])
def test_a_long_text_that_is_broken_far_inside_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_bad: str
) -> None:
    """What came before it may be written already, so it cannot be left out."""
    shrink(monkeypatch)
    monkeypatch.setattr(formats, "WHOLE_TEXT_BYTES", 10_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 7_001)
    path = tmp_path / "c.txt"
    for at in (69_999, 70_010, 140_019, 170_000):
        content = bytearray("many words é".encode() * 20_000)[:180_001]
        content[at : at + 2] = b"\xff\xff"
        path.write_bytes(content)
        said = refused(path, tmp_path / "out", on_bad=on_bad)
        with pytest.raises(UnicodeDecodeError) as caught:
            content.decode()
        first = caught.value.start
        assert f"c.txt: not UTF-8 at byte {first:,} (0x{content[first]:02x})" in said
        assert "data.on_bad=skip leaves out no text above 10,000 bytes" in said


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_foreign_character_is_named_with_its_place(tmp_path: Path, kind: str) -> None:
    content = ["abc", "ab" * 300_000 + "!" + "ab", "c", "a?c"]
    path, root = write(tmp_path / f"c.{kind}", content), tmp_path / "out"
    said = refused(path, root, tokenizer="char:abc", seed=None)
    place = {"jsonl": "line 2", "parquet": "row 2"}[kind]
    assert f"character '!' at {path}: {place}, character 600,001 is not among" in said
    assert "char:ALPHABET" in said
    prepared = made(path, root, tokenizer="char:abc", seed=None, on_bad="skip")
    assert sorted(documents_of(prepared)) == ["abc", "c"]
    assert prepared.manifest.bad == {"foreign_character": 2}
    assert prepared.manifest.documents == 2
    assert prepared.manifest.bytes == 4


def test_a_foreign_character_in_a_long_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "WHOLE_TEXT_BYTES", 100_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 30_000)
    path = tmp_path / "c.txt"
    path.write_text("ab" * 300_000 + "\N{SNOWMAN}" + "ab")
    for on_bad in ("refuse", "skip"):
        said = refused(path, tmp_path / "out", tokenizer="char:abc", on_bad=on_bad)
        assert f"'\N{SNOWMAN}' at {path}, character 600,001 is not among" in said


def test_all_are_counted_and_the_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    path = tmp_path / "c.jsonl"
    rows = [line(text) for text in texts(200)]
    for at in (17, 60, 61, 150):
        rows[at] = b"broken"
    rows[33] = line("")
    path.write_bytes(b"\n".join(rows))
    manifests = [
        made(path, tmp_path / str(workers), on_bad="skip", workers=workers).manifest
        for workers in (1, 2)
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0].bad == {"not_json": 4, "empty": 1}
    assert manifests[0].documents == 195
    at = len(b"\n".join(rows[:17])) + 1
    named = manifests[0].bad_named["not_json"]
    assert "c.jsonl: line 18 is not JSON" in named or f"line at byte {at:,} is not JSON" in named


def test_mending_what_was_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    path = tmp_path / "c.jsonl"
    rows = [line(text) for text in texts(100)]
    path.write_bytes(b"\n".join([*rows[:50], b"broken", *rows[50:]]))
    refused(path, tmp_path / "out")
    path.write_bytes(b"\n".join(rows))
    assert sorted(documents_of(made(path, tmp_path / "out"))) == sorted(texts(100))


def test_nothing_but_bad_documents(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"broken\n" * 5)
    for on_bad in ("refuse", "skip"):
        assert "c.jsonl: line 1 is not JSON" in refused(path, tmp_path / "out", on_bad=on_bad)


def test_skipping_gives_what_there_would_be_without_them(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows = [line(text) for text in TEXTS]
    path.write_bytes(b"\n".join([rows[0], b"broken", *rows[1:]]))
    skipped = made(path, tmp_path / "out", on_bad="skip", seed=None, val_tokens=3)
    clean = made(write(tmp_path / "clean.jsonl", TEXTS), tmp_path / "out", seed=None, val_tokens=3)
    assert hashes(skipped) == hashes(clean)
    assert contents(skipped.folder / "tokenizer") == contents(clean.folder / "tokenizer")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_hundred_megabytes_in_one_line(tmp_path: Path, kind: str) -> None:
    """As a line of JSON it is too long, and never held; as a text it is one long document."""
    path, block = tmp_path / f"c.{kind}", b"word " * 200_000
    with path.open("wb") as file:
        if kind == "jsonl":
            file.write(line(GOOD[0]) + b'\n{"text": "')
        for _ in range(100):
            file.write(block)
        if kind == "jsonl":
            file.write(b'"}\n' + line(GOOD[1]))
    asked: dict[str, Any] = {"on_bad": "skip"} | ({"max_tokens": 1000} if kind == "txt" else {})
    peak = peak_mib(child(path, tmp_path / "out", workers=1, shard_tokens=1 << 22, **asked))
    assert peak < 250
    prepared = made(path, tmp_path / "out", shard_tokens=1 << 22, **asked)
    assert prepared.reused
    if kind == "jsonl":
        assert sorted(documents_of(prepared)) == GOOD[:2]
        assert prepared.manifest.bad == {"too_long": 1}
        assert (
            "the line at byte 38 is 100,000,012 bytes long"
            in prepared.manifest.bad_named["too_long"]
        )
    else:
        assert prepared.manifest.train_tokens == 1000
        assert prepared.manifest.val_tokens == 10_000_001
