"""Shards on a bucket: the same batches, in bounded space, whatever becomes of the network."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_loader import corpus

from tuppence.data import cache, loader
from tuppence.data.cache import ASIDE, BUCKET, Cache, load_bucket
from tuppence.data.loader import Loader, val_windows
from tuppence.data.shards import load_manifest
from tuppence.errors import Fault, UserError
from tuppence.store import Away, Store

pytest.importorskip("fsspec")
pytest_plugins = ["bucket_places"]

TOKENS, SHARD = 5000, 100
SHARD_BYTES = 1024 + 2 * SHARD
VAL_BYTES = 1024 + 2 * 40
ENOUGH = VAL_BYTES + 14 * SHARD_BYTES  # two blocks of 500 tokens, wherever they begin
SIZE: dict[str, Any] = {"sequence_len": 10, "batch_size": 8, "seed": 3}
STEPS = 90  # an epoch and a half


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of five shards, and failures that are tried again at once."""
    monkeypatch.setattr(loader, "BLOCK_TOKENS", 5 * SHARD)
    monkeypatch.setattr(cache, "RETRY_SECONDS", (0.01, 0.01, 0.02))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with all of its fifty shards."""
    return corpus(tmp_path_factory.mktemp("w"), tokens=TOKENS, val=40, shard_tokens=SHARD)


@pytest.fixture
def expected(whole: Path) -> list[np.ndarray]:
    """Its batches."""
    local = Loader(whole, **SIZE)
    return [local.batch(step) for step in range(STEPS)]


def sent(whole: Path, url: str) -> Store:
    """The shards, on a bucket."""
    there = Store(url)
    for shard in load_manifest(whole).shards:
        there.write(shard.file, (whole / shard.file).read_bytes())
    return there


def bare(whole: Path, folder: Path, url: str, *, cache_bytes: int = ENOUGH) -> Path:
    """A prepared folder that has everything but its shards."""
    folder.mkdir()
    shutil.copy(whole / "manifest.json", folder)
    (folder / BUCKET).write_text(json.dumps({"url": url, "cache_bytes": cache_bytes}))
    return folder


@pytest.fixture
def bucket(whole: Path, tmp_path: Path) -> str:
    """The shards, in a folder that plays the bucket."""
    url = f"file://{tmp_path}/bucket/corpus"
    sent(whole, url)
    return url


@pytest.fixture
def folder(whole: Path, tmp_path: Path, bucket: str) -> Path:
    return bare(whole, tmp_path / "here", bucket)


@contextlib.contextmanager
def loading(folder: Path, **more: Any) -> Iterator[Loader]:
    """A loader; no thread of its may live on."""
    made = Loader(folder, **{**SIZE, **more})
    try:
        yield made
    finally:
        made.close()
        assert "shards" not in {thread.name for thread in threading.enumerate()}


def on_disk(folder: Path) -> int:
    """Bytes of the folder's shards, whole and coming."""
    total = 0
    for path in folder.rglob("*.bin"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def shards_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("train_*.bin")}


def patched(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Callable[..., None]], Any]) -> None:
    """Replace the fetch of every store."""
    monkeypatch.setattr(Store, "fetch", wrap(Store.fetch))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is fetched, as it begins."""
    names: list[str] = []

    def wrap(fetch: Callable[..., None]) -> Any:
        def noted(self: Store, name: str, local: Path) -> None:
            names.append(name)
            fetch(self, name, local)

        return noted

    patched(monkeypatch, wrap)
    return names


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set the network is away."""
    gone = threading.Event()

    def wrap(fetch: Callable[..., None]) -> Any:
        def noted(self: Store, name: str, local: Path) -> None:
            if gone.is_set():
                local.write_bytes(b"half of")
                raise Away(f"cannot fetch {name} from {self.url}: no route")
            fetch(self, name, local)

        return noted

    patched(monkeypatch, wrap)
    return gone


