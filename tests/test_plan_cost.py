"""plan/cost.py against built models: parameters exactly, FLOPs by torch's own counter."""

from functools import partial

import pytest
import torch
from families import SMALL, built, data_plan, model_plan
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from tuppence import recipes
from tuppence.config import ModelPlan
from tuppence.model import Family, build, depth, looped
from tuppence.model.cache import Cache
from tuppence.model.replay import Draws
from tuppence.plan import cost
from tuppence.plan.asked import solve_model
from tuppence.plan.shapes import planned_shape, shape_of

TINY = {"n_head": 4, "n_embd": 128, "vocab_size": 512}
LOOPED = {
    "family": "looped",
    "n_prelude": 2,
    "n_recurrent": 3,
    "n_coda": 1,
    "mean_recurrence": 4,
    "max_recurrence": 8,
}


def params(model: Family) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(plan: ModelPlan) -> Family:
    """The planned model without memory. Attention by matmuls: torch's counter gives fused kernels
    a fifth backward product, their recomputation of the scores, which is no model FLOP."""
    return build(plan, attention="matmul", device="meta")


def small(plan: ModelPlan) -> Family:
    """The planned model on the CPU: autocast, which the modern ones ask about, knows no meta."""
    return built(plan, attention="matmul")


def counted_flops(model: Family, *, recurrence: int | None = None) -> float:
    """FLOPs per token of a forward and backward pass, by torch."""
    where = next(model.parameters()).device
    idx = torch.zeros(2, model.plan.sequence_len, dtype=torch.long, device=where)
    draws = Draws(idx[:, 0], recurrence) if recurrence else None
    with set_checkpoint_early_stop(False), FlopCounterMode(display=False) as counter:
        model(idx, idx, draws=draws).backward()
    return counter.get_total_flops() / idx.numel()


def built_gpt2(**sizes) -> Family:
    return on_meta(model_plan(family="gpt2", **sizes))


# ---------------------------------------------------------------- every family


@pytest.mark.parametrize(
    "keys",
    [
        {"family": "gpt2", "n_layer": 2, "bias": True},
        {"family": "gpt2", "n_layer": 2, "tied_head": False},
        {"family": "depth", "n_layer": 4},
        {"family": "depth", "n_layer": 5, "n_kv_head": 2, "window_pattern": "SSL"},
        {"family": "depth", "n_layer": 1, "n_kv_head": 1, "residual_scalars": False},
        {"family": "depth", "n_layer": 2, "value_embeddings": False},
        {"family": "depth", "n_layer": 3, "exportable": True},
        {**LOOPED},
        {**LOOPED, "lora_rank": 0, "n_prelude": 0, "n_coda": 0},
        {**LOOPED, "lora_rank": 8, "mixture_of_depths": True},
    ],
    ids=lambda keys: " ".join(
        f"{k}={v}" for k, v in list(keys.items())[::5] + [*keys.items()][-2:]
    ),
)
def test_a_plan_counts_the_built_model(keys):
    """Parameters by the part they play, each exactly; a shape made of the plan is the request's."""
    plan = model_plan(**keys)
    model, shape = on_meta(plan), planned_shape(plan)
    assert plan.params == shape.params == params(model)
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    adapters = {p for name, p in model.named_parameters() if name.startswith("adapter")}
    assert plan.params_matmul == sum(p.numel() for p in linear | adapters)
    looked_up = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)} - linear
    assert shape.params_lookup == sum(p.numel() for p in looked_up)
    assert shape.params_muon == sum(p.numel() for p in model.parameter_groups()["matrix"])
    assert plan.flops_per_token == round(shape.flops_per_token)


def test_the_parts_that_both_name_are_the_same():
    assert cost.GATE_CHANNELS == depth.GATE_CHANNELS
    assert cost.LEAST_CAPACITY == looped.LEAST_CAPACITY


# ---------------------------------------------------------------- gpt2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "vocab_size", "sequence_len"),
    [
        (1, 1, 8, 3, 4),
        (4, 4, 128, 65, 64),
        (6, 6, 384, 65, 256),
        (12, 12, 768, 50304, 1024),
        (24, 16, 1024, 50257, 1024),
        (36, 20, 1280, 50304, 512),
        (48, 25, 1600, 50257, 1024),
    ],
)
def test_gpt2_parameters_are_the_models(
    n_layer, n_head, n_embd, vocab_size, sequence_len, bias, tied_head
):
    sizes = {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "vocab_size": vocab_size,
        "sequence_len": sequence_len,
        "bias": bias,
        "tied_head": tied_head,
    }
    model, shape = built_gpt2(**sizes), cost.gpt2(**sizes)
    assert shape.params == params(model)
    multiplying = {p for m in model.modules() if isinstance(m, torch.nn.Linear) for p in [m.weight]}
    assert shape.params_matmul == sum(p.numel() for p in multiplying)


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "vocab_size", "sequence_len"),
    [(2, 2, 64, 65, 32), (4, 4, 128, 512, 256), (12, 12, 768, 50304, 1024)],
)
@pytest.mark.parametrize("tied_head", [False, True])
def test_gpt2_flops_are_torchs(n_layer, n_head, n_embd, vocab_size, sequence_len, tied_head):
    sizes = {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "vocab_size": vocab_size,
        "sequence_len": sequence_len,
        "bias": True,
        "tied_head": tied_head,
    }
    model, shape = built_gpt2(**sizes), cost.gpt2(**sizes)
    assert shape.flops_per_token == pytest.approx(counted_flops(model), rel=0.01)


