"""Real ranks: every family and optimizer under ddp, zero1 and fsdp is the run of one process."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoints import state_of
from families import SMALL, built, model_plan, on_one_thread, optimizer_plan
from gloo import start
from torch import Tensor

from tuppence import checkpoint
from tuppence.checkpoint import Piece, Retention, Saver
from tuppence.config import ModelPlan
from tuppence.folder import RunFolder
from tuppence.model.looped import draw_recurrence
from tuppence.ranks import ALONE, Ranks, _session, join, rows_of
from tuppence.train import muon, parallel, setup, step
from tuppence.train.draws import sequence_keys
from tuppence.train.optim import optimizers_of
from tuppence.train.parallel import Parallel, recompute
from tuppence.train.step import StepResult, micro_batches, train_step
from tuppence.workers import Workers

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)

# Sizes that do not divide: 51 tokens, 60 and 40 rows, 3 layers; one row, of which others have none.
SIZES = {"vocab_size": 51, "n_head": 4, "n_embd": 40}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {**SMALL["gpt2"], "tied_head": True, "dropout": 0.1},
    "depth": {**SMALL["depth"], "n_kv_head": 1, "residual_scalars": True, "value_embeddings": True},
    "looped": SMALL["looped"],
    "mixture": {**SMALL["looped"], "mixture_of_depths": True, "backprop_depth": 2},
    "even": {**SMALL["gpt2"], "tied_head": False, "vocab_size": 64, "n_embd": 64},
}
FAMILIES = ("gpt2", "depth", "looped", "mixture")
HOWS = ("ddp", "zero1", "fsdp")
SHARDED = ("zero1", "fsdp")
BATCH, STEPS, CLIP = 8, 3, 0.05
# One process adds in another order. What that comes to, over three steps: the most that was seen of
# any case here is 4e-6 nats, 4e-5 of a norm, and of the way the weights went 3e-5 under AdamW and
# 5e-3 under Muon, which iterates in bf16.
LOSS, NORM, WAY = 2e-5, 2e-4, {"adamw": 2e-4, "muon": 2e-2}
LOSS_BF16 = 5e-3  # seen: 1.3e-3, under fsdp, where norms and tables are in bf16 as well
RATES = {"learning_rate": 0.01, "embedding_rate": 0.02, "head_rate": 0.005, "scalar_rate": 0.01}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train a case."""

    case: str
    how: str
    optimizer: str
    micro_batches: int = 1
    recompute: bool = False
    precision: str = "fp32"


WAYS = [("adamw", 1, False), ("muon", 1, False), ("muon", 2, True)]
ON_TWO = [Setting(case, how, *way) for case in FAMILIES for how in HOWS for way in WAYS]
ON_FOUR = [Setting(case, how, "muon") for case in FAMILIES for how in HOWS]
IN_BF16 = [Setting(case, how, "muon", precision="bf16") for case in FAMILIES for how in HOWS]
EVEN = [Setting("even", how, "adamw") for how in HOWS]
SAVED = [Setting(case, how, "muon") for case in ("gpt2", "mixture") for how in HOWS]

# ---------------------------------------------------------------- in a rank


