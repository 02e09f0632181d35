"""The looped family: its draws, its loop by the textbook, truncated gradients."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import LOOP, SMALL, built, model_plan, on_one_thread, shaken
from forked import Forked
from textbook import looped as textbook
from torch import Tensor

from tuppence.config import LoopPlan, ModelPlan
from tuppence.model import looped
from tuppence.model.looped import Looped, capacity_of, draw_recurrence
from tuppence.model.replay import Draws, keyed_normal
from tuppence.plan.shapes import expected_recurrence
from tuppence.train.draws import sequence_keys

PLAN = model_plan(**SMALL["looped"])
ROUTED = model_plan(**SMALL["looped"], mixture_of_depths=True)
IDX = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(3))
TARGETS = IDX.roll(-1, 1)
KEYS = torch.tensor([11, 22, 33, 44])

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)


def loop_of(plan: ModelPlan = PLAN, **changes: object) -> LoopPlan:
    assert plan.loop is not None
    return dataclasses.replace(plan.loop, **changes)


def gradients(model: Looped) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- draws


def test_r_is_a_function_of_seed_and_step() -> None:
    """Pinned: a resumed run, on whatever machine, draws these again."""
    loop = loop_of(mean_recurrence=4.0, max_recurrence=16)
    drawn = [draw_recurrence(loop, seed=1, step=step) for step in range(12)]
    assert drawn == [draw_recurrence(loop, seed=1, step=step) for step in reversed(range(12))][::-1]
    assert drawn == [5, 6, 3, 3, 7, 6, 2, 3, 4, 3, 3, 6]
    assert drawn != [draw_recurrence(loop, seed=2, step=step) for step in range(12)]


def test_r_is_log_normal_about_its_median() -> None:
    loop = loop_of(mean_recurrence=4.0, max_recurrence=9)
    drawn = [draw_recurrence(loop, seed=0, step=step) for step in range(4000)]
    count = Counter(drawn)
    assert np.median(drawn) == 4
    assert (min(drawn), max(drawn)) == (1, 9)
    assert all(isinstance(r, int) for r in drawn)
    assert np.mean(drawn) == pytest.approx(expected_recurrence(loop), rel=0.015)
    for r in range(2, 9):  # of log r, deviation 0.5, the part that rounds to r
        ends = [0.5 * math.erf(math.log(x / 4) / 0.5 / math.sqrt(2)) for x in (r - 0.5, r + 0.5)]
        assert count[r] / 4000 == pytest.approx(ends[1] - ends[0], abs=0.02)
    least = loop_of(mean_recurrence=1.0, max_recurrence=9)
    assert min(draw_recurrence(least, seed=0, step=step) for step in range(200)) == 1


def test_noise_belongs_to_sequence_and_position() -> None:
    whole = keyed_normal(KEYS, 0, 16, 32)
    torch.testing.assert_close(keyed_normal(KEYS[2:3], 0, 16, 32)[0], whole[2])
    torch.testing.assert_close(keyed_normal(KEYS.flip(0), 5, 4, 32), whole.flip(0)[:, 5:9])
    others = keyed_normal(KEYS + 1, 0, 16, 32)
    assert not torch.isclose(whole, others).any()
    assert not torch.isclose(whole[:, 1:], whole[:, :-1]).any()


def test_noise_is_standard_normal() -> None:
    x = keyed_normal(torch.arange(64), 0, 64, 64).flatten()
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    assert x.std().item() == pytest.approx(1, abs=0.01)
    for bound, inside in ((0.5, 0.3829), (1.0, 0.6827), (2.0, 0.9545), (3.0, 0.9973)):
        assert (x.abs() < bound).float().mean().item() == pytest.approx(inside, abs=0.005)
    pairs = x.view(-1, 2)
    assert (pairs[:, 0] * pairs[:, 1]).mean().item() == pytest.approx(0, abs=0.01)
    assert (pairs[:, 0].abs() * pairs[:, 1].abs()).mean().item() == pytest.approx(
        2 / math.pi, abs=0.01
    )


@pytest.mark.parametrize("plan", [PLAN, ROUTED], ids=["plain", "routed"])
def test_a_sequence_is_the_same_in_any_batch(plan: ModelPlan) -> None:
    model = shaken(plan)
    with torch.no_grad():
        whole = model(IDX, draws=Draws(KEYS, 4))
        alone = model(IDX[2:3], draws=Draws(KEYS[2:3], 4))
        turned = model(IDX.flip(0), draws=Draws(KEYS.flip(0), 4))
        other = model(IDX, draws=Draws(KEYS + 1, 4))
    torch.testing.assert_close(alone[0], whole[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned.flip(0), whole, atol=1e-4, rtol=1e-4)
    assert (other - whole).abs().max() > 1e-3


@pytest.mark.parametrize("plan", [PLAN, ROUTED], ids=["plain", "routed"])
def test_two_halves_of_a_batch_are_the_batch(plan: ModelPlan) -> None:
    """As two ranks: each its half with its keys, the same r, gradients averaged."""
    r = draw_recurrence(loop_of(plan), seed=0, step=5)
    model, found = shaken(plan), []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        model.zero_grad()
        loss = torch.zeros(())
        for part in parts:
            mine = model(IDX[part], TARGETS[part], draws=Draws(KEYS[part], r)) / len(parts)
            mine.backward()
            loss += mine.detach()
        found.append((loss, gradients(model)))
    (whole, grads), (halves, other) = found
    assert halves.item() == pytest.approx(whole.item(), rel=1e-6)
    assert grads.keys() == other.keys()
    for name, grad in grads.items():
        assert (grad - other[name]).norm() <= 1e-5 * grad.norm(), name


STEPS = 3


def rank_trains(rank: int, world: int, folder: str) -> None:
    """One process of a group: its part of each batch; rank 0 writes what all of them saw."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=world
        )
    model = built(PLAN)
    seen = []
    for step in range(STEPS):
        r = torch.tensor([draw_recurrence(loop_of(), seed=0, step=step)])
        drawn = [torch.zeros_like(r) for _ in range(world)]
        keys = torch.from_numpy(sequence_keys(seed=0, step=step, batch_sequences=4))
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        loss = model(IDX[mine], TARGETS[mine], draws=Draws(keys[mine], int(r))) / world
        loss.backward()
        total = loss.detach()
        if world > 1:
            dist.all_gather(drawn, r)
            for tensor in (total, *(p.grad for p in model.parameters())):
                dist.all_reduce(tensor)
        else:
            drawn = [r]
        seen.append([total.item(), *(int(one) for one in drawn)])
        with torch.no_grad():  # plain descent, which does not enlarge roundings
            for p in model.parameters():
                p.sub_(0.1 * p.grad)
        model.zero_grad()
    if rank == 0:
        np.save(Path(folder, f"seen_{world}.npy"), seen)
    if world > 1:
        dist.barrier()


