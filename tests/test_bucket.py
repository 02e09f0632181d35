"""A run that lives on a bucket: sent, verified, sent again, brought back."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bucket_runs import (
    begun,
    codes,
    mirrored,
    objects,
    patched,
    same_bytes,
    save,
    settled,
    steps_on,
    store_at,
)
from checkpoints import equal, fresh, load_newest, state_of, trained

from tuppence import bucket, checkpoint, store
from tuppence.bucket import mirror
from tuppence.errors import Fault
from tuppence.folder import RunFolder

pytest.importorskip("fsspec")
pytest_plugins = ["bucket_places"]
pytestmark = pytest.mark.usefixtures("quick", "closed")


# ---------------------------------------------------------------- there and back


def test_a_run_comes_back_on_a_fresh_machine(url: str, tmp_path: Path) -> None:
    here = begun(tmp_path / "here/x")
    best, last = save(here, 10, best=True), save(here, 20)
    mirrored(here, url)
    there = RunFolder(tmp_path / "there/x")
    assert bucket.restore(there, url)
    assert same_bytes(best, there.checkpoints / best.name)
    assert same_bytes(last, there.checkpoints / last.name)
    for name in ("run.json", "plan.json", "metrics.jsonl", "tokenizer/tokenizer.json"):
        assert there.file(name).read_bytes() == here.file(name).read_bytes()
    for name in ("last.json", "best.json"):
        assert there.read_json(f"checkpoints/{name}") == here.read_json(f"checkpoints/{name}")
    checkpoint.verify(checkpoint.choose(there, "last"))
    assert bucket.attempts_begun(there) == 1


def test_nothing_on_the_bucket_is_nothing_restored(url: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    assert not bucket.restore(folder, url)
    assert not folder.path.exists()


def test_the_next_attempt_goes_on_and_the_one_after_sees_only_its_work(
    url: str, tmp_path: Path
) -> None:
    first = begun(tmp_path / "a/x")
    save(first, 10, best=True)
    save(first, 20)
    mirrored(first, url)
    second = RunFolder(tmp_path / "b/x")
    bucket.restore(second, url)
    begun(second.path, attempt=2, token="bbbb2222")
    save(second, 30, attempt=2)
    mirrored(second, url)
    assert {n.split("/")[0] for n in objects(url)} == {"attempt.json", "a00002-bbbb2222"}
    assert steps_on(url) == {10, 20, 30}
    third = RunFolder(tmp_path / "c/x")
    assert bucket.restore(third, url)
    assert checkpoint.choose(third, "last").name == "step_00000030"
    assert checkpoint.choose(third, "best").name == "step_00000010"
    assert bucket.attempts_begun(third) == 2


def test_the_lines_up_to_a_checkpoint_go_before_it(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any write leaves no checkpoint that knows more than the documents beside it."""
    folder = begun(tmp_path / "x")
    steps: list[tuple[int, int]] = []

    def watching(write: Callable[..., None]) -> Callable[..., None]:
        def watched(self: store.Store, name: str, content: bytes) -> None:
            write(self, name, content)
            lines = self.read(f"{mirrored_by}/metrics.jsonl") or b""
            last = json.loads(lines.splitlines()[-1])["step"] if lines else 0
            steps.append((last, max(steps_on(memory), default=0)))

        return watched

    def in_the_middle(find: Callable[..., Any]) -> Callable[..., Any]:
        def found(self: store.Store, *words: Any) -> Any:
            there = find(self, *words)
            complete = any("step_00000010/checkpoint.json" in name for name in there)
            again = self is store_at(memory) or (folder.checkpoints / "step_00000020").exists()
            if complete and not again:
                save(folder, 20)  # the same round sends it, after the documents it began with
            return there

        return found

    mirrored_by = "a00001-aaaa1111"
    patched(monkeypatch, "find", in_the_middle)
    patched(monkeypatch, "write", watching)
    save(folder, 10)
    made = bucket.Mirror(folder, memory)
    settled(made)
    made.checkpoint(save(folder, 30))
    assert made.close(60)
    assert steps[-1] == (30, 30)
    assert all(lines >= saved for lines, saved in steps)