class Trained:
    """A model on its ranks; every `step` is a function of its number and the global batch."""

    def __init__(self, setting: Setting, ranks: Ranks, *, seed: int = 0) -> None:
        self.ranks, self.setting, self.plan = ranks, setting, plan_of(setting.case)
        model = built(self.plan, seed=seed)
        if setting.recompute:
            recompute(model)
        how = "none" if ranks.world == 1 else setting.how
        self.parallel = Parallel(model, how=how, ranks=ranks, precision=setting.precision)
        self.workers = Workers(model, count=1, device="cpu", precision=setting.precision)
        plan = optimizer_plan(self.plan.family, optimizer=setting.optimizer, **RATES)
        self.optimizers = optimizers_of(model, plan, self.workers, self.parallel)

    def step(self, number: int) -> StepResult:
        tokens = np.random.default_rng(number).integers(0, 51, (BATCH, 17))
        keys = sequence_keys(seed=0, step=number, batch_sequences=BATCH)
        rows = BATCH // self.ranks.world
        mine = slice(self.ranks.rank * rows, (self.ranks.rank + 1) * rows)
        loop = self.plan.loop
        batch = micro_batches(
            tokens[mine],
            micro_batch=rows // self.setting.micro_batches,
            device="cpu",
            keys=keys[mine],
            recurrence=draw_recurrence(loop, seed=0, step=number) if loop else None,
        )
        return train_step(
            self.workers,
            self.optimizers,
            batch,
            factor=1.0,
            grad_clip=CLIP,
            parallel=self.parallel,
        )

    def pieces(self) -> dict[str, Piece]:
        """Copies of the weights and moments that this rank writes."""
        both = {**self.parallel.weights(), **self.parallel.moments(self.optimizers)}
        return {name: dataclasses.replace(p, tensor=p.tensor.clone()) for name, p in both.items()}

    def save(self, path: Path, number: int) -> None:
        """A checkpoint of all ranks."""
        folder = RunFolder(path, writes=self.ranks.lead)
        if self.ranks.lead:
            folder.checkpoints.mkdir(parents=True)
            checkpoint.claim(folder, 1)
        self.ranks.barrier()
        saver = Saver(
            folder, attempt=1, keep=Retention(5), rank=self.ranks.rank, world=self.ranks.world
        )
        weights, moments = self.parallel.weights(), self.parallel.moments(self.optimizers)
        saver.save(weights, moments, state_of(number))
        saver.close()
        folder.close()
        self.ranks.barrier()


def plan_of(case: str) -> ModelPlan:
    return model_plan(**{**SIZES, **CASES[case]})


class Watched:
    """Counts collectives, and the matrices that are orthogonalised, by shape."""

    def __init__(self) -> None:
        self.collectives: Counter[str] = Counter()
        self.shapes: Counter[tuple[int, ...]] = Counter()
        for room, name in (
            (dist, "all_reduce"),
            (dist, "all_to_all_single"),
            (parallel, "reduce_scatter"),
            (parallel, "all_gather"),
        ):
            setattr(room, name, self._counted(name, getattr(room, name)))
        orthogonalised = muon.orthogonalised

        def noted(stack: Tensor) -> Tensor:
            self.shapes[tuple(stack.shape[1:])] += len(stack)
            return orthogonalised(stack)

        muon.orthogonalised = noted

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.collectives[name] += 1
            return call(*args, **options)

        return counted

    def since(self) -> tuple[dict[str, int], dict[tuple[int, ...], int]]:
        """What was counted since the last call."""
        found = dict(self.collectives), dict(self.shapes)
        self.collectives.clear()
        self.shapes.clear()
        return found


def record(setting: Setting, ranks: Ranks, watched: Watched) -> dict[str, Any]:
    """A few steps, and what is left of them."""
    trained = Trained(setting, ranks)
    watched.since()
    results = [trained.step(number) for number in range(STEPS)]
    collectives, shapes = watched.since()
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "updated": [r.updated for r in results],
        "collectives": collectives,
        "shapes": shapes,
        "pieces": trained.pieces(),
    }


def poisoned(setting: Setting, ranks: Ranks) -> dict[str, Any]:
    """A step, one in which the last rank's loss is not a number, and another step."""
    trained = Trained(setting, ranks)
    trained.step(0)
    before, backward = trained.pieces(), step.backward
    if ranks.rank == ranks.world - 1:
        step.backward = not_a_number
    struck = trained.step(1)
    step.backward = backward
    after = trained.pieces()
    return {"struck": struck, "before": before, "after": after, "next": trained.step(2)}


def not_a_number(workers: Workers, model: Any, micro: Any, *, of: int) -> Tensor:
    loss: Tensor = model(micro.inputs, micro.targets, draws=micro.draws) / of * float("nan")
    torch.autograd.backward(loss)
    return loss.detach()


def saved_as(setting: Setting) -> str:
    return f"{setting.case} {setting.how}"