def test_two_processes_draw_and_learn_alike(tmp_path: Path) -> None:
    """Real processes, over gloo: the same r on both, and the losses of one process."""
    ranks = [Forked(rank_trains, rank, 2, str(tmp_path)) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    rank_trains(0, 1, str(tmp_path))
    two, one = (np.load(tmp_path / f"seen_{world}.npy") for world in (2, 1))
    assert (two[:, 1] == two[:, 2]).all()
    assert (two[:, 1] == one[:, 1]).all()
    assert len(set(one[:, 1])) > 1
    assert two[:, 0] == pytest.approx(one[:, 0], abs=1e-6)


# ---------------------------------------------------------------- the textbook


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"lora_rank": 0, "n_prelude": 0, "n_coda": 0},
        {"n_prelude": 2, "n_recurrent": 1, "max_recurrence": 3},
        {"mixture_of_depths": True},
    ],
    ids=["all", "core alone", "beyond the adapters", "mixture of depths"],
)
def test_logits_and_gradients_are_the_textbooks(keys: dict, how: str) -> None:
    """Four iterations; with 3 adapters the last one's serves for the fourth."""
    plan = model_plan(**{**SMALL["looped"], **keys})
    model = shaken(plan, attention=how).double()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    parts = [capacity_of(loop_of(plan), i) for i in range(4)]
    noise = keyed_normal(KEYS, 0, 16, 32).double()
    expected = torch.stack(
        [
            textbook(weights, plan, row, own, recurrence=4, capacities=parts)
            for row, own in zip(IDX[:2], noise, strict=False)
        ]
    )
    draws = Draws(KEYS[:2], 4)
    torch.testing.assert_close(model(IDX[:2], draws=draws).double(), expected, atol=1e-5, rtol=0)
    F.cross_entropy(expected.flatten(0, 1), TARGETS[:2].flatten()).backward()
    model(IDX[:2], TARGETS[:2], draws=draws).backward()
    for name, p in model.named_parameters():
        if not name.startswith("router"):  # it has a loss of its own besides
            assert p.grad is not None, name
            torch.testing.assert_close(p.grad, weights[name].grad, atol=1e-6, rtol=1e-5)