def test_a_deleted_document_goes_from_the_bucket(memory: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    folder.write_beat({"end": 1.0})
    made = bucket.Mirror(folder, memory)
    settled(made)
    assert "a00001-aaaa1111/heartbeat.json" in objects(memory)
    folder.file("heartbeat.json").unlink()
    assert made.close(60)
    assert "a00001-aaaa1111/heartbeat.json" not in objects(memory)


@pytest.mark.parametrize("place", ["s3", "memory"])
def test_a_real_save_is_sent_as_it_is_committed_and_goes_on_elsewhere(
    place: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url, folder = request.getfixturevalue(place), RunFolder(tmp_path / "a/x")
    folder.path.mkdir(parents=True)
    folder.write_json("run.json", {"name": "x"})
    fence = checkpoint.claim(folder, 1)
    sending = bucket.Mirror(folder, url)
    keep = checkpoint.Retention(keep_last=2)
    saver = checkpoint.Saver(
        folder, attempt=1, keep=keep, committed=sending.checkpoint, fence=fence
    )
    run = trained(1)
    for step in (1, 2, 3, 4):
        run.step(step)
        saver.save(*run.pieces(), state_of(step, best_step=1))
        saver.point("best", 1) if step == 1 else None
    saver.close()
    assert sending.close(60)
    assert steps_on(url) == {1, 3, 4}
    there, other = RunFolder(tmp_path / "b/x"), fresh(seed=1)
    assert bucket.restore(there, url)
    state = load_newest(there, other.model, other.optimizers)
    assert state is not None
    assert state.step == 4
    assert equal(other.tensors(), run.tensors())
    checkpoint.verify(checkpoint.choose(there, "best"))
    checkpoint.claim(there, bucket.attempts_begun(there) + 1)
    mirrored(there, url)
    assert steps_on(url) == {1, 3, 4}


# ---------------------------------------------------------------- verified, resumed


def test_large_files_go_in_parts_that_are_compared(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PART_BYTES", 5 << 20)  # the smallest that S3 takes
    local = tmp_path / "large"
    local.write_bytes(random.Random(0).randbytes((10 << 20) + 7))
    there = store.Store(s3)
    digest = there.digest(local)
    there.send(local, "large", digest)
    assert digest.tag.endswith("-3")
    assert there._fs.info(there._path("large"))["ETag"] == f'"{digest.tag}"'
    there.copy("large", "copied")
    assert there.holds("copied", digest)
    changed = bytearray(local.read_bytes())
    changed[6 << 20] ^= 1
    local.write_bytes(changed)
    assert not there.holds("large", there.digest(local))


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_what_does_not_arrive_whole_is_sent_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    folder = begun(tmp_path / "x")
    saved, harmed = save(folder, 10), []

    def harming(send: Callable[..., None]) -> Callable[..., None]:
        def sent(self: store.Store, local: Path, name: str, digest: store.Digest) -> None:
            if name not in harmed:
                harmed.append(name)
                content = bytearray(local.read_bytes())
                content[5] ^= 1
                other = tmp_path / "harmed"
                other.write_bytes(content if harm == "flip" else content[:-1])
                local = other
            send(self, local, name, digest)

        return sent

    patched(monkeypatch, "send", harming)
    mirrored(folder, url)
    assert len(harmed) == 3
    assert codes(folder).count("upload_recovered") >= 1
    there = RunFolder(tmp_path / "there")
    bucket.restore(there, url)
    assert same_bytes(saved, there.checkpoints / saved.name)


@pytest.mark.parametrize(("tag", "of"), [("0" * 32, ""), ("of-another-form", "safetensors")])
def test_where_tags_are_no_hashes_the_size_is_compared(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str, of: str
) -> None:
    """A bucket with keys of its own gives ETags that are no MD5: nothing is sent for ever."""
    folder = begun(tmp_path / "x")
    save(folder, 10)
    real = store.Store.__init__

    def encrypting(self: store.Store, url: str) -> None:
        real(self, url)
        info = self._fs.info

        def told(path: str) -> dict[str, Any]:
            found: dict[str, Any] = info(path)
            return found | {"ETag": f'"{tag}"'} if of in path else found

        self._fs.info = told

    monkeypatch.setattr(store.Store, "__init__", encrypting)
    mirrored(folder, s3)
    assert "upload_failed" not in codes(folder)
    assert steps_on(s3) == {10}


KILLED_IN_A_SEND = """
import sys, time
from tuppence import bucket
from tuppence import store
from tuppence.folder import RunFolder
send = store.Store.send
def slow(self, local, name, digest):
    if "optimizer" in name:
        print("sending", flush=True)
        time.sleep(600)
    send(self, local, name, digest)
store.Store.send = slow
bucket.Mirror(RunFolder(__import__("pathlib").Path(sys.argv[1])), sys.argv[2])
time.sleep(600)
"""


def test_after_a_kill_inside_a_send_only_the_rest_is_sent(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "x")
    saved = save(folder, 10)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_IN_A_SEND, str(folder.path), s3],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sending\n"
        process.kill()
    assert steps_on(s3) == set()
    sent: list[str] = []
    patched(
        monkeypatch,
        "send",
        lambda send: lambda self, local, *rest: (sent.append(local.name), send(self, local, *rest)),
    )
    begun(folder.path, attempt=2, token="bbbb2222")
    mirrored(folder, s3)
    assert sorted(sent) == ["optimizer.safetensors", "state.json"]
    there = RunFolder(tmp_path / "there")
    assert bucket.restore(there, s3)
    assert same_bytes(saved, there.checkpoints / saved.name)
    assert {n.split("/")[0] for n in objects(s3)} == {"attempt.json", "a00002-bbbb2222"}


def test_parts_of_a_send_that_was_cut_off_do_not_stay(s3: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    mirrored(folder, s3)
    there = store.Store(s3)
    name, _, key = there._path("a00001-aaaa1111/checkpoints/step_00000010/m").partition("/")
    there._fs.call_s3("create_multipart_upload", Bucket=name, Key=key)
    begun(folder.path, attempt=2, token="bbbb2222")
    save(folder, 20, attempt=2)
    mirrored(folder, s3)
    assert there._fs.list_multipart_uploads(name) == []


def test_a_checkpoint_that_is_damaged_here_is_not_sent(memory: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    save(folder, 10)
    bad = save(folder, 20) / "model.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1])
    mirrored(folder, memory)
    assert steps_on(memory) == {10}
    assert codes(folder).count("upload_refused") == 1


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("verb", ["write", "send", "read", "find", "holds"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_failure_passes_and_is_told_of_once(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, times: int
) -> None:
    folder = begun(tmp_path / "x")
    made = bucket.Mirror(folder, memory)
    settled(made)
    failed: list[int] = []

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(self: store.Store, *rest: Any) -> Any:
            if len(failed) < times:
                failed.append(1)
                raise store.Away("the network is away")
            return real(self, *rest)

        return attempt

    patched(monkeypatch, verb, failing)
    made.checkpoint(save(folder, 10))
    settled(made)
    assert made.close(60)
    assert len(failed) == times
    assert codes(folder).count("upload_failed") == 1
    assert codes(folder).count("upload_recovered") == 1
    assert steps_on(memory) == {10}


def test_a_server_that_goes_and_comes_back(s3: str, tmp_path: Path, server: Any) -> None:
    folder = begun(tmp_path / "x")
    made = bucket.Mirror(folder, s3)
    settled(made)
    server.stop()
    made.checkpoint(save(folder, 10))
    while "upload_failed" not in codes(folder):
        made.check()
    assert made.lag() > 0
    assert not made.close(0)
    assert codes(folder)[-1] == "upload_unfinished"
    made._thread.join()
    server._port = server.get_host_and_port()[1]
    server._server_ready_event.clear()
    server.start()
    begun(folder.path, attempt=2, token="bbbb2222")
    mirrored(folder, s3)
    assert steps_on(s3) == {10}


def test_a_fault_of_ours_is_told_at_the_next_check(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "x")
    monkeypatch.setattr(mirror.Mirror, "_point", lambda self: 1 / 0)
    made = bucket.Mirror(folder, memory)
    assert not made.close(60)
    with pytest.raises(Fault, match="ZeroDivisionError"):
        made.check()