def restored(path: Path, setting: Setting, ranks: Ranks) -> Trained:
    """What a checkpoint has, in a model that had other weights and moments."""
    trained = Trained(setting, ranks, seed=1)
    trained.step(5)
    setup.restore(path / "checkpoints/step_00000003", trained.parallel, trained.optimizers)
    return trained


def on_two(folder: Path) -> None:
    """Everything that two ranks do; each leaves what it found in a file."""
    ranks, watched = join("cpu"), Watched()
    found: dict[str, Any] = {"rank": (ranks.rank, ranks.world, ranks.local_rank)}
    found["told"] = ranks.told("a", lambda: ranks.rank), ranks.told("b", lambda: ranks.rank, by=1)
    found["sum"] = ranks.sum(1.5, ranks.rank), ranks.leads(ranks.rank + 7.0)
    found["agree"] = [ranks.agree(ranks.rank == r) for r in (0, 1)], ranks.all(ranks.rank == 0)
    found["sessions"] = [_session(ranks.store, ranks.rank, ranks.world) for _ in range(5)]
    for setting in (*ON_TWO, *IN_BF16, *EVEN):
        found[setting] = record(setting, ranks, watched)
    for setting in ON_FOUR:
        found["nan", setting] = poisoned(setting, ranks)
    for setting in SAVED:
        trained = Trained(setting, ranks)
        for number in range(STEPS):
            trained.step(number)
        trained.save(folder / saved_as(setting), STEPS)
    for a, b in itertools.product(SAVED, SAVED):
        if a.case == b.case:
            trained = restored(folder / saved_as(a), b, ranks)
            found["restored", a, b] = trained.pieces()
            if a.how == "ddp":  # one state, saved by each
                trained.save(folder / f"again {saved_as(b)}", STEPS)
    torch.save(found, folder / f"two {ranks.rank}.pt")
    ranks.part()


def on_four(folder: Path) -> None:
    """Everything that four ranks do."""
    ranks, watched = join("cpu"), Watched()
    found: dict[Any, Any] = {s: record(s, ranks, watched) for s in ON_FOUR}
    for a, b in itertools.product(SAVED, SAVED):
        if a.case == b.case and (a.how == "ddp" or a.how == b.how):
            trained = restored(folder / saved_as(a), b, ranks)
            found["restored", a, b] = trained.pieces()
            if a.how == b.how:
                trained.save(folder / f"four {saved_as(b)}", STEPS)
    torch.save(found, folder / f"four {ranks.rank}.pt")
    ranks.part()


# ---------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


Found = list[dict[Any, Any]]  # by rank