def test_in_training_and_out_of_it_the_loop_is_one() -> None:
    """Without a router: the noise of key 0, and as many iterations as it is told."""
    model = shaken(PLAN)
    zero = torch.zeros(4, dtype=torch.int64)
    assert model.recurrence == PLAN.loop.mean_recurrence
    for r in (1, 3, 7):
        model.recurrence = r
        with torch.no_grad():
            assert torch.equal(model(IDX), model(IDX, draws=Draws(zero, r)))


def test_the_reported_loss_is_the_cross_entropy() -> None:
    """The router's own loss gives gradients, and adds nothing to the number."""
    model = shaken(ROUTED)
    draws = Draws(KEYS, 4)
    loss, logits = model(IDX, TARGETS, draws=draws), model(IDX, draws=draws)
    expected = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    torch.testing.assert_close(loss, expected)


def test_the_least_of_everything_runs() -> None:
    plan = model_plan(**{**SMALL["looped"], **LOOP, "n_prelude": 0, "n_coda": 0, "lora_rank": 0})
    model = built(plan)
    model(IDX, TARGETS, draws=Draws(KEYS, 1)).backward()
    assert model.inject.weight.grad is not None


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    for plan in (PLAN, ROUTED):
        first = built(plan)(IDX, TARGETS, draws=Draws(KEYS, 3)).item()
        assert first == pytest.approx(math.log(50), abs=0.01)


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
def test_no_token_sees_a_later_one(how: str) -> None:
    model, changed = shaken(PLAN, attention=how), IDX.clone()
    changed[:, 9] = (changed[:, 9] + 7) % 50
    with torch.no_grad():
        before, after = model(IDX), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


# ---------------------------------------------------------------- truncated gradients


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("plan", [PLAN, ROUTED], ids=["plain", "routed"])
@pytest.mark.parametrize(("r", "kept"), [(5, 2), (3, 1), (2, 4)])
def test_truncated_gradients_are_those_of_a_cut_graph(
    plan: ModelPlan, r: int, kept: int, bf16: bool, monkeypatch
) -> None:
    """The whole graph with the state cut loose before the last iterations, under autocast too: its
    cache of cast weights must not hand on casts made without gradients."""
    monkeypatch.setattr(looped, "ROUTER_LOSS", 0.0)  # a mean over the iterations that are kept
    found = []
    for depth in (kept, None):
        model = shaken(dataclasses.replace(plan, loop=loop_of(plan, backprop_depth=depth)))
        if depth is None:
            cut_before(model, r - kept, monkeypatch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(IDX, TARGETS, draws=Draws(KEYS, r))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (loss, grads), (expected, others) = found
    assert torch.equal(loss, expected)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], atol=1e-6, rtol=1e-4)
    for name in ("core.0.attn.c_attn.weight", "inject.weight", "prelude.0.mlp.c_fc.weight"):
        assert grads[name].any()


def cut_before(model: Looped, first: int, monkeypatch) -> None:
    """Let no gradient through the iterations before `first`."""
    iterate = model._iterate

    def cutting(state: Tensor, given: Tensor, place: object, i: int) -> tuple[Tensor, Tensor]:
        state, loss = iterate(state, given, place, i)
        return (state.detach() if i < first else state), loss

    monkeypatch.setattr(model, "_iterate", cutting)


def test_what_is_kept_grows_with_the_iterations_that_learn() -> None:
    """Of eight iterations: as much again for each that gradients pass through."""

    def saved(depth: int | None) -> int:
        model = shaken(dataclasses.replace(PLAN, loop=loop_of(backprop_depth=depth)))
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(IDX, TARGETS, draws=Draws(KEYS, 8))
        assert loss.requires_grad
        return sum(seen.values())

    depths = [saved(depth) for depth in (1, 2, 3, 4)]
    each = depths[1] - depths[0]
    assert each > 0.3 * depths[0]  # an iteration is two blocks, as are the ends
    assert depths[2] - depths[1] == pytest.approx(each, rel=0.01)
    assert depths[3] - depths[2] == pytest.approx(each, rel=0.01)
    assert saved(None) == saved(8) == pytest.approx(depths[0] + 7 * each, rel=0.02)


@pytest.mark.parametrize(("r", "kept", "learn"), [(2, None, [0, 1]), (4, 1, [3]), (7, 2, [4])])
def test_only_adapters_that_ran_learn(r: int, kept: int | None, learn: list[int]) -> None:
    """Five adapters; the last one also serves the iterations beyond it."""
    model = shaken(dataclasses.replace(PLAN, loop=loop_of(backprop_depth=kept)))
    model(IDX, TARGETS, draws=Draws(KEYS, r)).backward()
    for p in (model.adapter_down, model.adapter_up):
        assert p.grad is not None
        assert [i for i in range(5) if p.grad[i].any()] == learn
