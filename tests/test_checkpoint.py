"""Checkpoints: bit for bit what was saved, on any number of ranks; beside training; what stays."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CUTS,
    Trained,
    by_elements,
    by_rows,
    cut,
    equal,
    fresh,
    replicated,
    save_on,
    savers,
    state_of,
    trained,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuppence import checkpoint
from tuppence.checkpoint import Piece, Pointer, Retention, Saver, fence, retention, tensors, writing
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "checkpoint.json")
TAKEN = r"attempt 2 has taken .* over"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    yield made
    made.close()


@pytest.fixture
def saved(folder: RunFolder) -> RunFolder:
    """Checkpoints of steps 1 and 2."""
    made = fresh()
    for step in (1, 2):
        made.step(step)
        made.save(folder, step)
    return folder


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def steps(folder: RunFolder) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.complete(folder)]


def codes(folder: RunFolder) -> list[str]:
    return [event["code"] for event in folder.rows("events")]


# ---------------------------------------------------------------- what was saved


@pytest.mark.parametrize("tied", [True, False])
def test_training_goes_on_as_if_nothing_had_happened(folder: RunFolder, tied: bool) -> None:
    straight, stopped, resumed = (fresh(tied=tied) for _ in range(3))
    for number in range(6):
        straight.step(number)
    for number in range(3):
        stopped.step(number)
    stopped.save(folder, 3)
    assert checkpoint.load_newest(folder, resumed.model, resumed.optimizers) == state_of(3)
    assert equal(resumed.tensors(), stopped.tensors())
    for number in range(3, 6):
        resumed.step(number)
    assert equal(straight.tensors(), resumed.tensors())
    assert not equal(straight.tensors(), stopped.tensors())
    assert {name.rpartition(".")[2] for name in resumed.tensors()} >= {
        *("exp_avg", "exp_avg_sq", "step"),
        "momentum_buffer",
    }
    inside = sorted(file.name for file in (folder.checkpoints / "step_00000003").iterdir())
    assert inside == sorted(FILES)


def test_pointers_and_steps_choose_a_checkpoint(saved: RunFolder) -> None:
    last = checkpoint.pointer(saved, "last")
    first, second = checkpoint.complete(saved)
    weights = second / "model.safetensors"
    assert last == Pointer(2, "step_00000002", checkpoint.file_sha256(weights))
    with pytest.raises(UserError, match="no best checkpoint yet; steps saved: 1, 2"):
        checkpoint.choose(saved, "best")
    right = Pointer(1, "step_00000001", checkpoint.weights_sha256(first))
    checkpoint.point(saved, "best", right)
    chosen = [checkpoint.choose(saved, which).name[-1] for which in ("best", "last", "1", "2")]
    assert chosen == ["1", "2", "1", "2"]
    for which in ("3", "newest", "-1", "", "²"):
        with pytest.raises(UserError, match="best, last or one of the steps 1, 2"):
            checkpoint.choose(saved, which)
    for wrong in ({"step": 2}, {"path": "step_00000002"}, {"sha256": last.sha256}):
        checkpoint.point(saved, "best", dataclasses.replace(right, **wrong))
        with pytest.raises(Fault, match=r"best\.json does not name the weights"):
            checkpoint.choose(saved, "best")
    (saved.checkpoints / "last.json").write_text('{"step": 2, ')
    with pytest.raises(Fault, match=r"last\.json is damaged"):
        checkpoint.pointer(saved, "last")


KINDS_OF_NUMBERS = {
    "numbers.long": torch.arange(5),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half(),
    "brain": torch.tensor([[1.5, math.nan], [math.inf, -0.0]]).bfloat16(),
    "a single number": torch.tensor(3.25),
    "truth": torch.tensor([True, False, True]),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "short": torch.arange(-3, 3, dtype=torch.int16),
    "words": torch.arange(4, dtype=torch.int32),
    "double": torch.full((2, 2, 2), math.pi, dtype=torch.float64),
    "tiny": torch.tensor([-1], dtype=torch.int8),
    "été ☃": torch.zeros(3, 1),
    "transposed": torch.arange(6.0).view(2, 3).T,
}


@pytest.mark.parametrize(
    "held",
    [KINDS_OF_NUMBERS, {k: v for k, v in KINDS_OF_NUMBERS.items() if v.element_size() < 4}, {}],
    ids=["all", "small", "none"],
)
def test_files_are_those_of_the_library(held: dict[str, torch.Tensor], tmp_path: Path) -> None:
    image = checkpoint.pieces.staged(checkpoint.whole(held))
    told = tensors.write(tmp_path / "ours", image)
    save_file({k: v.contiguous() for k, v in held.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert equal(load_file(tmp_path / "ours"), held)
    assert told.sha256 == checkpoint.file_sha256(tmp_path / "ours")
    assert told.bytes == (tmp_path / "ours").stat().st_size


def test_a_file_of_many_blocks_written_a_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"x": torch.arange(1000, dtype=torch.int64), "y": torch.arange(33, dtype=torch.int8)}
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(tensors, "BLOCK", 100)
        patched.setattr(os, "write", lambda handle, block: write(handle, block[:7]))
        told = tensors.write(tmp_path / "ours", checkpoint.pieces.staged(checkpoint.whole(held)))
    assert equal(load_file(tmp_path / "ours"), held)
    assert told.sha256 == checkpoint.file_sha256(tmp_path / "ours")


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_any_ranks_read_what_any_ranks_wrote(folder: RunFolder, how: str, world: int) -> None:
    made = trained()
    path = save_on(folder, made, 3, world=world, how=CUTS[how])
    checkpoint.verify(path)
    parts = {1: [""]}.get(world, [f"-{r + 1:05d}-of-{world:05d}" for r in range(world)])
    files = {f"{kind}{part}.safetensors" for kind in ("model", "optimizer") for part in parts}
    assert {file.name for file in path.iterdir()} == files | set(FILES[2:])
    weights, moments = made.pieces()
    assert equal(checkpoint.consolidated(path), {k: p.tensor for k, p in weights.items()})
    for others in (1, 2, 4):
        for theirs in CUTS.values():
            for rank in range(others):
                for kind, pieces in (("model", weights), ("optimizer", moments)):
                    there = cut(pieces, theirs, rank, others)
                    blank = {
                        k: dataclasses.replace(p, tensor=torch.full_like(p.tensor, -1))
                        for k, p in there.items()
                    }
                    checkpoint.read(path, blank, kind)
                    right = {k: p.tensor for k, p in there.items()}
                    assert equal({k: p.tensor for k, p in blank.items()}, right)
    again = fresh(seed=1)
    assert checkpoint.load(path, again.model, again.optimizers) == state_of(3)
    assert equal(again.tensors(), made.tensors())


def test_shards_are_rows_where_they_can_be(folder: RunFolder) -> None:
    """So that another reader of safetensors sees what they are; the metadata says where."""
    path = save_on(folder, trained(), 3, world=2)
    with safe_open(path / "model-00002-of-00002.safetensors", "pt") as file:
        assert file.get_slice("wte.weight").get_shape() == [5, 6]
        assert file.get_slice("blocks.0.bias").get_shape() == [3]
        told = json.loads(file.metadata()["pieces"])
    assert told["wte.weight"] == {"start": 36, "shape": [11, 6]}
    assert "scale" not in told  # whole
    assert checkpoint.index(path, "model")["wte.weight"].shape == (11, 6)
    path = save_on(folder, trained(), 4, world=3, how=by_elements)
    with safe_open(path / "model-00002-of-00003.safetensors", "pt") as file:
        assert file.get_slice("wte.weight").get_shape() == [22]  # elements 7 to 29
    path = save_on(folder, trained(), 5, world=8)  # six rows on eight ranks
    with safe_open(path / "model-00007-of-00008.safetensors", "pt") as file:
        assert "blocks.0.bias" not in file.keys()  # noqa: SIM118


def test_the_hash_of_shards(folder: RunFolder) -> None:
    import hashlib

    alone = save_on(folder, trained(), 1)
    told = checkpoint.file_sha256(alone / "model.safetensors")
    assert checkpoint.weights_sha256(alone) == told
    path = save_on(folder, trained(), 2, world=3)
    files = [path / f"model-0000{r}-of-00003.safetensors" for r in (1, 2, 3)]
    joined = "".join(checkpoint.file_sha256(file) for file in files)
    assert checkpoint.weights_sha256(path) == hashlib.sha256(joined.encode()).hexdigest()
    last = checkpoint.pointer(folder, "last")
    assert last == Pointer(2, path.name, checkpoint.weights_sha256(path))
    assert checkpoint.choose(folder, "last") == path


def test_tensors_that_are_not_flat_in_memory(folder: RunFolder) -> None:
    table = torch.arange(12.0).view(4, 3)
    pieces = {"w": Piece(table.T, 0, (3, 4))}  # held as columns
    saver = savers(folder, 1)[0]
    saver.save(pieces, {}, state_of(1))
    saver.close()
    path = folder.checkpoints / "step_00000001"
    assert equal(checkpoint.consolidated(path), {"w": table.T})
    for how in (by_rows, by_elements):
        shards = save_on_two(folder, {"w": table.T}, how)
        for into in (torch.zeros(4, 3).T, torch.zeros(6, 8)[::2, ::2], torch.zeros(3, 4)):
            checkpoint.read(shards, {"w": Piece(into, 0, (3, 4))}, "model")
            assert torch.equal(into, table.T)


def save_on_two(folder: RunFolder, held: dict[str, torch.Tensor], how: Any) -> Path:
    ranks = savers(folder, 2)
    for rank, saver in enumerate(ranks):
        saver.save(cut(checkpoint.whole(held), how, rank, 2), {}, state_of(2))
    for saver in ranks:
        saver.close()
    return folder.checkpoints / "step_00000002"


def test_a_hole_between_the_ranks_is_a_fault(folder: RunFolder) -> None:
    tensor = torch.arange(10.0)
    ranks = savers(folder, 2)
    for saver, (a, b) in zip(ranks, [(0, 4), (5, 10)], strict=True):
        saver.save({"w": Piece(tensor[a:b], a, (10,))}, {}, state_of(1))
    for saver in ranks:
        saver.close()
    path = folder.checkpoints / "step_00000001"
    checkpoint.verify(path)
    for start, end in ((0, 10), (3, 5), (4, 5), (0, 5)):
        into = torch.zeros(end - start)
        with pytest.raises(Fault, match="no file holds w from element 4 on"):
            checkpoint.read(path, {"w": Piece(into, start, (10,))}, "model")
        assert not into.any()
    into = torch.zeros(5)
    checkpoint.read(path, {"w": Piece(into, 5, (10,))}, "model")
    assert torch.equal(into, tensor[5:])
    with pytest.raises(Fault, match="no file holds w"):
        checkpoint.consolidated(path)


@pytest.mark.parametrize("world", [1, 2])
def test_pieces_of_another_model_are_named(folder: RunFolder, world: int) -> None:
    made = trained()
    path = save_on(folder, made, 3, world=world)
    blank = {k: torch.zeros_like(p.tensor) for k, p in made.pieces()[0].items()}

    def refused(wanted: dict[str, torch.Tensor], match: str, **options: bool) -> None:
        with pytest.raises(Fault, match=match):
            checkpoint.read(path, checkpoint.whole(wanted), "model", **options)
        assert not any(tensor.any() for tensor in wanted.values())

    refused({**blank, "zz": torch.zeros(1)}, "another model: zz stands in only one of the two")
    refused({**blank, "zz": torch.zeros(1)}, "another model: zz stands", partial=True)
    fewer = {k: v for k, v in blank.items() if k != "scale"}
    refused(fewer, "another model: scale stands in only one of the two")
    turned = torch.zeros(6, 11)
    refused({**blank, "wte.weight": turned}, r"wte.weight is \[11, 6\], not \[6, 11\]")
    refused({**blank, "scale": torch.zeros((), dtype=torch.float64)}, r"scale is torch.float32, no")
    checkpoint.read(path, checkpoint.whole(fewer), "model", partial=True)
    assert equal(fewer, {k: made.pieces()[0][k].tensor for k in fewer})
    # a rank that has nothing of a tensor says so, and then it knows all of them
    empty = {**checkpoint.whole(fewer), "scale": Piece(torch.zeros(0), 0, ())}
    checkpoint.read(path, empty, "model")


def test_optimizers_of_another_model_are_named(folder: RunFolder) -> None:
    path = save_on(folder, trained(), 3)
    other = fresh()
    before = other.tensors()
    for optimizers in (other.optimizers[:1], other.optimizers[1:]):
        with pytest.raises(Fault, match=r"of another optimizer: nothing here has \S+"):
            checkpoint.load(path, other.model, optimizers)
        assert equal(other.tensors(), before)


# ---------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("name", FILES)
def test_the_newest_that_is_whole_is_loaded(saved: RunFolder, name: str) -> None:
    made = fresh()
    made.step(3)
    made.save(saved, 3)
    path = saved.checkpoints / "step_00000003"
    (path / name).write_bytes((path / name).read_bytes()[:-3])
    (saved.checkpoints / "step_00000002" / name).unlink()
    found = checkpoint.newest(saved)
    assert found.path == saved.checkpoints / "step_00000001"
    assert [name in line for line in found.damaged] == [True, True]
    events = list(saved.rows("events"))
    assert [(e["code"], e["path"]) for e in events] == [
        ("checkpoint_damaged", "step_00000003"),
        ("checkpoint_damaged", "step_00000002"),
    ]
    assert [e["message"] for e in events] == list(found.damaged)
    other = fresh(seed=1)
    assert checkpoint.load_newest(saved, other.model, other.optimizers) == state_of(1)


def test_damage_in_all_of_them_is_a_fault(saved: RunFolder) -> None:
    for path in checkpoint.complete(saved):
        (path / "model.safetensors").write_bytes(b"")
    made = trained()
    before = made.tensors()
    with pytest.raises(Fault, match=r"all 2 checkpoints of .* are damaged .*--fresh"):
        checkpoint.load_newest(saved, made.model, made.optimizers)
    assert equal(made.tensors(), before)  # nothing of a damaged one was taken over


def test_no_checkpoint_is_no_fault(folder: RunFolder) -> None:
    made = fresh()
    assert checkpoint.newest_verified(folder) is None
    assert checkpoint.load_newest(folder, made.model, made.optimizers) is None


@pytest.mark.parametrize("change", [{"layers": 3}, {"layers": 1}, {"tied": False}, {"width": 8}])
def test_a_checkpoint_of_another_model_is_a_fault(saved: RunFolder, change: dict[str, Any]) -> None:
    other = fresh(**change)
    before = other.tensors()
    with pytest.raises(Fault, match=r"step_00000002 is of another model: \S+ (stands|is)"):
        checkpoint.load(saved.checkpoints / "step_00000002", other.model)
    assert equal(other.tensors(), before)


def test_the_pointers_of_a_kill_are_mended(saved: RunFolder) -> None:
    """Killed before `last` was set; `best` points into steps that will be taken again."""
    first, second = checkpoint.complete(saved)
    right = Pointer(1, first.name, checkpoint.weights_sha256(first))
    ahead = Pointer(9, "step_00000009", "0" * 64)
    checkpoint.point(saved, "best", ahead)
    (saved.checkpoints / "last.json").unlink()
    made = fresh()
    checkpoint.load_newest(saved, made.model, made.optimizers)
    assert checkpoint.choose(saved, "last") == second
    assert checkpoint.pointer(saved, "best") == right  # as the state of step 2 has it
    (saved.checkpoints / "best.json").write_text("torn")
    checkpoint.load_newest(saved, made.model, made.optimizers)
    assert checkpoint.pointer(saved, "best") == right
    assert codes(saved) == ["pointer_damaged"]
    checkpoint.point(saved, "best", ahead)
    checkpoint.mend_pointers(saved, first, state_of(1))  # nothing was best at step 1 yet
    assert checkpoint.pointer(saved, "best") is None
    checkpoint.mend_pointers(saved, second, state_of(2, best_step=2))
    assert checkpoint.choose(saved, "best") == second


def test_a_newer_attempt_goes_before_a_later_step(folder: RunFolder) -> None:
    """Attempt 2 went on from before step 9; that 9 is not of its past."""
    for attempt, step in ((1, 9), (2, 4), (2, 6)):
        saver = savers(folder, 1, attempt=attempt)[0]
        saver.save(*trained().pieces(), state_of(step))
        saver.close()
    assert [int(path.name[5:]) for path in checkpoint.by_age(folder)] == [9, 4, 6]
    assert checkpoint.newest_verified(folder) == folder.checkpoints / "step_00000006"
    assert steps(folder) == [4, 6, 9]


def test_a_save_killed_between_its_renames_loses_no_checkpoint(folder: RunFolder) -> None:
    made = trained()
    path = save_on(folder, made, 3)
    os.replace(path, folder.checkpoints / ".step_00000003.replaced")
    retention.sweep(folder, lambda path: True)  # as a leftover it would go, but it is the only one
    assert checkpoint.newest_verified(folder) == path
    other = fresh(seed=1)
    checkpoint.load(path, other.model, other.optimizers)
    assert equal(other.tensors(), made.tensors())


# ---------------------------------------------------------------- beside training


class Held:
    """Stops the saver's thread where a function is called, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        function = getattr(module, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.go.wait(60)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, held)


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
    assert checkpoint.newest_verified(folder) == folder.checkpoints / "step_00000003"
    saver.check()  # told once
    saver.close()


