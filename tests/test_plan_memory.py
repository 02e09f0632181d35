"""plan/memory.py: activations against what autograd saves, states by hand, published peaks."""

import dataclasses
import math
import timeit
from functools import partial
from pathlib import Path

import pytest
import torch
from families import built, model_plan
from torch.utils.checkpoint import checkpoint

from tuppence.config import ModelPlan
from tuppence.model import Family, layers
from tuppence.model.looped import capacity_of
from tuppence.model.replay import Draws
from tuppence.plan import cost, memory
from tuppence.plan.cost import GIB, Shape
from tuppence.plan.gpus import find_gpu
from tuppence.plan.job import Job
from tuppence.plan.shapes import planned_shape

ROOT = Path(__file__).parents[1]
B, T, V = 3, 96, 1000  # numbers that no other dimension has
TINY = {"n_head": 4, "n_embd": 128, "vocab_size": V, "sequence_len": T}
LOOPED = {
    "family": "looped",
    "n_prelude": 2,
    "n_recurrent": 3,
    "n_coda": 1,
    "mean_recurrence": 4,
    "max_recurrence": 8,
}


def job(shape: Shape, **changes) -> Job:
    plain = {
        "gpu": find_gpu("H100"),
        "gpu_count": 1,
        "nodes": 1,
        "precision": "bf16",
        "parallel": "none",
        "checkpointing": False,
        "micro_batch": B,
        "accumulation": 4,
    }
    return Job(shape=shape, **{**plain, **changes})


def depth(n_layer: int, *, vocab_size: int = 32, **changes) -> Shape:
    """The dial: width 64 x depth."""
    return cost.depth(
        n_layer=n_layer,
        n_head=max(1, n_layer // 2),
        n_embd=64 * n_layer,
        vocab_size=vocab_size,
        sequence_len=2048,
        **changes,
    )


def looped_546m() -> Shape:
    return cost.looped(
        n_prelude=2,
        n_recurrent=3,
        n_coda=1,
        recurrence=4,
        mean_recurrence=4,
        max_recurrence=16,
        backprop_depth=None,
        lora_rank=32,
        n_head=18,
        n_embd=2304,
        vocab_size=32768,
        sequence_len=2048,
    )


# ---------------------------------------------------------------- activations


def saved_bytes(model: Family, precision: str, draws: Draws | None = None) -> tuple[int, int]:
    """Bytes that autograd saves of a forward pass: of activations, and of logits and the head.

    Each storage once. Parameters, tables and their casts (no dimension of tokens) are not
    activations.
    """
    idx = torch.zeros(B, T, dtype=torch.long)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in own and t.is_floating_point():
            seen[storage._cdata] = (storage.nbytes(), t)
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(idx, idx, draws=draws)
    rows = token_rows(model.plan)
    of_tokens = [(n, t) for n, t in seen.values() if B in t.shape or t.shape[:1].numel() in rows]
    logits = sum(n for n, t in of_tokens if t.shape[-1] == V)
    head = sum(n for n, t in seen.values() if t.shape == (V, model.plan.n_embd))
    return sum(n for n, _ in of_tokens) - logits, logits + head


def token_rows(plan: ModelPlan) -> set[int]:
    """The numbers of rows that matrices of tokens have, taken ones included, and heads together."""
    parts = [capacity_of(plan.loop, i) for i in range(8)] if plan.loop else [1.0]
    return {B * math.ceil(part * T) for part in parts} | {B * plan.n_head}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("n_layer", [2, 8])
def test_gpt2_keeps_what_autograd_saves(n_layer, precision):
    plan = model_plan(family="gpt2", **TINY, n_layer=n_layer)
    shape = planned_shape(plan)
    kept, logits = saved_bytes(built(plan), precision)
    counted = memory.activation_bytes(job(shape, precision=precision))
    assert counted == pytest.approx(kept, rel=0.03)
    assert logits == 4 * B * T * V  # the log-softmax; two gradients join it in the backward pass
    assert memory.memory(job(shape, precision=precision)).logits == 3 * logits


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"value_embeddings": False},
        {"residual_scalars": False},
        {"exportable": True},
        {"window_pattern": "SL"},
    ],
    ids=lambda parts: next(iter(parts), "all"),
)
def test_depth_keeps_what_autograd_saves(parts, n_kv_head, precision):
    plan = model_plan(family="depth", **TINY, n_layer=5, n_kv_head=n_kv_head, **parts)
    kept, head = saved_bytes(built(plan), precision)
    counted = memory.memory(job(planned_shape(plan), precision=precision))
    assert counted.activations == pytest.approx(kept, rel=0.03)
    assert head == 4 * V * 128  # its gradient; no logits, which come and go in chunks
    assert counted.logits == head + B * T * V * (10 if precision == "bf16" else 8)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("mixture_of_depths", [False, True])
