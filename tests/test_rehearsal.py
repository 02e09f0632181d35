"""The rehearsal finds the micro-batch that fits, without a trace; the preflight proves the wire."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import SMALL, model_plan, on_one_thread
from forked import Forked
from torch import nn

from tuppence import config
from tuppence.config import DataPlan, Plan, Run
from tuppence.errors import DoesNotFit, Fault
from tuppence.model import build
from tuppence.plan.hardware import Calibration
from tuppence.plan.solve import solve
from tuppence.ranks import ALONE, Ranks
from tuppence.train.optim import optimizers_of
from tuppence.train.preflight import preflight
from tuppence.train.rehearsal import rehearse, sizes, worst_of
from tuppence.train.step import train_step
from tuppence.workers import Workers

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)

ROWS = 16
CASES = {**SMALL, "gpt2 dropout": {**SMALL["gpt2"], "dropout": 0.1}}
PlanOf = Callable[[str], Plan]


@pytest.fixture
def plan_of(data_plan: DataPlan, calibration: Calibration) -> PlanOf:
    def planned(case: str) -> Plan:
        keys = {"n_head": 2, "n_embd": 32, "sequence_len": 16, **CASES[case]}
        words = [f"model.{key}={value}" for key, value in keys.items()]
        words += ["budget.steps=10", f"train.batch_tokens={ROWS * 16}", "machine.usd_per_hour=1"]
        words += ["train.precision=fp32", "train.optimizer=muon"]
        return solve(config.override(Run(name="x"), words), data_plan, calibration)

    return planned


class Limited(nn.Module):
    """A model with room for `most` sequences; it notes how many it was given."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most
        self.seen: list[tuple[int, int | None]] = []

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, *, draws: Any) -> Any:
        self.seen.append((len(inputs), draws.recurrence))
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.model(inputs, targets, draws=draws)


def workers_of(plan: Plan, *, most: int, count: int = 1) -> Workers:
    model = build(plan.model)
    model.init_weights(0)
    return Workers(Limited(model, most), count=count, device="cpu", precision="fp32")


def yes(fits: bool) -> bool:
    return fits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 3])
