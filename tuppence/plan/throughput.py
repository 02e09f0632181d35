"""How fast a job runs: a roofline over its real matmuls, attention, traffic, links and launches.

    step = accumulation x bubble x (busy + launches + exposed gathers) + exposed reduction
           + optimizer + fixed,      busy = matmul + attention + elementwise + loss + recompute

Each part is physics with a constant or two (facts/throughput_fit.json says what each means;
bench/fit_throughput.py fits them to published runs). What a framework adds or saves beyond that is
its software factor, with deviations for a family of cards and for a precision, all shrunk to the
mean of all: software that was never seen gets that mean and a wide interval. No GPU run of tuppence
itself has been measured: it gets the mean of its compiled peers and the wide interval.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tuppence.config import Interval
from tuppence.plan.gpus import ceiling_tflops
from tuppence.plan.job import Gpu, Job

FACTS = Path(__file__).parent / "facts" / "throughput_fit.json"

GPUS_PER_NODE = 8
FLASH_BACKWARD = 1.25  # flash attention's backward runs 5 matmuls where 4 are counted
CAUSAL_SKIP = 0.5  # of the counted square: kernels skip the masked half
BACKWARD_SHARE = 0.6  # of a micro-batch's time
GRADIENT_BYTES = {"ddp": 4.0, "zero1": 4.0, "fsdp": 2.0}  # reduced per parameter
ADAM_BYTES = 34.0  # per parameter: read and write fp32 weight and two moments, gradient, bf16 copy
NEWTON_SCHULZ = 5  # iterations of Muon
SOFTENING = 4.0  # of the maximum of two overlapped times


@dataclass(frozen=True)
class Software:
    """What is known of a framework without timing it. `fused`: compiled or written by hand, so that
    elementwise work is not a kernel each; `flash`: attention never writes its T x T scores;
    `peers` lend their factor where the framework itself was never measured."""

    fused: bool = True
    flash: bool = True
    peers: tuple[str, ...] = ()
    spelled: tuple[str, ...] = ()


SOFTWARE = {  # in the order in which a published spelling is looked for
    "tuppence": Software(peers=("nanochat", "modded-nanogpt", "nanogpt"), spelled=("tuppence",)),
    "modded-nanogpt": Software(spelled=("modded",)),
    "nanochat": Software(spelled=("nanochat",)),
    "nanogpt": Software(spelled=("nanogpt",)),
    "llm.c": Software(spelled=("llm.c", "llmc")),
    "llm-foundry": Software(fused=False, spelled=("foundry", "composer", "mosaic")),
    "megatron-bridge": Software(spelled=("bridge", "nemo")),
    "megatron-core": Software(spelled=("megatron-core", "mcore", "megatron core")),
    "megatron-lm": Software(fused=False, flash=False, spelled=("megatron",)),
    "internevo": Software(fused=False, spelled=("intern",)),
    "nanotron": Software(fused=False, spelled=("nanotron",)),
    "torchtitan-compiled": Software(spelled=("torchtitan-compiled",)),
    "torchtitan": Software(fused=False, spelled=("titan",)),
}


@dataclass(frozen=True)
class Fit:
    """Fitted numbers. `deviations` are logarithms of time: ("framework", name), ("family", name,
    cards), ("precision", name, precision) and ("all",); `half_widths` of the 80% interval too."""

    constants: dict[str, float]
    deviations: dict[tuple[str, ...], float]
    half_widths: dict[tuple[str, ...], float] = field(default_factory=dict)


@lru_cache(maxsize=1)
def fitted() -> Fit:
    """The fit that ships in the package."""
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    return Fit(
        constants={name: entry["value"] for name, entry in facts["constants"].items()},
        deviations={tuple(k.split(" | ")): v for k, v in facts["log_time_deviations"].items()},
        half_widths={tuple(k.split(" | ")): v for k, v in facts["log_half_widths"].items()},
    )


# ---------------------------------------------------------------- answers


def tokens_per_second(job: Job, fit: Fit | None = None) -> Interval:
    """Tokens a second of the whole job: middle and 80% interval."""
    fit = fit or fitted()
    middle = job.tokens_per_step / sum(breakdown(job, fit).values())
    spread = math.exp(_half_width(job, fit))
    return Interval(low=middle / spread, mid=middle, high=middle * spread)


def step_seconds(job: Job, fit: Fit | None = None) -> Interval:
    """Seconds of an optimizer step: middle and 80% interval."""
    fit = fit or fitted()
    middle = sum(breakdown(job, fit).values())
    spread = math.exp(_half_width(job, fit))
    return Interval(low=middle / spread, mid=middle, high=middle * spread)


def breakdown(job: Job, fit: Fit | None = None) -> dict[str, float]:
    """Seconds of a step by what they are spent on: matmul, attention, elementwise, loss,
    recompute, communication (exposed), launches, optimizer. Their sum is the step."""
    fit = fit or fitted()
    factor = math.exp(software_log(job, fit.deviations))
    seconds = parts(job, fit.constants)
    return {k: v if k == "communication" else v * factor for k, v in seconds.items()}


def deviation_keys(job: Job, framework: str) -> tuple[tuple[str, ...], ...]:
    """Which deviations bear on a job."""
    return (
        ("framework", framework),
        ("family", framework, family(job.gpu)),
        ("precision", framework, job.precision),
    )


def software_log(job: Job, deviations: Mapping[tuple[str, ...], float]) -> float:
    """The logarithm of the software factor: the mean of all, and the framework's deviations."""
    name = framework_key(job.framework)
    names = (name,) if ("framework", name) in deviations else software_of(name).peers
    total = deviations.get(("all",), 0.0)
    for each in names:
        total += sum(deviations.get(k, 0.0) for k in deviation_keys(job, each)) / len(names)
    return total


