"""The looped family, how deep for which token: routers, more iterations, early exit."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from families import SMALL, built, model_plan, on_one_thread, optimizer_plan, shaken
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tuppence.config import LoopPlan, ModelPlan
from tuppence.evals.generate import generate
from tuppence.model import looped
from tuppence.model.cache import Cache
from tuppence.model.layers import softcapped
from tuppence.model.looped import Looped, capacity_of, draw_recurrence
from tuppence.model.replay import Draws
from tuppence.train.draws import sequence_keys
from tuppence.train.optim import optimizers_of
from tuppence.train.step import micro_batches, train_step
from tuppence.workers import Workers

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


# ---------------------------------------------------------------- mixture of depths


class Spied:
    """What a model's loop saw: states before and after each iteration, and the tokens taken."""

    def __init__(self, model: Looped, monkeypatch) -> None:
        self.states: list[tuple[Tensor, Tensor]] = []
        self.taken: list[Tensor] = []
        iterate = model._iterate

        def spying(state: Tensor, given: Tensor, place: object, i: int) -> tuple[Tensor, Tensor]:
            new, loss = iterate(state, given, place, i)
            self.states.append((state.detach(), new.detach()))
            return new, loss

        monkeypatch.setattr(model, "_iterate", spying)
        for choose in ("most_wanted", "above_zero"):
            monkeypatch.setattr(looped, choose, self._choosing(getattr(looped, choose)))

    def _choosing(self, choose):
        def choosing(score_BT: Tensor, *capacity: float) -> tuple[Tensor, Tensor]:
            index_BP, valid_BP = choose(score_BT, *capacity)
            taken_BT = torch.zeros_like(score_BT).scatter(1, index_BP, valid_BP.float())
            self.taken.append(taken_BT.bool())
            return index_BP, valid_BP

        return choosing


def test_capacity_falls_from_all_to_three_tenths() -> None:
    loop = loop_of(ROUTED, mean_recurrence=8.0, max_recurrence=16)
    parts = [capacity_of(loop, i) for i in range(12)]
    assert parts[0] == 1.0
    assert parts[7:] == pytest.approx([0.3] * 5)
    assert np.diff(parts[:8]) == pytest.approx([-0.1] * 7)
    assert {capacity_of(loop_of(PLAN), i) for i in range(12)} == {1.0}


def test_in_training_the_best_scored_are_taken_and_the_rest_keep_their_state(monkeypatch) -> None:
    model = shaken(ROUTED)
    spied = Spied(model, monkeypatch)
    with torch.no_grad():
        model(IDX, draws=Draws(KEYS, 4))
    assert len(spied.states) == 4
    for i, taken in enumerate(spied.taken, start=1):
        before, after = spied.states[i]
        score = model.router(before).squeeze(-1)
        assert taken.sum(1).tolist() == [math.ceil(capacity_of(ROUTED.loop, i) * 16)] * 4
        for row in range(4):
            assert score[row][taken[row]].min() > score[row][~taken[row]].max()
        assert torch.equal(after[~taken], before[~taken])
        assert (after[taken] != before[taken]).any(-1).all()


def test_elsewhere_those_above_zero_are_taken_and_the_rest_keep_their_state(monkeypatch) -> None:
    """Sequences that take fewer than others included: what fills them up changes nothing."""
    model = shaken(ROUTED)
    model.recurrence = 4
    spied = Spied(model, monkeypatch)
    with torch.no_grad():
        whole = model(IDX)
    counts = set()
    for i, taken in enumerate(spied.taken, start=1):
        before, after = spied.states[i]
        score = model.router(before).squeeze(-1) + model.router_bias[min(i, 4)]
        assert torch.equal(taken, score > 0)
        assert torch.equal(after[~taken], before[~taken])
        assert (after[taken] != before[taken]).any(-1).all()
        counts |= set(taken.sum(1).tolist())
    assert len(counts) > 2
    with torch.no_grad():
        for row in range(4):
            torch.testing.assert_close(model(IDX[row : row + 1])[0], whole[row], atol=1e-4, rtol=0)