def found_by(world: int, name: str, work: Callable[[Path], None], folder: Path) -> Found:
    started = start(world, work, folder, folder=folder / f"logs of {name}")
    codes = started.codes()
    assert codes == [0] * world, "\n".join(started.said(rank) for rank in range(world))
    files = [folder / f"{name} {rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def two(folder: Path) -> Found:
    return found_by(2, "two", on_two, folder)


@pytest.fixture(scope="module")
def four(folder: Path, two: Found) -> Found:
    return found_by(4, "four", on_four, folder)


State = dict[str, Tensor]  # weights and moments, flat


def whole(pieces_by_rank: list[dict[str, Piece]]) -> State:
    """The ranks' pieces put together: each element is somebody's, and nobody else's."""
    out: State = {}
    holders: State = {}
    for pieces in pieces_by_rank:
        for name, piece in pieces.items():
            count = int(np.prod(piece.shape))
            flat = out.setdefault(name, torch.zeros(count, dtype=piece.tensor.dtype))
            held = holders.setdefault(name, torch.zeros(count, dtype=torch.int64))
            flat[piece.start : piece.end] = piece.tensor.flatten()
            held[piece.start : piece.end] += 1
    assert all(bool((held == 1).all()) for held in holders.values())
    return out


def of(found: Found, key: Any) -> State:
    """What the ranks had at the end."""
    return whole([rank[key]["pieces"] for rank in found])


def the_same(a: State, b: State) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def way(after: State, before: State) -> Tensor:
    """What was added to the weights, in one row."""
    names = [name for name in sorted(before) if "." not in name or name in after]
    return torch.cat([(after[name] - before[name]).double() for name in names])


@pytest.fixture(scope="module")
def alone() -> Callable[[Setting], tuple[State, list[StepResult], State]]:
    """The first weights, the steps and what is left after them, of one process."""
    known: dict[Any, tuple[State, list[StepResult], State]] = {}

    def alone(setting: Setting) -> tuple[State, list[StepResult], State]:
        key = (setting.case, setting.optimizer, setting.precision)
        if key not in known:
            one = dataclasses.replace(setting, micro_batches=2, recompute=False)
            trained = Trained(one, ALONE)
            before = whole([trained.pieces()])
            results = [trained.step(number) for number in range(STEPS)]
            known[key] = before, results, whole([trained.pieces()])
        return known[key]

    return alone


def check_like_one(found: Found, setting: Setting, alone: Any) -> None:
    before, steps, after = alone(setting)
    losses, norms = found[0][setting]["losses"], found[0][setting]["norms"]
    assert min(norms) > CLIP  # clipping was at work
    assert losses == pytest.approx([s.loss for s in steps], abs=LOSS)
    assert norms == pytest.approx([s.grad_norm for s in steps], rel=NORM)
    mine = of(found, setting)
    assert mine.keys() == after.keys()
    here, there = way(mine, before), way(after, before)
    assert (here - there).norm() < WAY[setting.optimizer] * there.norm()


def ident(setting: Setting) -> str:
    again = "-recompute" if setting.recompute else ""
    return f"{setting.case}-{setting.how}-{setting.optimizer}-{setting.micro_batches}{again}"


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize("setting", ON_TWO, ids=ident)
def test_two_ranks_are_one_process(setting: Setting, two: Found, alone: Any) -> None:
    check_like_one(two, setting, alone)


@pytest.mark.parametrize("setting", ON_FOUR, ids=ident)
def test_four_ranks_are_one_process(setting: Setting, four: Found, alone: Any) -> None:
    check_like_one(four, setting, alone)


@pytest.mark.parametrize("setting", ON_TWO, ids=ident)
def test_loss_and_norm_are_one_number_on_all_ranks(setting: Setting, two: Found) -> None:
    for key in ("losses", "norms", "updated"):
        assert two[0][setting][key] == two[1][setting][key]


def test_ways_to_spread_are_bitwise_one(two: Found) -> None:
    """Where every rank has whole vectors of the processor's, of which AdamW's last, broken one
    rounds in another order."""
    ddp, zero1, fsdp = (of(two, setting) for setting in EVEN)
    assert the_same(ddp, zero1)
    assert the_same(ddp, fsdp)
    assert len({tuple(two[0][setting]["losses"]) for setting in EVEN}) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("case", FAMILIES)
def test_rows_are_moved_alike_wherever_they_lie(case: str, optimizer: str, two: Found) -> None:
    """zero1 and fsdp cut the same rows, of odd sizes too: bitwise one run."""
    zero1, fsdp = (Setting(case, how, optimizer) for how in SHARDED)
    assert the_same(of(two, zero1), of(two, fsdp))
    assert two[0][zero1]["losses"] == two[0][fsdp]["losses"]


@pytest.mark.parametrize("setting", IN_BF16, ids=ident)
def test_bf16_computes_and_weights_stay_fp32(setting: Setting, two: Found, alone: Any) -> None:
    _, steps, _ = alone(dataclasses.replace(setting, precision="fp32"))
    losses = two[0][setting]["losses"]
    assert losses == pytest.approx([s.loss for s in steps], abs=LOSS_BF16)
    assert losses != [s.loss for s in steps]
    assert two[0][setting]["losses"] == two[1][setting]["losses"]
    assert {t.dtype for t in of(two, setting).values()} == {torch.float32}


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("how", ["ddp", "zero1"])
@pytest.mark.parametrize("case", FAMILIES)
def test_accumulation_costs_no_communication(case: str, how: str, two: Found) -> None:
    settings = (Setting(case, how, *way) for way in WAYS if way[0] == "muon")
    once, twice = (two[0][setting]["collectives"] for setting in settings)
    assert once == twice
    here = {"all_reduce": 2 * STEPS}  # of gradients, and of the loss
    if how == "zero1":  # of norm and loss; updates of Muon there and back
        here |= {"reduce_scatter": STEPS, "all_gather": STEPS, "all_to_all_single": 2 * STEPS}
    assert once == here


@pytest.mark.parametrize("how", SHARDED)
@pytest.mark.parametrize("case", FAMILIES)
def test_every_matrix_is_orthogonalised_once(case: str, how: str, two: Found, four: Found) -> None:
    model = built(plan_of(case))
    packed = model.packed_rows()
    expected: Counter[tuple[int, ...]] = Counter()
    for p in model.parameter_groups()["matrix"]:
        if p.dim() == 2:
            expected.update((rows, p.shape[1]) for rows in packed.get(p, (p.shape[0],)))
    for found in (two, four):
        done: Counter[tuple[int, ...]] = Counter()
        for rank in found:
            done.update(rank[Setting(case, how, "muon")]["shapes"])
        assert done == Counter({shape: STEPS * count for shape, count in expected.items()})
        assert all(rank[Setting(case, how, "muon")]["shapes"] for rank in found)  # work for all


def test_moments_are_held_by_rows(two: Found, four: Found) -> None:
    """A rank has no more of a parameter than its rows, and of some small ones none."""
    key = Setting("mixture", "zero1", "muon")
    for found in (two, four):
        for number, rank in enumerate(found):
            for name, piece in rank[key]["pieces"].items():
                if piece.shape:
                    start, stop = rows_of(piece.shape[0], number, len(found))
                    assert len(piece.tensor) == stop - start > 0, name
        held = ["router.weight.exp_avg" in rank[key]["pieces"] for rank in found]
        assert held == [True] + [False] * (len(found) - 1)


# ---------------------------------------------------------------- not a number


@pytest.mark.parametrize("setting", ON_FOUR, ids=ident)
def test_nan_on_one_rank_leaves_all_as_they_were(setting: Setting, two: Found) -> None:
    for rank in two:
        found = rank["nan", setting]
        assert found["struck"].skipped == "loss nan, gradient norm nan"
        before, after = whole_of_one(found["before"]), whole_of_one(found["after"])
        assert the_same(before, after)
        assert any(bool(value.any()) for name, value in before.items() if "exp_avg" in name)
        assert found["next"].updated
    assert two[0]["nan", setting]["next"] == two[1]["nan", setting]["next"]


def whole_of_one(pieces: dict[str, Piece]) -> State:
    return {name: piece.tensor for name, piece in pieces.items()}


# ---------------------------------------------------------------- checkpoints


PAIRS = [(a, b) for a, b in itertools.product(SAVED, SAVED) if a.case == b.case]


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=ident)
def test_a_checkpoint_loads_into_any_other_way(
    a: Setting, b: Setting, folder: Path, two: Found, four: Found
) -> None:
    """Saved by two ranks; weights and moments in two, in four and in one, bit for bit."""
    saved = of(two, a)
    assert the_same(whole([rank["restored", a, b] for rank in two]), saved)
    if a.how in ("ddp", b.how):
        assert the_same(whole([rank["restored", a, b] for rank in four]), saved)
    assert the_same(whole([restored(folder / saved_as(a), b, ALONE).pieces()]), saved)
    named = checkpoint.consolidated(folder / saved_as(a) / "checkpoints/step_00000003")
    assert all(named[name].flatten().equal(saved[name]) for name in named)