@pytest.mark.parametrize(
    ("recurrence", "backprop_depth", "lora_rank"), [(1, None, 0), (4, None, 32), (8, 2, 32)]
)
def test_looped_keeps_what_autograd_saves(
    recurrence, backprop_depth, lora_rank, mixture_of_depths, precision
):
    loops = {"backprop_depth": backprop_depth, "lora_rank": lora_rank}
    plan = model_plan(**LOOPED, **TINY, **loops, mixture_of_depths=mixture_of_depths)
    kept, head = saved_bytes(built(plan), precision, Draws(torch.arange(B), recurrence))
    shape = planned_shape(plan, recurrence=recurrence)
    counted = memory.memory(job(shape, precision=precision))
    assert counted.activations == pytest.approx(kept, rel=0.03)
    assert counted.logits == head + B * T * V * (10 if precision == "bf16" else 8)


def test_logits_come_in_chunks():
    """However many tokens: no more than a chunk of them at once, and the head's gradient."""
    shape = depth(12, vocab_size=32768)
    chunks = memory.HEAD_CHUNK
    assert list(chunks.values()) == [layers.HEAD_CHUNK[False], layers.HEAD_CHUNK[True]]
    small, large = (memory.memory(job(shape, micro_batch=b)) for b in (1, 64))
    head = 4 * 32768 * 768
    assert small.logits == 10 * 2048 * 32768 + head
    assert large.logits == 10 * chunks["cuda"] + head


def test_only_our_own_models_are_counted_by_their_code():
    """Others keep what a norm of torch's own and their own activation keep."""
    for shape in (depth(12), looped_546m()):
        ours = memory.activation_bytes(job(shape))
        others = memory.activation_bytes(job(shape, framework="no such framework"))
        assert ours < 0.8 * others
    gpt2 = cost.gpt2(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, sequence_len=1024)
    others = job(gpt2, framework="no such framework")
    assert memory.activation_bytes(job(gpt2)) == memory.activation_bytes(others)


def test_a_checkpointed_layer_keeps_its_input():
    def plan(n_layer: int) -> ModelPlan:
        return model_plan(family="depth", **TINY, n_layer=n_layer, exportable=True)

    def saved(n_layer: int) -> int:
        model = built(plan(n_layer))
        for block in model.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return saved_bytes(model, "bf16")[0]

    def counted(n_layer: int) -> float:
        return memory.activation_bytes(job(planned_shape(plan(n_layer)), checkpointing=True))

    assert counted(6) - counted(2) == saved(6) - saved(2)
    whole = memory.activation_bytes(job(planned_shape(plan(1))))
    assert counted(1) > 0.9 * whole  # one block is there again while it is recomputed


def test_what_of_a_block_is_recomputed():
    shape = cost.gpt2(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, sequence_len=1024)

    def counted(recompute: str, framework: str = "llm.c") -> float:
        return memory.activation_bytes(job(shape, recompute=recompute, framework=framework))

    layer = 2 * B * 1024 * 768 * 12  # one bf16 vector a token in every layer
    hidden = 2 * B * 1024 * 4 * 768  # one block's hidden layer is there again
    assert counted("none") - counted("activation") == 4 * layer - hidden
    assert counted("activation") - counted("norm") == 2 * layer
    assert counted("selective", "torchtitan") < 0.7 * counted("none", "torchtitan")


