"""Preparation: exact counts and splits, the same shards whatever happens, damage found."""

from __future__ import annotations

import dataclasses
import itertools
import json
import lzma
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from test_data_sources import TEXTS, write

from tuppence.data.encoders import GPT2_PATTERN, gpt2_ranks
from tuppence.data.prepare import Prepared, Progress, prepare, survey
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
from tuppence.data.sources import asset
from tuppence.data.tokenizer import load_tokenizer
from tuppence.errors import Fault, UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
REPOSITORY = Path(__file__).parents[1]


def tokens_of(prepared: Prepared, split: str) -> np.ndarray[Any, Any]:
    shards = [open_shard(prepared.folder / s.file) for s in prepared.manifest.of_split(split)]
    return np.concatenate([np.zeros(0, dtype=np.uint16), *shards])


def stream_of(prepared: Prepared) -> list[int]:
    return [*tokens_of(prepared, "train").tolist(), *tokens_of(prepared, "val").tolist()]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_shakespeare_char_is_nanogpts(tmp_path: Path) -> None:
    text = asset("shakespeare.txt").read_text(encoding="utf-8")
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    made = prepare(source="shakespeare", tokenizer="char", root=tmp_path)
    manifest = made.manifest
    assert tokens_of(made, "train").tolist() == [ids[c] for c in text[:cut]]
    assert tokens_of(made, "val").tolist() == [ids[c] for c in text[cut:]]
    assert (manifest.train_tokens, manifest.val_tokens) == (1_003_854, 111_540)
    assert (manifest.vocab_size, manifest.end_of_text, manifest.documents) == (65, None, 1)
    assert (manifest.bytes, manifest.val_bytes) == (1_115_394, 111_540)
    assert manifest.bytes_per_token == 1.0
    assert [item.path for item in manifest.inputs] == ["shakespeare"]
    assert made.folder.parent == tmp_path
    assert made.folder.name == f"shakespeare-char-{manifest.inputs_sha256[:12]}"
    assert load_tokenizer(made.folder / "tokenizer").sha256 == manifest.tokenizer_sha256


def test_gpt2_counts_and_ids_are_tiktokens(tmp_path: Path) -> None:
    text = asset("shakespeare.txt").read_text(encoding="utf-8")
    tik = tiktoken.Encoding(
        "g", pat_str=GPT2_PATTERN, mergeable_ranks=gpt2_ranks(), special_tokens={}
    )
    made = prepare(source="shakespeare", tokenizer="gpt2", root=tmp_path)
    assert stream_of(made) == [*tik.encode_ordinary(text), 50_256]
    assert made.manifest.tokens == 338_026
    assert made.manifest.bytes == 1_115_394
    val = tokens_of(made, "val").tolist()
    assert made.manifest.val_bytes == len(tik.decode_bytes(val[:-1]))


@pytest.mark.parametrize(("tokenizer", "end"), [("char", True), ("byte", True), ("gpt2", True)])
def test_end_of_text_follows_every_document(tmp_path: Path, tokenizer: str, end: bool) -> None:
    made = prepare(
        source=str(write(tmp_path / "c.jsonl", TEXTS)), tokenizer=tokenizer, root=tmp_path
    )
    stream = stream_of(made)
    eot = made.manifest.end_of_text
    assert eot is not None
    assert made.manifest.documents == stream.count(eot) == len(TEXTS)
    assert stream[-1] == eot
    loaded = load_tokenizer(made.folder / "tokenizer")
    texts, held = [], []
    for token in stream:
        held.append(token)
        if token == eot:
            texts.append(loaded.decode(held))
            held = []
    assert texts == TEXTS
    assert made.manifest.bytes == sum(len(text.encode()) for text in TEXTS)


def test_formats_and_packings_give_the_same_tokens(tmp_path: Path) -> None:
    expected = None
    for kind, packing in itertools.product(("jsonl", "parquet"), ("", ".gz", ".xz", ".zst")):
        path = write(tmp_path / f"corpus.{kind}{packing}", TEXTS)
        made = prepare(source=str(path), tokenizer="gpt2", root=tmp_path / "out", val_tokens=5)
        hashes = [shard.sha256 for shard in made.manifest.shards]
        assert expected in (None, hashes)
        expected = hashes
    plain = write(tmp_path / "t.txt", TEXTS)
    packed = [write(tmp_path / f"t.txt.{packing}", TEXTS) for packing in ("gz", "xz", "zst")]
    streams = [
        stream_of(prepare(source=str(path), tokenizer="gpt2", root=tmp_path / "out"))
        for path in (plain, *packed)
    ]
    assert all(stream == streams[0] for stream in streams)