def knowledge(job: Job, deviations: Mapping[tuple[str, ...], float]) -> str:
    """How much of the job's kind has been measured: its cards, its framework, or neither."""
    name = framework_key(job.framework)
    if ("framework", name) not in deviations:
        return "unknown framework"
    seen = ("family", name, family(job.gpu)) in deviations
    return "known" if seen else "other cards"


def _half_width(job: Job, fit: Fit) -> float:
    kind = knowledge(job, fit.deviations)
    own = fit.half_widths.get((kind, framework_key(job.framework)))
    return own if own is not None else fit.half_widths[(kind,)]


def software_of(framework: str) -> Software:
    """What is known of a framework; compiled code with flash attention where nothing is."""
    return SOFTWARE.get(framework_key(framework), Software())


@lru_cache(maxsize=256)
def framework_key(name: str) -> str:
    """The framework that a published spelling means: "nanoGPT torch.compile" is nanogpt."""
    text = name.lower()
    found = (k for k, known in SOFTWARE.items() if any(part in text for part in known.spelled))
    return next(found, text)


# ---------------------------------------------------------------- one step, by parts


def parts(job: Job, c: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step by what they are spent on, before the software factor."""
    fused = software_of(job.framework).fused
    bandwidth = job.gpu.bandwidth_gbs * 1e9 * c["bandwidth_share"]
    peak = sustained_flops(job.gpu, job.precision, c)
    busy = _busy_seconds(job, c, peak, bandwidth)
    compute = sum(busy.values())
    late = _larger(compute, _launch_seconds(job, fused, c)) - compute
    gather = _sharding_seconds(job, c)
    exposed = _larger(compute + late, gather) - compute - late + gather * c["link_unhidden"]
    exposed += _tensor_seconds(job, c)
    bubble = 1 + (job.pipeline - 1) / max(job.accumulation, job.pipeline) * c["bubble"]
    each = job.accumulation * bubble
    reduce = _reduction_seconds(job, c)
    behind = BACKWARD_SHARE * compute  # of the last micro-batch: the others reduce nothing
    out = {name: seconds * each for name, seconds in busy.items()}
    out["communication"] = exposed * each + _larger(behind, reduce) - behind
    out["communication"] += reduce * c["link_unhidden"]
    out["launches"] = late * each + c["step_overhead" if fused else "step_overhead_unfused"]
    out["optimizer"] = _update_seconds(job, peak, bandwidth)
    return out


def _busy_seconds(
    job: Job, c: Mapping[str, float], peak: float, bandwidth: float
) -> dict[str, float]:
    """What one micro-batch keeps a GPU busy with. Tensor and pipeline parts split its matmuls."""
    shape, kind = job.shape, software_of(job.framework)
    rows = job.micro_batch * shape.sequence_len
    split = job.tensor * job.pipeline
    plain = 1.0 if kind.fused else c["unfused"]
    forward, backward, head, quantized = _matmul_seconds(job, c, peak)
    seen, seen_backward, scores = _attention_seconds(job, c, peak)
    scores *= 0.0 if kind.flash else c["score_bytes"] / bandwidth
    wide = c["hidden_words"] * shape.ffn * (1.5 if shape.gated else 1.0) / job.tensor
    word = 4.0 if job.precision == "fp32" else 2.0
    touch = rows * (c["channel_words"] * shape.n_embd + wide) * word * plain
    touch /= 3 * bandwidth * job.pipeline  # a third forward, the rest backward
    loss = head + rows * shape.vocab_size / split * c["logit_bytes"] * plain / bandwidth
    again = 0.0
    if job.checkpointing:
        again = (forward + seen + scores / 3) * shape.layers_kept / shape.layers_run
        again = c["recompute_share"] * (again + touch * shape.layers_kept)
    elif job.recompute == "selective":  # every other matmul, and all between them
        again = c["recompute_share"] * (backward / 4 + touch * shape.layers_kept)
    return {
        "matmul": forward + backward,
        "attention": seen + seen_backward + scores,
        "elementwise": touch * (shape.layers_run + 2 * shape.layers_kept) + quantized / bandwidth,
        "loss": loss,
        "recompute": again,
    }


def _matmul_seconds(
    job: Job, c: Mapping[str, float], peak: float
) -> tuple[float, float, float, float]:
    """Forward and backward of the blocks' matmuls, the head's, and the bytes of fp8 casts.

    A matmul loses a fixed depth of its pipeline on every side: 1 / (1 + half (1/k + 1/n + 1/m)).
    """
    rows = job.micro_batch * job.shape.sequence_len
    forward = backward = head = cast_bytes = 0.0
    for m in job.shape.matmuls:
        n = m.n / job.tensor
        speed = peak / (1 + c["matmul_half"] * (1 / m.k + 1 / n + 1 / rows))
        seconds = 2.0 * rows * m.k * n / job.pipeline / speed
        if m.name == "lm_head":
            head += seconds * (m.runs + 2 * m.backward_runs)
            continue
        if job.precision == "fp8":
            seconds /= c["fp8_gain"]
            cast_bytes += 3 * rows * (m.k + n) * c["fp8_bytes"] * m.runs / job.pipeline
        forward += m.runs * seconds
        backward += 2 * m.backward_runs * seconds
    return forward, backward, head, cast_bytes


def _attention_seconds(job: Job, c: Mapping[str, float], peak: float) -> tuple[float, float, float]:
    """Forward, backward, and the scores that attention without flash writes.

    Kernels multiply on matrix units, then take exponentials on the others, which every score
    needs whatever the head's size: small heads and cards rich in compute pay for them.
    """
    shape, gpu = job.shape, job.gpu
    rows = job.micro_batch * shape.sequence_len
    share = c.get(f"attention_share.{family(gpu)}", c["attention_share"])
    vector = gpu.vector_tflops * 1e12 or peak / 15  # an A100's ratio
    forward = backward = scores = 0.0
    for a in shape.attentions:
        wide = c["attention_wide"] if a.head_dim >= 96 else 1.0
        each = 4.0 * a.head_dim / (peak * share * wide) + c["softmax_ops"] / vector
        looked = a.window * (1 - CAUSAL_SKIP * a.window / shape.sequence_len)
        seconds = rows * a.n_head * looked * each / (job.tensor * job.pipeline)
        forward += a.runs * seconds
        backward += 2 * a.backward_runs * seconds * FLASH_BACKWARD
        scores += a.runs * rows * a.n_head * a.window / (job.tensor * job.pipeline)
    return forward, backward, scores


def sustained_flops(gpu: Gpu, precision: str, c: Mapping[str, float]) -> float:
    """What matmuls keep up for hours: the measured ceiling, or what the power limit feeds."""
    table = "bf16" if precision == "fp8" else precision
    ceiling, sheet = ceiling_tflops(gpu, table)[0], gpu.sheet_tflops.get(table, math.inf)
    if gpu.link == "none" and table not in gpu.measured_tflops:
        ceiling = sheet  # GeForce sheets are modest: the three measured cards reach theirs
    ceiling = min(ceiling, sheet) * c["matmul_share"]  # short tests boost above it, runs do not
    per_watt = c.get(f"tflops_per_watt.{family(gpu)}", 0.0) * (0.5 if table == "fp32" else 1)
    if not gpu.watts or not per_watt:
        return ceiling * 1e12
    fed = gpu.watts * per_watt
    return 1e12 / math.pow(ceiling**-SOFTENING + fed**-SOFTENING, 1 / SOFTENING)


def family(gpu: Gpu) -> str:
    """Cards that behave alike. Ampere is two chips: GA10x (A10, RTX 30) has an older process and
    more vector units for its matrix units than GA100 (A100)."""
    name = {"Grace-Hopper": "Hopper", "Blackwell Ultra": "Blackwell"}.get(gpu.arch, gpu.arch)
    small = gpu.sheet_tflops.get("bf16", 0.0) < 8 * gpu.vector_tflops
    return "Ampere GA10x" if name == "Ampere" and small else name


def _launch_seconds(job: Job, fused: bool, c: Mapping[str, float]) -> float:
    """What the host needs to launch a micro-batch's kernels: the floor of small shapes."""
    kept = job.shape.layers_kept
    kernels = 14 * job.shape.layers_run + 26 * kept + (14 * kept if job.checkpointing else 0)
    return kernels / job.pipeline * c["launch_seconds"] * (1.0 if fused else c["unfused"])


def _larger(a: float, b: float) -> float:
    """A soft maximum: two things at once take a little longer than the longer one."""
    if b <= 0:
        return a
    high, low = max(a, b), min(a, b)
    return high * math.pow(1 + math.pow(low / high, SOFTENING), 1 / SOFTENING)


def _update_seconds(job: Job, peak: float, bandwidth: float) -> float:
    """AdamW moves bytes; Muon multiplies too. A sharded update is split among replicas."""
    shards = job.tensor * job.pipeline
    shards *= job.replicas if job.parallel in ("zero1", "fsdp") else 1
    seconds = job.shape.params * ADAM_BYTES / bandwidth
    if job.optimizer == "muon":
        for m in job.shape.matmuls:
            low, high = min(m.k, m.n), max(m.k, m.n)
            if m.name != "lm_head" and low > 1:
                flops = NEWTON_SCHULZ * (4.0 * low * low * high + 2.0 * low**3)
                seconds += m.stored * flops / (0.6 * peak)
    return seconds / shards


# ---------------------------------------------------------------- links


def bus_bytes(job: Job, c: Mapping[str, float]) -> float:
    """What a ring over all GPUs moves a second: its slowest link, one way."""
    inside = job.gpu.link_gbs / 2 * c[f"link_share.{job.gpu.link}"]
    if job.nodes <= 1:
        return inside * 1e9
    per_gpu = {"Volta": 12.5, "Turing": 1.6, "Hopper": 50.0, "Grace-Hopper": 50.0}
    network = per_gpu.get(job.gpu.arch, 100.0 if "Blackwell" in job.gpu.arch else 25.0)
    if job.gpu.link != "nvlink":
        network = 1.6  # 100 Gbit/s shared by eight
    across = network * GPUS_PER_NODE * c["network_share"]
    return min(inside, across) * 1e9


def _sharding_seconds(job: Job, c: Mapping[str, float]) -> float:
    """FSDP, per micro-batch: gather weights forward and backward, scatter gradients."""
    n = job.replicas
    if job.parallel != "fsdp" or n == 1:
        return 0.0
    held = job.shape.params / (job.tensor * job.pipeline)
    moved = 3 * 2.0 * held * (n - 1) / n
    waits = 3 * job.shape.layers_kept * n * c["hop_seconds"]
    return moved / bus_bytes(job, c) + waits


def _reduction_seconds(job: Job, c: Mapping[str, float]) -> float:
    """DDP or a sharded optimizer, once a step: an all-reduce, or its two halves."""
    n = job.replicas
    if job.parallel == "fsdp" or n == 1:
        return 0.0
    held = job.shape.params / (job.tensor * job.pipeline)
    moved = 2 * GRADIENT_BYTES.get(job.parallel, 4.0) * held * (n - 1) / n
    waits = job.shape.layers_kept * n * c["hop_seconds"]
    return moved / bus_bytes(job, c) + waits


def _tensor_seconds(job: Job, c: Mapping[str, float]) -> float:
    """Tensor parallelism: four all-reduces of activations a layer, six with recomputation."""
    t = job.tensor
    if t == 1:
        return 0.0
    times = 6 if job.checkpointing else 4
    rows = job.micro_batch * job.shape.sequence_len
    moved = 2 * (t - 1) / t * rows * job.shape.n_embd * 2.0 * times
    moved *= job.shape.layers_kept / job.pipeline
    inside = job.gpu.link_gbs / 2 * c[f"link_share.{job.gpu.link}"] * 1e9
    return moved / inside * c["tensor_exposed"]