@pytest.mark.parametrize(("recompute", "vectors"), [("none", 16), ("activation", 12), ("norm", 10)])
def test_llmc_keeps_what_its_table_lists(recompute, vectors):
    """Its activation tensors: two norms, qkv, attention, two residuals, hidden and GELU; once the
    embedding, the last norm, five vectors of scratch and a hidden layer; logits in place."""
    shape = cost.gpt2(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, sequence_len=1024)
    j = job(shape, framework="llm.c", recompute=recompute)
    once = 7 + (0 if recompute == "none" else 4)
    listed = 2 * 768 * (12 * vectors + once) + 12 * (4 * 12 + 4 * 4)
    tokens = B * 1024
    assert memory.activation_bytes(j) == pytest.approx(tokens * listed, rel=0.01)
    assert memory.memory(j).logits == 2 * tokens * 50304


def test_fp8_keeps_less():
    """13 bytes-pairs a token, layer and channel of nanochat's 18.5, counted by torch's min-cut
    partitioner on its code; the head's gradient takes more."""
    shape = depth(24, vocab_size=32768)
    bf16 = memory.memory(job(shape, framework="nanochat"))
    fp8 = memory.memory(job(shape, framework="nanochat", precision="fp8"))
    assert fp8.activations / bf16.activations == pytest.approx(12.5 / 18, rel=0.02)
    assert fp8.logits > bf16.logits


# ---------------------------------------------------------------- states


def states_gib(**changes) -> float:
    m = memory.memory(job(depth(64), gpu_count=8, **changes))
    return (m.weights + m.gradients + m.optimizer) / GIB


def test_replicated_muon_state_of_the_1000_dollar_model():
    """fp32 weights and gradients and 1/8 of the momentum: 102 GiB before any activation."""
    fp32 = {"precision": "fp32", "optimizer": "muon"}
    assert states_gib(parallel="zero1", **fp32) == pytest.approx(102, abs=0.5)
    assert states_gib(parallel="ddp", **fp32) == pytest.approx(144, abs=0.5)
    assert states_gib(parallel="fsdp", **fp32) == pytest.approx(144 / 8, abs=0.1)
    adamw = {"precision": "fp32", "optimizer": "adamw"}
    assert states_gib(parallel="ddp", **adamw) == pytest.approx(16 * depth(64).params / GIB)
    assert states_gib(parallel="zero1", **adamw) == pytest.approx(9 / 16 * 192, abs=0.1)
    assert states_gib(parallel="fsdp", **adamw) == pytest.approx(192 / 8, abs=0.1)


def test_casts_stand_beside_their_masters():
    shape = depth(12)
    fp32, bf16 = (memory.memory(job(shape, precision=p)) for p in ("fp32", "bf16"))
    assert bf16.weights - fp32.weights == 2 * shape.params_matmul
    mixed = memory.memory(job(shape, framework="llm.c"))
    assert mixed.weights == mixed.gradients == 2 * shape.params
    assert mixed.optimizer == 12 * shape.params


def test_gradients_that_are_not_accumulated_come_as_activations_go():
    once = memory.memory(job(depth(12), accumulation=1))
    assert once.gradients == 0
    tiny = memory.memory(job(depth(64), accumulation=1, micro_batch=1, checkpointing=True))
    rest = 4 * depth(64).params - tiny.activations - tiny.logits
    assert tiny.gradients == rest > 0


def test_fsdp_gathers_blocks_and_ends():
    shape = depth(12, vocab_size=32768)
    sharded = memory.memory(job(shape, gpu_count=8, parallel="fsdp"))
    alone = memory.memory(job(shape, gpu_count=1, parallel="fsdp"))
    assert alone.communication == 0
    gathered = 2 * (2 * shape.params_body / 12 + 2 * 32768 * 768)
    assert sharded.communication == gathered + 6 * 32768 * 768
    assert sharded.weights == 4 * shape.params / 8


