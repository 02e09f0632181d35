"""Checkpoints: bit for bit what was saved, on any number of ranks; which one is loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CUTS,
    by_elements,
    by_rows,
    codes,
    cut,
    equal,
    fresh,
    load_newest,
    newest_verified,
    run_folder,
    save_on,
    saved_twice,
    savers,
    state_of,
    steps,
    trained,
)
from families import on_one_thread
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuppence import checkpoint
from tuppence.checkpoint import Piece, Pointer, retention, tensors
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "checkpoint.json")

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)
folder = pytest.fixture(run_folder)
saved = pytest.fixture(saved_twice)


# ---------------------------------------------------------------- what was saved


@pytest.mark.parametrize("tied", [True, False])
def test_training_goes_on_as_if_nothing_had_happened(folder: RunFolder, tied: bool) -> None:
    straight, stopped, resumed = (fresh(tied=tied) for _ in range(3))
    for number in range(6):
        straight.step(number)
    for number in range(3):
        stopped.step(number)
    stopped.save(folder, 3)
    assert load_newest(folder, resumed.model, resumed.optimizers) == state_of(3)
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
    assert load_newest(saved, other.model, other.optimizers) == state_of(1)


def test_damage_in_all_of_them_is_a_fault(saved: RunFolder) -> None:
    for path in checkpoint.complete(saved):
        (path / "model.safetensors").write_bytes(b"")
    made = trained()
    before = made.tensors()
    with pytest.raises(Fault, match=r"all 2 checkpoints of .* are damaged .*--fresh"):
        load_newest(saved, made.model, made.optimizers)
    assert equal(made.tensors(), before)  # nothing of a damaged one was taken over


def test_no_checkpoint_is_no_fault(folder: RunFolder) -> None:
    made = fresh()
    assert newest_verified(folder) is None
    assert load_newest(folder, made.model, made.optimizers) is None


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
    load_newest(saved, made.model, made.optimizers)
    assert checkpoint.choose(saved, "last") == second
    assert checkpoint.pointer(saved, "best") == right  # as the state of step 2 has it
    (saved.checkpoints / "best.json").write_text("torn")
    load_newest(saved, made.model, made.optimizers)
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
    assert newest_verified(folder) == folder.checkpoints / "step_00000006"
    assert steps(folder) == [4, 6, 9]


def test_a_save_killed_between_its_renames_loses_no_checkpoint(folder: RunFolder) -> None:
    made = trained()
    path = save_on(folder, made, 3)
    os.replace(path, folder.checkpoints / ".step_00000003.replaced")
    retention.sweep(folder, lambda path: True)  # as a leftover it would go, but it is the only one
    assert newest_verified(folder) == path
    other = fresh(seed=1)
    checkpoint.load(path, other.model, other.optimizers)
    assert equal(other.tensors(), made.tensors())
