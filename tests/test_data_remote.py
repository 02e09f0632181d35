"""Text from elsewhere: exact whatever the network does, or one line that says why not."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet
import pytest
from small_corpora import hashes, jsonl, made, pack

from tuppence import store
from tuppence.data.survey import survey
from tuppence.errors import Fault, UserError
from tuppence.text import remote
from tuppence.text.formats import Meter
from tuppence.text.inputs import InputFile
from tuppence.text.reading import documents
from tuppence.text.sources import find_files, left_out

if TYPE_CHECKING:
    from hub_server import Hub

pytest_plugins = ["bucket_places", "hub_server"]
FAULTS = ["drop", "short", "cut", "503", "429", "500"]


def texts_of(count: int) -> list[str]:
    """Documents that do not compress to nothing."""
    rng = random.Random(count)
    words = [f"{rng.randrange(10**6):x}" for _ in range(5000)]
    return [" ".join(rng.choices(words, k=rng.randrange(20, 900))) for _ in range(count)]


TEXTS = texts_of(2000)


def parquet(texts: list[str], rows: int = 100) -> bytes:
    sink = pyarrow.BufferOutputStream()
    urls = [text[:100] for text in texts]
    table = pyarrow.table({"id": range(len(texts)), "text": texts, "url": urls})
    pyarrow.parquet.write_table(table, sink, row_group_size=rows)
    return bytes(sink.getvalue().to_pybytes())


PARQUET = parquet(TEXTS)


def read(source: str) -> list[str]:
    return [document.text for document in documents(find_files(source))]


def length(asked: str | None) -> int:
    """Of a range as a header has it."""
    first, last = (asked or "").removeprefix("bytes=").split("-")
    return int(last) + 1 - int(first)


def reading_ahead() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "read-ahead" in thread.name]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No thread of a read outlives it."""
    yield
    assert reading_ahead() == []


# ---------------------------------------------------------------- a dataset of the Hub


def test_a_parquet_streams(hub: Hub) -> None:
    hub.add("owner/name", {"data/train-0.parquet": PARQUET})
    assert len(PARQUET) > 4 << 20  # several blocks
    assert read("hf://owner/name") == TEXTS
    ranges = [each.range for each in hub.ranged() if each.path.startswith("/cdn")]
    assert len(ranges) == len(set(ranges))
    assert len(ranges) < 16


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_network_costs_a_try(hub: Hub, fault: str) -> None:
    hub.add("owner/name", {"train.parquet": PARQUET})
    hub.faults.extend([fault, fault, "", fault, fault, fault])
    assert read("hf://owner/name") == TEXTS
    assert not hub.faults


def test_the_hub_and_the_disk_make_the_same_shards(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/name", {"data/train.parquet": PARQUET})
    (tmp_path / "train.parquet").write_bytes(PARQUET)
    hub.faults.extend(["", "drop", "503", "short", "cut"])
    there = made("hf://owner/name", tmp_path / "a", max_tokens=50_000)
    here = made(tmp_path / "train.parquet", tmp_path / "b", max_tokens=50_000)
    assert hashes(there) == hashes(here)
    assert there.manifest.inputs_sha256 == here.manifest.inputs_sha256
    (told,) = there.manifest.inputs
    assert told.path == "hf://datasets/owner/name@" + hub.revisions["main"] + "/data/train.parquet"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_never_mends_is_one_line(hub: Hub, fault: str) -> None:
    hub.add("owner/name", {"train.parquet": PARQUET})
    found = find_files("hf://owner/name")
    hub.always = fault
    with pytest.raises(Fault, match=r"the same command goes on from where it stopped") as caught:
        list(documents(found))
    assert "\n" not in str(caught.value)
    assert found[0].shown in str(caught.value)
    assert "tried 6 times" in str(caught.value)
    assert len([each for each in hub.ranged() if each.path.startswith("/cdn")]) == 6


def test_what_cannot_mend_is_not_tried_again(hub: Hub) -> None:
    hub.add("owner/name", {"train.parquet": PARQUET})
    found = find_files("hf://owner/name")
    hub.always = "403"
    with pytest.raises(Fault, match=r"train\.parquet cannot be read: HTTP 403"):
        list(documents(found))
    assert len(hub.ranged()) == 2  # the Hub, and where it sends


def test_the_token_is_for_the_hub_alone(hub: Hub) -> None:
    hub.add("owner/name", {"train.parquet": PARQUET})
    read("hf://owner/name")
    for each in hub.asked:
        assert each.authorization == (None if each.path.startswith("/cdn") else "Bearer hf_nobody")


# ---------------------------------------------------------------- seeking, blocks


def opened(hub: Hub, content: bytes) -> tuple[InputFile, io.BufferedReader]:
    hub.web["some.txt"] = content
    (file,) = find_files(f"{hub.url}/some.txt")
    return file, remote.opened(file)


def test_reads_anywhere(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 100)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 800)
    content = random.Random(1).randbytes(20_000)
    _, reader = opened(hub, content)
    rng = random.Random(2)
    with reader:
        for _ in range(100):
            at = rng.randrange(21_000)
            count = rng.choice((1, 50, 99, 900, 5000))
            assert reader.seek(at) == at
            assert reader.read(count) == content[at : at + count]
        reader.seek(-10, io.SEEK_END)
        assert reader.read() == content[-10:]
        assert reader.read(1) == b""
        reader.seek(0)
        assert reader.read() == content


