"""Saves beside training: what a step waits for, a late writer, and ranks that fail."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    Held,
    Trained,
    by_elements,
    by_rows,
    cut,
    equal,
    fresh,
    names,
    newest_verified,
    replicated,
    run_folder,
    save_on,
    savers,
    state_of,
    steps,
    trained,
)
from families import on_one_thread
from safetensors.torch import save_file

from tuppence import checkpoint
from tuppence.checkpoint import Retention, Saver, fence, tensors, writing
from tuppence.errors import Fault, Overtaken
from tuppence.folder import RunFolder

TAKEN = r"attempt 2 has taken .* over"

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)
folder = pytest.fixture(run_folder)


# ---------------------------------------------------------------- beside training


def test_training_goes_on_while_a_save_is_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, writing, "write_part")
    made, came = trained(), []
    saver = Saver(
        folder,
        attempt=1,
        keep=Retention(2),
        fence=fence.claim(folder, 1),
        committed=lambda path: came.append((path.name, threading.current_thread().name)),
    )
    before = made.tensors()
    saver.save(*made.pieces(), state_of(3))
    saver.point("best", 3)
    assert held.reached.wait(60)
    made.step(3)  # the step after has changed every tensor
    assert checkpoint.complete(folder) == []
    assert not equal(made.tensors(), before)
    held.go.set()
    saver.wait()
    saver.check()
    other = fresh(seed=1)
    path = checkpoint.choose(folder, "best")
    assert checkpoint.choose(folder, "last") == path
    assert checkpoint.load(path, other.model, other.optimizers) == state_of(3)
    assert equal(other.tensors(), before)
    assert came == [("step_00000003", "saver")]
    event = next(iter(folder.rows("events")))
    assert (event["code"], event["step"]) == ("save", 3)
    assert event["sha256"] == checkpoint.weights_sha256(path)
    assert saver.seconds > 0
    saver.close()


def test_host_buffers_are_kept_while_they_fit(folder: RunFolder) -> None:
    saver, made = savers(folder, 1)[0], trained(0)
    made.step(0)  # moments appear with the first step
    saver.prepare(*made.pieces())
    saver.wait()
    seen = [[saver._images[kind].data.data_ptr() for kind in ("model", "optimizer")]]
    for step in (1, 2, 3):
        made.step(step)
        saver.save(*made.pieces(), state_of(step))
        saver.wait()
        seen.append([saver._images[kind].data.data_ptr() for kind in ("model", "optimizer")])
        other = fresh(seed=1)
        checkpoint.load(checkpoint.choose(folder, "last"), other.model, other.optimizers)
        assert equal(other.tensors(), made.tensors())
    assert seen[0] == seen[1] == seen[2] == seen[3]
    del made.optimizers[1]
    saver.save(*made.pieces(), state_of(4))  # fewer moments: another file
    saver.wait()
    assert not any(
        "momentum" in n for n in checkpoint.index(folder.checkpoints / "step_00000004", "optimizer")
    )
    saver.close()


def test_a_hook_that_fails_is_told_and_the_checkpoint_stands(folder: RunFolder) -> None:
    def fail(path: Path) -> None:
        raise Fault("the bucket is gone")

    saver = savers(folder, 1, committed=fail)[0]
    saver.save(*trained().pieces(), state_of(3))
    with pytest.raises(Fault, match=r"^the bucket is gone$"):
        saver.wait()
    assert newest_verified(folder) == folder.checkpoints / "step_00000003"
    saver.check()  # told once
    saver.close()


def test_pointing_at_what_was_not_saved_is_told(folder: RunFolder) -> None:
    saver = savers(folder, 1)[0]
    saver.point("best", 7)
    with pytest.raises(Fault, match="step_00000007"):
        saver.close()
    assert checkpoint.pointer(folder, "best") is None


# ---------------------------------------------------------------- two writers


def test_a_claim_is_one_attempts(folder: RunFolder) -> None:
    with pytest.raises(Fault, match="not claimed for attempt 1"):
        Saver(folder, attempt=1, keep=Retention(1))
    first = checkpoint.claim(folder, 1)
    first.check()
    peer = checkpoint.Fence(folder, 1)  # another rank of the attempt
    assert peer.token == first.token
    there = json.loads(folder.file("attempt.json").read_text())
    assert (there["attempt"], there["pid"]) == (1, os.getpid())
    checkpoint.claim(folder, 1).check()  # the same number, started twice
    for old in (first, peer):
        with pytest.raises(
            Fault, match=r"another process of attempt 1 has taken .* over; this one"
        ):
            old.check()
    second = checkpoint.claim(folder, 2)
    with pytest.raises(
        Overtaken, match=r"attempt 2 has taken .* over; this one \(attempt 1\) stops"
    ):
        first.check()
    with pytest.raises(Fault, match=TAKEN):
        checkpoint.claim(folder, 1)
    with pytest.raises(Fault, match=TAKEN):
        checkpoint.Fence(folder, 1)
    second.check()
    assert [p.name for p in folder.path.iterdir()] == ["attempt.json"]
    for text in ("", "{", '{"attempt": 2}', "[]"):
        folder.file("attempt.json").write_text(text)
        with pytest.raises(Fault, match="does not say who holds the run"):
            second.check()


def test_a_zombie_writes_nothing(folder: RunFolder) -> None:
    zombie, made = savers(folder, 1)[0], trained()
    zombie.save(*made.pieces(), state_of(1))
    zombie.wait()
    new = savers(folder, 1, attempt=2)[0]
    made.step(9)
    new.save(*made.pieces(), state_of(2))
    new.wait()
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    zombie.save(*trained().pieces(), state_of(2))
    with pytest.raises(Fault, match=TAKEN):
        zombie.wait()
    zombie.point("best", 2)
    with pytest.raises(Fault, match=TAKEN):
        zombie.close()
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before
    new.close()


@pytest.mark.parametrize("where", ["write_part", "gather", "seal"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_zombie_in_the_middle_of_the_same_step(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, where: str, world: int
) -> None:
    first, made = trained(), trained()
    made.step(9)
    save_on(folder, first, 1, world=world)
    with monkeypatch.context() as patched:
        held = Held(patched, writing, where)
        zombies = savers(folder, world)
        for rank, zombie in enumerate(zombies):
            weights, moments = first.pieces()
            zombie.save(
                cut(weights, by_rows, rank, world), cut(moments, by_rows, rank, world), state_of(2)
            )
        assert held.reached.wait(60)
        patched.undo()
        ranks = savers(folder, world, attempt=2)
        for rank, saver in enumerate(ranks):
            weights, moments = made.pieces()
            saver.save(
                cut(weights, by_rows, rank, world), cut(moments, by_rows, rank, world), state_of(2)
            )
        for saver in ranks:
            saver.close()
        held.go.set()
    with pytest.raises(Fault, match=TAKEN):
        zombies[0].close()
    for zombie in zombies[1:]:
        try:
            zombie.close()  # its part was on disk before, or it has noticed
        except Fault as fault:
            assert "attempt 2 has taken" in str(fault)  # noqa: PT017
    path = checkpoint.choose(folder, "last")
    checkpoint.verify(path)
    assert checkpoint.manifest(path).attempt == 2
    assert equal(checkpoint.consolidated(path), {k: p.tensor for k, p in made.pieces()[0].items()})
    assert steps(folder) == [1, 2]


# ---------------------------------------------------------------- ranks that fail


def test_a_rank_that_never_comes_is_named(folder: RunFolder) -> None:
    made = trained()
    save_on(folder, made, 1, world=3)
    ranks = savers(folder, 3, patience=0.2)
    for rank in (0, 2):
        ranks[rank].save(*made.pieces(), state_of(2))
    with pytest.raises(
        Fault, match=r"cannot save step 2 .* the part of rank 1 did not come within"
    ):
        ranks[0].close()
    ranks[2].close()
    assert newest_verified(folder) == folder.checkpoints / "step_00000001"


def test_a_zombie_does_not_wait_for_its_ranks(folder: RunFolder) -> None:
    """Its other rank has gone; it does not take ten minutes to see that it was taken over."""
    zombie = savers(folder, 2)[0]
    zombie.save(*trained().pieces(), state_of(2))
    while not any(folder.checkpoints.glob(".step_*")):  # it has begun
        time.sleep(0.002)
    checkpoint.claim(folder, 2)
    with pytest.raises(Fault, match=TAKEN):
        zombie.close()
    assert not any(folder.checkpoints.iterdir())


def test_a_rank_that_cannot_write_is_told_at_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, write, made = savers(folder, 2), tensors.write, trained()

    def refuse(path: Path, image: tensors.Image) -> Any:
        if path.name == "optimizer-00002-of-00002.safetensors":
            raise OSError(28, os.strerror(28))
        return write(path, image)

    monkeypatch.setattr(tensors, "write", refuse)
    for saver in ranks:
        saver.save(*made.pieces(), state_of(2))
    for saver, told in zip(ranks, ("rank 1: No space left", "No space left"), strict=True):
        with pytest.raises(Fault, match=rf"cannot save step 2 in \S+ {told}"):
            saver.wait()
    assert checkpoint.complete(folder) == []
    monkeypatch.undo()
    for saver in ranks:  # the same step again, by the same savers: nothing old is taken for new
        made.step(7)
        saver.save(*made.pieces(), state_of(2))
    for saver in ranks:
        saver.close()
    assert newest_verified(folder) is not None


def test_parts_of_an_earlier_try_are_not_taken_for_new_ones(folder: RunFolder) -> None:
    """Rank 1's part of a save that rank 0 gave up lies there when both save that step again."""
    old, new = trained(1), trained(4)
    ranks = savers(folder, 2, patience=0.1)

    def save(rank: int, made: Trained) -> None:
        weights, moments = made.pieces()
        held = cut(weights, by_rows, rank, 2), cut(moments, by_rows, rank, 2)
        ranks[rank].save(*held, state_of(2))

    save(0, old)
    with pytest.raises(Fault, match="rank 1 did not come"):
        ranks[0].wait()
    save(1, old)  # too late
    ranks[1].wait()
    ranks[0].patience = 60
    save(0, new)
    save(1, new)
    for saver in ranks:
        saver.close()
    path = checkpoint.choose(folder, "last")
    checkpoint.verify(path)
    assert equal(checkpoint.consolidated(path), {k: p.tensor for k, p in new.pieces()[0].items()})
    assert names(folder) == ["last.json", "step_00000002"]  # the late part is swept