def test_pointing_at_what_was_not_saved_is_told(folder: RunFolder) -> None:
    saver = savers(folder, 1)[0]
    saver.point("best", 7)
    with pytest.raises(Fault, match="step_00000007"):
        saver.close()
    assert checkpoint.pointer(folder, "best") is None


# ---------------------------------------------------------------- what stays


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_few_and_the_best_are_kept(folder: RunFolder, keep_last: int) -> None:
    made = trained()
    for step in (10, 20, 30, 40, 50):
        pointer = made.save(folder, step)
        if step == 20:
            checkpoint.point(folder, "best", pointer)
        checkpoint.retain(folder, keep_last=keep_last)
    last = [50, 40, 30][:keep_last]
    assert steps(folder) == sorted({20, *last})
    for path in checkpoint.complete(folder):
        checkpoint.verify(path)


def saves(folder: RunFolder, numbers: range, keep: Retention, best: int | None = None) -> None:
    saver = savers(folder, 1, keep=keep)[0]
    for step in numbers:
        saver.save(*trained(1).pieces(), state_of(step))
        if step == best:
            saver.point("best", step)
    saver.close()


def one_size(folder: RunFolder) -> int:
    """The bytes of the largest checkpoint: numbers in state.json have more or fewer digits."""
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in checkpoint.complete(folder)]
    assert max(sizes) - min(sizes) < 100
    return max(sizes)


