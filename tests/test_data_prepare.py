"""Preparation: exact counts and splits, caps, order, reuse, and damage found."""

from __future__ import annotations

import dataclasses
import itertools
import json
import lzma
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from small_corpora import (
    REPOSITORY,
    SHARED,
    TEXTS,
    child,
    contents,
    documents_of,
    hashes,
    made,
    peak_mib,
    shrink,
    stream_of,
    texts,
    tokens_of,
    write,
)

from tuppence.data.prepare import (
    Options,
    Place,
    Prepared,
    Progress,
    prepare,
    prepare_slices,
    survey,
)
from tuppence.data.shards import (
    MANIFEST,
    Manifest,
    header,
    load_manifest,
    open_shard,
    token_dtype,
    verify,
    write_shard,
)
from tuppence.data.split import VAL_MOST, Asked
from tuppence.data.work import done_of
from tuppence.errors import Fault, UserError
from tuppence.files import asset
from tuppence.preparing import told
from tuppence.text import formats
from tuppence.tokenizer.ranks import GPT2_SPLIT, published_ranks
from tuppence.tokenizer.spec import load_tokenizer

# ---------------------------------------------------------------- counts and ids


def test_shakespeare_char_is_nanogpts(tmp_path: Path) -> None:
    text = asset("shakespeare.txt").read_text(encoding="utf-8")
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    prepared = made("shakespeare", tmp_path, tokenizer="char")
    manifest = prepared.manifest
    assert tokens_of(prepared, "train") == [ids[c] for c in text[:cut]]
    assert tokens_of(prepared, "val") == [ids[c] for c in text[cut:]]
    assert (manifest.train_tokens, manifest.val_tokens) == (1_003_854, 111_540)
    assert (manifest.vocab_size, manifest.end_of_text, manifest.documents) == (65, None, 1)
    assert (manifest.bytes, manifest.val_bytes) == (1_115_394, 111_540)
    assert manifest.bytes_per_token == 1.0
    assert [item.path for item in manifest.inputs] == ["shakespeare"]
    assert prepared.folder.parent == tmp_path
    assert prepared.folder.name == f"shakespeare-char-{manifest.inputs_sha256[:12]}"
    assert load_tokenizer(prepared.folder / "tokenizer").sha256 == manifest.tokenizer_sha256


def test_gpt2_counts_and_ids_are_tiktokens(tmp_path: Path) -> None:
    text = asset("shakespeare.txt").read_text(encoding="utf-8")
    tik = tiktoken.Encoding(
        "g", pat_str=GPT2_SPLIT.regex, mergeable_ranks=published_ranks("gpt2"), special_tokens={}
    )
    prepared = made("shakespeare", tmp_path, tokenizer="gpt2")
    assert stream_of(prepared) == [*tik.encode_ordinary(text), 50_256]
    assert prepared.manifest.tokens == 338_026
    assert prepared.manifest.bytes == 1_115_394
    val = tokens_of(prepared, "val")
    assert prepared.manifest.val_bytes == len(tik.decode_bytes(val[:-1]))


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_end_of_text_follows_every_document(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "c.jsonl", TEXTS)
    prepared = made(path, tmp_path, tokenizer=tokenizer, seed=None)
    assert documents_of(prepared) == TEXTS
    assert prepared.manifest.documents == len(TEXTS)
    assert prepared.manifest.bytes == sum(len(text.encode()) for text in TEXTS)


def test_formats_and_packings_give_the_same_tokens(tmp_path: Path) -> None:
    expected = None
    for kind, packing in itertools.product(("jsonl", "parquet"), ("", ".gz", ".xz", ".zst")):
        path = write(tmp_path / f"corpus.{kind}{packing}", TEXTS)
        prepared = made(path, tmp_path / "out", tokenizer="gpt2", val_tokens=5)
        assert expected in (None, hashes(prepared))
        expected = hashes(prepared)
    packed = [write(tmp_path / f"t.txt{packing}", TEXTS) for packing in ("", ".gz", ".xz", ".zst")]
    streams = [stream_of(made(path, tmp_path / "out", tokenizer="gpt2")) for path in packed]
    assert all(stream == streams[0] for stream in streams)


