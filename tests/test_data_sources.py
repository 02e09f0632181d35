"""Where text comes from: every format and packing, lazily, and what is said when one is bad."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_corpora import TEXTS, made, pack, write

from tuppence.errors import UserError
from tuppence.files import asset
from tuppence.preparing import told
from tuppence.text import reading
from tuppence.text.documents import Bad, documents_of
from tuppence.text.formats import Meter, read_items
from tuppence.text.inputs import kind_of
from tuppence.text.reading import has_one_document
from tuppence.text.slices import Part
from tuppence.text.sources import find_files, left_out, slug_of, source_bytes
from tuppence.tokenizer.pieces import Piece, recut


def documents(source: str, *, text_field: str = "text") -> Iterator[str]:
    """Every document as one string. Raises UserError at the first that is broken."""
    held = ""
    found = find_files(source)
    for number, file in enumerate(found):
        items = read_items(file, Part(number), text_field=text_field, meter=Meter())
        for document in documents_of(list(items), found, text_field=text_field):
            if isinstance(document, Bad):
                raise UserError(document.message)
            held += document.text
            if document.last:
                yield held
                held = ""


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_formats(tmp_path: Path, kind: str, compression: str) -> None:
    path = write(tmp_path / f"corpus.{kind}{compression}", TEXTS)
    assert list(documents(str(path))) == (["".join(TEXTS)] if kind == "txt" else TEXTS)


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
def test_large_txt_is_streamed(tmp_path: Path, compression: str) -> None:
    text = "naïve café 日本 " * 300_000  # several blocks, characters across their borders
    path = write(tmp_path / f"corpus.txt{compression}", [text])
    pieces = list(reading.documents(find_files(str(path))))
    assert len(pieces) > 3
    assert max(len(piece.text) for piece in pieces) <= 1 << 20
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[2].offset == len(pieces[0].text) + len(pieces[1].text)


def test_long_json_lines_cross_blocks(tmp_path: Path) -> None:
    texts = ["a" * 3_000_000, "b", "c" * 1_500_000]
    assert list(documents(str(write(tmp_path / "long.jsonl", texts)))) == texts


def test_named_corpus_folder_glob_and_list(tmp_path: Path) -> None:
    assert len(next(documents("shakespeare"))) == 1_115_394
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.txt", ["bee"])
    write(tmp_path / "sub" / "a.jsonl.gz", ["ay"])
    (tmp_path / "README.md").write_text("not text of the corpus")
    assert list(documents(str(tmp_path))) == ["bee", "ay"]
    assert [file.shown for file in find_files(str(tmp_path))] == [
        f"{tmp_path}/b.txt",
        f"{tmp_path}/sub/a.jsonl.gz",
    ]
    assert list(documents(f"{tmp_path}/*.txt")) == ["bee"]
    assert list(documents(f"{tmp_path}/**/*.jsonl.gz")) == ["ay"]
    assert list(documents(f"{tmp_path}/sub/a.jsonl.gz, {tmp_path}/b.txt")) == ["ay", "bee"]


def test_text_field(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", ["one", "two"], field="content")
    assert list(documents(str(path), text_field="content")) == ["one", "two"]


def test_one_document(tmp_path: Path) -> None:
    one_row = write(tmp_path / "one.jsonl", ["alone"])
    many = write(tmp_path / "many.jsonl", TEXTS)
    text = write(tmp_path / "text.txt", ["some"])
    empty = write(tmp_path / "none.jsonl", [])
    assert has_one_document(find_files(str(text)))
    assert has_one_document(find_files(str(one_row)))
    assert has_one_document(find_files(f"{text},{empty}"))
    assert not has_one_document(find_files(str(many)))
    assert not has_one_document(find_files(f"{text},{one_row}"))
    assert not has_one_document(find_files(f"{text},{text}"))


def test_meter_counts_files_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl.xz", TEXTS * 100)
    meter = Meter()
    found = find_files(str(path))
    for text in reading.documents(found, meter=meter):
        assert text
        assert 0 < meter.done_bytes <= path.stat().st_size
    assert meter.reading is None
    assert meter.done_bytes == path.stat().st_size == source_bytes(found)


@pytest.mark.parametrize(
    ("source", "slug"),
    [
        ("shakespeare", "shakespeare"),
        ("a/books_50mb.jsonl.xz", "books_50mb"),
        ("data/*.parquet", "corpus"),
        ("x y.txt,b.txt", "x-y-and-1-more"),
        ("web.json.gz", "web"),
        ("web.ndjson", "web"),
        ("fineweb_10bt", "fineweb_10bt"),
        ("hf://HuggingFaceFW/fineweb@9bb295d/sample/10BT", "fineweb-sample-10BT"),
        ("hf://datasets/owner/name@refs/convert/parquet/*.parquet", "name"),
        ("s3://bucket/folder/*.parquet", "folder"),
        ("https://host/a/books.jsonl.gz?key=secret", "books"),
    ],
)
def test_slug(source: str, slug: str) -> None:
    assert slug_of(source) == slug


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.TXT", ("txt", "")),
        ("a.jsonl.zst", ("jsonl", "zst")),
        ("a.json", ("jsonl", "")),
        ("a.ndjson.gz", ("jsonl", "gz")),
        ("c4-train.00000-of-01024.json.gz", ("jsonl", "gz")),
        ("a.parquet.xz", ("parquet", "xz")),
        ("a.csv", None),
        ("a.gz", None),
        ("txt", None),
    ],
)
def test_kinds(name: str, kind: tuple[str, str] | None) -> None:
    assert kind_of(name) == kind


def test_json_beside_texts_tells_about_them(tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text('{"made": "today"}')
    write(tmp_path / "a.jsonl.gz", ["other"]).rename(tmp_path / "a.json.gz")
    with pytest.raises(UserError, match=r"about\.json.*'text' is missing"):
        list(documents(f"{tmp_path}/about.json"))
    assert [Path(file.path).name for file in find_files(str(tmp_path))] == [
        "a.json.gz",
        "about.json",
    ]
    write(tmp_path / "b.jsonl", ["text"])
    assert list(documents(str(tmp_path))) == ["text"]


def names_of(source: Path | str, below: Path) -> list[str]:
    return [Path(file.path).relative_to(below).as_posix() for file in find_files(str(source))]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder that links lead into, out of, and round in."""
    folder, other = tmp_path / "corpus", tmp_path / "other"
    for path in (folder / "sub", other):
        path.mkdir(parents=True)
    write(folder / "top.txt", ["top"])
    write(folder / "sub" / "inner.txt", ["inner"])
    write(other / "far.txt", ["far"])
    (folder / "loop").symlink_to(".")
    (folder / "sub" / "up").symlink_to("..")
    for name in ("a_link", "z_link"):  # sorted before and after what they lead to
        (folder / name).symlink_to("sub")
    (folder / "outside").symlink_to("../other")
    (folder / "again.txt").symlink_to("top.txt")
    return folder