def test_elsewhere_no_later_token_changes_what_is_taken() -> None:
    model = shaken(ROUTED)
    with torch.no_grad():
        before = model(IDX)
        for place in (5, 9, 14):
            changed = IDX.clone()
            changed[:, place:] = (changed[:, place:] + 7) % 50
            after = model(changed)
            torch.testing.assert_close(before[:, :place], after[:, :place], atol=1e-4, rtol=0)
            assert (before[:, place:] - after[:, place:]).abs().amax(-1).min() > 1e-3


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_skipped_tokens_cost_nothing() -> None:
    """FLOPs of each further iteration, forward and backward, are its capacity's part of a whole
    one's: attention, over fewer tokens of fewer, is less."""
    idx = torch.zeros(1, 120, dtype=torch.long)
    costs = {}
    for routed in (False, True):
        keys = {**SMALL["looped"], "mean_recurrence": 4, "mixture_of_depths": routed}
        model = built(model_plan(**keys, sequence_len=120, n_embd=128), attention="matmul")

        def pass_of(r: int, model: Looped = model) -> int:
            draws = Draws(torch.zeros(1, dtype=torch.int64), r)
            return flops(lambda: model(idx, idx, draws=draws).backward())

        costs[routed] = np.diff([pass_of(r) for r in (1, 2, 3, 4, 5)])
    parts = costs[True] / costs[False]
    capacities = [capacity_of(loop_of(ROUTED, mean_recurrence=4.0), i) for i in (1, 2, 3, 4)]
    assert capacities == pytest.approx([0.767, 0.533, 0.3, 0.3], abs=1e-3)
    assert parts == pytest.approx(capacities, abs=0.04)


def test_a_router_that_wants_nothing_costs_nothing() -> None:
    model = shaken(ROUTED)
    with torch.no_grad():
        model.router.weight.zero_()
        model.router_bias.fill_(-1)
        model.recurrence = 1
        once, out = flops(lambda: model(IDX)), model(IDX)
        model.recurrence = 4
        scores = 3 * 2 * IDX.numel() * 32
        assert flops(lambda: model(IDX)) == once + scores
        assert torch.equal(model(IDX), out)


def test_the_loss_teaches_the_router(monkeypatch) -> None:
    """Through the gate alone, and through a loss of its own that reaches nothing else."""
    found = {}
    for weight in (0.0, 0.5):
        monkeypatch.setattr(looped, "ROUTER_LOSS", weight)
        model = shaken(ROUTED)
        model(IDX, TARGETS, draws=Draws(KEYS, 4)).backward()
        found[weight] = gradients(model)
    for name, grad in found[0.0].items():
        assert torch.equal(grad, found[0.5][name]) == (not name.startswith("router")), name
    assert found[0.0]["router.weight"].abs().max() > 1e-5
    assert found[0.0]["router_bias"].tolist()[0] == 0  # the first iteration takes all
    assert all(found[0.0]["router_bias"][1:4] != 0)


# ---------------------------------------------------------------- trained


def repeats(step: int, rows: int = 16) -> np.ndarray:
    """Words of 4 to 8 random letters, each repeated to the end of its line of 25."""
    generator = np.random.default_rng(step)
    words = [generator.integers(0, 16, generator.integers(4, 9)) for _ in range(rows)]
    return np.stack([np.resize(word, 25) for word in words])


