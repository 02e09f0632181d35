"""Published training runs as jobs: what a row of published/throughput.csv says was run, and how
fast. Where a row is silent, its job is what its framework would do.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

from tuppence.errors import UserError
from tuppence.plan.cost import GIB, Shape, decoder
from tuppence.plan.gpus import find_gpu
from tuppence.plan.job import Gpu, Job
from tuppence.plan.throughput import framework_key

PUBLISHED = Path(__file__).parent / "published" / "throughput.csv"
Row = dict[str, str]

GATED = re.compile(r"llama|mistral|qwen|intern|olmo|smol|gemma|phi-?3|swiglu|deepseek|yi-", re.I)
VOCABULARIES = {"llama-3": 128256, "llama": 32000, "mistral": 32000, "": 50304}
LENGTHS = {"gpt-2": 1024, "llama-3": 8192, "llama-2": 4096, "": 2048}
TYPICAL_STEP_TOKENS = 2**19
NEVER_CHECKPOINTS = re.compile(r"nanochat|nanogpt|llm\.c|megatron")  # not whole blocks
ROUGHLY = 2.5  # times over the rough count below, before a blank means activation checkpointing
TYPICAL_FILL = 0.7  # of a card's memory, where a row does not say its micro-batch


def number(row: Row, column: str) -> float | None:
    """A column's first number, or None: blank, "unknown" and "~8" are all met."""
    found = re.search(r"[-+]?\d[\d_,]*\.?\d*(?:[eE][-+]?\d+)?", row.get(column) or "")
    return float(found[0].replace(",", "").replace("_", "")) if found else None


def whole(row: Row, column: str) -> int | None:
    """A column's number if it is a positive integer."""
    value = number(row, column)
    return int(value) if value and value >= 1 else None


# ---------------------------------------------------------------- shapes