def test_milestones_stay(folder: RunFolder) -> None:
    saves(folder, range(1, 15), Retention(2, keep_every=5), best=3)
    assert steps(folder) == [3, 5, 10, 13, 14]
    assert names(folder) == ["best.json", "last.json", *(f"step_{s:08d}" for s in steps(folder))]
    assert set(codes(folder)) == {"save"}


def test_over_the_limit_milestones_go_first_then_the_older(folder: RunFolder) -> None:
    saves(folder, range(1, 15), Retention(3, keep_every=4), best=3)
    assert steps(folder) == [3, 4, 8, 12, 13, 14]
    size = one_size(folder)
    kept = []
    for room in (6, 5, 4, 3, 2, 1, 0):
        retention.enforce(folder, Retention(3, keep_every=4, max_bytes=room * size))
        kept.append(steps(folder))
    assert kept == [
        [3, 4, 8, 12, 13, 14],
        [3, 8, 12, 13, 14],
        [3, 12, 13, 14],
        [3, 13, 14],
        [3, 14],  # last and best stay whatever is asked
        [3, 14],
        [3, 14],
    ]
    events = [(e["code"], e.get("step")) for e in folder.rows("events") if e["code"] != "save"]
    gone = [("milestone_deleted", step) for step in (4, 8, 12)]
    assert events == [*gone, ("over_disk_limit", None), ("over_disk_limit", None)]