def test_tensor_parallelism_splits_states_and_activations():
    one = memory.memory(job(depth(12), gpu_count=2, parallel="none", framework="megatron-core"))
    two = memory.memory(
        job(depth(12), gpu_count=2, parallel="none", framework="megatron-core", tensor=2)
    )
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert getattr(two, part) == getattr(one, part) / 2


# ---------------------------------------------------------------- does it fit


@pytest.mark.parametrize("parallel", ["ddp", "zero1"])
@pytest.mark.parametrize("framework", ["tuppence", "nanochat"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_guide_004_does_not_fit_replicated(parallel, framework, checkpointing):
    tried = job(
        depth(64),
        gpu=find_gpu("H100-PCIe"),
        gpu_count=8,
        parallel=parallel,
        checkpointing=checkpointing,
        micro_batch=4,
        accumulation=8,
        optimizer="muon",
        framework=framework,
    )
    assert not memory.fits(tried)
    assert memory.largest_micro_batch(tried, 32) == 0
    if checkpointing:
        assert memory.fits(dataclasses.replace(tried, parallel="fsdp"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("framework", ["tuppence", "nanochat"])
def test_guide_002_does_not_fit_at_batch_8(optimizer, framework):
    tried = job(
        looped_546m(),
        gpu=find_gpu("A10G"),
        micro_batch=8,
        accumulation=8,
        optimizer=optimizer,
        framework=framework,
    )
    assert not memory.fits(tried)
    assert 1 <= memory.largest_micro_batch(tried, 64) < 8
    assert memory.fits(dataclasses.replace(tried, gpu=find_gpu("A100-80GB")))


def test_guide_001_fits():
    """GPT-2 124M at micro-batch 12, on one A10G, in nanoGPT."""
    shape = cost.gpt2(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, sequence_len=1024)
    assert memory.fits(
        job(shape, gpu=find_gpu("A10G"), micro_batch=12, accumulation=40, framework="nanogpt")
    )


def test_head_room_is_the_high_end_and_the_process():
    j = job(depth(24, vocab_size=32768))
    m, peak = memory.memory(j), memory.peak_memory_gib(j)
    assert peak.low < peak.mid < peak.high
    assert peak.mid == pytest.approx(m.allocated / GIB)
    needed = peak.high + m.overhead / GIB
    room = dataclasses.replace(j.gpu, memory_gib=needed + 0.01)
    short = dataclasses.replace(j.gpu, memory_gib=needed - 0.01)
    assert memory.fits(dataclasses.replace(j, gpu=room))
    assert not memory.fits(dataclasses.replace(j, gpu=short))


def test_the_largest_micro_batch_is_the_largest_divisor_that_fits():
    j = job(looped_546m(), gpu=find_gpu("A100-80GB"))
    best = memory.largest_micro_batch(j, 60)
    tried = {b: dataclasses.replace(j, micro_batch=b, accumulation=60 // b) for b in range(1, 61)}
    fitting = [b for b, one in tried.items() if 60 % b == 0 and memory.fits(one)]
    assert best == max(fitting) < 60


def test_memory_grows_with_everything():
    base = job(depth(12, vocab_size=1024))
    larger = [
        dataclasses.replace(base, micro_batch=B + 1),
        dataclasses.replace(base, shape=depth(14, vocab_size=1024)),
        dataclasses.replace(base, shape=depth(12, vocab_size=2048)),
        dataclasses.replace(base, precision="fp32"),
    ]
    assert all(memory.memory(j).total > memory.memory(base).total for j in larger)
    assert memory.memory(dataclasses.replace(base, checkpointing=True)).total < (
        memory.memory(base).total
    )


def test_a_peak_takes_microseconds():
    j = job(looped_546m())
    seconds = min(timeit.repeat(lambda: memory.peak_memory_gib(j), number=50, repeat=5)) / 50
    assert seconds < 200e-6  # 10 where nothing else runs


# ---------------------------------------------------------------- published peaks


def published(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import published_memory

    return published_memory


def test_published_peaks(monkeypatch):
    scores = published(monkeypatch).score(ROOT / "bench" / "published" / "throughput.csv")
    assert scores["rows"] + scores["skipped"] == 18
    assert scores["skipped"] == 0
    assert scores["median_error"] <= 0.05
    assert scores["p90_error"] <= 0.15
    assert 0.72 <= scores["coverage"] <= 0.90
    assert set(scores["groups"]) == {"nanochat", "modded-nanogpt"}


def test_no_published_run_is_called_impossible(monkeypatch):
    bench = published(monkeypatch)
    table = ROOT / "bench" / "published" / "throughput.csv"
    assert bench.impossible(table) == []
    monkeypatch.setitem(memory.SOFTWARE, "llm-foundry", memory.UNKNOWN)  # fp32 stream, eager loss
    assert bench.impossible(table)


def test_rows_without_a_shape_are_counted(monkeypatch, tmp_path):
    bench = published(monkeypatch)
    text = (ROOT / "bench" / "published" / "throughput.csv").read_text(encoding="utf-8")
    header, *rows = text.splitlines()
    good = next(r for r in rows if r.startswith("ncrep-73282185"))
    blank = good.replace(",nanochat,20,1280,10,10,5120,", ",nanochat,,,,,,")
    assert blank != good
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([header, good, blank]), encoding="utf-8")
    scores = bench.score(path)
    assert (scores["rows"], scores["skipped"]) == (1, 1)
    path.write_text("\n".join([header, blank]), encoding="utf-8")
    assert bench.score(path)["median_error"] is None


# ---------------------------------------------------------------- CPUs


def test_the_cpu_count_of_gpt2_is_what_it_was():
    shape = cost.gpt2(n_layer=2, n_head=4, n_embd=128, vocab_size=65, sequence_len=32)
    sizes = {"tokens": 64}
    assert memory.cpu_activation_bytes(shape, **sizes, precision="fp32", attention="sdpa") == 64 * (
        2 * 128 * (8 + 17 * 4) + 65 * 12
    )
    matmul = memory.cpu_activation_bytes(shape, **sizes, precision="bf16", attention="matmul")
    assert matmul == 64 * (2 * (128 * (8 + 17 * 2) + 4 * 32 * 2) + 3 * 4 * 32 * 2 + 65 * 10)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize(
    "keys",
    [
        {"family": "depth", "n_layer": 5, "n_kv_head": 2},
        {"family": "depth", "n_layer": 4, "exportable": True},
        {**LOOPED, "max_recurrence": 5},
        {**LOOPED, "mixture_of_depths": True, "backprop_depth": 2},
    ],
    ids=["depth", "exportable", "looped", "mixture of depths"],
)
def test_on_a_cpu_the_modern_families_keep_what_autograd_saves(keys, attention, precision):
    plan = model_plan(**{**TINY, **keys})
    most = plan.loop.max_recurrence if plan.loop else None
    draws = Draws(torch.arange(B), most) if most else None
    kept, head = saved_bytes(built(plan, attention=attention), precision, draws)
    counted = memory.cpu_activation_bytes(
        planned_shape(plan, recurrence=most),
        tokens=B * T,
        precision=precision,
        attention=attention,
    )
    wide = 2 if precision == "bf16" else 4
    counted -= 3 * B * 4 * T * T * wide if attention == "matmul" else 0  # scores, for a moment
    counted -= B * T * V * (10 if precision == "bf16" else 8)  # logits, for a moment
    assert counted - head == pytest.approx(kept, rel=0.03)


def test_a_state_is_weights_gradients_and_moments():
    assert memory.state_bytes(10) == 160
    assert memory.state_bytes(10, muon_params=6) == 10 * 8 + 4 * 8 + 6 * 4
    shape = looped_546m()
    plain, muon = (memory.memory(job(shape, optimizer=o)).optimizer for o in ("adamw", "muon"))
    assert plain == 8 * shape.params
    assert plain - muon == 4 * shape.params_muon