def test_shards_roll_and_the_tail_crosses_them(tmp_path: Path) -> None:
    whole = prepare(source="shakespeare", tokenizer="gpt2", root=tmp_path / "a")
    parts = prepare(
        source="shakespeare", tokenizer="gpt2", root=tmp_path / "b", shard_tokens=25_000
    )
    assert stream_of(whole) == stream_of(parts)
    sizes = [shard.tokens for shard in parts.manifest.of_split("train")]
    assert sizes[:-1] == [25_000] * 12
    assert sum(sizes) == parts.manifest.train_tokens == whole.manifest.train_tokens
    assert parts.manifest.val_sha256 == whole.manifest.val_sha256
    assert {path.name for path in parts.folder.glob("*.bin")} == {
        shard.file for shard in parts.manifest.shards
    }
    verify(parts.folder, parts.manifest)


@pytest.mark.parametrize("cap", [1, 1000, 65_537, 300_000])
@pytest.mark.parametrize("val", [None, 1, 500])
def test_max_tokens_is_exact(tmp_path: Path, cap: int, val: int | None) -> None:
    if val is not None and val > cap:
        pytest.skip("more than half")
    whole = stream_of(prepare(source="shakespeare", tokenizer="gpt2", root=tmp_path))
    made = prepare(
        source="shakespeare", tokenizer="gpt2", root=tmp_path, max_tokens=cap, val_tokens=val
    )
    manifest = made.manifest
    assert manifest.train_tokens == cap
    expected_val = val if val is not None else -(-cap // 9)
    assert manifest.val_tokens == expected_val
    assert manifest.tokens == cap + expected_val
    assert stream_of(made) == whole[: cap + expected_val]
    loaded = load_tokenizer(made.folder / "tokenizer")
    assert manifest.bytes == loaded.token_bytes()[stream_of(made)].sum()


def test_max_tokens_beyond_the_corpus_changes_nothing(tmp_path: Path) -> None:
    made = prepare(source="shakespeare", tokenizer="char", root=tmp_path, max_tokens=10**9)
    assert (made.manifest.train_tokens, made.manifest.val_tokens) == (1_003_854, 111_540)


def test_reading_stops_when_enough_was_read(tmp_path: Path) -> None:
    """What lies behind the cap is not even looked at: here it is not JSON."""
    rows = [json.dumps({"text": "word " * 20_000})] * 400
    (tmp_path / "c.jsonl").write_text("\n".join([*rows, "not json"]))
    with pytest.raises(UserError, match="line 401 is not JSON"):
        prepare(source=str(tmp_path / "c.jsonl"), tokenizer="byte", root=tmp_path)
    made = prepare(
        source=str(tmp_path / "c.jsonl"), tokenizer="byte", root=tmp_path, max_tokens=150_000
    )
    assert made.manifest.train_tokens == 150_000
    assert made.manifest.documents == 2


def test_documents_split_by_a_cap_are_counted_where_they_begin(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", ["abcd"] * 10)
    for cap, documents in ((4, 1), (5, 2), (9, 2), (10, 3)):
        made = prepare(
            source=str(path), tokenizer="byte", root=tmp_path, max_tokens=cap, val_tokens=1
        )
        assert made.manifest.documents == documents, cap


def test_reuse_and_fresh(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", TEXTS)

    def ask(**options: Any) -> Prepared:
        defaults: dict[str, Any] = {"source": str(path), "tokenizer": "byte", "root": tmp_path}
        return prepare(**defaults | options)

    first = ask()
    assert not first.reused
    again = ask()
    assert again.reused
    assert again.manifest == first.manifest
    moved = write(tmp_path / "other.jsonl", TEXTS)
    before = contents(first.folder)
    fresh = ask(fresh=True)
    assert not fresh.reused
    assert fresh.folder == first.folder
    assert contents(fresh.folder) == before
    keys = {first.manifest.inputs_sha256}
    for options in (
        {"tokenizer": "char"},
        {"tokenizer": "char:" + "".join(sorted(set("".join(TEXTS))))},
        {"max_tokens": 40},
        {"val_tokens": 7},
        {"shard_tokens": 50},
        {"source": str(write(tmp_path / "more.jsonl", [*TEXTS, "x"]))},
    ):
        keys.add(ask(**options).manifest.inputs_sha256)
    assert len(keys) == 7
    assert ask(source=str(moved)).manifest.inputs_sha256 == first.manifest.inputs_sha256


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[Progress] = []
    made = prepare(source="shakespeare", tokenizer="gpt2", root=tmp_path, on_progress=seen.append)
    tokenizing = [progress for progress in seen if progress.phase == "tokenizing"]
    assert len(tokenizing) > 2
    assert tokenizing[-1].tokens == made.manifest.tokens
    assert tokenizing[-1].done_bytes == tokenizing[-1].total_bytes == 1_115_394
    assert [p.tokens for p in tokenizing] == sorted(p.tokens for p in tokenizing)


KILLED = """
import os, signal, sys
from pathlib import Path
from tuppence.data.prepare import prepare
source, root, phase, turns = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
def on_progress(progress):
    global turns
    turns -= progress.phase.startswith(phase)
    if turns == 0:
        os.kill(os.getpid(), signal.SIGKILL)
prepare(source=source, tokenizer="gpt2", root=root, shard_tokens=60_000, on_progress=on_progress)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_9_then_again_equals_uninterrupted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"source": "shakespeare", "tokenizer": "gpt2", "shard_tokens": 60_000}
    expected = prepare(root=tmp_path / "whole", **options)
    root = tmp_path / "killed"
    for phase, turns in (("tokenizing", 1), ("tokenizing", 4), ("cutting", 1)):
        child = start(KILLED, "shakespeare", root, phase, turns)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert not (root / expected.folder.name).exists()
        (partial,) = root.glob("*.partial")
        (partial / "train_000099.bin").write_bytes(b"left over")
    phases: list[str] = []
    again = prepare(root=root, on_progress=lambda p: phases.append(p.phase), **options)
    assert any("interrupted" in phase for phase in phases)
    assert contents(again.folder) == contents(expected.folder)
    assert not list(root.glob("*.partial"))


TWO = """
import sys
from pathlib import Path
from tuppence.data.prepare import prepare
print(prepare(source="shakespeare", tokenizer="gpt2", root=Path(sys.argv[1])).reused)
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    children = [start(TWO, tmp_path) for _ in range(3)]
    said = [child.communicate()[0].strip() for child in children]
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
    ("options", "says"),
    [
        ({"max_tokens": 0}, "data.max_tokens is 0"),
        ({"val_tokens": 0}, "data.val_tokens is 0"),
        ({"val_tokens": 700_000}, "more than half of the 1,115,395 tokens.*at most 557,697"),
        ({"val_tokens": 300, "max_tokens": 100}, "more than half of the 400"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"tokenizer": "gtp2"}, "did you mean gpt2"),
        ({"tokenizer": "char:abc"}, "'F' at document 1, character 1 is not among"),
        ({"source": "shakspeare"}, "did you mean shakespeare"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    defaults: dict[str, Any] = {"source": "shakespeare", "tokenizer": "byte", "root": tmp_path}
    with pytest.raises(UserError, match=says) as caught:
        prepare(**defaults | options)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_stranger_is_named_with_its_place(tmp_path: Path) -> None:
    texts = ["abc", "a" * 600_000 + "!", "c"]  # the stranger sits in a later piece of its document
    path = write(tmp_path / "c.jsonl", texts)
    with pytest.raises(UserError, match="'!' at document 2, character 600,001 is not among"):
        prepare(source=str(path), tokenizer="char:abc", root=tmp_path)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_empty_corpus(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        prepare(source=str(tmp_path / "empty.txt"), tokenizer=tokenizer, root=tmp_path)


def test_survey_is_exact_for_small_corpora(tmp_path: Path) -> None:
    for tokenizer, tokens, vocab in (("char", 1_115_394, 65), ("gpt2", 338_026, 50_257)):
        found = survey(source="shakespeare", tokenizer=tokenizer)
        assert (found.bytes, found.documents) == (1_115_394, 1)
        assert (found.tokens, found.vocab_size, found.exact) == (tokens, vocab, True)
    path = write(tmp_path / "c.jsonl", TEXTS)
    made = prepare(source=str(path), tokenizer="byte", root=tmp_path).manifest
    found = survey(source=str(path), tokenizer="byte")
    assert (found.bytes, found.documents, found.tokens) == (made.bytes, made.documents, made.tokens)


def test_survey_of_bpe_is_near(tmp_path: Path) -> None:
    made = prepare(source="shakespeare", tokenizer="bpe:1024", root=tmp_path).manifest
    assert made.vocab_size == 1024
    found = survey(source="shakespeare", tokenizer="bpe:1024")
    assert not found.exact
    assert 0.7 < found.tokens / made.tokens < 1.4


# VmHWM and not ru_maxrss, which a child inherits from the process that started it
RSS = """
import sys
from pathlib import Path
from tuppence.data.prepare import prepare
prepare(source=sys.argv[1], tokenizer=sys.argv[2], root=Path(sys.argv[3]), val_tokens=1000)
assert "torch" not in sys.modules
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_is_flat_as_the_corpus_grows(tmp_path: Path) -> None:
    text = asset("shakespeare.txt").read_bytes()
    peaks = []
    for copies in (8, 56):
        path = tmp_path / f"{copies}.txt"
        path.write_bytes(text * copies)
        peaks.append(int(start(RSS, path, "byte", tmp_path).communicate()[0]) / 1024)
    assert peaks[1] < peaks[0] + 25, peaks
    assert peaks[1] < 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_fifty_megabytes_of_books(tmp_path: Path) -> None:
    path = SHARED / "corpora" / "books_50mb.jsonl.xz"
    if not path.exists():
        pytest.skip("needs shared/data/corpora/books_50mb.jsonl.xz")
    peak = int(start(RSS, path, "gpt2", tmp_path).communicate()[0]) / 1024
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