def test_room_is_made_before_a_save(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    saves(folder, range(1, 5), Retention(9))
    size = one_size(folder)
    held = Held(monkeypatch, writing, "write_part")
    saver = savers(folder, 1, keep=Retention(9, max_bytes=3 * size + size // 2))[0]
    saver.save(*trained(1).pieces(), state_of(5))
    assert held.reached.wait(60)
    assert steps(folder) == [3, 4]  # and 5 is still to come
    held.go.set()
    saver.wait()
    assert steps(folder) == [3, 4, 5]
    free = [0]  # a disk that is full until all that may go has gone
    monkeypatch.setattr(retention, "_free", lambda folder: free[0])
    saver.save(*trained(1).pieces(), state_of(6))
    saver.close()
    assert steps(folder) == [5, 6]  # never the last good one


def test_going_back_leaves_nothing_later(folder: RunFolder) -> None:
    saves(folder, range(1, 6), Retention(9), best=4)
    checkpoint.drop_later(folder, 3)
    assert steps(folder) == [1, 2, 3]
    assert names(folder) == [f"step_0000000{step}" for step in (1, 2, 3)]  # no pointers
    assert checkpoint.newest_verified(folder) == folder.checkpoints / "step_00000003"


def test_deleting_is_done_by_name_first(saved: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill inside leaves no damaged checkpoint for a later attempt to complain of."""

    class Killed(BaseException):
        pass

    def kill(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(path.iterdir()).unlink()
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(retention.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            checkpoint.retain(saved, keep_last=1)
    assert checkpoint.newest(saved).damaged == ()
    assert steps(saved) == [2]
    checkpoint.retain(saved, keep_last=1)
    assert names(saved) == ["last.json", "step_00000002"]


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
    with pytest.raises(Fault, match=r"attempt 2 has taken .* over; this one \(attempt 1\) stops"):
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
    assert checkpoint.newest_verified(folder) == folder.checkpoints / "step_00000001"


def test_a_zombie_does_not_wait_for_its_ranks(folder: RunFolder) -> None:
    """Its other rank has gone; it does not take ten minutes to see that it was taken over."""
    zombie = savers(folder, 2)[0]
    zombie.save(*trained().pieces(), state_of(2))
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
    assert checkpoint.newest_verified(folder) is not None


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
