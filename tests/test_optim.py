"""Muon and AdamW against torch's; who owns what; what a checkpoint and a bad gradient leave."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_newest, save
from families import SMALL, built, model_plan, on_one_thread, optimizer_plan
from torch import nn

from tuppence.config import OptimizerPlan
from tuppence.folder import RunFolder
from tuppence.model import Family
from tuppence.model.looped import draw_recurrence
from tuppence.train.draws import sequence_keys
from tuppence.train.muon import Muon, orthogonalised
from tuppence.train.optim import optimizers_of
from tuppence.train.setup import FIRST_STATE
from tuppence.train.step import StepResult, micro_batches, train_step
from tuppence.workers import Workers

MUON = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
RATES = {"learning_rate": 0.02, "embedding_rate": 0.05, "head_rate": 0.01, "scalar_rate": 0.03}
BOTH = [(family, optimizer) for family in SMALL for optimizer in ("adamw", "muon")]

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far apart, as a part of the second."""
    return float((one - other).norm() / other.norm())


def moved(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grad: torch.Tensor):
    """What one step adds to a parameter."""
    before = parameter.detach().clone()
    parameter.grad = grad.clone()
    optimizer.step()
    return parameter.detach() - before


# ---------------------------------------------------------------- Muon


@pytest.mark.parametrize("workers", [None, 2])
def test_muon_is_torchs(workers: int | None) -> None:
    """Single matrices of three shapes, two of each, over six steps.

    Both iterate in bf16; a stack of matrices rounds in another order than one alone.
    """
    shapes = [(24, 64), (64, 24), (48, 48)] * 2
    ours = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    model = nn.ParameterList(ours)
    spread = Workers(model, count=workers, device="cpu", precision="fp32") if workers else None
    mine = Muon(ours, **MUON, rows={}, workers=spread)
    peer = torch.optim.Muon(theirs, **MUON, nesterov=True, adjust_lr_fn="original")
    first = [p.detach().clone() for p in ours]
    for step in range(6):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = normal(*p.shape, seed=100 * step + i)
            q.grad = p.grad.clone()
        mine.step()
        peer.step()
    for p, q, start in zip(ours, theirs, first, strict=True):
        assert relative(p.detach() - start, q.detach() - start) < 0.01
        torch.testing.assert_close(
            mine.state[p]["momentum"], peer.state[q]["momentum_buffer"], atol=1e-6, rtol=1e-5
        )


def test_packed_matrices_are_moved_piece_by_piece() -> None:
    """Query, key and value of unequal rows, in one parameter: as torch moves them apart."""
    rows = (32, 16, 16)
    packed = nn.Parameter(normal(64, 32))
    pieces = [nn.Parameter(t.clone()) for t in packed.detach().split(rows)]
    mine = Muon([packed], **MUON, rows={packed: rows})
    peer = torch.optim.Muon(pieces, **MUON)
    whole = Muon([other := nn.Parameter(packed.detach().clone())], **MUON, rows={})
    first = packed.detach().clone()
    for step in range(3):
        packed.grad = other.grad = normal(64, 32, seed=step + 1)
        for piece, grad in zip(pieces, packed.grad.split(rows), strict=True):
            piece.grad = grad.clone()
        for optimizer in (mine, peer, whole):
            optimizer.step()
    apart = torch.cat([p.detach() for p in pieces]) - first
    assert relative(packed.detach() - first, apart) < 0.01
    assert relative(other.detach() - first, apart) > 0.2


@pytest.mark.parametrize("family", SMALL)
def test_packed_rows_are_the_models_own(family: str) -> None:
    """Every packed projection is named, its rows are its heads' and add up."""
    model = built(model_plan(**SMALL[family]))
    packed = {p for name, p in model.named_parameters() if name.endswith("c_attn.weight")}
    rows = model.packed_rows()
    assert set(rows) == packed
    keys = model.plan.n_kv_head * model.plan.n_embd // model.plan.n_head
    assert set(rows.values()) == {(32, keys, keys)}
    assert all(sum(rows[p]) == len(p) for p in packed)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 64)])
def test_an_update_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """Its singular values are near one, its singular vectors those of the gradient."""
    U, _, Vh = torch.linalg.svd(normal(*shape), full_matrices=False)
    grad = U * torch.linspace(1, 0.1, len(Vh)) @ Vh
    weight = nn.Parameter(normal(*shape, seed=1))
    optimizer = Muon([weight], lr=0.1, momentum=0.95, weight_decay=0.0, rows={})
    tall = max(1.0, shape[0] / shape[1]) ** 0.5
    update = -moved(optimizer, weight, grad) / (0.1 * tall)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6
    assert values.max() < 1.3
    nearest = U @ Vh
    assert (update * nearest).sum() / update.norm() / nearest.norm() > 0.95
    along = U.T @ update @ Vh.T  # of the gradient's own directions: nearly diagonal
    assert (along - along.diag().diag()).norm() < 0.05 * along.norm()


