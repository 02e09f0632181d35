"""Duplicates go, the first of them stays, and what is left is counted right."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpora import (
    contents,
    documents_of,
    hashes,
    made,
    shrink,
    stream_of,
    texts,
    tokens_of,
    write,
)

from tuppence.data import make, traits
from tuppence.data.dedup import duplicates
from tuppence.data.prepare import Options, prepare, prepare_slices
from tuppence.data.shards import verify
from tuppence.data.work import done_of
from tuppence.errors import UserError
from tuppence.text import formats
from tuppence.text.documents import Document

near = pytest.mark.skipif(
    traits.importlib.util.find_spec("rensa") is None, reason="needs rensa (extra corpus)"
)


def first_of_each(documents: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(documents))


def altered(text: str, place: int) -> str:
    """One word of many is another."""
    words = text.split(" ")
    words[place % len(words)] = "otherwise"
    return " ".join(words)


# ---------------------------------------------------------------- exact


def test_the_first_of_equal_documents_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    content = texts(200) + texts(50) + texts(10)  # equals lie in other windows and slices, and
    content += [text for text in texts(30, seed=2) for _ in range(3)]  # side by side
    path = write(tmp_path / "c.jsonl", content)
    before, after = made(path, tmp_path), made(path, tmp_path, dedup="exact")
    assert documents_of(after) == first_of_each(documents_of(before))
    manifest = after.manifest
    assert manifest.documents == 230
    assert manifest.duplicates == 50 + 10 + 60
    assert before.manifest.duplicates == 0
    assert manifest.bytes == sum(len(text.encode()) for text in set(content))
    assert manifest.tokens == manifest.bytes + manifest.documents
    assert manifest.tokens == manifest.train_tokens + manifest.val_tokens == len(stream_of(after))
    verify(after.folder, manifest)


def test_a_slice_without_duplicates_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    path = write(tmp_path / "c.jsonl", texts(200) + texts(1))
    with_, without = (
        made(path, tmp_path, val_tokens=9),
        made(path, tmp_path, val_tokens=9, dedup="exact"),
    )
    assert hashes(without)[:-1] == hashes(with_)[:-1]
    assert hashes(without)[-1] != hashes(with_)[-1]


def test_nothing_to_do_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    path = write(tmp_path / "c.jsonl", texts(200))
    assert hashes(made(path, tmp_path, dedup="exact")) == hashes(made(path, tmp_path))


def test_workers_do_not_choose_who_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    path = write(tmp_path / "c.jsonl", texts(100) + texts(100))
    one, two = (
        made(path, tmp_path / str(workers), workers=workers, dedup="exact", shard_tokens=700)
        for workers in (1, 2)
    )
    assert contents(one.folder) == contents(two.folder)


@pytest.mark.parametrize("cap", [1, 3000, 7000])
def test_a_cap_counts_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cap: int
) -> None:
    shrink(monkeypatch)
    content = [text for text in texts(200) for _ in range(4)]
    path = write(tmp_path / "c.jsonl", content)
    whole = made(path, tmp_path, dedup="exact", val_tokens=1)
    capped = made(path, tmp_path, dedup="exact", val_tokens=1, max_tokens=cap)
    assert capped.manifest.train_tokens == cap
    assert stream_of(capped) == stream_of(whole)[: cap + 1]
    end = capped.manifest.end_of_text
    kept = stream_of(capped)
    assert capped.manifest.documents == kept.count(end) + (kept[-1] != end)
    beyond = made(path, tmp_path, dedup="exact", val_tokens=1, max_tokens=10**9)
    assert tokens_of(beyond, "train") == tokens_of(whole, "train")


def test_slices_with_nothing_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they are, the others' duplicates are found."""
    shrink(monkeypatch, **{"slices.SLICE_BYTES": 500})
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "c", "e"):
        (folder / f"{name}.jsonl").write_bytes(b"not json\n" * 60)
    for name in ("b", "d"):
        write(folder / f"{name}.jsonl", texts(20))
    prepared = made(folder, tmp_path, dedup="exact", on_bad="skip")
    assert Counter(documents_of(prepared)) == Counter(texts(20))
    assert prepared.manifest.duplicates == 20
    assert prepared.manifest.bad == {"not_json": 180}