def until(true: Callable[[], bool]) -> None:
    """Wait for it, but not for ever."""
    for _ in range(12_000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


def settled(remote: Loader) -> None:
    """Wait until the thread has brought all that comes next, or given up."""
    cached = remote._stream._cache
    assert cached is not None
    until(lambda: not cached._soon)


# ---------------------------------------------------------------- the same, in bounded space


@pytest.mark.parametrize("place", ["s3", "file"])
def test_batches_are_those_of_a_local_folder(
    request: pytest.FixtureRequest,
    whole: Path,
    expected: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    url = request.getfixturevalue("s3") if place == "s3" else f"file://{tmp_path}/bucket"
    sent(whole, url)
    folder, most = bare(whole, tmp_path / "here", url), [0]

    def wrap(fetch: Callable[..., None]) -> Any:
        def measured(self: Store, name: str, local: Path) -> None:
            fetch(self, name, local)
            most.append(on_disk(folder))

        return measured

    patched(monkeypatch, wrap)
    said: list[str] = []
    with loading(folder, say=said.append) as remote:
        for step, batch in enumerate(expected[:50] if place == "s3" else expected):
            assert np.array_equal(remote.batch(step), batch)
            most.append(on_disk(folder))
    assert ENOUGH - 4 * SHARD_BYTES < max(most) <= ENOUGH
    assert said == []
    assert not list((folder / ASIDE).rglob("*.bin"))
    pairs = zip(
        val_windows(whole, sequence_len=7).batches(2),
        val_windows(folder, sequence_len=7).batches(2),
        strict=True,
    )
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert (folder / "val_000000.bin").exists()
    with loading(folder) as remote:  # and any step of another seed, with what is there
        remote.batch(0)
    again = Loader(whole, **{**SIZE, "seed": 4})
    with loading(folder, seed=4) as remote:
        for step in (77, 3, 40):
            assert np.array_equal(remote.batch(step), again.batch(step))
    assert on_disk(folder) <= ENOUGH


def test_what_is_there_is_not_fetched_again(folder: Path, fetched: list[str]) -> None:
    with loading(folder) as remote:
        for step in range(3):
            remote.batch(step)
        settled(remote)
    before = [*fetched]
    assert len(before) == len({*before})
    with loading(folder) as remote:
        remote.batch(0)
    assert fetched == before


def test_the_next_block_is_there_before_it_is_asked_for(
    folder: Path, expected: list[np.ndarray], away: threading.Event
) -> None:
    with loading(folder) as remote:
        first, second = remote._order.visit(0), remote._order.visit(remote._order.visit(0).end)
        now, soon = (remote._stream._holding([remote._tokens_of(v)]) for v in (first, second))
        assert np.array_equal(remote.batch(0), expected[0])
        wanted = {f"train_{index:06d}.bin" for index in (*now, *soon)}
        until(lambda: shards_in(folder) == wanted)
        away.set()
        for step in range(second.end // SIZE["batch_size"]):
            assert np.array_equal(remote.batch(step), expected[step])


def test_too_small_a_cache_is_said_once_and_holds_two_blocks(
    whole: Path, expected: list[np.ndarray], tmp_path: Path, bucket: str
) -> None:
    folder, said = bare(whole, tmp_path / "here", bucket, cache_bytes=2000), []
    with loading(folder, say=said.append) as remote:
        for step, batch in enumerate(expected):
            assert np.array_equal(remote.batch(step), batch)
            assert on_disk(folder) <= ENOUGH
    assert len(said) == 1
    assert said[0].startswith("cache_bytes=2,000 is less than the ")


def test_a_folder_above_its_bound_shrinks(whole: Path, tmp_path: Path, bucket: str) -> None:
    folder = bare(whole, tmp_path / "here", bucket)
    for shard in whole.glob("train_*.bin"):
        shutil.copy(shard, folder)
    assert on_disk(folder) > 3 * ENOUGH
    with loading(folder) as remote:
        remote.batch(0)
    assert on_disk(folder) <= ENOUGH


def test_a_folder_with_its_shards_needs_no_bucket(whole: Path) -> None:
    assert load_bucket(whole) is None
    with loading(whole) as local:
        assert not local.remote
        local.batch(0)


# ---------------------------------------------------------------- what goes wrong


def test_a_network_that_comes_back(
    folder: Path, expected: list[np.ndarray], away: threading.Event
) -> None:
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        away.clear()

    with loading(folder, say=say) as remote:
        away.set()
        assert np.array_equal(remote.batch(0), expected[0])
    assert len(said) == 2
    assert said[0].endswith("no route; tried again until it works")
    assert said[1].endswith("answers again")


def test_a_network_that_stays_away(folder: Path, away: threading.Event) -> None:
    away.set()
    with loading(folder, say=lambda message: None) as remote:
        with pytest.raises(Fault, match=r"no route; run the same command to go on") as caught:
            remote.batch(0)
        assert "\n" not in str(caught.value)
        away.clear()
        remote.batch(0)  # and so it does
    assert not list((folder / ASIDE).rglob("*.bin"))


def test_closing_ends_a_wait_for_the_network(
    folder: Path, away: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RETRY_SECONDS", (3600.0,))
    waits, errors = threading.Event(), []
    remote = Loader(folder, **SIZE, say=lambda message: waits.set())
    away.set()

    def work() -> None:
        try:
            remote.batch(0)
        except Away as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    waits.wait()
    remote.close()
    thread.join()
    assert len(errors) == 1
    assert "shards" not in {each.name for each in threading.enumerate()}


def test_a_server_that_is_down_for_a_while(
    s3: str,
    whole: Path,
    expected: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moto_server = pytest.importorskip("moto.server")
    sent(whole, s3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    late = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    started: list[str] = []

    def say(message: str) -> None:
        if not started:
            late.start()  # it knows what the other server of this process was sent
        started.append(message)

    with loading(bare(whole, tmp_path / "here", s3), say=say) as remote:
        assert np.array_equal(remote.batch(0), expected[0])
    late.stop()
    assert len(started) == 2


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("harm", [flipped, lambda content: content[:-2], lambda content: b""])
def test_an_object_that_arrives_damaged_is_fetched_again(
    folder: Path,
    expected: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[bytes], bytes],
) -> None:
    seen: list[str] = []

    def wrap(fetch: Callable[..., None]) -> Any:
        def first_harmed(self: Store, name: str, local: Path) -> None:
            fetch(self, name, local)
            if name not in seen:
                local.write_bytes(harm(local.read_bytes()))
            seen.append(name)

        return first_harmed

    patched(monkeypatch, wrap)
    with loading(folder) as remote:
        for step in range(20):
            assert np.array_equal(remote.batch(step), expected[step])
    assert len(seen) > len({*seen})


def test_an_object_that_is_damaged_is_named(folder: Path, bucket: str) -> None:
    there = Store(bucket)
    for name in there.find():
        there.write(name, flipped(there.read(name) or b""))
    with loading(folder) as remote, pytest.raises(Fault, match=r"is damaged: 1,224 bytes with"):
        remote.batch(0)
    assert shards_in(folder) == set()
    with pytest.raises(Fault, match=r"val_000000.bin is damaged"):
        next(val_windows(folder, sequence_len=7).batches(1))


def test_an_object_that_is_missing_is_not_waited_for(
    folder: Path, bucket: str, fetched: list[str]
) -> None:
    there = Store(bucket)
    for name in there.find():
        there.delete(name)
    with loading(folder) as remote:
        with pytest.raises(Fault, match=r"train_.*\.bin is not there, though the manifest names"):
            remote.batch(0)
        settled(remote)
        assert max(map(fetched.count, fetched)) <= 2  # the thread's try and the loader's


@pytest.mark.parametrize(
    "cause", [PermissionError("not yours"), OSError(errno.ENOSPC, "No space left")]
)
def test_what_cannot_change_is_not_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cause: OSError
) -> None:
    said: list[str] = []

    def refuse(self: Store, name: str, local: Path) -> None:
        raise Away(f"cannot fetch {name}: {cause}") from cause

    monkeypatch.setattr(Store, "fetch", refuse)
    with loading(folder, say=said.append) as remote, pytest.raises(Fault, match=str(cause)[-9:]):
        remote.batch(0)
    assert said == []  # it would say that it tries again


def test_a_shard_cut_short_here_is_fetched_again(
    folder: Path, whole: Path, expected: list[np.ndarray]
) -> None:
    for shard in whole.glob("train_*.bin"):
        (folder / shard.name).write_bytes(shard.read_bytes()[:-2])
    with loading(folder) as remote:
        assert np.array_equal(remote.batch(0), expected[0])


def test_a_damaged_bucket_json_is_named(folder: Path) -> None:
    (folder / BUCKET).write_text('{"url": "s3://x/y"}')
    with pytest.raises(Fault, match=r"bucket.json is damaged: Bucket: the key 'cache_bytes'"):
        Loader(folder, **SIZE)
    (folder / BUCKET).write_text('{"url": "ftp://x/y", "cache_bytes": 1}')
    with loading(folder, say=lambda message: None) as remote, pytest.raises(UserError, match="ftp"):
        remote.batch(0)


def test_evaluating_takes_no_room_from_training(whole: Path, tmp_path: Path, bucket: str) -> None:
    folder = bare(whole, tmp_path / "here", bucket, cache_bytes=2000)
    with loading(folder, say=lambda message: None) as remote:
        remote.batch(0)
        settled(remote)
    before = shards_in(folder)
    assert sum(1 for _ in val_windows(folder, sequence_len=7).batches(1)) == 6
    assert shards_in(folder) == before


# ---------------------------------------------------------------- several at once


def test_two_that_want_a_shard_fetch_it_once(
    folder: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, both = load_manifest(folder), threading.Barrier(2)
    bucket = load_bucket(folder)
    assert bucket is not None

    def wrap(fetch: Callable[..., None]) -> Any:
        def slow(self: Store, name: str, local: Path) -> None:
            time.sleep(0.2)
            fetch(self, name, local)

        return slow

    patched(monkeypatch, wrap)
    found: list[np.ndarray] = []

    def work() -> None:
        cached = Cache(folder, manifest, bucket)
        both.wait()
        found.append(cached.open(manifest.shards[3]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [manifest.shards[3].file]
    assert np.array_equal(*found)


def test_another_process_may_delete_what_it_does_not_need(
    folder: Path, expected: list[np.ndarray]
) -> None:
    with loading(folder) as remote:
        for step, batch in enumerate(expected[:40]):
            for shard in folder.glob("train_*.bin"):
                if (step + int(shard.stem[-2:])) % 3 == 0:
                    shard.unlink(missing_ok=True)
            assert np.array_equal(remote.batch(step), batch)


def test_what_a_killed_process_left_takes_no_room(folder: Path) -> None:
    aside = folder / ASIDE
    aside.mkdir()
    for index in range(40):
        (aside / f"train_{index:06d}.bin").write_bytes(b"half of it")
    with loading(folder) as remote:
        remote.batch(0)
        settled(remote)
    assert not list(aside.glob("*.bin"))
    assert on_disk(folder) <= ENOUGH


CHILD = """
import hashlib, sys
from pathlib import Path
from tuppence.data import loader
loader.BLOCK_TOKENS = int(sys.argv[2])
made = loader.Loader(Path(sys.argv[1]), sequence_len=10, batch_size=8, seed=3)
sha = ""
for step in range(int(sys.argv[3])):
    sha = loader.rolling_sha(sha, made.batch(step))
    print(sha, flush=True)
made.close()
"""


def test_two_processes_share_a_folder(folder: Path, expected: list[np.ndarray]) -> None:
    command = [sys.executable, "-c", CHILD, str(folder), str(5 * SHARD), str(STEPS)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    most = 0
    while any(child.poll() is None for child in children):
        # not one moment's: a shard may be renamed, or go and another come, while files are summed
        most = max(most, min(on_disk(folder) for _ in range(3)))
        time.sleep(0.002)
    sha = ""
    for batch in expected:
        sha = loader.rolling_sha(sha, batch)
    for child in children:
        out, _ = child.communicate()
        assert child.returncode == 0
        assert out.split()[-1] == sha
    assert 0 < most <= ENOUGH
    assert not list((folder / ASIDE).rglob("*.bin"))
