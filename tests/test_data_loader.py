"""Batches: pure functions of (manifest, seed, step, rank, world size), each token once an epoch."""

from __future__ import annotations

import hashlib
import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tuppence.data import loader as loader_module
from tuppence.data.loader import Loader, rolling_sha, val_windows
from tuppence.data.permute import Order, key_of, permuted
from tuppence.data.prepare import Options, prepare
from tuppence.errors import Fault, UserError


def corpus(folder: Path, *, tokens: int, val: int = 1, shard_tokens: int = 10**8) -> Path:
    """A prepared folder whose train tokens are 0, 1, 2 ...: each token tells its place."""
    assert tokens + val <= 50_000
    text = "".join(chr(256 + i) for i in range(tokens + val))
    (folder / "numbers.txt").write_text(text, encoding="utf-8")
    return prepare(
        source=str(folder / "numbers.txt"),
        tokenizer="char",
        root=folder,
        options=Options(val_tokens=val, shard_tokens=shard_tokens, workers=1),
    ).folder


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 100, 1000, 4096, 4097, 65_537])
def test_permutation_is_a_bijection(n: int) -> None:
    indices = np.arange(n, dtype=np.uint64)
    for key in (0, 1, 2**64 - 1):
        found = permuted(indices, n=n, keys=np.full(n, key, dtype=np.uint64))
        assert sorted(found.tolist()) == list(range(n))


def test_permutation_looks_random() -> None:
    n = 10_007
    indices = np.arange(n, dtype=np.uint64)
    first, second = (
        permuted(indices, n=n, keys=np.full(n, key_of("x", i), dtype=np.uint64)).astype(np.int64)
        for i in range(2)
    )
    assert (first == second).sum() < 20  # one is expected
    assert (first == np.arange(n)).sum() < 20
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.05
    small = [
        tuple(permuted(np.arange(3, dtype=np.uint64), n=3, keys=np.full(3, k, dtype=np.uint64)))
        for k in range(100)
    ]
    assert len(set(small)) == 6  # every order of three comes up


def test_permutation_needs_no_memory() -> None:
    n = 2**40 + 1
    indices = np.array([0, 1, n - 1], dtype=np.uint64)
    keys = np.full(3, 7, dtype=np.uint64)
    tracemalloc.start()
    found = permuted(indices, n=n, keys=keys)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000
    assert len(set(found.tolist())) == 3
    assert found.max() < n


SIZES = [(1, 1), (1, 5), (7, 1), (7, 7), (7, 8), (8, 7), (100, 99), (100, 33), (101, 10), (64, 16)]


@pytest.mark.parametrize(("n", "block"), SIZES)
def test_blocks_have_each_element_once_an_epoch(n: int, block: int) -> None:
    order = Order(n, block=block, key=3)
    for epoch in range(5):
        samples = np.arange(epoch * n, (epoch + 1) * n, dtype=np.uint64)
        found = order.at(samples)
        assert sorted(found.tolist()) == list(range(n))
        for sample in samples.tolist():  # alone as among others
            one = order.at(np.array([sample], dtype=np.uint64))
            assert one[0] == found[sample - epoch * n]