def test_links_are_followed_and_no_file_is_read_twice(
    linked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ["outside/far.txt", "sub/inner.txt", "top.txt"]
    assert names_of(linked, linked) == there
    assert names_of(f"{linked}/**/*.txt", linked) == there
    assert names_of(f"{linked}/**", linked) == there
    assert names_of(f"{linked}/**/sub/**/i*.txt", linked) == ["sub/inner.txt"]
    assert sorted(documents(f"{linked}/*/*.txt")) == ["far", "inner", "top"]
    assert sorted(documents(str(linked))) == ["far", "inner", "top"]
    assert left_out(str(linked)) == {}
    monkeypatch.chdir(linked)
    assert [file.shown for file in find_files("**/*.txt")] == there
    top = f"{linked}/top.txt"
    assert list(documents(f"{top},{top}")) == ["top", "top"]  # who says it twice means it


def test_hidden_files_are_not_of_the_corpus(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "corpus"  # what it lies in does not matter
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", ".b.txt", ".git/c.txt"):
        write(folder / name, [name])
    assert names_of(folder, folder) == ["a.txt"]
    assert names_of(f"{folder}/**/*.txt", folder) == ["a.txt"]
    assert names_of(f"{folder}/.*.txt", folder) == [".b.txt"]
    assert names_of(f"{folder}/.b.txt", folder) == [".b.txt"]
    assert left_out(str(folder)) == {}


def test_what_is_left_out_of_a_folder_is_told(tmp_path: Path) -> None:
    folder, bare = tmp_path / "corpus", tmp_path / "bare"
    for path in (folder / "sub", bare):
        path.mkdir(parents=True)
    others = ("README.md", "sub/B.MD", "sub/c.md", "d.text", "e.json", "LICENSE", "g.csv.gz")
    for name in others:
        (folder / name).write_text("{}")
    (folder / "gone.txt").symlink_to("nowhere")
    write(folder / "a.jsonl", TEXTS).rename(folder / "a.ndjson")
    write(bare / "b.json", []).write_text(json.dumps({"text": "x"}))
    assert names_of(folder, folder) == ["a.ndjson"]
    found = left_out(str(folder))
    assert found == {
        ".md": 3,
        ".csv.gz": 1,
        ".json": 1,
        ".text": 1,
        ".txt": 1,
        "without a suffix": 1,
    }
    assert next(iter(found)) == ".md"
    assert left_out(f"{folder}, {bare}") == found
    assert left_out(f"{folder}/*.ndjson,{bare},shakespeare,fineweb,{tmp_path}/none") == {}
    prepared = made(folder, tmp_path / "out")
    lines = told(prepared.folder, prepared.manifest, reused=prepared.reused)
    said = "not read   3 .md, 1 .csv.gz, 1 .json, 1 .text, 1 .txt, 1 without a suffix"
    assert [line for line in lines if line.startswith("not read")] == [said]
    prepared = made(bare, tmp_path / "out")
    lines = told(prepared.folder, prepared.manifest, reused=True)
    assert not any("not read" in line for line in lines)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    write(tmp_path / "a.txt", ["x"])
    scandir = os.scandir

    def denied(path: Path) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"locked: cannot be listed \(Permission denied\)"):
        find_files(str(tmp_path))


def bad_inputs(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(case, source, what the message must say)."""
    good = json.dumps({"text": "fine"})
    write(folder / "books.jsonl", ["x"])
    (folder / "notes.md").write_text("x")
    (folder / "empty").mkdir()
    (folder / "latin.txt").write_bytes(b"x" * (1 << 20) + b"caf\xe9 au lait")
    (folder / "cut.txt").write_bytes("x 日".encode()[:-1])
    (folder / "latin.jsonl").write_bytes(good.encode() + b'\n{"text": "caf\xe9"}\n')
    (folder / "broken.jsonl").write_text(good + "\n" + '{"text": "no end\n')
    (folder / "list.jsonl").write_text(good + "\n\n[1]\n")
    (folder / "field.jsonl").write_text(good + "\n" + '{"title": "a", "body": "b"}\n')
    (folder / "null.jsonl").write_text(good + "\n" + '{"text": null}\n')
    (folder / "half.jsonl").write_text(good + "\n" + '{"text": "a \\ud83d b"}\n')
    write(folder / "field.parquet", ["x"], field="body")
    (folder / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    for packing in ("gz", "xz", "zst"):
        whole = pack(b"hello world\n" * 5000, packing)
        (folder / f"short.txt.{packing}").write_bytes(whole[: len(whole) * 2 // 3])
        yield packing, f"{folder}/short.txt.{packing}", [f"short.txt.{packing}", "truncated"]
    yield "near name", "shakespear", ["no such file", "did you mean shakespeare?"]
    yield "of the Hub", "Skylion007/openwebtext", ["did you mean hf://Skylion007/openwebtext?"]
    yield "near file", f"{folder}/book.jsonl", ["did you mean", "books.jsonl"]
    (folder / "link.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    yield "link", f"{folder}/link.txt", ["link.txt: a link to nowhere.txt, which is not there"]
    yield "pipe", f"{folder}/pipe.txt", ["pipe.txt: neither a file nor a folder"]
    yield "comma", f"{folder}/books.jsonl,", ["books.jsonl,: a comma with nothing beside it"]
    yield "two commas", "a.txt,,b.txt", ["a comma with nothing beside it"]
    yield "empty source", "", ["data.source is empty", "shakespeare"]
    yield "glob", f"{folder}/*.parquet.gz", ["no files match"]
    yield "extension", f"{folder}/notes.md", ["notes.md", "unknown kind", ".jsonl", ".zst"]
    yield "empty folder", f"{folder}/empty", ["no files of a known kind"]
    yield "txt utf-8", f"{folder}/latin.txt", ["latin.txt", "not UTF-8", "byte 1,048,579", "0xe9"]
    yield "txt end", f"{folder}/cut.txt", ["cut.txt", "byte 2", "0xe6"]
    yield "jsonl utf-8", f"{folder}/latin.jsonl", ["latin.jsonl", "line 2", "not UTF-8", "byte 13"]
    yield "json", f"{folder}/broken.jsonl", ["broken.jsonl", "line 2 is not JSON"]
    yield "not an object", f"{folder}/list.jsonl", ["line 3 holds a list, not an object"]
    yield "field", f"{folder}/field.jsonl", ["line 2", "'text' is missing", "title, body"]
    yield "null", f"{folder}/null.jsonl", ["line 2", "'text' is null, not a string"]
    yield "surrogate", f"{folder}/half.jsonl", ["line 2", "half a surrogate pair"]
    yield (
        "parquet field",
        f"{folder}/field.parquet",
        ["field.parquet", "no field 'text'", "id, body"],
    )
    yield "parquet", f"{folder}/bad.parquet", ["bad.parquet", "not a whole parquet file"]


def test_bad_inputs(tmp_path: Path) -> None:
    for case, source, parts in bad_inputs(tmp_path):
        with pytest.raises(UserError) as caught:
            list(documents(source))
        message = str(caught.value)
        assert "\n" not in message, case
        assert len(message) < 450 + len(source), (case, message)
        for part in parts:
            assert part in message, (case, message)


@pytest.mark.parametrize("cut", ["anywhere", "before_space", "nowhere"])
def test_recut_does_not_depend_on_how_text_arrives(cut: str) -> None:
    text = asset("shakespeare.txt").read_text(encoding="utf-8")[:30_000]
    text += "x" * 5000 + " y" + "!\tb\x1cc\u2003d " * 300

    def arriving(size: int) -> Iterator[Piece]:
        for document in range(2):
            for start in range(0, len(text), size):
                yield Piece(text[start : start + size], document, start, False)
            yield Piece("", document, len(text), True)

    whole = list(recut(arriving(10**9), cut=cut, piece_chars=1000))  # type: ignore[arg-type]
    for size in (7, 999, 4096):
        assert list(recut(arriving(size), cut=cut, piece_chars=1000)) == whole  # type: ignore[arg-type]
    assert "".join(piece.text for piece in whole) == 2 * text
    assert sum(piece.last for piece in whole) == 2
    if cut == "nowhere":
        assert len(whole) == 2
    else:
        assert len(whole) > 60
        assert all(text[p.offset : p.offset + len(p.text)] == p.text for p in whole)
    if cut == "before_space":
        borders = [(text[piece.offset - 1], piece.text[0]) for piece in whole if piece.offset]
        assert not any(before.isspace() for before, _ in borders)
        assert all(after == " " or before.isalpha() > after.isalpha() for before, after in borders)