def test_a_stack_is_its_matrices() -> None:
    stack = normal(5, 24, 40)
    together = orthogonalised(stack)
    for one, alone in zip(together, stack, strict=True):
        assert relative(one, orthogonalised(alone[None])[0]) < 0.01
    assert together.dtype == torch.float32


# ---------------------------------------------------------------- groups


def plan_of(family: str, optimizer: str, **train: object) -> OptimizerPlan:
    return optimizer_plan(family, optimizer=optimizer, **{**RATES, "weight_decay": 0.2, **train})


@pytest.mark.parametrize("family", SMALL)
def test_adamw_is_torchs_group_by_group(family: str) -> None:
    """Rates, decay and betas of each group, against one torch optimizer a group."""
    plan = plan_of(family, "adamw")
    ours, theirs = (built(model_plan(**SMALL[family])) for _ in range(2))
    peers = [
        torch.optim.AdamW(
            params,
            lr=plan.groups[name].learning_rate,
            weight_decay=plan.groups[name].weight_decay,
            betas=(plan.groups[name].beta1, plan.groups[name].beta2),
            eps=plan.eps,
            foreach=False,
            fused=False,
        )
        for name, params in theirs.parameter_groups().items()
    ]
    optimizers = optimizers_of(ours, plan)
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            p.grad = normal(*p.shape, seed=100 * step + i)
            q.grad = p.grad.clone()
        for optimizer in (*optimizers, *peers):
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def owners(optimizers: list[torch.optim.Optimizer]) -> list[int]:
    return [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gpt2", {}),
        ("gpt2", {"tied_head": False, "bias": False}),
        ("depth", {}),
        ("depth", {"exportable": True, "window_pattern": None}),
        ("looped", {}),
        ("looped", {"mixture_of_depths": True}),
        ("looped", {"lora_rank": 0, "n_prelude": 0, "n_coda": 0}),
    ],
)
def test_every_parameter_has_one_owner(family: str, more: dict, optimizer: str) -> None:
    model = built(model_plan(**{**SMALL[family], **more}))
    optimizers = optimizers_of(model, plan_of(family, optimizer))
    assert sorted(owners(optimizers)) == sorted(id(p) for p in model.parameters())
    muon = [id(p) for o in optimizers if isinstance(o, Muon) for p in o.param_groups[0]["params"]]
    matrices = [id(p) for p in model.parameter_groups()["matrix"]]
    assert muon == (matrices if optimizer == "muon" else [])
    assert all(p.dim() == 2 for p in model.parameter_groups()["matrix"])


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("fault", ["forgets", "names twice", "forgets and names twice"])
def test_a_family_that_miscounts_is_stopped(family: str, fault: str, monkeypatch) -> None:
    model = built(model_plan(**SMALL[family]))
    groups = model.parameter_groups()
    if "forgets" in fault:
        groups["matrix"].pop()
    if "names twice" in fault:
        groups["embedding"].append(groups["matrix"][0])
    monkeypatch.setattr(model, "parameter_groups", lambda: groups)
    with pytest.raises(AssertionError, match="owned twice or never"):
        optimizers_of(model, plan_of(family, "muon"))


