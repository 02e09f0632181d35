"""Building and filling: meta first, once, a function of the seed, with the spread that is said."""

import math

import pytest
import torch
from families import SMALL, built, model_plan
from torch import Tensor

from tuppence.model import FAMILIES, Family, build

WIDE = {"n_embd": 128, "n_head": 4, "vocab_size": 400}
ALL_PARTS = {
    "gpt2": {"family": "gpt2", "n_layer": 8, "bias": True, "tied_head": False},
    "depth": {"family": "depth", "n_layer": 4, "n_kv_head": 2},
    "looped": {**SMALL["looped"], "mixture_of_depths": True},
}


def weights(model: Family) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_every_family_is_here() -> None:
    assert set(FAMILIES) == set(SMALL) == set(ALL_PARTS)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_meta_first_gives_the_model_that_is_built_directly(family: str, attention: str) -> None:
    plan = model_plan(**ALL_PARTS[family])
    direct = FAMILIES[family](plan, attention=attention)
    direct.init_weights(3)
    ours = built(plan, attention=attention, seed=3)
    assert type(ours) is type(direct)
    assert weights(ours).keys() == weights(direct).keys()
    for name, p in weights(ours).items():
        assert torch.equal(p, weights(direct)[name]), name
    buffers = dict(direct.named_buffers())
    assert dict(ours.named_buffers()).keys() == buffers.keys()
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert all(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("family", SMALL)
def test_building_draws_nothing_and_filling_draws_from_its_seed_alone(family: str) -> None:
    """The process's own generator stays where it was: nothing is filled that is filled again."""
    plan = model_plan(**ALL_PARTS[family])
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = built(plan, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = built(plan, seed=5), built(plan, seed=6)
    one.init_weights(5)  # again, over what was there
    constant = {name for name, p in weights(one).items() if len(p.unique()) == 1}
    constant |= {"stream_scale", "embedding_scale"}
    for name, p in weights(one).items():
        assert torch.equal(p, weights(same)[name]), name
        assert torch.equal(p, weights(other)[name]) == (name in constant), name


@pytest.mark.parametrize("family", SMALL)
def test_the_kernel_has_no_part_in_the_weights(family: str) -> None:
    plan = model_plan(**ALL_PARTS[family])
    fused, plain = (weights(built(plan, attention=how)) for how in ("sdpa", "matmul"))
    assert fused.keys() == plain.keys()
    assert all(torch.equal(p, plain[name]) for name, p in fused.items())


@pytest.mark.parametrize("family", SMALL)
def test_nothing_stays_on_meta(family: str) -> None:
    """And on meta, everything is there, tables too: a model of any size takes no memory."""
    plan = model_plan(**ALL_PARTS[family])
    for device in ("cpu", "meta"):
        model = build(plan, device=device)
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {device}


def test_a_tied_head_stays_tied() -> None:
    tied, untied = (
        built(model_plan(family="gpt2", n_layer=1, tied_head=tie)) for tie in (True, False)
    )
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight
    assert len([*untied.parameters()]) == len([*tied.parameters()]) + 1
    with torch.no_grad():
        tied.wte.weight.mul_(0)
        assert not tied.lm_head.weight.any()
    built_again = built(model_plan(family="gpt2", n_layer=1))
    built_again(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    assert built_again.wte.weight.grad is built_again.lm_head.weight.grad


# ---------------------------------------------------------------- the spread of first weights


def is_normal(x: Tensor, std: float) -> None:
    """By deviation and by the parts within one and two of them."""
    assert x.mean().item() == pytest.approx(0, abs=0.1 * std)
    assert x.std().item() == pytest.approx(std, rel=0.05)
    within = [(x.abs() < n * std).float().mean().item() for n in (1, 2)]
    assert within == pytest.approx([0.683, 0.954], abs=0.03)


def is_uniform(x: Tensor, low: float, high: float) -> None:
    """Between its ends, and as many below the middle as above."""
    spread = high - low
    assert low <= x.min().item() <= low + 0.05 * spread
    assert high - 0.05 * spread <= x.max().item() <= high
    quarters = [(x < low + part * spread).float().mean().item() for part in (0.25, 0.5, 0.75)]
    assert quarters == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


def keeps_variance(x: Tensor, reads: int) -> None:
    """Uniform, with a deviation of reads^-1/2."""
    is_uniform(x, -math.sqrt(3 / reads), math.sqrt(3 / reads))


def test_first_weights_of_gpt2() -> None:
    found = weights(built(model_plan(**ALL_PARTS["gpt2"], **WIDE, sequence_len=64)))
    for name, p in found.items():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert p.eq(1).all(), name
        else:
            is_normal(p, 0.02 / 4 if "c_proj" in name else 0.02)  # sqrt(2 x 8 layers) = 4


def test_first_weights_of_depth() -> None:
    """What writes into the stream is zero, the head near it; the rest keeps the variance."""
    found = weights(built(model_plan(**ALL_PARTS["depth"], **WIDE)))
    is_normal(found.pop("wte.weight"), 0.8)
    is_normal(found.pop("lm_head.weight"), 0.001)
    assert torch.equal(found.pop("stream_scale"), torch.linspace(1.15, 1.05, 4))
    assert torch.equal(found.pop("embedding_scale"), torch.linspace(0.2, 0.05, 4))
    gates = torch.cat([found.pop(name) for name in list(found) if "value_gate" in name])
    assert gates.shape == (4, 12)
    assert 0 <= gates.min() < gates.mean() - 0.007 < gates.mean() + 0.007 < gates.max() <= 0.02
    assert {n.split(".", 2)[0] for n in found} == {"h", "value_embeddings"}
    for name, p in found.items():
        if name.endswith("c_proj.weight"):
            assert not p.any(), name
        elif name.endswith("c_fc.weight"):
            is_uniform(p, -0.4 * math.sqrt(3 / 128), 0.4 * math.sqrt(3 / 128))
        else:
            keeps_variance(p, 128)


def test_first_weights_of_looped() -> None:
    """Adapters and router start as nothing; matrices keep the variance of what they read."""
    found = weights(built(model_plan(**ALL_PARTS["looped"], **WIDE)))
    is_normal(found.pop("wte.weight"), 1.0)
    is_normal(found.pop("lm_head.weight"), 0.001)
    assert found.pop("state_gain").eq(1).all()
    for name in ("adapter_up", "router.weight", "router_bias"):
        assert not found.pop(name).any(), name
    keeps_variance(found.pop("adapter_down"), 128)
    keeps_variance(found.pop("inject.weight"), 256)
    for name, p in found.items():
        keeps_variance(p, 512 if name.endswith("mlp.c_proj.weight") else 128)


@pytest.mark.parametrize("family", SMALL)
def test_a_second_layer_is_not_the_first(family: str) -> None:
    """Each parameter has numbers of its own."""
    found = [
        p
        for p in weights(built(model_plan(**ALL_PARTS[family]))).values()
        if p.unique().numel() > 9
    ]
    first = [round(float(p.flatten()[0]), 6) for p in found]
    assert len(set(first)) == len(first) > 4