def test_gpt2_small_is_the_published_one():
    shape = cost.gpt2(
        n_layer=12, n_head=12, n_embd=768, vocab_size=50304, sequence_len=1024, bias=True
    )
    assert shape.params == 124_475_904
    assert shape.flops_per_token == 6 * shape.params_matmul + 12 * 12 * 768 * 1024


# ---------------------------------------------------------------- depth


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("vocab_size", [65, 512])
@pytest.mark.parametrize("n_layer", [2, 3])
@pytest.mark.parametrize("exportable", [False, True])
def test_depth_flops_are_torchs(n_kv_head, vocab_size, n_layer, exportable):
    sizes = {**TINY, "n_layer": n_layer, "n_kv_head": n_kv_head, "vocab_size": vocab_size}
    plan = model_plan(family="depth", **sizes, sequence_len=96, exportable=exportable)
    assert plan.flops_per_token == pytest.approx(counted_flops(small(plan)), rel=0.01)


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_recomputed_blocks_are_counted(n_kv_head):
    plan = model_plan(family="depth", **TINY, n_layer=2, n_kv_head=n_kv_head, sequence_len=96)
    model, shape = small(plan), planned_shape(plan)
    for block in model.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    counted = counted_flops(model)
    assert shape.hardware_flops_per_token(checkpointing=True) == pytest.approx(counted, rel=0.01)
    assert shape.hardware_flops_per_token(checkpointing=False) == shape.flops_per_token


@pytest.mark.parametrize("exportable", [False, True])
@pytest.mark.parametrize("dial", [12, 20, 24, 26, 44, 64])
def test_the_dial_counts_the_built_model(dial, exportable):
    """Width 64 x depth, 32,768 tokens, 2,048 positions: 135M to 17B parameters, to the last one."""
    asked = {"depth": dial, "n_head": None, "n_embd": None, "exportable": exportable}
    plan = model_plan(family="depth", vocab_size=32768, sequence_len=2048, **asked)
    model = on_meta(plan)
    plain = 12 * dial * (64 * dial) ** 2 + 2 * 32768 * 64 * dial
    values = dial // 2 * (32768 * 64 * dial + 12 * plan.n_kv_head)
    assert plan.params == params(model)
    assert plan.params == plain + (0 if exportable else values + 2 * dial)


def test_windows_count_what_a_query_may_look_at():
    sizes = {**TINY, "n_layer": 4, "sequence_len": 64}
    full, half = cost.depth(**sizes), cost.depth(**sizes, windows=(32, 32, 32, 64))
    assert full.attention_flops_per_token == 12 * 4 * 128 * 64
    assert half.attention_flops_per_token == 12 * 128 * (3 * 32 + 64)
    assert half.params == full.params


def test_a_window_counts_the_positions_that_its_mask_shows():
    """The last query of each layer's mask; earlier ones have fewer before them."""
    plan = model_plan(family="depth", n_layer=5, sequence_len=64, window_pattern="SL")
    model = built(plan, attention="matmul")
    shown = [int((model._mask(w, 0, 64)[-1] == 0).sum()) for w in plan.windows]
    assert shown == [16, 64, 16, 64, 64]
    assert planned_shape(plan).attention_flops_per_token == 12 * 32 * sum(shown)


def test_nanochat_of_2025():
    for n_layer, expected in ((20, 560_988_160), (32, 1_879_048_192)):
        shape = cost.depth(
            n_layer=n_layer,
            n_head=n_layer // 2,
            n_embd=64 * n_layer,
            vocab_size=65536,
            sequence_len=2048,
        )
        assert shape.params == expected


def test_nanochat_d24_of_2026():
    """Value embeddings in every other layer, gated by 32 channels; SSSL windows, the last full."""
    windows = tuple(1024 if i % 4 != 3 and i != 23 else 2048 for i in range(24))
    shape = cost.decoder(
        family="nanochat",
        n_layer=24,
        n_embd=1536,
        n_head=12,
        vocab_size=32768,
        sequence_len=2048,
        windows=windows,
        value_embeddings=12,
        gate_channels=32,
        params_small=48,
    )
    assert shape.params == 1_384_124_976
    assert shape.flops_per_token == pytest.approx(4.945112e9, abs=500)  # its report rounds