def test_it_falls_back_to_the_largest_divisor_that_fits(
    plan_of: PlanOf, case: str, count: int
) -> None:
    plan = plan_of(case)
    for most, found in ((100, 8), (7, 4), (1, 1)):
        workers = workers_of(plan, most=most, count=count)
        assert rehearse(workers, plan, micro_batch=8, rows=ROWS, agree=yes) == found
        passes = [sum(rows == found for rows, _ in m.seen) for m in workers._models]
        assert sum(passes) == min(ROWS // found, 2 * count)  # every worker at once, twice
        assert max(passes) - min(passes) <= 1
        drawn = {recurrence for model in workers._models for _, recurrence in model.seen}
        assert drawn == {plan.model.loop.max_recurrence if plan.model.loop else None}
    assert sizes(8, 24) == [8, 6, 4, 3, 2, 1]
    assert sizes(8, 3) == [3, 1]


def test_nothing_that_fits_is_said_and_another_error_is_raised(plan_of: PlanOf) -> None:
    plan = plan_of("gpt2")
    with pytest.raises(DoesNotFit, match="one sequence of 16 tokens does not fit the memory of"):
        rehearse(workers_of(plan, most=0), plan, micro_batch=8, rows=ROWS, agree=yes)
    workers = workers_of(plan, most=8)
    workers.model.model.lm_head = nn.Linear(3, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        rehearse(workers, plan, micro_batch=8, rows=ROWS, agree=yes)


def test_one_rank_without_room_decides_for_all(plan_of: PlanOf) -> None:
    asked: list[bool] = []

    def elsewhere_four_fit(fits: bool) -> bool:
        asked.append(fits)
        return fits and len(asked) > 1

    plan = plan_of("gpt2")
    workers = workers_of(plan, most=100)
    assert rehearse(workers, plan, micro_batch=8, rows=ROWS, agree=elsewhere_four_fit) == 4
    assert asked == [True, True]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("most", [100, 2])
def test_it_leaves_no_trace(plan_of: PlanOf, case: str, most: int) -> None:
    plan = plan_of(case)

    def first_steps(*, rehearsed: bool) -> list[tuple[float, float]]:
        workers = workers_of(plan, most=most, count=2)
        optimizers = optimizers_of(workers.model.model, plan.optimizer, workers)
        generator = torch.get_rng_state()
        if rehearsed:
            found = rehearse(
                workers, plan, micro_batch=8, rows=ROWS, agree=yes, optimizers=optimizers
            )
            assert found == min(8, most)
        assert torch.equal(torch.get_rng_state(), generator)
        for model in workers._models:
            assert model.training
            assert all(p.grad is None for p in model.parameters())
        assert all(not optimizer.state for optimizer in optimizers)
        batch = [worst_of(plan, 2, "cpu")] * 3
        taken = [train_step(workers, optimizers, batch, factor=1.0, grad_clip=1.0) for _ in "ab"]
        return [(step.loss, step.grad_norm) for step in taken]

    assert first_steps(rehearsed=True) == first_steps(rehearsed=False)


def test_room_for_moments_is_part_of_it(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's two and Muon's one, of what has none yet."""
    plan = plan_of("gpt2")
    workers = workers_of(plan, most=100)
    optimizers = optimizers_of(workers.model.model, plan.optimizer)
    reserved: list[int] = []
    empty_like = torch.empty_like

    def noted(p: torch.Tensor, **options: Any) -> torch.Tensor:
        reserved.append(p.numel())
        return empty_like(p, **options)

    monkeypatch.setattr(torch, "empty_like", noted)
    rehearse(workers, plan, micro_batch=8, rows=ROWS, agree=yes, optimizers=optimizers)
    groups = plan.optimizer.groups
    expected = sum(
        p.numel() * (2 if groups[name].optimizer == "adamw" else 1)
        for name, params in workers.model.model.parameter_groups().items()
        for p in params
    )
    assert sum(reserved) == expected
    train_step(workers, optimizers, [worst_of(plan, 2, "cpu")], factor=1.0, grad_clip=1.0)
    reserved.clear()
    rehearse(workers, plan, micro_batch=8, rows=ROWS, agree=yes, optimizers=optimizers)
    assert reserved == []

    def refused(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "empty_like", refused)
    fresh = optimizers_of(workers.model.model, plan.optimizer)
    with pytest.raises(DoesNotFit):
        rehearse(workers, plan, micro_batch=8, rows=ROWS, agree=yes, optimizers=fresh)


def found_within(mebibytes: int) -> None:
    """Print the micro-batch that fits into so much more address space than is taken."""
    import resource

    model = model_plan(n_layer=4, n_embd=128, sequence_len=256, family="gpt2")
    plan = SimpleNamespace(model=model, machine=SimpleNamespace(name="this"))
    built = build(model, attention="matmul")
    workers = Workers(built, count=1, device="cpu", precision="fp32")
    built.init_weights(0)
    rehearse(workers, plan, micro_batch=1, rows=1, agree=bool)  # threads are made
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (mebibytes << 20),) * 2)
    print(rehearse(workers, plan, micro_batch=64, rows=64, agree=bool))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on address space")
def test_a_real_limit_is_found() -> None:
    process = Forked(found_within, 150)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert 1 <= int(out) < 64


# ---------------------------------------------------------------- preflight


def compare(rank: int, port: int, what: str) -> None:
    """Print what the preflight of a rank says."""
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False, wait_for_workers=False)
    ranks = Ranks(rank, 2, rank, 2, dist.PrefixStore("tuppence", store))
    facts = {"code": "abc", "torch": "2.13.0", "plan": "f00"}
    if what == "absent":
        with pytest.raises(Fault) as fault:
            preflight(ranks, facts, device="cpu", seconds=0.5)
        print(fault.value)
        return
    group = dist.PrefixStore("group", store)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=2)
    if what == "differ" and rank == 1:
        facts |= {"torch": "2.12.0", "card": "y"}
    if what == "twice":
        plain = dist.all_reduce
        dist.all_reduce = lambda data: (rank and data.mul_(2), plain(data))
    try:
        print(preflight(ranks, facts, device="cpu") > 0)
    except Fault as fault:
        print(fault)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("what", "ranks", "said"),
    [
        ("agree", 2, "True"),
        (
            "differ",
            2,
            "the ranks do not run the same: rank 1 has card y, rank 0 None; "
            "rank 1 has torch 2.12.0, rank 0 2.13.0",
        ),
        ("twice", 2, "the first all-reduce added up wrongly: rank 1 2 times, not once each"),
        ("absent", 1, "rank 1 did not come to the preflight within 0.5 s"),
    ],
)
def test_ranks_compare_themselves_and_prove_the_sum(what: str, ranks: int, said: str) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    processes = [Forked(compare, rank, store.port, what) for rank in range(ranks)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == said + "\n"


def test_alone_there_is_nothing_to_compare() -> None:
    assert preflight(ALONE, {"code": "abc"}, device="cpu") is None