def test_a_heavily_repeated_corpus_is_read_in_few_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    passes = []
    without = make.dedup.without
    counted = lambda *args, **asked: (passes.append(1), without(*args, **asked))[1]  # noqa: E731
    monkeypatch.setattr(make.dedup, "without", counted)
    content = ["the same words again and again and again"] * 2000 + texts(100)
    path = write(tmp_path / "c.jsonl", content)
    capped = made(path, tmp_path, dedup="exact", val_tokens=50, max_tokens=500, seed=None)
    assert (
        stream_of(capped)
        == stream_of(made(path, tmp_path / "whole", dedup="exact", val_tokens=50, seed=None))[:550]
    )
    assert len(passes) < 12  # the second preparation's one among them; of 550 tokens each, 150


def test_what_a_rank_made_ahead_of_a_gap_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before duplicates went there was enough without slice 3."""
    shrink(monkeypatch)
    folder = tmp_path / "in"
    folder.mkdir()
    for number, seed in enumerate((0, 0, 1, 2, 3)):
        write(folder / f"{number}.jsonl", texts(35, seed=seed))
    sizes = [sum(len(t.encode()) + 1 for t in texts(35, seed=seed)) for seed in (0, 0, 1)]
    asked = {"dedup": "exact", "val_tokens": 100, "max_tokens": sum(sizes) - 600, "workers": 1}
    for rank in (0, 1):
        options = Options(**asked, rank=rank, world=2)
        prepare_slices(source=str(folder), tokenizer="byte", root=tmp_path / "a", options=options)
    (partial,) = (tmp_path / "a").glob("*.partial")
    assert done_of(partial, 4).finished
    assert not done_of(partial, 3).windows
    options = Options(**asked)
    merged = prepare(
        source=str(folder), tokenizer="byte", root=tmp_path / "a", options=options, merge=2
    )
    assert hashes(merged) == hashes(made(folder, tmp_path / "b", **asked))


@pytest.mark.parametrize("dedup", ["exact", pytest.param("near", marks=near)])
def test_texts_longer_than_a_window_go_where_their_files_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: str
) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(formats, "WHOLE_TEXT_BYTES", 300_000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 100_000)
    folder = tmp_path / "in"
    folder.mkdir()
    long = "long " * 150_000
    for name, text in (("a", long), ("b", "x"), ("c", long), ("d", "x"), ("e", long + "not")):
        (folder / f"{name}.txt").write_text(text)
    prepared = made(folder, tmp_path, dedup=dedup)
    assert documents_of(prepared) == [long, "x", long + "not"]
    assert prepared.manifest.duplicates == 2


def test_a_servers_tag_makes_no_texts_equal() -> None:
    """It may be made from a time and a size."""
    piece = [Document("the start of a", place, 0, False) for place in ("a.txt", "b.txt")]

    def same(identity: str) -> bool:
        first, second = (traits.keys([each], dedup="exact", identity=identity) for each in piece)
        return bool((first == second).all())

    assert same("sha256:00")
    assert same("git:00")
    assert not same("etag:00")
    assert not same("")


# ---------------------------------------------------------------- near


@near
def test_near_duplicates_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, **{"windows.WINDOW_BYTES": 20_000, "slices.SLICE_BYTES": 60_000})
    long = [" ".join(texts(12, seed=seed)) for seed in range(30)]
    near_ones = [altered(text, place=50 + i) for i, text in enumerate(long[:20])]
    path = write(tmp_path / "c.jsonl", long + near_ones + [long[25].upper()])
    before, after = made(path, tmp_path), made(path, tmp_path, dedup="near")
    group = {text: i for i, text in enumerate(long)}
    group |= {text: i for i, text in enumerate(near_ones)} | {long[25].upper(): 25}
    order, kept = documents_of(before), documents_of(after)
    firsts = {group[text]: text for text in reversed(order)}
    assert kept == [text for text in order if firsts[group[text]] == text]
    assert after.manifest.duplicates == 21
    assert after.manifest.dedup == "near"
    again = made(path, tmp_path / "again", dedup="near", workers=2)
    assert contents(again.folder) == contents(after.folder)


@near
def test_what_is_half_the_same_stays() -> None:
    """The curve of `traits`: at a share of a half one pair in eighteen is found, at 0.9 all."""

    def found(shared: int, total: int) -> float:
        pairs = 0
        for seed in range(60):
            words = [f"{seed}x{i}" for i in range(total)]
            other = words[:shared] + [f"{seed}y{i}" for i in range(total - shared)]
            keys = traits.keys(
                [Document(" ".join(text), "here", 0, True) for text in (words, other)], dedup="near"
            )
            pairs += bool((keys[0] == keys[1]).any())
        return pairs / 60

    runs = 200 - 5 + 1
    for shared, low, high in ((100, 0.0, 0.02), (135, 0.0, 0.25), (160, 0.3, 0.8), (190, 0.95, 1)):
        same = shared - 5 + 1
        share = same / (2 * runs - same)
        assert low <= found(shared, 200) <= high, share


@pytest.mark.parametrize(
    "letters",
    ["天地玄黄宇宙洪荒日月盈昃辰宿列张", "กขคงจฉชซญดตถทนบปผ", "あいうえおかきくけこさしす"],
)
@near
def test_near_in_scripts_without_spaces(letters: str) -> None:
    rng = random.Random(1)
    text = "".join(rng.choices(letters, k=600))
    other = "".join(rng.choices(letters, k=600))
    mended = text[:300] + other[300:302] + text[302:]
    documents = [Document(each, "here", 0, True) for each in (text, mended, other, text[:300])]
    first, *rest = traits.keys(documents, dedup="near")
    assert [bool((first == keys).any()) for keys in rest] == [True, False, False]


def test_words() -> None:
    assert traits.words_of("Two\u00a0Words\n und ähnlich") == ["two", "words", "und", "ähnlich"]
    assert traits.words_of("GPT是 模型。Ok") == ["gpt", "是", "模", "型", "。ok"]


def test_near_without_its_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traits.importlib.util, "find_spec", lambda name: None)
    path = write(tmp_path / "c.jsonl", texts(3))
    with pytest.raises(UserError, match=r"data\.dedup=near needs.*tuppence\[corpus\]"):
        made(path, tmp_path, dedup="near")


# ---------------------------------------------------------------- the pass over bands


def _rows(keys: list[list[int]]) -> Any:
    columns = [[0, *row] for row in keys]
    return np.array(columns, dtype=np.uint64).reshape(len(keys), -1)


def test_alike_in_any_band_and_of_any_earlier() -> None:
    rows = [
        _rows([[1, 10], [2, 20]]),
        np.empty((0, 1), dtype=np.uint64),
        _rows([[1, 30], [3, 30], [2**64 - 1, 40]]),
    ]
    # the fourth is like the third, which is gone itself
    assert duplicates(rows).tolist() == [False, False, True, True, False]
    assert duplicates([]).tolist() == []


def test_one_band_at_a_time_is_in_memory() -> None:
    count, bands = 100_000, 14
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 2**63, size=(count, 1 + bands), dtype=np.uint64)
    keys[-1] = keys[0]
    tracemalloc.start()
    gone = duplicates([keys[: count // 2], keys[count // 2 :]])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert gone.nonzero()[0].tolist() == [count - 1]
    assert peak < count * 64  # all bands together would be 120 bytes a document before any sorting
