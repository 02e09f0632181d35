"""Checkpoints: bit for bit what was saved, damage found wherever it is, disks that fill up."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import optimizer_plan

from tuppence import checkpoint
from tuppence.checkpoint import Pointer, State
from tuppence.config import DataPlan, ModelPlan, Run
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder
from tuppence.model import build
from tuppence.model.gpt2 import GPT2
from tuppence.plan.asked import solve_model
from tuppence.train.optim import optimizers_of

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "checkpoint.json")
ADAMW = optimizer_plan(learning_rate=1e-2, weight_decay=0.1)


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
def tiny(small_run: Run, data_plan: DataPlan) -> ModelPlan:
    model = dataclasses.replace(small_run.model, n_layer=1, n_embd=8, sequence_len=8)
    return solve_model(dataclasses.replace(small_run, model=model), data_plan)


@dataclasses.dataclass
class Trained:
    """A model and its optimizer; every `step` is a function of the step's number."""

    model: GPT2
    optimizers: list[torch.optim.Optimizer]

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(65, (4, 9), generator=generator)
        self.model(tokens[:, :-1], tokens[:, 1:]).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()

    def save(self, folder: RunFolder, step: int) -> Pointer:
        return checkpoint.save(folder, self.model, self.optimizers, state_of(step))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and moments by name."""
        out = {}
        for name, parameter in self.model.named_parameters():
            out[name] = parameter.detach()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    out[f"{name}.{key}"] = value
        return out


def fresh(plan: ModelPlan, *, seed: int = 0) -> Trained:
    model = build(plan)
    model.init_weights(seed)
    return Trained(model, optimizers_of(model, ADAMW))


def state_of(step: int) -> State:
    return State(
        step=step,
        tokens=32 * step,
        tokens_sha="ab" * 32,
        progress=step / 7,  # not a short decimal
        finished=False,
        evaluation_due=False,
        began_seconds=1.5,
        bad_steps=1,
        best_step=None if step == 1 else 1,
        best_val_loss=None if step == 1 else 10 / 3,
        attempt=1,
        saved_at=1.7e9 + 1 / 3,
    )


@pytest.fixture
def trained(tiny: ModelPlan) -> Trained:
    return fresh(tiny)


@pytest.fixture
def saved(trained: Trained, folder: RunFolder) -> RunFolder:
    """Checkpoints of steps 1 and 2."""
    for step in (1, 2):
        trained.step(step)
        trained.save(folder, step)
    return folder


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- what was saved


@pytest.mark.parametrize("tied", [True, False])
def test_training_goes_on_as_if_nothing_had_happened(
    tiny: ModelPlan, folder: RunFolder, tied: bool
) -> None:
    plan = dataclasses.replace(tiny, tied_head=tied, bias=True)
    straight, stopped, resumed = (fresh(plan) for _ in range(3))
    for number in range(6):
        straight.step(number)
    for number in range(3):
        stopped.step(number)
    stopped.save(folder, 3)
    assert checkpoint.load_newest(folder, resumed.model, resumed.optimizers) == state_of(3)
    for number in range(3, 6):
        resumed.step(number)
    assert equal(straight.tensors(), resumed.tensors())
    assert not equal(straight.tensors(), stopped.tensors())
    assert len(resumed.tensors()) == 4 * len(dict(resumed.model.named_parameters()))
    inside = sorted(file.name for file in (folder.checkpoints / "step_00000003").iterdir())
    assert inside == sorted(FILES)


def test_pointers_and_steps_choose_a_checkpoint(saved: RunFolder) -> None:
    last = checkpoint.pointer(saved, "last")
    weights = saved.checkpoints / "step_00000002" / "model.safetensors"
    assert last == Pointer(2, "step_00000002", checkpoint.file_sha256(weights))
    with pytest.raises(UserError, match="no best checkpoint yet; steps saved: 1, 2"):
        checkpoint.choose(saved, "best")
    checkpoint.point(saved, "best", Pointer(1, "step_00000001", "x"))
    chosen = [checkpoint.choose(saved, which).name[-1] for which in ("best", "last", "1", "2")]
    assert chosen == ["1", "2", "1", "2"]
    for which in ("3", "newest", "-1", "", "²"):
        with pytest.raises(UserError, match="best, last or one of the steps 1, 2"):
            checkpoint.choose(saved, which)
    (saved.checkpoints / "last.json").write_text('{"step": 2, ')
    with pytest.raises(Fault, match=r"last\.json is damaged"):
        checkpoint.pointer(saved, "last")


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_found(saved: RunFolder, name: str) -> None:
    path = saved.checkpoints / "step_00000002"
    whole = (path / name).read_bytes()
    size, passed = len(whole), 0
    for offset in {0, 1, 7, 8, size - 2, size - 1, *range(0, size, max(1, size // 60))}:
        damaged = bytearray(whole)
        damaged[offset] ^= 0x10
        (path / name).write_bytes(damaged)
        try:
            checkpoint.verify(path)
            passed += 1
        except Fault as error:
            assert f"{path} is damaged: {name}" in str(error) or name == "checkpoint.json"  # noqa: PT017
    assert passed <= (3 if name == "checkpoint.json" else 0)  # a blank of the hashes harms nothing
    (path / name).unlink()
    with pytest.raises(Fault, match=rf"{path} is damaged: {name}"):
        checkpoint.verify(path)


HASHES = dict.fromkeys(FILES[:3], "0" * 64)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\xff",
        "[]",
        '{"version": 1, "sha256": {}}',
        json.dumps({"version": 2, "sha256": HASHES}),
        json.dumps({"version": 1, "sha256": {**HASHES, "../run.json": "0" * 64}}),
    ],
)
def test_hashes_that_are_not_there(saved: RunFolder, text: str) -> None:
    path = saved.checkpoints / "step_00000002"
    (path / "checkpoint.json").write_text(text, encoding="latin-1")
    with pytest.raises(Fault, match=r"step_00000002 is damaged: checkpoint\.json"):
        checkpoint.verify(path)


@pytest.mark.parametrize("name", FILES)
def test_the_newest_that_is_whole_is_loaded(
    trained: Trained, tiny: ModelPlan, saved: RunFolder, name: str
) -> None:
    trained.step(3)
    trained.save(saved, 3)
    path = saved.checkpoints / "step_00000003"
    (path / name).write_bytes((path / name).read_bytes()[:-3])
    (saved.checkpoints / "step_00000002" / name).unlink()
    other = fresh(tiny, seed=1)
    assert checkpoint.load_newest(saved, other.model, other.optimizers) == state_of(1)
    events = list(saved.rows("events"))
    assert [(e["code"], e["path"]) for e in events] == [
        ("checkpoint_damaged", "step_00000003"),
        ("checkpoint_damaged", "step_00000002"),
    ]
    assert all(name in e["message"] for e in events)


def test_damage_in_all_of_them_is_a_fault(trained: Trained, saved: RunFolder) -> None:
    for path in checkpoint.complete(saved):
        (path / "model.safetensors").write_bytes(b"")
    before = {name: tensor.clone() for name, tensor in trained.tensors().items()}
    with pytest.raises(Fault, match=r"all 2 checkpoints of .* are damaged .*--fresh"):
        checkpoint.load_newest(saved, trained.model, trained.optimizers)
    assert equal(trained.tensors(), before)  # nothing of a damaged one was taken over


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 2}, {"bias": True}, {"tied_head": False}, {"n_embd": 16}, {"vocab_size": 66}],
)
def test_a_checkpoint_of_another_model_is_a_fault(
    tiny: ModelPlan, saved: RunFolder, change: dict[str, Any]
) -> None:
    other = fresh(dataclasses.replace(tiny, **change))
    before = {name: tensor.clone() for name, tensor in other.tensors().items()}
    with pytest.raises(Fault, match=r"step_00000002 is of another model: \S+ (stands|is)"):
        checkpoint.load(saved.checkpoints / "step_00000002", other.model)
    assert equal(other.tensors(), before)


# ---------------------------------------------------------------- leftovers and retention


def test_killed_while_writing_the_earlier_ones_stand(
    trained: Trained, tiny: ModelPlan, saved: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing catches it, as nothing catches kill -9."""

    def kill(*_: object) -> None:
        raise Killed

    for where in ("_optimizer_tensors", "_flush", "write_text"):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, where, kill)
            with pytest.raises(Killed):
                trained.save(saved, 3)
        assert [p.name for p in checkpoint.complete(saved)] == ["step_00000001", "step_00000002"]
        assert checkpoint.load_newest(saved, trained.model, trained.optimizers) == state_of(2)
    for number in (3, 9):  # the leftover of this process is in the way, then the same step
        trained.step(number)
        trained.save(saved, 3)
        other = fresh(tiny)
        assert checkpoint.load_newest(saved, other.model, other.optimizers) == state_of(3)
        assert equal(other.tensors(), trained.tensors())
    checkpoint.retain(saved, keep_last=5)
    assert names(saved) == ["last.json", *(f"step_0000000{step}" for step in (1, 2, 3))]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_few_and_the_best_are_kept(
    trained: Trained, folder: RunFolder, keep_last: int
) -> None:
    for step in (10, 20, 30, 40, 50):
        pointer = trained.save(folder, step)
        if step == 20:
            checkpoint.point(folder, "best", pointer)
        checkpoint.retain(folder, keep_last=keep_last)
    last = [50, 40, 30][:keep_last]
    assert [int(path.name[5:]) for path in checkpoint.complete(folder)] == sorted({20, *last})
    for path in checkpoint.complete(folder):
        checkpoint.verify(path)


# ---------------------------------------------------------------- full and read-only disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("where", ["save_file", "_flush", "write_text", "_flush_folder"])
def test_a_save_that_cannot_be_written(
    trained: Trained,
    tiny: ModelPlan,
    saved: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    code: int,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, where, refuse)
        with pytest.raises(Fault) as fault:
            trained.save(saved, 3)
    message = str(fault.value)
    assert message.startswith(f"cannot save step 3 in {saved.checkpoints}: {os.strerror(code)} (")
    assert "the last good one is step 2: make room or give write access" in message
    assert "\n" not in message
    # steps 1 and 2 stand, step 2 loads, and nothing is left of a third
    assert names(saved) == ["last.json", "step_00000001", "step_00000002"]
    other = fresh(tiny)
    assert checkpoint.load_newest(saved, other.model, other.optimizers) == state_of(2)
    trained.save(saved, 3)