def test_shards_roll_and_the_tail_crosses_them(tmp_path: Path) -> None:
    whole = made("shakespeare", tmp_path / "a", tokenizer="gpt2")
    parts = made("shakespeare", tmp_path / "b", tokenizer="gpt2", shard_tokens=25_000)
    assert stream_of(whole) == stream_of(parts)
    sizes = [shard.tokens for shard in parts.manifest.of_split("train")]
    assert sizes[:-1] == [25_000] * 12
    assert sum(sizes) == parts.manifest.train_tokens == whole.manifest.train_tokens
    assert parts.manifest.val_sha256 == whole.manifest.val_sha256
    assert {path.name for path in parts.folder.glob("*.bin")} == {
        shard.file for shard in parts.manifest.shards
    }
    verify(parts.folder, parts.manifest)


# ---------------------------------------------------------------- order


def test_every_document_once_in_an_order_that_the_seed_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    content = texts(300)
    path = write(tmp_path / "c.jsonl", content)
    orders = {}
    for seed in (None, 0, 1):
        prepared = made(path, tmp_path, seed=seed)
        orders[seed] = documents_of(prepared)
        assert prepared.manifest.seed == seed
        assert Counter(orders[seed]) == Counter(content)
        assert prepared.manifest.documents == 300
    assert orders[None] == content
    assert orders[0] != content
    assert orders[0] != orders[1]
    assert documents_of(made(path, tmp_path / "again", seed=1)) == orders[1]
    # a window's documents stay in their window: no document goes far
    far = max(abs(orders[0].index(text) - i) for i, text in enumerate(content))
    assert 1 < far < 20


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet", "c.jsonl.zst"])
def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shrink(monkeypatch)
    path = write(tmp_path / name, texts(200))
    counts = (1, 2, 4) if name == "c.jsonl" else (1, 2)
    one, *others = [
        made(path, tmp_path / str(workers), workers=workers, shard_tokens=1000)
        for workers in counts
    ]
    assert len(one.manifest.shards) > 10
    for other in others:
        assert contents(other.folder) == contents(one.folder)


# ---------------------------------------------------------------- split and caps