def test_holds_two_blocks_and_one_more_under_way(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 1 << 10)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1 << 13)
    _, reader = opened(hub, bytes(200_000))
    with reader:
        while reader.read(1000):
            raw = reader.raw
            assert isinstance(raw, remote._Remote)
            assert len(raw._content) <= 1 << 13
        assert len(reading_ahead()) == 1
    assert reading_ahead() == []
    lengths = [length(each.range) for each in hub.ranged()[1:]]
    assert sum(lengths) == 200_000  # nothing twice
    assert max(lengths) == 1 << 13
    assert sorted(lengths[:5]) == lengths[:5]


def test_closing_ends_a_wait(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 1 << 10)
    monkeypatch.setattr(remote, "PAUSES", (10_000.0,))
    _, reader = opened(hub, bytes(50_000))
    hub.faults.extend(["", "", "503"])  # the third block is the one that is read ahead
    with reader:
        assert reader.raw.read(1024) == bytes(1024)
        assert reader.raw.read(2048) == bytes(2048)
        while len(hub.ranged()) < 4:
            threading.Event().wait(0.001)
    assert len(hub.ranged()) == 4


# ---------------------------------------------------------------- the web, compressed


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.jsonl.xz", "a.jsonl.zst"]
)
def test_what_is_compressed_streams(hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BYTES", 1 << 12)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1 << 15)
    hub.web[name] = pack(jsonl(TEXTS[:200]), name.rpartition(".")[2])
    hub.faults.extend(["", "drop", "short", "", "cut", "503", "429"])
    assert read(f"{hub.url}/{name}?key=secret") == TEXTS[:200]
    assert find_files(f"{hub.url}/{name}?key=secret")[0].shown == f"{hub.url}/{name}"


def test_a_server_without_ranges(hub: Hub) -> None:
    hub.ranges = False
    hub.web |= {"small.jsonl": jsonl(TEXTS[:20]), "large.txt": bytes(9 << 20)}
    assert read(f"{hub.url}/small.jsonl") == TEXTS[:20]
    with pytest.raises(UserError, match=r"large\.txt cannot be read: .* gives no parts"):
        find_files(f"{hub.url}/large.txt")


def test_a_file_of_the_web_that_changes(hub: Hub) -> None:
    hub.web["a.jsonl"] = jsonl(TEXTS[:20])
    (file,) = find_files(f"{hub.url}/a.jsonl")
    hub.web["a.jsonl"] = jsonl(TEXTS[:20]).replace(b"a", b"b")
    with pytest.raises(Fault, match=r"a\.jsonl is not what it was when it was listed: .*etag"):
        list(documents([file]))
    hub.web["a.jsonl"] += b"\n"
    with pytest.raises(Fault, match="bytes, and had"):
        list(documents([file]))


def test_what_the_web_does_not_have(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"/none\.jsonl cannot be read: HTTP 404"):
        find_files(f"{hub.url}/none.jsonl")
    with pytest.raises(UserError, match="its name does not tell"):
        find_files(f"{hub.url}/none")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/a\.jsonl cannot be read .*tried 3 times"):
        find_files("http://127.0.0.1:9/a.jsonl")


# ---------------------------------------------------------------- buckets


def put(url: str, files: dict[str, bytes]) -> store.Store:
    place = store.Store(url)
    for name, content in files.items():
        place.write(name, content)
    return place


def test_a_bucket(url: str) -> None:
    files = {
        "c/b.jsonl": jsonl(TEXTS[:3]),
        "c/a/x.parquet": parquet(TEXTS[3:6]),
        "c/about.json": b"{}",
        "c/notes.md": b"no text",
        "other.jsonl.zst": b"no",
    }
    put(url, files)
    assert read(f"{url}/c/") == TEXTS[3:6] + TEXTS[:3]
    assert read(f"{url}/c/*.jsonl") == TEXTS[:3]
    assert read(f"{url}/**/*.parquet, {url}/c/b.jsonl") == TEXTS[3:6] + TEXTS[:3]
    (one,) = find_files(f"{url}/c/a/x.parquet")
    assert one.bytes == len(files["c/a/x.parquet"])
    for missing in ("d/", "c/*.txt", "c/none.jsonl"):
        with pytest.raises(UserError, match=r"no (such )?file"):
            find_files(f"{url}/{missing}")


def test_a_folder_on_a_bucket_is_read_as_one_here(url: str) -> None:
    files = {
        "c/a.jsonl": jsonl(TEXTS[:3]),
        "c/empty.txt": b"",
        "c/.hidden.txt": b"x",
        "c/.old/b.txt": b"x",
        "c/about.json": b"{}",
        "c/notes.md": b"no text",
    }
    put(url, files)

    def names_of(source: str) -> list[str]:
        return [file.path.rpartition("/c/")[2] for file in find_files(source)]

    assert names_of(f"{url}/c/") == ["a.jsonl", "empty.txt"]
    assert names_of(f"{url}/c/**/*.txt") == ["empty.txt"]
    assert names_of(f"{url}/c/.h*.txt") == [".hidden.txt"]
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        read(f"{url}/c/empty.txt")
    assert left_out(f"{url}/c/") == {".json": 1, ".md": 1}
    assert left_out(f"{url}/c/a.jsonl,{url}/c/*.jsonl") == {}
    if not url.startswith("file:"):
        with pytest.raises(UserError, match=r"\*\*\.txt: \*\* stands for whole folders"):
            find_files(f"{url}/c/**.txt")


def test_a_parquet_streams_from_s3(s3: str) -> None:
    put(s3, {"train.parquet": PARQUET})
    assert read(f"{s3}/train.parquet") == TEXTS


def test_s3_is_read_again_where_it_failed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.0,) * 5)
    place = put(s3, {"train.parquet": PARQUET})
    calls, right = [], store.Store.read_range

    def bad(self: store.Store, name: str, start: int, stop: int, tag: str) -> bytes:
        calls.append(start)
        content = right(self, name, start, stop, tag)
        if len(calls) % 3 == 1:
            raise store.Away("the connection was reset")
        return content[:-1] if len(calls) % 3 == 2 else content

    found = find_files(f"{s3}/train.parquet")
    monkeypatch.setattr(store.Store, "read_range", bad)
    assert [document.text for document in documents(found)] == TEXTS
    monkeypatch.setattr(store.Store, "read_range", right)
    place.write("train.parquet", PARQUET[:-1] + b"2")
    with pytest.raises(Fault, match=r"train\.parquet is not what it was .* has changed"):
        list(documents(found))
    place.delete("train.parquet")
    with pytest.raises(Fault, match=r"cannot be read: .*not found"):
        list(documents(found))