def test_a_fast_rank_is_not_swept(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has written its part of step 2 before rank 0 commits step 1 and cleans up."""
    made = trained()
    ranks = savers(folder, 2)
    held = Held(monkeypatch, writing, "seal")
    for step in (1, 2):
        weights, moments = (cut(p, by_rows, 1, 2) for p in made.pieces())
        ranks[1].save(weights, moments, state_of(step))
        ranks[1].wait()
        if step == 1:
            weights, moments = (cut(p, by_rows, 0, 2) for p in made.pieces())
            ranks[0].save(weights, moments, state_of(1))
            assert held.reached.wait(60)
    held.go.set()
    ranks[0].wait()
    ranks[0].save(weights, moments, state_of(2))
    for saver in ranks:
        saver.close()
    assert steps(folder) == [1, 2]


def test_replicated_and_sharded_come_to_the_same(folder: RunFolder, tmp_path: Path) -> None:
    made = trained()
    paths = [
        save_on(folder, made, step, world=2, how=how)
        for step, how in enumerate((replicated, by_rows, by_elements), 1)
    ]
    files = []
    for path in [*paths, save_on(folder, made, 4)]:
        save_file(checkpoint.consolidated(path), tmp_path / path.name)
        files.append((tmp_path / path.name).read_bytes())
    assert len(set(files)) == 1
    assert files[0] == (folder.checkpoints / "step_00000004/model.safetensors").read_bytes()