@pytest.mark.parametrize("setting", SAVED, ids=ident)
def test_four_ranks_checkpoint_loads_into_one(
    setting: Setting, folder: Path, two: Found, four: Found
) -> None:
    again = restored(folder / f"four {saved_as(setting)}", setting, ALONE)
    assert the_same(whole([again.pieces()]), of(two, setting))


@pytest.mark.parametrize("case", ["gpt2", "mixture"])
def test_sharded_and_replicated_are_the_same_files(case: str, folder: Path, two: Found) -> None:
    """One state, whether every rank has all of it or only its rows."""
    paths = [folder / f"again {case} {how}" / "checkpoints/step_00000003" for how in HOWS]
    ddp, zero1, fsdp = (checkpoint.manifest(path).files for path in paths)
    assert len(ddp) == 5  # of two ranks' weights and moments, and the state
    assert ddp == zero1 == fsdp


def test_moments_that_a_checkpoint_has_not_are_forgotten(tmp_path: Path) -> None:
    """A router that had no gradient yet when it was saved, and has had one since."""
    trained = Trained(Setting("mixture", "ddp", "muon"), ALONE)
    loop = trained.plan.loop
    assert loop is not None
    trained.save(tmp_path / "run", STEPS)
    trained.step(0)
    assert "router.weight.exp_avg" in trained.pieces()
    path = tmp_path / "run/checkpoints/step_00000003"
    setup.restore(path, trained.parallel, trained.optimizers)
    assert not [name for name in trained.pieces() if "exp_avg" in name or "momentum" in name]