def trained(steps: int, **keys: object) -> Looped:
    """A small model of one block a part, at r = 4 on average."""
    sizes = {"n_prelude": 1, "n_recurrent": 1, "n_coda": 1, "lora_rank": 4, "n_head": 2}
    loops = {"mean_recurrence": 4, "max_recurrence": 8, "sequence_len": 24}
    model = built(model_plan(family="looped", vocab_size=16, **{**sizes, **loops, **keys}))
    workers = Workers(model, count=1, device="cpu", precision="fp32")
    rates = {"learning_rate": 0.02, "embedding_rate": 0.05, "head_rate": 0.01, "scalar_rate": 0.01}
    optimizers = optimizers_of(
        model, optimizer_plan("looped", optimizer="muon", weight_decay=0.0, **rates), workers
    )
    for step in range(steps):
        batch = micro_batches(
            repeats(step),
            micro_batch=16,
            device="cpu",
            keys=sequence_keys(seed=0, step=step, batch_sequences=16),
            recurrence=draw_recurrence(loop_of(model.plan), seed=0, step=step),
        )
        factor = min(1.0, 2 * (1 - step / steps))
        assert train_step(workers, optimizers, batch, factor=factor, grad_clip=1.0).updated
    return model


@pytest.fixture(scope="module")
def looper() -> Looped:
    """A core and nothing else: what it can, it can by looping."""
    return trained(250, n_prelude=0, n_coda=0)


def held_out(model: Looped, recurrence: int) -> float:
    rows = torch.from_numpy(repeats(10**6, 200))
    model.recurrence = recurrence
    with torch.no_grad():
        return model(rows[:, :-1], rows[:, 1:]).item()


def test_more_iterations_are_no_worse(looper: Looped) -> None:
    losses = {r: held_out(looper, r) for r in (1, 2, 4, 8)}
    assert losses[2] < losses[1] - 0.1
    assert losses[4] < losses[2] - 0.03
    assert losses[8] <= losses[4] + 0.02


def test_training_changes_what_the_router_takes(monkeypatch) -> None:
    """And outside training it takes about as many as it was taught: not none, not all."""
    rows = torch.from_numpy(repeats(10**6, 32))[:, :-1]
    taken = {}
    for steps in (5, 150):
        model = trained(steps, mixture_of_depths=True)
        with monkeypatch.context() as patch, torch.no_grad():
            spied = Spied(model, patch)
            model(rows, draws=Draws(torch.arange(32), 4))
            model.recurrence = 4
            model(rows)
        taken[steps] = spied.taken
    changed = [(a != b).float().mean().item() for a, b in zip(*taken.values(), strict=True)]
    assert min(changed[:3]) > 0.1
    capacities = [capacity_of(loop_of(model.plan), i) for i in (1, 2, 3)]
    elsewhere = [t.float().mean().item() for t in taken[150][3:]]
    assert elsewhere == pytest.approx(capacities, abs=0.2)


# ---------------------------------------------------------------- early exit


def test_an_exit_that_nothing_meets_changes_nothing() -> None:
    model = shaken(PLAN)
    with torch.no_grad():
        plain = model(IDX)
        for model.exit_whole in (False, True):
            model.exit_kl = 0.0
            assert torch.equal(model(IDX), plain)


@pytest.mark.parametrize("whole", [False, True])
def test_an_exit_that_everything_meets_leaves_two_iterations(whole: bool) -> None:
    """Two, because agreement is between successive outputs."""
    model = shaken(PLAN)
    with torch.no_grad():
        model.recurrence = 2
        twice = model(IDX)
        model.recurrence = 7
        assert not torch.allclose(model(IDX), twice)
        model.exit_kl, model.exit_whole = 1e9, whole
        assert torch.equal(model(IDX), twice)


def outputs(model: Looped, monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """(state, logits) of each time that the model reads out, of one pass over IDX."""
    seen, read = [], model._read

    def reading(state: Tensor, place: object) -> Tensor:
        found = read(state, place)
        seen.append((state, softcapped(model.lm_head(found))))
        return found

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model, "_read", reading)
        model(IDX)
    return seen


def kl(now: Tensor, before: Tensor) -> Tensor:
    """Of the new output against the one before, in nats, for each token."""
    p, q = now.log_softmax(-1), before.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def agreeing() -> Looped:
    """A model whose iterations come to agree, each token in its own time."""
    model = shaken(PLAN)
    with torch.no_grad():
        model.adapter_up.zero_()
        model.lm_head.weight.mul_(0.1)
        model.inject.weight[:, :32] *= 0.2  # of the state: a contraction
    model.recurrence = 12
    return model