@pytest.mark.parametrize(("family", "optimizer"), BOTH)
def test_decay_touches_what_was_planned_and_nothing_else(family: str, optimizer: str) -> None:
    """With gradients of zero a step is the decay alone: of matrices, and of GPT-2's embeddings and
    head under AdamW, as it was published."""
    plan = plan_of(family, optimizer)
    model = built(model_plan(**SMALL[family]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kinds = {id(p): kind for kind, ps in model.parameter_groups().items() for p in ps}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for one in optimizers_of(model, plan):
        one.step()
    for name, p in model.named_parameters():
        kind = kinds[id(p)]
        published = family == "gpt2" and optimizer == "adamw" and kind in ("embedding", "head")
        decay = 0.2 if kind == "matrix" or published else 0.0
        assert plan.groups[kind].weight_decay == decay
        kept = 1 - plan.groups[kind].learning_rate * decay
        torch.testing.assert_close(p.detach(), before[name] * kept, atol=0, rtol=1e-6)


def test_rates_are_their_groups() -> None:
    """The peak of each group is what train_step multiplies."""
    plan = plan_of("looped", "muon")
    model = built(model_plan(**SMALL["looped"]))
    kinds = {id(ps[0]): kind for kind, ps in model.parameter_groups().items()}
    optimizers = optimizers_of(model, plan)
    found = {kinds[id(g["params"][0])]: g["peak"] for o in optimizers for g in o.param_groups}
    assert found == {"matrix": 0.02, "embedding": 0.05, "head": 0.01, "scalar": 0.03}


# ---------------------------------------------------------------- steps


class Trained:
    """A model and its optimizers; every `step` is a function of the step's number."""

    def __init__(self, family: str, optimizer: str, *, seed: int = 0, **keys: object) -> None:
        self.plan = model_plan(**{**SMALL[family], **keys})
        self.model: Family = built(self.plan, seed=seed)
        self.workers = Workers(self.model, count=1, device="cpu", precision="fp32")
        self.optimizers = optimizers_of(self.model, plan_of(family, optimizer), self.workers)

    def step(self, number: int) -> StepResult:
        tokens = np.random.default_rng(number).integers(0, 50, (4, 17))
        loop = self.plan.loop
        batch = micro_batches(
            tokens,
            micro_batch=2,
            device="cpu",
            keys=sequence_keys(seed=0, step=number, batch_sequences=4),
            recurrence=draw_recurrence(loop, seed=0, step=number) if loop else None,
        )
        return train_step(self.workers, self.optimizers, batch, factor=0.5, grad_clip=1.0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights, and what the optimizers remember of them."""
        out = {}
        for name, p in self.model.named_parameters():
            out[name] = p.detach().clone()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(p, {}).items():
                    out[f"{name}.{key}"] = value.clone()
        return out


def the_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(("family", "optimizer"), BOTH)
def test_a_checkpoint_keeps_every_moment(family: str, optimizer: str, tmp_path: Path) -> None:
    straight, resumed = Trained(family, optimizer), Trained(family, optimizer, seed=1)
    for number in range(3):
        straight.step(number)
    folder = RunFolder(tmp_path)
    save(folder, straight.model, straight.optimizers, FIRST_STATE)
    assert load_newest(folder, resumed.model, resumed.optimizers) == FIRST_STATE
    saved = straight.tensors()
    assert the_same(resumed.tensors(), saved)
    states = {name.rpartition(".")[2] for name in saved} - {"weight", "bias"}
    assert states >= ({"momentum", "exp_avg"} if optimizer == "muon" else {"exp_avg_sq"})
    for number in range(3, 6):
        assert straight.step(number) == resumed.step(number)
    assert the_same(resumed.tensors(), straight.tensors())
    assert not the_same(saved, straight.tensors())


def test_a_router_that_never_had_a_gradient_is_saved_without_moments(tmp_path: Path) -> None:
    """A step of one iteration asks no router; later ones do, before and after a resume alike."""
    keys = {"mixture_of_depths": True, "mean_recurrence": 1}
    trained, again = Trained("looped", "muon", **keys), Trained("looped", "muon", seed=1, **keys)
    assert trained.plan.loop is not None
    drawn = [draw_recurrence(trained.plan.loop, seed=0, step=n) for n in range(8)]
    first = drawn.index(1)
    assert max(drawn[first + 1 :]) > 1
    trained.step(first)
    assert "router.weight.exp_avg" not in trained.tensors()
    save(RunFolder(tmp_path), trained.model, trained.optimizers, FIRST_STATE)
    load_newest(RunFolder(tmp_path), again.model, again.optimizers)
    for number in range(first + 1, 8):
        assert trained.step(number) == again.step(number)
    assert the_same(trained.tensors(), again.tensors())
    assert "router.weight.exp_avg" in trained.tensors()


@pytest.mark.parametrize(("family", "optimizer"), BOTH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_no_trace(
    family: str, optimizer: str, bad: float
) -> None:
    struck, spared = Trained(family, optimizer), Trained(family, optimizer)
    for trained in (struck, spared):
        assert trained.step(0).updated
    before = struck.tensors()
    hook = struck.model.lm_head.weight.register_hook(lambda grad: grad * bad)
    result = struck.step(1)
    hook.remove()
    assert not result.updated
    assert not np.isfinite(result.grad_norm)
    assert np.isfinite(result.loss)
    assert the_same(struck.tensors(), before)
    assert all(p.grad is None for p in struck.model.parameters())
    assert struck.step(2) == spared.step(2)
    assert the_same(struck.tensors(), spared.tensors())


@pytest.mark.parametrize(("family", "optimizer"), BOTH)
def test_the_factor_scales_every_rate(family: str, optimizer: str) -> None:
    """Half the factor, half the way: of Muon, and of AdamW's first step."""
    ways = []
    for factor in (0.0, 0.5, 1.0):
        trained = Trained(family, optimizer)
        before = trained.tensors()
        tokens = np.random.default_rng(0).integers(0, 50, (4, 17))
        keys = sequence_keys(seed=0, step=0, batch_sequences=4)
        batch = micro_batches(tokens, micro_batch=4, device="cpu", keys=keys, recurrence=2)
        train_step(trained.workers, trained.optimizers, batch, factor=factor, grad_clip=0.0)
        after = trained.tensors()
        ways.append({name: after[name] - before[name] for name in before})
    for name, way in ways[2].items():
        assert not ways[0][name].any(), name
        torch.testing.assert_close(ways[1][name], way / 2, atol=1e-6, rtol=1e-4)