@pytest.mark.parametrize(("n", "block"), SIZES)
def test_a_visit_says_what_its_samples_are(n: int, block: int) -> None:
    order = Order(n, block=block, key=4)
    turns = []
    sample = 0
    while sample < 4 * n:
        visit = order.visit(sample)
        assert visit.first == sample
        assert visit.epoch == sample // n
        assert visit == order.visit(visit.end - 1)
        there = order.at(np.arange(visit.first, visit.end, dtype=np.uint64))
        assert sorted(there.tolist()) == list(range(visit.low, visit.high))
        assert visit.low % block == 0
        turns.append(visit.low // block)
        sample = visit.end
    assert sample == 4 * n  # no visit reaches into the next epoch
    epochs = [tuple(turns[i :: order.n_blocks]) for i in range(order.n_blocks)]
    if order.n_blocks > 4:
        assert turns[: order.n_blocks] != sorted(turns[: order.n_blocks])
        assert len(set(epochs)) > 1
        assert turns[: order.n_blocks] != turns[order.n_blocks : 2 * order.n_blocks]


def test_blocks_are_not_all_in_the_same_order() -> None:
    order = Order(400, block=100, key=2)
    found = order.at(np.arange(400, dtype=np.uint64)) % 100
    assert len({tuple(found[i : i + 100].tolist()) for i in range(0, 400, 100)}) == 4


def test_samples_of_several_epochs_at_once() -> None:
    order = Order(10, block=4, key=9)
    samples = np.arange(3, 57, dtype=np.uint64)
    apart = [order.at(samples[i : i + 1])[0] for i in range(len(samples))]
    assert order.at(samples).tolist() == apart


def test_blocks_come_in_every_order() -> None:
    order = Order(9, block=3, key=1)
    turns = {tuple(order.visit(9 * e + 3 * i).low for i in range(3)) for e in range(100)}
    assert len(turns) == 6


def test_one_block_is_the_order_that_runs_were_trained_in(tmp_path: Path) -> None:
    """The hash is of batches made before there were blocks."""
    loader = Loader(corpus(tmp_path, tokens=5000), sequence_len=16, batch_size=8, seed=1)
    sha = ""
    for step in range(100):  # into the third epoch
        sha = rolling_sha(sha, loader.batch(step))
    assert sha == "c4b9a2483696ca6630b7d643de4fae0ecf4c2444e7dd03c2ff505bcd12efe6bf"


@pytest.fixture(params=[None, 50, 130])
def block_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Blocks of so many tokens; None: all in one."""
    if request.param is not None:
        monkeypatch.setattr(loader_module, "BLOCK_TOKENS", request.param)
    tokens: int | None = request.param
    return tokens


@pytest.mark.parametrize("shard_tokens", [10**8, 97])
def test_an_epoch_covers_the_stream_once(
    tmp_path: Path, shard_tokens: int, block_tokens: int | None
) -> None:
    folder = corpus(tmp_path, tokens=1003, shard_tokens=shard_tokens)
    length = 10
    loader = Loader(folder, sequence_len=length, batch_size=3, seed=5)
    n = loader.n_windows
    assert n == (1003 - length) // length
    offsets = set()
    for epoch in range(4):
        samples = range(epoch * n, (epoch + 1) * n)
        rows = [loader.batch(k // 3)[k % 3] for k in samples]
        for row in rows:  # tokens tell their place, so a window must count upwards
            assert np.array_equal(row, np.arange(row[0], row[0] + length + 1))
        starts = [int(row[0]) for row in rows]
        assert starts != sorted(starts)
        offset = min(starts)
        assert sorted(starts) == list(range(offset, offset + n * length, length))
        assert 0 <= offset < 1003 - n * length
        offsets.add(offset)
        if block_tokens is not None:  # one block after another, each of neighbours
            size = block_tokens // length
            blocks = [(start - offset) // length // size for start in starts]
            assert len({*blocks}) == -(-n // size)
            assert sum(a != b for a, b in itertools.pairwise(blocks)) == len({*blocks}) - 1
    assert len(offsets) > 1
    assert loader.epochs(n // 3) == (n // 3) * 3 / n


@pytest.mark.usefixtures("block_tokens")
def test_batches_are_pure(tmp_path: Path) -> None:
    folder = corpus(tmp_path, tokens=5000)
    one, other = (Loader(folder, sequence_len=16, batch_size=8, seed=1) for _ in range(2))
    forward = [one.batch(step) for step in range(200)]
    for step in (199, 3, 700, 0, 199):
        batch = other.batch(step)
        assert batch.dtype == np.int64
        assert batch.shape == (8, 17)
        if step < 200:
            assert np.array_equal(batch, forward[step])
    assert not np.array_equal(forward[0], forward[1])
    reseeded = Loader(folder, sequence_len=16, batch_size=8, seed=2)
    assert not np.array_equal(reseeded.batch(0), forward[0])


@pytest.mark.usefixtures("block_tokens")
@pytest.mark.parametrize("shard_tokens", [10**8, 611])
def test_ranks_share_the_batch_of_one(tmp_path: Path, shard_tokens: int) -> None:
    folder = corpus(tmp_path, tokens=5000, shard_tokens=shard_tokens)
    loader = Loader(folder, sequence_len=16, batch_size=24, seed=1)
    for step in (0, 1, 170, 171, 10_000):  # sample 4,096 falls into step 170
        for world_size in (2, 3, 8):
            parts = [loader.batch(step, rank=r, world_size=world_size) for r in range(world_size)]
            assert np.array_equal(np.concatenate(parts), loader.batch(step))
    with pytest.raises(UserError, match="a batch of 24 sequences cannot be shared by 5 ranks"):
        loader.batch(0, rank=0, world_size=5)


@pytest.mark.usefixtures("block_tokens")
def test_shard_borders_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Loader(corpus(tmp_path / "a", tokens=3000), sequence_len=50, batch_size=8, seed=3)
    parts = Loader(
        corpus(tmp_path / "b", tokens=3000, shard_tokens=17), sequence_len=50, batch_size=8, seed=3
    )
    for step in range(30):
        assert np.array_equal(whole.batch(step), parts.batch(step))


def test_only_the_shards_of_a_block_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "BLOCK_TOKENS", 200)
    folder = corpus(tmp_path, tokens=3000, shard_tokens=50)
    loader = Loader(folder, sequence_len=10, batch_size=4, seed=3)
    for step in range(200):
        loader.batch(step)
        mapped = [shard for shard in loader._stream._maps if shard is not None]
        assert len(mapped) <= 12  # a batch may be in two blocks, each in six shards at most


def test_a_batch_into_rows_of_any_kind(tmp_path: Path) -> None:
    folder = corpus(tmp_path, tokens=3000, shard_tokens=170)
    loader = Loader(folder, sequence_len=50, batch_size=6, seed=3)
    assert loader.dtype == np.uint16
    for step in range(20):
        for dtype in (np.uint16, np.int32, np.int64):
            rows = np.zeros((6, 51), dtype=dtype)
            loader.fill(rows, step)
            assert np.array_equal(rows, loader.batch(step))
        loader.fill(rows[:2], step, rank=2)
        assert np.array_equal(rows[:2], loader.batch(step)[4:])


@pytest.mark.parametrize("tokens", [11, 12, 19, 20, 21, 29, 30])
def test_tiny_corpora(tmp_path: Path, tokens: int) -> None:
    folder = corpus(tmp_path, tokens=tokens)
    loader = Loader(folder, sequence_len=10, batch_size=64, seed=0)
    batch = np.concatenate([loader.batch(step) for step in range(20)])
    assert np.array_equal(batch - batch[:, :1], np.tile(np.arange(11), (1280, 1)))
    assert batch.min() == 0
    assert batch.max() == tokens - 1


def test_too_short_a_corpus(tmp_path: Path) -> None:
    folder = corpus(tmp_path, tokens=10)
    with pytest.raises(UserError, match=r"has 10 tokens.*sequence_len 10 needs 11"):
        Loader(folder, sequence_len=10, batch_size=1, seed=0)


def test_a_cut_shard_is_found(tmp_path: Path) -> None:
    folder = corpus(tmp_path, tokens=100)
    shard = folder / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(Fault, match="header says 100 tokens, the file holds 99"):
        Loader(folder, sequence_len=10, batch_size=1, seed=0)


@pytest.mark.parametrize("shard_tokens", [10**8, 13])
@pytest.mark.parametrize("val", [2, 10, 11, 12, 20, 21, 22, 95, 101])
def test_val_windows_predict_each_token_once(tmp_path: Path, val: int, shard_tokens: int) -> None:
    folder = corpus(tmp_path, tokens=200, val=val, shard_tokens=shard_tokens)
    windows = val_windows(folder, sequence_len=10)
    predicted: list[int] = []
    for inputs, targets in windows.batches(3):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == 10
        real = targets >= 0
        assert np.array_equal(inputs[real] + 1, targets[real])
        assert (inputs[~real] == 0).all()
        assert real.any(axis=1).all()
        predicted += targets[real].tolist()
    assert sorted(predicted) == list(range(201, 200 + val))
    assert windows.tokens == val - 1


def test_val_subset_is_strided_and_in_a_fixed_random_order(tmp_path: Path) -> None:
    folder = corpus(tmp_path, tokens=20_000, val=10_000)
    whole = val_windows(folder, sequence_len=10)
    some = val_windows(folder, sequence_len=10, max_tokens=500)
    assert len(some.starts) == 50
    assert some.tokens == 500
    assert sorted(some.starts.tolist()) == [j * 1000 // 50 * 10 for j in range(50)]
    for windows in (whole, some):
        assert windows.starts.tolist() != sorted(windows.starts.tolist())
    assert abs(whole.starts[:100].mean() / whole.starts.mean() - 1) < 0.25
    again = val_windows(folder, sequence_len=10)
    assert np.array_equal(again.starts, whole.starts)
    assert val_windows(folder, sequence_len=10, max_tokens=10**9).tokens == 9_999
    assert len(val_windows(folder, sequence_len=10, max_tokens=3).starts) == 1


def test_no_validation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validation split has 1 tokens, 2 are the least"):
        val_windows(corpus(tmp_path, tokens=100, val=1), sequence_len=10)


def test_rolling_sha() -> None:
    batch = np.array([[1, 2], [3, 70_000]])
    expected = hashlib.sha256(b"ab" + batch.astype("<u4").tobytes()).hexdigest()
    assert rolling_sha("ab", batch) == expected
    assert rolling_sha("ab", batch.astype(np.uint32)) == expected
    assert rolling_sha("ab", batch.T) != expected
    assert rolling_sha(expected, batch) != expected
