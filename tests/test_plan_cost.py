"""plan/cost.py against built models: parameters exactly, FLOPs by torch's own counter."""

import pytest
import torch
from reference_models import Depth, Looped
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from tuppence.config import ModelPlan
from tuppence.model.gpt2 import GPT2
from tuppence.plan import cost

LOOPED = {"n_prelude": 2, "n_recurrent": 3, "n_coda": 1, "lora_rank": 32, "max_recurrence": 8}
TINY = {"n_head": 4, "n_embd": 128, "vocab_size": 512}


def params(model) -> int:
    return sum(p.numel() for p in model.parameters())


def counted_flops(run, tokens: int) -> float:
    """FLOPs per token of a forward and backward pass, by torch.

    Attention as plain matmuls: the counter gives fused kernels a fifth backward product, their
    recomputation of the scores, which is no model FLOP.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        set_checkpoint_early_stop(False),
        FlopCounterMode(display=False) as counter,
    ):
        run().backward()
    return counter.get_total_flops() / tokens


def tokens_on_meta(batch: int, length: int):
    return torch.zeros(batch, length, dtype=torch.long, device="meta")


def built_gpt2(*, attention: str = "matmul", **sizes) -> GPT2:
    plan = ModelPlan(
        family="gpt2", dropout=0.0, params=0, params_matmul=0, flops_per_token=0, **sizes
    )
    with torch.device("meta"):
        return GPT2(plan, attention=attention)


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
    idx = tokens_on_meta(2, sequence_len)
    assert shape.flops_per_token == pytest.approx(
        counted_flops(lambda: model(idx, idx), idx.numel()), rel=0.01
    )


def test_gpt2_small_is_the_published_one():
    shape = cost.gpt2(
        n_layer=12, n_head=12, n_embd=768, vocab_size=50304, sequence_len=1024, bias=True
    )
    assert shape.params == 124_475_904
    assert shape.flops_per_token == 6 * shape.params_matmul + 12 * 12 * 768 * 1024


# ---------------------------------------------------------------- depth


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("vocab_size", [65, 512])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_depth_is_the_built_model(n_kv_head, vocab_size, checkpointing):
    sizes = {**TINY, "n_layer": 2, "n_kv_head": n_kv_head, "vocab_size": vocab_size}
    shape = cost.depth(**sizes, sequence_len=96)
    with torch.device("meta"):
        model = Depth(**sizes)
    assert shape.params == params(model)
    idx = tokens_on_meta(2, 96)
    counted = counted_flops(lambda: model(idx, checkpointing=checkpointing), idx.numel())
    assert shape.hardware_flops_per_token(checkpointing=checkpointing) == pytest.approx(
        counted, rel=0.01
    )


def test_windows_count_what_a_query_may_look_at():
    sizes = {**TINY, "n_layer": 4, "sequence_len": 64}
    full, half = cost.depth(**sizes), cost.depth(**sizes, windows=(32, 32, 32, 64))
    assert full.attention_flops_per_token == 12 * 4 * 128 * 64
    assert half.attention_flops_per_token == 12 * 128 * (3 * 32 + 64)
    assert half.params == full.params


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
@pytest.mark.parametrize("checkpointing", [False, True])
def test_looped_is_the_built_model(recurrence, backprop_depth, checkpointing):
    shape = cost.looped(
        **LOOPED, **TINY, recurrence=recurrence, backprop_depth=backprop_depth, sequence_len=96
    )
    with torch.device("meta"):
        model = Looped(**LOOPED, **TINY)
    assert shape.params == params(model)
    idx = tokens_on_meta(2, 96)

    def run():
        return model(
            idx,
            recurrence=recurrence,
            backprop_depth=backprop_depth,
            checkpointing=checkpointing,
        )

    assert shape.hardware_flops_per_token(checkpointing=checkpointing) == pytest.approx(
        counted_flops(run, idx.numel()), rel=0.01
    )
    if not checkpointing:
        assert shape.hardware_flops_per_token(checkpointing=False) == shape.flops_per_token


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("mixture_of_depths", [False, True])
def test_looped_options_are_counted(lora_rank, mixture_of_depths):
    options = {**LOOPED, "lora_rank": lora_rank, "mixture_of_depths": mixture_of_depths}
    shape = cost.looped(**options, **TINY, recurrence=3, backprop_depth=None, sequence_len=32)
    with torch.device("meta"):
        model = Looped(**options, **TINY)
    assert shape.params == params(model)
    idx = tokens_on_meta(1, 32)
    assert shape.flops_per_token == pytest.approx(
        counted_flops(lambda: model(idx, recurrence=3), 32), rel=0.01
    )


def test_looped_546m():
    sizes = {**LOOPED, "max_recurrence": 16}
    shape = cost.looped(
        **sizes,
        recurrence=4,
        backprop_depth=None,
        n_head=18,
        n_embd=2304,
        vocab_size=32768,
        sequence_len=2048,
    )
    assert shape.params == 546_179_328
    assert shape.flops_per_token == pytest.approx(7.29e9, rel=0.001)
    assert shape.layers_run == 15


def test_recomputation_is_work_but_not_progress():
    shape = cost.depth(**TINY, n_layer=4, sequence_len=64)
    again = shape.hardware_flops_per_token(checkpointing=True) - shape.flops_per_token
    head = 6 * 128 * 512
    assert again == pytest.approx((shape.flops_per_token - head) / 3)


# ---------------------------------------------------------------- bytes


def test_a_kv_cache_is_what_its_tensors_hold():
    """Two tensors [kv heads, tokens, head channels] a layer; windows and loops counted."""
    shape = cost.depth(n_layer=3, n_head=4, n_kv_head=2, n_embd=128, vocab_size=64, sequence_len=64)
    held = [torch.empty(2, 40, 32, dtype=torch.bfloat16) for _ in range(3 * 2)]
    assert shape.kv_cache_bytes(40) == sum(t.nbytes for t in held)
    assert shape.kv_cache_bytes(40, bytes_each=4) == 2 * sum(t.nbytes for t in held)
    windowed = cost.depth(**TINY, n_layer=2, sequence_len=64, windows=(16, 64))
    assert windowed.kv_cache_bytes(40) == 2 * 128 * (16 + 40) * 2
    looped = cost.looped(**LOOPED, **TINY, recurrence=4, backprop_depth=1, sequence_len=64)
    assert looped.kv_cache_bytes(10) == 2 * 128 * 10 * 15 * 2


def test_a_checkpoint_is_weights_and_two_moments():
    shape = cost.gpt2(n_layer=2, n_head=2, n_embd=64, vocab_size=65, sequence_len=32)
    weights = torch.empty(shape.params)
    assert cost.checkpoint_bytes(shape.params) == 3 * weights.nbytes