@pytest.mark.parametrize("fault", ["drop", "short", "cut"])
def test_what_s3_sends_in_part_is_asked_for_again(
    hub: Hub, s3: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", hub.url)
    bucket = f"s3://bucket-of-{fault}"
    hub.web["train.jsonl"] = jsonl(TEXTS[:500])
    hub.faults.extend([fault, "", fault, fault])
    assert read(f"{bucket}/train.jsonl") == TEXTS[:500]
    assert not hub.faults
    (file,) = find_files(f"{bucket}/train.jsonl")
    hub.web["train.jsonl"] = jsonl(TEXTS[1:501])
    with pytest.raises(Fault, match=r"train\.jsonl is not what it was"):
        list(documents([file]))


def test_a_bucket_that_is_not_there(s3: str) -> None:
    bucket = s3.split("/")[2]
    with pytest.raises(UserError, match=f"there is no bucket {bucket}0"):
        find_files(f"s3://{bucket}0/x/")
    with pytest.raises(UserError, match=r"text is read from s3://, gs://, hf://"):
        find_files("ftp://host/a.txt")


# ---------------------------------------------------------------- a look from afar


def test_a_survey_reads_little(hub: Hub) -> None:
    large = parquet(texts_of(12_000))
    hub.add("owner/name", {"train.parquet": large})
    found = survey(source="hf://owner/name", tokenizer="byte")
    fetched = 0
    for each in hub.ranged():
        if each.path.startswith("/cdn"):
            fetched += length(each.range)
    assert not found.exact
    assert found.source_bytes == len(large)
    assert found.bytes == pytest.approx(sum(map(len, texts_of(12_000))), rel=0.3)
    assert fetched < 12 << 20
    assert fetched < len(large) / 2


def test_the_meter_counts_what_is_read(hub: Hub) -> None:
    hub.add("owner/name", {"train.parquet": PARQUET})
    found, meter = find_files("hf://owner/name"), Meter()
    with closing(documents(found, meter=meter)) as reading:  # type: ignore[type-var]
        next(reading)
        assert 0 < meter.done_bytes <= len(PARQUET)
