"""What the throughput model's constants are fitted to: expectations, published rows, and the log of
one guide, on a card that no row of published/throughput.csv has.

A prior is a value and the standard deviation of its logarithm: hardware manuals, kernels' source
and common experience say about what to expect, and how surely. facts/throughput_fit.json shows the
fitted value beside it; where a prior stands untouched, no published row speaks of it.
"""

import csv
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from published_rows import Row, actual_tokens_per_second, read_job

from tuppence.plan.job import Job
from tuppence.plan.throughput import framework_key

# name: (prior, sd of its logarithm, meaning)
PRIORS: dict[str, tuple[float, float, str]] = {
    "matmul_share": (0.92, 0.03, "of the matmul ceiling, that a training step's matmuls reach"),
    "matmul_half": (40, 0.5, "size in a dimension at which a matmul loses half its speed to edges"),
    "tflops_per_watt.Hopper": (1.0, 0.1, "that the power limit sustains, bf16"),
    "tflops_per_watt.Ampere": (0.75, 0.1, "the same, A100"),
    "tflops_per_watt.Ampere GA10x": (0.5, 0.2, "the same, A10 and RTX 30"),
    "tflops_per_watt.Ada": (0.9, 0.2, "the same"),
    "tflops_per_watt.Blackwell": (1.8, 0.2, "the same"),
    "tflops_per_watt.Turing": (0.6, 0.2, "the same, fp16"),
    "bandwidth_share": (0.85, 0.05, "of the sheet's memory bandwidth"),
    "channel_words": (30, 0.3, "read and written a token, layer and channel, fused, both passes"),
    "hidden_words": (8, 0.3, "the same a hidden unit of the MLP"),
    "unfused": (2.0, 0.15, "times as much traffic where elementwise work is a kernel each"),
    "logit_bytes": (14, 0.3, "moved a logit by the loss, both passes"),
    "attention_share": (0.75, 0.2, "of matmul speed in flash attention, heads under 96"),
    "attention_share.Ampere": (0.75, 0.2, "the same"),
    "attention_share.Hopper": (0.5, 0.25, "the same: most kernels do not use Hopper's own units"),
    "attention_wide": (0.9, 0.2, "times as fast with heads of 96 and more"),
    "softmax_ops": (15, 0.4, "fp32 operations a score outside the matrix units"),
    "score_bytes": (20, 0.3, "moved a score by attention without flash, both passes"),
    "recompute_share": (0.92, 0.06, "of a forward pass, that checkpointing runs again"),
    "fp8_gain": (1.5, 0.15, "times bf16's speed in an fp8 matmul"),
    "fp8_bytes": (2, 0.3, "moved an element to cast it to fp8"),
    "launch_seconds": (5e-6, 0.5, "a kernel's launch on the host"),
    "step_overhead": (4e-3, 0.4, "seconds a step of host work, compiled or hand-written code"),
    "step_overhead_unfused": (25e-3, 0.3, "the same, eager code"),
    "link_unhidden": (0.25, 0.5, "of communication, that backward cannot hide"),
    "link_share.nvlink": (0.75, 0.1, "of a link's one-way bandwidth that collectives reach"),
    "link_share.pcie": (0.35, 0.2, "the same over PCIe (no published row: the prior stands)"),
    "link_share.none": (0.2, 0.2, "the same through the host (the prior stands)"),
    "network_share": (0.5, 0.3, "the same between nodes"),
    "hop_seconds": (2e-6, 0.5, "a rank's share of a collective's latency"),
    "tensor_exposed": (0.9, 0.2, "of tensor-parallel communication"),
    "bubble": (0.6, 0.3, "of a plain pipeline's bubble (schedules interleave)"),
}

# The log of the "GPT-2 in 4B tokens" guide: 13.70% of an A100's 312 TFLOPS, on an A10G.
GUIDE = {
    "id": "guide-001",
    "framework": "nanoGPT",
    "gpu_type": "A10G-24GB",
    "family": "GPT-2",
    "layers": "12",
    "dim": "768",
    "heads": "12",
    "vocab": "50304",
    "seq_len": "1024",
    "gpu_count": "1",
    "precision": "bf16",
    "parallelism": "single",
    "micro_batch_seqs": "12",
    "grad_accum": "40",
}
GUIDE_WEIGHT = 2.0
GUIDE_TOKENS_PER_SECOND = 0.1370159 * 312e12 / 855_382_272


@dataclass(frozen=True)
class Sample:
    """One run. `published` rows are scored; the guide's is evidence only."""

    name: str
    job: Job
    actual: float
    weight: float
    published: bool

    @property
    def shape(self) -> tuple[str, float, int]:
        """One model at any sequence length and on any machine: nothing of it may leak."""
        return (self.job.shape.family, self.job.shape.layers_run, self.job.shape.n_embd)

    @property
    def framework(self) -> str:
        return framework_key(self.job.framework)


def load(path: Path) -> list[Sample]:
    """All usable rows of a file, and the guide's run."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("kind", "result") == "result"]
    found = [sample for row in rows if (sample := _sample(row, published=True))]
    copies = Counter((s.framework, s.job.gpu.name, s.job.precision, *s.shape) for s in found)
    sizes = Counter(s.framework for s in found)
    weighted = []
    for s in found:
        same = copies[(s.framework, s.job.gpu.name, s.job.precision, *s.shape)]
        weighted.append(replace(s, weight=s.weight * 3 / math.sqrt(sizes[s.framework] * same)))
    guide = _sample({**GUIDE, "tok_s_per_gpu": str(GUIDE_TOKENS_PER_SECOND)}, published=False)
    assert guide
    return [*weighted, replace(guide, weight=GUIDE_WEIGHT)]


def _sample(row: Row, *, published: bool) -> Sample | None:
    job = read_job(row)
    if isinstance(job, str):
        return None
    actual = actual_tokens_per_second(row, job)
    if not actual:
        return None
    # Wall clocks that include evaluations say little of a step.
    weight = 0.3 if "evals" in row.get("notes", "") else 1.0
    return Sample(row.get("id", ""), job, actual, weight, published)