def test_the_split_of_many_documents() -> None:
    def split(
        tokens: int, *, estimated: bool = False, **asked: int | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        defaults: dict[str, Any] = {"max_tokens": None, "val_tokens": None, "source_bytes": 5000}
        found = Asked(**defaults | asked, single=False).split(tokens, estimated=estimated)
        return found.val, found.train

    assert split(1500) == ((0, 100), (100, 1500))
    assert split(600) == ((0, 100), (100, 600))  # by the bytes alone
    assert split(600, max_tokens=300) == ((0, 100), (100, 400))
    assert split(10**9, source_bytes=10**12)[0] == (0, VAL_MOST)
    assert split(1500, val_tokens=7) == ((0, 7), (7, 1500))
    assert split(1500, max_tokens=300) == ((0, 100), (100, 400))
    assert split(400, max_tokens=300) == ((0, 100), (100, 400))
    assert split(450, max_tokens=300) == ((0, 100), (100, 400))  # a window more than was wanted
    assert split(1500, max_tokens=5) == ((0, 100), (100, 105))  # whatever the cap
    assert split(1500, max_tokens=300, val_tokens=7) == ((0, 7), (7, 307))
    for cap, stop in ((None, 199), (5, 25), (1000, 199)):
        assert split(199, max_tokens=cap) == ((0, 20), (20, stop))  # a fiftieth is more than half
    assert Asked(5, None, 5000, single=False).wanted_tokens() == 200  # which shows that
    assert Asked(5, 100, 5000, single=False).wanted_tokens() == 105
    assert split(1051, max_tokens=300, val_tokens=751) == ((0, 751), (751, 1051))
    for cap in (None, 750):
        with pytest.raises(UserError, match=r"val_tokens 751 is more than half of the 1,500"):
            split(1500, val_tokens=751, max_tokens=cap)
        assert split(1500, val_tokens=751, max_tokens=cap, estimated=True)[0] == (0, 750)


def test_the_rule_says_when_a_cap_was_not_reached() -> None:
    def rule(tokens: int, *, single: bool = False, cap: int | None = 300) -> str:
        asked = Asked(cap, None, source_bytes=5000, single=single)
        return asked.rule(asked.split(tokens)).partition("train is ")[2]

    assert rule(1500) == "the next 300"
    assert rule(400) == "the next 300"
    assert rule(399) == "all the others, 299, fewer than data.max_tokens=300"
    assert rule(1500, cap=None) == "all the others"
    assert rule(1500, single=True) == "the first 300"
    assert rule(100, single=True) == "all the others, 90, fewer than data.max_tokens=300"


def test_the_split_of_one_text() -> None:
    def split(tokens: int, **asked: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
        defaults: dict[str, Any] = {"max_tokens": None, "val_tokens": None, "source_bytes": 5000}
        found = Asked(**defaults | asked, single=True).split(tokens)
        return found.train, found.val

    assert split(1005) == ((0, 904), (904, 1005))
    assert split(1005, val_tokens=5) == ((0, 1000), (1000, 1005))
    assert split(1005, max_tokens=300) == ((0, 300), (904, 1005))
    assert split(1005, max_tokens=2000) == ((0, 904), (904, 1005))
    assert split(10**9)[1] == (10**9 - VAL_MOST, 10**9)


def test_val_is_the_first_of_many_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    path = write(tmp_path / "c.jsonl", texts(300))
    prepared = made(path, tmp_path, val_tokens=1234)
    assert prepared.manifest.val_tokens == 1234
    assert tokens_of(prepared, "val") == stream_of(prepared)[:1234]
    assert Counter(documents_of(prepared)) == Counter(texts(300))
    assert "first 1,234 of the stream" in prepared.manifest.split_rule
    half = path.stat().st_size // 50
    assert made(path, tmp_path).manifest.val_tokens == half


def with_much_else(path: Path, rows: list[str], *, bytes_each: int) -> Path:
    """Texts in lines that have another field too."""
    other = "x" * bytes_each
    path.write_text("".join(json.dumps({"other": other, "text": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("bytes_each", "least", "most"), [(900, 0.2, 0.5), (4000, 0.1, 0.1001)])
def test_a_cap_does_not_move_val_of_files_with_much_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_each: int, least: float, most: float
) -> None:
    shrink(monkeypatch)
    path = with_much_else(tmp_path / "c.jsonl", texts(300), bytes_each=bytes_each)
    whole = made(path, tmp_path).manifest
    assert least <= whole.val_tokens / whole.tokens <= most
    for cap in (100, 9_000, 10**9):
        capped = made(path, tmp_path, max_tokens=cap).manifest
        assert capped.val_sha256 == whole.val_sha256
        assert capped.train_tokens == min(cap, whole.train_tokens)


@pytest.mark.parametrize("url", [None, "bucket"])
@pytest.mark.parametrize(("tokenizer", "val"), [("byte", 557_698), ("gpt2", 200_000)])
def test_a_val_split_that_is_too_large_leaves_nothing(
    tmp_path: Path, tokenizer: str, val: int, url: str | None
) -> None:
    """Where the bytes tell, no token is made before it is refused."""
    phases: list[str] = []
    with pytest.raises(UserError, match=rf"val_tokens {val:,} is more than half"):
        prepare(
            source="shakespeare",
            tokenizer=tokenizer,
            root=Place(tmp_path / "here", url and f"file://{tmp_path}/{url}"),
            options=Options(val_tokens=val, workers=1),
            on_progress=lambda progress: phases.append(progress.phase),
        )
    assert ("tokenizing" in phases) == (tokenizer == "gpt2")
    assert not [path for path in tmp_path.glob("here/*") if path.is_dir()]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}


def test_bytes_that_tell_little_refuse_nothing(tmp_path: Path) -> None:
    """Of what is compressed there may be any number of tokens."""
    path = write(tmp_path / "c.jsonl.xz", ["the same words"] * 1000)
    assert path.stat().st_size < 1000
    assert made(path, tmp_path, val_tokens=7000).manifest.val_tokens == 7000


@pytest.mark.parametrize("val", [None, 1, 500])
def test_a_cap_is_exact_and_does_not_move_val(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val: int | None
) -> None:
    shrink(monkeypatch)
    path = write(tmp_path / "c.jsonl", texts(300))
    whole = made(path, tmp_path, val_tokens=val)
    stream, end = stream_of(whole), whole.manifest.end_of_text
    sizes = load_tokenizer(whole.folder / "tokenizer").token_bytes()
    # the last two: where documents end, and one token behind that
    ends = [i + 1 for i, token in enumerate(stream) if token == end]
    in_train = next(i for i in ends if i > 5000) - whole.manifest.val_tokens
    for cap in (1, 600, 4097, 9000, in_train, in_train + 1):
        prepared = made(path, tmp_path, max_tokens=cap, val_tokens=val)
        manifest = prepared.manifest
        assert manifest.train_tokens == cap
        assert manifest.val_tokens == whole.manifest.val_tokens
        assert manifest.val_sha256 == whole.manifest.val_sha256
        assert manifest.max_tokens == cap
        kept = stream[: manifest.val_tokens + cap]
        assert stream_of(prepared) == kept
        assert manifest.tokens == len(kept)
        assert manifest.bytes == int(sizes[kept].sum())
        # a document counts where it begins
        assert manifest.documents == kept.count(end) + (kept[-1] != end), cap
        verify(prepared.folder, manifest)


def test_a_cap_on_one_text_leaves_its_end_for_val(tmp_path: Path) -> None:
    whole = made("shakespeare", tmp_path, tokenizer="gpt2")
    for cap in (1, 65_537, 300_000, 304_223):
        prepared = made("shakespeare", tmp_path, tokenizer="gpt2", max_tokens=cap)
        assert prepared.manifest.train_tokens == cap
        assert prepared.manifest.val_sha256 == whole.manifest.val_sha256
        assert tokens_of(prepared, "train") == tokens_of(whole, "train")[:cap]
        assert prepared.manifest.documents == 1
        sizes = load_tokenizer(prepared.folder / "tokenizer").token_bytes()
        assert prepared.manifest.bytes == int(sizes[stream_of(prepared)].sum())
    with pytest.raises(UserError, match="more than half of the 338,026"):
        made("shakespeare", tmp_path, tokenizer="gpt2", val_tokens=200_000)


def test_a_cap_beyond_the_corpus_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    for source in ("shakespeare", str(write(tmp_path / "c.jsonl", texts(200)))):
        whole = made(source, tmp_path, tokenizer="char")
        capped = made(source, tmp_path, tokenizer="char", max_tokens=10**9)
        assert hashes(capped) == hashes(whole)
        assert capped.folder != whole.folder
        assert "fewer than data.max_tokens=1,000,000,000" in capped.manifest.split_rule
        said = told(capped.folder, capped.manifest, reused=False)
        assert "all of it  there is less than data.max_tokens=1,000,000,000" in said


def test_files_sorted_later_do_not_move_val(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        write(folder / f"{number}.jsonl", texts(100, seed=number))
    few = made(folder, tmp_path / "out", val_tokens=4000).manifest
    write(folder / "3.parquet", texts(100, seed=3))
    write(folder / "4.jsonl.gz", texts(100, seed=4))
    more = made(folder, tmp_path / "out", val_tokens=4000).manifest
    assert more.val_sha256 == few.val_sha256
    assert more.documents == few.documents + 200
    assert more.inputs_sha256 != few.inputs_sha256


def test_reading_stops_when_enough_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies behind the cap is not even looked at: here it is not JSON."""
    shrink(monkeypatch)
    path = tmp_path / "c.jsonl"
    path.write_bytes(write(path, texts(300)).read_bytes() + b"not json\n")
    with pytest.raises(UserError, match=r"c\.jsonl: the line at byte [\d,]+ is not JSON"):
        made(path, tmp_path)
    prepared = made(path, tmp_path, max_tokens=2000)
    assert prepared.manifest.train_tokens == 2000
    assert not prepared.manifest.bad


def test_what_ranks_read_behind_the_cap_is_not_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):  # a slice each
        path = write(folder / f"{number}.jsonl", texts(35, seed=number))
        path.write_bytes(path.read_bytes() + b"not json\n" * (number == 2))
    tokens = sum(len(text.encode()) + 1 for seed in (0, 1) for text in texts(35, seed=seed))
    asked: dict[str, Any] = {"max_tokens": tokens - 500, "val_tokens": 100, "on_bad": "skip"}
    asked["workers"] = 1
    for rank in (2, 1, 0):
        options = Options(**asked, rank=rank, world=3)
        prepare_slices(source=str(folder), tokenizer="byte", root=tmp_path / "a", options=options)
    (partial,) = (tmp_path / "a").glob("*.partial")
    assert done_of(partial, 2).bad  # it did not know how much the others would find
    options = Options(**asked)
    merged = prepare(
        source=str(folder), tokenizer="byte", root=tmp_path / "a", options=options, merge=3
    )
    assert hashes(merged) == hashes(made(folder, tmp_path / "b", **asked))
    assert not merged.manifest.bad


def test_a_long_text_counts_with_all_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(formats, "WHOLE_TEXT_BYTES", 300_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 100_000)
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in (
        ("a", "x"),
        ("b", "long " * 150_000),
        ("c", "short"),
        ("d", "long " * 99_999),
    ):
        (folder / f"{name}.txt").write_text(text)
    lengths = made(folder, tmp_path, val_tokens=1).manifest.lengths
    assert (lengths["shortest"], lengths["longest"]) == (2, 750_001)
    # reading stops in a later window of it
    lengths = made(folder, tmp_path, val_tokens=1, max_tokens=300_000).manifest.lengths
    assert lengths["shortest"] == 2
    assert 300_000 < lengths["longest"] < 750_001
    path = write(tmp_path / "one.txt", ["long " * 150_000])
    assert made(path, tmp_path).manifest.lengths["median"] == 750_001


# ---------------------------------------------------------------- again, and at once


def test_reuse_and_fresh(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", TEXTS)

    def ask(*, fresh: bool = False, **asked: Any) -> Prepared:
        source, tokenizer = asked.pop("source", path), asked.pop("tokenizer", "byte")
        return prepare(
            source=str(source),
            tokenizer=tokenizer,
            root=tmp_path,
            options=Options(**asked),
            fresh=fresh,
        )

    first = ask()
    assert not first.reused
    again = ask()
    assert again.reused
    assert again.manifest == first.manifest
    before = contents(first.folder)
    (first.folder / "train_000000.bin").write_bytes(b"spoiled")
    made_anew = ask(fresh=True)
    assert not made_anew.reused
    assert made_anew.folder == first.folder
    assert contents(made_anew.folder) == before
    keys = {first.manifest.inputs_sha256}
    for asked in (
        {"tokenizer": "char"},
        {"tokenizer": "char:" + "".join(sorted(set("".join(TEXTS))))},
        {"max_tokens": 40},
        {"val_tokens": 7},
        {"shard_tokens": 50},
        {"seed": 1},
        {"seed": None},
        {"dedup": "exact"},
        {"source": write(tmp_path / "more.jsonl", [*TEXTS, "x"])},
    ):
        keys.add(ask(**asked).manifest.inputs_sha256)
    assert len(keys) == 10
    moved = write(tmp_path / "other.jsonl", TEXTS)
    assert ask(source=moved).manifest.inputs_sha256 == first.manifest.inputs_sha256
    for asked in ({"workers": 2}, {"on_bad": "skip"}):
        assert ask(**asked).reused


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[Progress] = []
    prepared = prepare(
        source="shakespeare", tokenizer="gpt2", root=tmp_path, on_progress=seen.append
    )
    tokenizing = [progress for progress in seen if progress.phase == "tokenizing"]
    assert tokenizing[-1].tokens == prepared.manifest.tokens
    assert tokenizing[-1].done_bytes == tokenizing[-1].total_bytes == 1_115_394


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_progress_only_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shrink(monkeypatch)
    path, seen = write(tmp_path / name, texts(300)), list[Progress]()
    prepare(source=str(path), tokenizer="byte", root=tmp_path, on_progress=seen.append)
    tokenizing = [progress for progress in seen if progress.phase == "tokenizing"]
    assert len(tokenizing) > 5
    for first, second in itertools.pairwise(tokenizing):
        assert first.done_bytes <= second.done_bytes
        assert first.tokens <= second.tokens
    assert tokenizing[-1].done_bytes == tokenizing[-1].total_bytes


TWO = """
import sys
from pathlib import Path
from tuppence.data.prepare import prepare
print(prepare(source="shakespeare", tokenizer="byte", root=Path(sys.argv[1])).reused)
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for _ in range(3)
    ]
    said = [running.communicate()[0].strip() for running in children]
    assert sorted(said) == ["False", "True", "True"]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    verify(folder, load_manifest(folder))


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    inside, release = threading.Event(), threading.Event()

    def slow(progress: Progress) -> None:
        if progress.phase == "tokenizing":
            inside.set()
            release.wait(20)

    phases: list[str] = []

    def told(progress: Progress) -> None:
        phases.append(progress.phase)
        if progress.phase.startswith("waiting"):
            release.set()

    first = threading.Thread(
        target=lambda: prepare(
            source="shakespeare", tokenizer="byte", root=tmp_path, on_progress=slow
        )
    )
    first.start()
    assert inside.wait(20)
    second = prepare(source="shakespeare", tokenizer="byte", root=tmp_path, on_progress=told)
    first.join()
    assert second.reused
    assert any(phase.startswith("waiting") for phase in phases)


# ---------------------------------------------------------------- damage


def test_damage_is_found(tmp_path: Path) -> None:
    def made() -> Prepared:
        return prepare(source="shakespeare", tokenizer="byte", root=tmp_path, fresh=True)

    def again() -> Prepared:
        return prepare(source="shakespeare", tokenizer="byte", root=tmp_path)

    shard = made().folder / "train_000000.bin"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    with pytest.raises(
        Fault, match=r"train_000000.bin: header says 1,003,855 tokens.* 1,003,805;.*"
    ):
        again()
    prepared = made()
    with shard.open("r+b") as file:
        file.seek(500_000)
        byte = file.read(1)
        file.seek(500_000)
        file.write(bytes([byte[0] ^ 1]))
    assert again().reused  # sizes are right; contents are checked on demand
    with pytest.raises(Fault, match=r"train_000000\.bin: sha256"):
        verify(prepared.folder, prepared.manifest)
    prepared = made()
    (prepared.folder / "val_000000.bin").unlink()
    with pytest.raises(Fault, match=r"val_000000\.bin: shard is missing"):
        again()
    prepared = made()
    with (prepared.folder / "tokenizer" / "tokenizer.json").open("ab") as spoiled:
        spoiled.write(b" ")
    with pytest.raises(Fault, match=r"tokenizer\.json: missing or altered"):
        again()
    write_shard(prepared.folder / "val_000000.bin", np.arange(5), vocab_size=257)
    with pytest.raises(Fault, match="the manifest says 111,540 tokens, the shard has 5"):
        again()


def test_manifest_is_strict(tmp_path: Path) -> None:
    made = prepare(source="shakespeare", tokenizer="byte", root=tmp_path)
    path = made.folder / MANIFEST
    whole = json.loads(path.read_text())
    assert load_manifest(made.folder) == made.manifest
    assert set(whole) == {field.name for field in dataclasses.fields(Manifest)}
    damages: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda m: m.pop("tokens"), "tokens"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m["shards"][0].pop("sha256"), "sha256"),
        (lambda m: m.update(version=99), "version 99"),
        (lambda m: m.pop("shards"), "not a manifest"),
    ]
    for damage, says in damages:
        content = json.loads(json.dumps(whole))
        damage(content)
        path.write_text(json.dumps(content))
        with pytest.raises(Fault, match=says):
            load_manifest(made.folder)
    path.write_text("{")
    with pytest.raises(Fault, match="not a manifest"):
        load_manifest(made.folder)
    path.unlink()
    with pytest.raises(Fault, match="missing, so this is no prepared corpus"):
        load_manifest(made.folder)


def test_shard_format_of_the_field(tmp_path: Path) -> None:
    narrow, wide = tmp_path / "narrow.bin", tmp_path / "wide.bin"
    write_shard(narrow, np.array([1, 2, 65_535]), vocab_size=65_536)
    write_shard(wide, np.array([1, 2, 65_536]), vocab_size=65_537)
    words = np.fromfile(narrow, dtype="<i4", count=256)
    assert words[:4].tolist() == [20240520, 1, 3, 0]
    assert narrow.stat().st_size == 1024 + 6
    words = np.fromfile(wide, dtype="<i4", count=256)
    assert words[:4].tolist() == [20240801, 7, 3, 0]
    assert wide.stat().st_size == 1024 + 12
    assert open_shard(narrow).tolist() == [1, 2, 65_535]
    assert open_shard(wide).tolist() == [1, 2, 65_536]
    nanogpt = tmp_path / "train.bin"
    np.arange(1000, dtype=np.uint16).tofile(nanogpt)
    assert open_shard(nanogpt).tolist() == list(range(1000))
    assert len(header(dtype=token_dtype(10), count=1)) == 1024
    nanogpt.write_bytes(b"abc")
    with pytest.raises(Fault, match="neither a shard"):
        open_shard(nanogpt)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"max_tokens": 0}, "data.max_tokens is 0"),
        ({"val_tokens": 0}, "data.val_tokens is 0"),
        ({"val_tokens": 700_000}, "more than half of the 1,115,395 tokens.*at most 557,697"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"rank": 3, "world": 3}, "rank 3 of 3: ranks are 0 to 2"),
        ({"tokenizer": "gtp2"}, "did you mean gpt2"),
        ({"tokenizer": "char:abc"}, "'F' at shakespeare, character 1 is not among"),
        ({"source": "shakspeare"}, "did you mean shakespeare"),
    ],
)
def test_bad_options(tmp_path: Path, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        made(asked.pop("source", "shakespeare"), tmp_path, **{"tokenizer": "byte"} | asked)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".partial" and path.is_dir()]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_empty_corpus(tmp_path: Path, tokenizer: str) -> None:
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_bytes(b"")
        for on_bad in ("refuse", "skip"):
            with pytest.raises(UserError, match="empty"):
                made(tmp_path / name, tmp_path, tokenizer=tokenizer, on_bad=on_bad)