# ---------------------------------------------------------------- what ranks tell each other


def test_ranks_agree(two: Found) -> None:
    assert [rank["rank"] for rank in two] == [(0, 2, 0), (1, 2, 1)]
    for rank in two:
        assert rank["told"] == (0, 1)
        assert rank["sum"] == ([3.0, 1.0], 7.0)
        assert rank["agree"] == ([True, False], False)


def test_ranks_that_are_started_again_do_not_hear_those_before(two: Found) -> None:
    """Five starts that share a store: each has a name of its own, the same on both ranks."""
    assert two[0]["sessions"] == two[1]["sessions"]
    assert len(set(two[0]["sessions"])) == 5


@pytest.mark.parametrize(("length", "world"), [(51, 4), (5, 4), (1, 3), (8, 4), (3, 4)])
def test_rows_are_torchs_chunks(length: int, world: int) -> None:
    chunks = torch.arange(length).chunk(world)
    mine = [torch.arange(length)[slice(*rows_of(length, r, world))] for r in range(world)]
    assert [m.tolist() for m in mine if len(m)] == [c.tolist() for c in chunks]


# ---------------------------------------------------------------- recompute


def loss_and_gradients(case: str, *, again: bool, count: int) -> tuple[list[float], State, int]:
    """Of one batch with everything drawn; and the bytes that the forward pass kept."""
    plan = plan_of(case)
    model = built(plan)
    if again:
        recompute(model)
    workers = Workers(model, count=count, device="cpu", precision="fp32")
    tokens = np.random.default_rng(0).integers(0, 51, (BATCH, 17))
    keys = sequence_keys(seed=0, step=0, batch_sequences=BATCH)
    batch = micro_batches(
        tokens, micro_batch=BATCH // 2, device="cpu", keys=keys, recurrence=plan.loop and 3
    )
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch[0].inputs, batch[0].targets, draws=batch[0].draws)
    losses = workers.map(lambda model, one: step.backward(workers, model, one, of=2), batch)
    workers.sum_gradients()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [one.item() for one in losses], gradients, sum(kept.values())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", FAMILIES)
def test_recompute_changes_no_bit_and_keeps_less(case: str, count: int) -> None:
    losses, gradients, kept = loss_and_gradients(case, again=False, count=count)
    again, regained, fewer = loss_and_gradients(case, again=True, count=count)
    assert again == losses
    assert the_same(gradients, regained)
    assert fewer < 0.6 * kept


@pytest.mark.parametrize("case", FAMILIES)
def test_recompute_leaves_evaluation_alone(case: str) -> None:
    model = built(plan_of(case))
    ids = torch.randint(51, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids)
        recompute(model)
        assert model(ids).equal(before)