@pytest.mark.parametrize(("calm", "exit_kl"), [(True, 1e-4), (False, 0.5)])
def test_each_token_keeps_its_state_once_it_agrees(calm: bool, exit_kl: float, monkeypatch) -> None:
    """Also where its output goes on changing, because those that it looks at do."""
    model = agreeing() if calm else shaken(PLAN)
    if not calm:
        model.inject.weight.data[:, :32] *= 3  # of the state: it goes its own ways
    model.exit_kl, model.recurrence = exit_kl, 12
    seen = outputs(model, monkeypatch)
    done = torch.zeros(4, 16, dtype=torch.bool)
    reopened, ended = 0, Counter()
    for (before, logits_before), (state, logits) in itertools.pairwise(seen):
        assert torch.equal(state[done], before[done])
        assert (state[~done] != before[~done]).any(-1).all()
        now = kl(logits, logits_before) < exit_kl
        ended[int((now & ~done).sum())] += 1
        reopened += int((done & ~now).sum())
        done |= now
    assert len(ended) > 2  # they end at different times
    assert bool(done.all()) == (len(seen) < 12) == calm
    assert (reopened > 9) == (not calm)


def test_a_batch_ends_as_a_whole_by_its_mean(monkeypatch) -> None:
    model = agreeing()
    model.exit_kl, model.exit_whole = 1e-4, True
    seen = outputs(model, monkeypatch)
    means = [kl(b[1], a[1]).mean().item() for a, b in itertools.pairwise(seen)]
    assert [mean < 1e-4 for mean in means] == [False] * (len(means) - 1) + [True]
    assert 2 < len(seen) < 12
    model.recurrence, model.exit_kl = len(seen), None
    with torch.no_grad():
        assert torch.equal(model(IDX), seen[-1][1])


def test_a_router_has_no_early_exit() -> None:
    model = shaken(ROUTED)
    model.exit_kl = 0.1
    with pytest.raises(AssertionError, match="without routers"):
        model(IDX)


def test_iterations_that_were_not_run_repeat_the_last_in_the_cache() -> None:
    """Two of five are run: the keys and values of the third to the fifth are the second's."""
    model, cache = shaken(PLAN), Cache(16)
    model.recurrence, model.exit_kl = 5, 1e9
    with torch.no_grad():
        for part in (IDX[:1, :7], IDX[:1, 7:8], IDX[:1, 8:]):
            model(part, cache=cache)
    ends, core = 2, 2
    assert sorted(cache._layers) == list(range(ends + 5 * core))
    for layer, kept in cache._layers.items():
        assert kept.length == 16
        assert kept.k[:, :, :16].any(-1).all()
        run = layer < ends + 2 * core
        like = cache._layers[layer if run else ends + core + (layer - ends) % core]
        assert torch.equal(kept.k, like.k)
        assert torch.equal(kept.v, like.v)
    first, second = cache._layers[ends], cache._layers[ends + core]
    assert not torch.equal(first.k, second.k)


@pytest.mark.parametrize("whole", [False, True])
def test_generation_with_early_exit_runs(looper: Looped, whole: bool) -> None:
    """Also past the context; with an exit that nothing meets, it says what it says without."""
    workers = Workers(looper, count=1, device="cpu", precision="fp32")
    looper.recurrence = 6
    said = {}
    for exit_kl in (None, 0.0, 1e-3, 1e9):
        looper.exit_kl, looper.exit_whole = exit_kl, whole
        said[exit_kl] = generate(
            workers, [1, 2, 3, 4, 1, 2], new_tokens=40, context=24, temperature=0
        )
    looper.exit_kl, looper.exit_whole = None, False
    assert {len(ids) for ids in said.values()} == {46}
    assert said[0.0] == said[None]