# ---------------------------------------------------------------- a look beforehand


def test_survey_is_exact_for_small_corpora(tmp_path: Path) -> None:
    for tokenizer, tokens, vocab in (("char", 1_115_394, 65), ("gpt2", 338_026, 50_257)):
        found = survey(source="shakespeare", tokenizer=tokenizer)
        assert (found.bytes, found.documents) == (1_115_394, 1)
        assert (found.tokens, found.vocab_size, found.exact) == (tokens, vocab, True)
    path = write(tmp_path / "c.jsonl", TEXTS)
    manifest = made(path, tmp_path).manifest
    found = survey(source=str(path), tokenizer="byte")
    assert found.bytes == manifest.bytes
    assert found.documents == manifest.documents
    assert found.tokens == manifest.tokens


def test_survey_of_bpe_is_near(tmp_path: Path) -> None:
    manifest = made("shakespeare", tmp_path, tokenizer="bpe:1024").manifest
    assert manifest.vocab_size == 1024
    found = survey(source="shakespeare", tokenizer="bpe:1024")
    assert not found.exact
    assert 0.7 < found.tokens / manifest.tokens < 1.4


# ---------------------------------------------------------------- size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_is_flat_as_the_corpus_grows(tmp_path: Path, kind: str) -> None:
    text = asset("shakespeare.txt").read_text(encoding="utf-8")
    lines = "".join(json.dumps({"text": text[i : i + 5000]}) + "\n" for i in range(0, 10**6, 5000))
    peaks = []
    for copies in (16, 48):
        path = tmp_path / f"{copies}.{kind}"
        path.write_text((text if kind == "txt" else lines) * copies)
        small = {"slices.SLICE_BYTES": 1 << 22, "windows.WINDOW_BYTES": 1 << 21}
        running = child(path, tmp_path, constants=small, workers=1, shard_tokens=1 << 22)
        peaks.append(peak_mib(running))
    assert peaks[1] < peaks[0] + 25, peaks
    assert peaks[1] < 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_fifty_megabytes_of_books(tmp_path: Path) -> None:
    path = SHARED / "corpora" / "books_50mb.jsonl.xz"
    if not path.exists():
        pytest.skip("needs shared/data/corpora/books_50mb.jsonl.xz")
    peak = peak_mib(child(path, tmp_path, tokenizer="gpt2"))
    (folder,) = (item for item in tmp_path.iterdir() if item.is_dir())
    manifest = load_manifest(folder)
    assert manifest.tokens == 11_876_734 + 98
    assert manifest.documents == 98
    assert peak < 600
    with lzma.open(path) as file:
        assert manifest.bytes == sum(len(json.loads(line)["text"].encode()) for line in file)
    found = survey(source=str(path), tokenizer="gpt2")
    assert not found.exact
    assert 0.8 < found.tokens / manifest.tokens < 1.25
    assert 0.8 < found.bytes / manifest.bytes < 1.25