def test_the_1000_dollar_model_is_three_times_what_it_claims():
    """Claimed: 4.3B at depth 64, a rule of thumb that forgets that width grows with depth."""

    def at(depth: int) -> int:
        shape = cost.depth(
            n_layer=depth, n_head=depth, n_embd=64 * depth, vocab_size=32, sequence_len=2048
        )
        return shape.params

    assert at(64) == 12 * 64 * 4096**2 + 2 * 32 * 4096  # 12.9B
    assert at(44) < 4.3e9 < at(45)


# ---------------------------------------------------------------- looped


@pytest.mark.parametrize("recurrence", [1, 4, 8])
@pytest.mark.parametrize("backprop_depth", [None, 2])
@pytest.mark.parametrize("lora_rank", [0, 32])
def test_looped_flops_are_torchs(recurrence, backprop_depth, lora_rank):
    keys = {**LOOPED, "backprop_depth": backprop_depth, "lora_rank": lora_rank}
    plan = model_plan(**keys, **TINY, sequence_len=96)
    counted = counted_flops(small(plan), recurrence=recurrence)
    shape = planned_shape(plan, recurrence=recurrence)
    assert shape.flops_per_token == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("recurrence", [1, 3, 4, 6])
@pytest.mark.parametrize("backprop_depth", [None, 2])
def test_mixture_of_depths_counts_the_tokens_taken(recurrence, backprop_depth):
    """1, 0.77, 0.53, 0.3, 0.3 ... of the tokens; the model rounds each up to whole ones."""
    keys = {**LOOPED, "mixture_of_depths": True, "backprop_depth": backprop_depth}
    plan = model_plan(**keys, **TINY, sequence_len=240)
    counted = counted_flops(small(plan), recurrence=recurrence)
    shape = planned_shape(plan, recurrence=recurrence)
    assert shape.flops_per_token == pytest.approx(counted, rel=0.01)
    router = next(m for m in shape.matmuls if m.name == "router")
    kept = min(recurrence, backprop_depth or recurrence)
    assert (router.runs, router.backward_runs) == (recurrence - 1, min(recurrence - 1, kept))


def test_recomputed_iterations_are_counted(monkeypatch):
    plan = model_plan(**LOOPED, **TINY, backprop_depth=2, sequence_len=96)
    model, shape = small(plan), planned_shape(plan)
    for block in (*model.prelude, *model.coda):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    monkeypatch.setattr(model, "_core", partial(checkpoint, model._core, use_reentrant=False))
    counted = counted_flops(model, recurrence=4)
    assert shape.hardware_flops_per_token(checkpointing=True) == pytest.approx(counted, rel=0.01)


def test_looped_546m():
    """The guide's, as its recipe asks for it."""
    model = recipes.get("looped_546m").model
    plan = solve_model(recipes.get("looped_546m"), data_plan(32768))
    shape = shape_of(model, 32768)
    assert shape.params == plan.params == params(on_meta(plan)) == 546_179_328
    assert shape.flops_per_token == pytest.approx(7.29e9, rel=0.001)
    assert shape.layers_run == 15


def test_recomputation_is_work_but_not_progress():
    shape = cost.depth(**TINY, n_layer=4, sequence_len=64)
    again = shape.hardware_flops_per_token(checkpointing=True) - shape.flops_per_token
    head = 6 * 128 * 512
    assert again == pytest.approx((shape.flops_per_token - head) / 3)


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("family", SMALL)
def test_a_kv_cache_is_what_the_model_keeps(family):
    """Keys and values of every executed layer; windows hide positions, and none is thrown away."""
    plan = model_plan(**{**SMALL[family], "window_pattern": None})
    model, cache = built(plan), Cache(plan.sequence_len)
    with torch.no_grad():
        model(torch.zeros(1, 10, dtype=torch.long), cache=cache)
    kept = sum(
        t[:, :, : layer.length].nbytes
        for layer in cache._layers.values()
        for t in (layer.k, layer.v)
    )
    assert planned_shape(plan).kv_cache_bytes(10, bytes_each=4) == kept


def test_a_kv_cache_counts_windows_and_loops():
    windowed = cost.depth(**TINY, n_layer=2, sequence_len=64, windows=(16, 64))
    assert windowed.kv_cache_bytes(40) == 2 * 128 * (16 + 40) * 2
    looped = planned_shape(model_plan(**LOOPED, **TINY, backprop_depth=1, sequence_len=64))
    assert looped.kv_cache_bytes(10) == 2 * 128 * 10 * 15 * 2


def test_a_checkpoint_is_weights_and_two_moments():
    shape = cost.gpt2(n_layer=2, n_head=2, n_embd=64, vocab_size=65, sequence_len=32)
    weights = torch.empty(shape.params)
    assert cost.checkpoint_bytes(shape.params) == 3 * weights.nbytes