def read_shape(row: Row) -> Shape | str:
    """The row's model at its sequence length, or what is missing."""
    layers, dim = whole(row, "layers"), whole(row, "dim")
    if not layers or not dim:
        return "no shape: layers or dim is blank"
    family = row.get("family", "").lower()
    words = f"{family} {row.get('notes', '')}"
    if "nanochat" in family:
        return _nanochat(row, layers, dim)
    heads = _heads(row, layers, dim)
    gated = bool(GATED.search(words))
    ffn = whole(row, "ffn") or (-(-8 * dim // 3 // 256) * 256 if gated else 4 * dim)
    if "internlm" in family and ffn == 11008:
        gated = True
    learned = any(name in family for name in ("mpt", "gpt-2", "gpt2", "megatron"))
    tied = row.get("tied", "") in ("1", "1.0", "True", "true") or (
        not row.get("tied") and "gpt-2" in family
    )
    small = (2 * layers + 1) * dim
    if "mpt" in family or "megatron" in family:
        small = 13 * layers * dim + 2 * dim  # biases everywhere, LayerNorm's too
    elif "gpt" in family and "llm.c" in row.get("framework", ""):
        small = 13 * layers * dim + 2 * dim
    return decoder(
        family=family or "unknown",
        n_layer=layers,
        n_embd=dim,
        n_head=heads,
        n_kv_head=whole(row, "kv_heads"),
        ffn=ffn,
        gated=gated,
        vocab_size=whole(row, "vocab") or _usual(family, VOCABULARIES),
        sequence_len=whole(row, "seq_len") or _usual(family, LENGTHS),
        tied_head=tied,
        learned_positions=learned,
        params_small=small,
    )


def _usual(family: str, table: dict[str, int]) -> int:
    """A family's vocabulary or length, by the first of its names that matches."""
    return next(value for name, value in table.items() if name in family)


def _heads(row: Row, layers: int, dim: int) -> int:
    heads = whole(row, "heads")
    if heads and dim % heads == 0:
        return heads
    wanted = 128 if dim >= 2048 else 64
    return next(h for h in range(max(1, dim // wanted), dim + 1) if dim % h == 0)


def _nanochat(row: Row, layers: int, dim: int) -> Shape:
    """nanochat of 2025 (vocabulary of 65,536, full windows) or of 2026 (32,768, value embeddings
    in every other layer, windows in three layers of four: half of T, later a quarter)."""
    heads = _heads(row, layers, dim)
    kv_heads = whole(row, "kv_heads") or heads
    vocab, length = whole(row, "vocab") or 32768, whole(row, "seq_len") or 2048
    new = vocab == 32768

    gated = "swiglu" in row.get("notes", "").lower()
    ffn = whole(row, "ffn") or 4 * dim

    def build(short: int, gate_channels: int = 12) -> Shape:
        spans = [
            short if short and i % 4 != 3 and i != layers - 1 else length for i in range(layers)
        ]
        return decoder(
            family="nanochat",
            n_layer=layers,
            n_embd=dim,
            n_head=heads,
            n_kv_head=kv_heads,
            ffn=2 * ffn // 3 if gated else ffn,
            gated=gated,
            vocab_size=vocab,
            sequence_len=length,
            windows=tuple(spans),
            value_embeddings=(layers + 1) // 2 if new else 0,
            gate_channels=gate_channels if new else 0,
            params_small=(2 * layers + (26 if gate_channels == 12 else 0)) if new else 0,
        )

    if not new or "full window" in row.get("notes", ""):
        return build(0)
    stated = number(row, "flops_per_token_source") or number(row, "d_flops_per_token")
    shapes = [build(length // 4), build(length // 2, 32), build(0)]
    if not stated:
        return shapes[0]
    return min(shapes, key=lambda s: abs(s.flops_per_token / stated - 1))


# ---------------------------------------------------------------- jobs


def read_job(row: Row) -> Job | str:
    """The job of a row, or why there is none."""
    shape = read_shape(row)
    if isinstance(shape, str):
        return shape
    gpu = read_gpu(row)
    if isinstance(gpu, str):
        return gpu
    framework = _framework(row)
    count = whole(row, "gpu_count") or _count_needed(shape, gpu)
    node = 72 if gpu.name.startswith("GB") else 8
    nodes = -(-count // node)
    precision = _precision(row)
    stored = row.get("act_ckpt", "").lower()
    tensor, pipeline, parallel = _parallelism(row, shape, gpu, count, framework)
    job = Job(
        shape=shape,
        gpu=gpu,
        gpu_count=count,
        nodes=nodes,
        precision=precision,
        parallel=parallel,
        checkpointing=bool(re.match(r"full|yes|true|all|every|block|1", stored)),
        micro_batch=1,
        accumulation=1,
        optimizer=_optimizer(row, framework),
        framework=framework,
        tensor=tensor,
        pipeline=pipeline,
        recompute="selective" if re.match(r"selective|sac|op$", stored) else "none",
    )
    held = whole(row, "micro_batch_seqs") or 1
    may = not stored and not NEVER_CHECKPOINTS.search(framework)
    if may and held > ROUGHLY * max(0.0, _sequences_that_fit(job)):
        job = replace(job, checkpointing=True)
    micro, accumulation = _batch(row, job)
    return replace(job, micro_batch=micro, accumulation=accumulation)


def _framework(row: Row) -> str:
    """The framework's key; torchtitan is eager unless it is said to be compiled (fp8 needs it)."""
    name = framework_key(row.get("framework") or "unknown")
    words = f"{row.get('framework')} {row.get('parallelism')} {row.get('notes')}".lower()
    if name == "torchtitan" and ("compile" in words or _precision(row) == "fp8"):
        return "torchtitan-compiled"
    return name


def read_gpu(row: Row) -> Gpu | str:
    """The row's card; one that the table lacks is built from the row's own peak."""
    name = row.get("gpu_type", "")
    try:
        return find_gpu(name)
    except UserError:
        pass
    peak = number(row, "d_peak_bf16_dense_tflops") or number(row, "mfu_peak_ref_tflops")
    if not name or name == "unknown" or not peak:
        return f"no result: the GPU {name or 'unnamed'} is unknown"
    return Gpu(
        name=name,
        arch="unknown",
        memory_gib=0.98 * (number(row, "gpu_mem_gb") or 24),
        bandwidth_gbs=6.0 * peak,  # an A100's ratio
        sheet_tflops=dict.fromkeys(("bf16", "fp16", "fp8", "fp32"), peak),
        measured_tflops={},
        link="pcie",
        link_gbs=64.0,
    )


def _precision(row: Row) -> str:
    text = row.get("precision", "").lower()
    for name in ("fp8", "bf16", "fp16", "fp32"):
        if name in text:
            return name
    return "fp32" if "tf32" in text else "bf16"


def _optimizer(row: Row, framework: str) -> str:
    words = f"{row.get('id', '')} {row.get('notes', '')}".lower()
    if framework == "modded-nanogpt":
        return "adamw" if "adam" in words else "muon"
    return "muon" if framework == "nanochat" or "muon" in words else "adamw"


def _count_needed(shape: Shape, gpu: Gpu) -> int:
    needed = 20 * shape.params / (gpu.memory_gib * GIB)
    return 8 if needed < 8 else 2 ** math.ceil(math.log2(needed))


def _parallelism(
    row: Row, shape: Shape, gpu: Gpu, count: int, framework: str
) -> tuple[int, int, str]:
    """Tensor (context counts as tensor: both split a sequence's work), pipeline, and the rest."""
    text = row.get("parallelism", "").lower()

    def degree(tag: str) -> int:
        found = re.search(rf"\b{tag}\s*=?\s*(\d+)", text)
        return int(found[1]) if found else 1

    tensor, pipeline, model = degree("tp") * degree("cp"), degree("pp"), degree("mp")
    if model > 1:
        tensor, pipeline = min(8, model), max(1, model // 8)
    if tensor * pipeline > count:
        tensor, pipeline = 1, 1
    split = tensor * pipeline > 1
    if re.search(r"fsdp|hsdp|zero-?3|full_shard|shard_grad", text):
        return tensor, pipeline, "fsdp"
    if re.search(r"zero|shard", text) or ("megatron" in framework and re.search(r"\bdp", text)):
        return tensor, pipeline, "zero1"
    if count // (tensor * pipeline) == 1:
        return tensor, pipeline, "none"
    crowded = 18 * shape.params / (tensor * pipeline) > 0.6 * gpu.memory_gib * GIB
    if crowded and "megatron" in framework and (tensor > 1 or not text):
        tensor = max(tensor, 8 if shape.params > 1e11 else 4 if shape.params > 2e10 else 2)
        while not split and 10 * shape.params / (tensor * pipeline) > 0.6 * gpu.memory_gib * GIB:
            pipeline *= 2
        return tensor, pipeline, "zero1"
    if crowded:
        return tensor, pipeline, "fsdp"
    if framework in ("nanochat", "megatron-core", "megatron-bridge"):
        return tensor, pipeline, "zero1"
    shards = framework in ("llm-foundry", "torchtitan", "fms-fsdp", "litgpt", "olmo", "lingua")
    return tensor, pipeline, "fsdp" if shards and not text else "ddp"


def _batch(row: Row, job: Job) -> tuple[int, int]:
    """Sequences at a time and accumulation, as stated or as the framework would choose."""
    micro, accumulation = whole(row, "micro_batch_seqs"), whole(row, "grad_accum")
    tokens = number(row, "global_batch_tokens")
    each = tokens / job.replicas / job.shape.sequence_len if tokens else None
    if micro and accumulation:
        return micro, accumulation
    if micro and each:
        return micro, max(1, round(each / micro))
    if accumulation and each:
        return max(1, round(each / accumulation)), accumulation
    limit = _fitting(job)
    if not each:  # a typical step of half a million tokens
        each = TYPICAL_STEP_TOKENS / job.replicas / job.shape.sequence_len
        accumulation = accumulation or max(
            1, 4 * (job.pipeline - 1), round(each / (micro or limit))
        )
        return micro or limit, accumulation
    count = max(1, round(each))
    micro = max(b for b in range(1, count + 1) if count % b == 0 and b <= max(1, limit))
    return micro, count // micro


def _fitting(job: Job) -> int:
    """The largest power of two of sequences that fills no more than a typical part of memory."""
    sequences = _sequences_that_fit(job)
    return max(1, min(64, 2 ** int(math.log2(sequences)))) if sequences > 1 else 1


def _sequences_that_fit(job: Job) -> float:
    """A rough count of its own (plan/memory.py has the real one): states and activations."""
    shape, split = job.shape, job.tensor * job.pipeline
    state = 16 * shape.params / split
    if job.parallel == "fsdp":
        state /= job.replicas
    if job.parallel == "zero1":
        state = (6 + 10 / job.replicas) * shape.params / split
    kept = 2 * shape.n_embd if job.checkpointing else 18 * shape.n_embd + 4 * shape.ffn
    token = 2 * kept * shape.layers_kept / split + 8 * shape.vocab_size / split
    room = TYPICAL_FILL * job.gpu.memory_gib * GIB - state
    return room / (token * shape.sequence_len)


# ---------------------------------------------------------------- results


def actual_tokens_per_second(row: Row, job: Job) -> float | None:
    """Tokens a second and GPU, as printed, or from what was printed."""
    count, tokens, ms = job.gpu_count, number(row, "global_batch_tokens"), number(row, "step_ms")
    if value := number(row, "tok_s_per_gpu"):
        return value
    if value := number(row, "tok_s_total"):
        return value / count
    if tokens and ms:
        return 1000 * tokens / ms / count
    if value := number(row, "d_tok_s_per_gpu"):
        return value
    total, hours = number(row, "total_tokens"), number(row, "wall_clock_h")
    if total and hours:
        return total / hours / 3600 / count
    flops = _counted_flops(row, job)
    if value := number(row, "tflops_per_gpu_source"):
        return value * 1e12 / flops
    share, peak = number(row, "mfu_reported_pct"), number(row, "mfu_peak_ref_tflops")
    peak = peak or job.gpu.sheet_tflops.get("bf16") or job.gpu.sheet_tflops.get("fp16")
    return share / 100 * peak * 1e12 / flops if share and peak else None


def _counted_flops(row: Row, job: Job) -> float:
    """FLOPs per token as the row's source counts them."""
    kind = row.get("mfu_kind", "").lower()
    flops = job.shape.hardware_flops_per_token(checkpointing="hfu" in kind and job.checkpointing)
    if "causal" in kind and "non-causal" not in kind:
        flops -= job.shape.attention_flops_per_token / 2
    return flops
