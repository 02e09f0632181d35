"""One way to run one model on some GPUs: what speed and memory are functions of.

tokens per step = micro_batch x sequence_len x accumulation x data_parallel
"""

from dataclasses import dataclass

from tuppence.plan.cost import Shape


@dataclass(frozen=True)
class Gpu:
    """One card. Ceilings in TFLOPS by precision: `sheet` promised, `measured` by large matmuls.

    `link` is what joins cards inside a node (nvlink, pcie, none) and `link_gbs` its bandwidth both
    ways together, GB/s. `memory_gib` is what a process can have. `watts` is the power limit,
    `vector_tflops` fp32 outside the matrix units; 0 where not known.
    """

    name: str
    arch: str
    memory_gib: float
    bandwidth_gbs: float
    sheet_tflops: dict[str, float]
    measured_tflops: dict[str, float]
    link: str
    link_gbs: float
    watts: float = 0.0
    vector_tflops: float = 0.0


@dataclass(frozen=True)
class Job:
    """How a shape is run. `micro_batch` counts sequences on one model replica at a time.

    `parallel` is none, ddp (all replicated), zero1 (optimizer sharded) or fsdp (all sharded);
    `tensor` and `pipeline` above one occur in published runs only. `framework` names the software
    whose measured efficiency applies; `optimizer` is adamw or muon. `recompute` says what a block
    computes again where it is not checkpointed whole: nothing, its `activation`, that and its
    `norm`s (llm.c), or `selective`: all but attention and every other matmul (torchtitan).
    """

    shape: Shape
    gpu: Gpu
    gpu_count: int
    nodes: int
    precision: str
    parallel: str
    checkpointing: bool
    micro_batch: int
    accumulation: int
    optimizer: str = "adamw"
    framework: str = "tuppence"
    tensor: int = 1
    pipeline: int = 1
    recompute: str = "none"

    @property
    def replicas(self) -> int:
        """Copies of the model that see different sequences."""
        return max(1, self.gpu_count // (self.tensor * self.pipeline))

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batch * self.shape.sequence_len * self.accumulation * self.replicas
