"""What was solved: total, frozen, every number explicit."""

from dataclasses import dataclass, replace

from tuppence.config.run import Budget


@dataclass(frozen=True)
class Interval:
    """An estimate: the middle, and the 80% interval around it."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Warning:
    """What the person should know before paying; `code` is stable, `message` is for reading."""

    code: str
    message: str


@dataclass(frozen=True)
class LoopPlan:
    """The looped family's own numbers. `backprop_depth` None: through every iteration."""

    n_prelude: int
    n_recurrent: int
    n_coda: int
    mean_recurrence: float
    max_recurrence: int
    backprop_depth: int | None
    lora_rank: int
    mixture_of_depths: bool


@dataclass(frozen=True)
class ModelPlan:
    """A fully specified model. `flops_per_token` counts forward and backward (see plan/cost.py).

    `n_layer` blocks are stored; `windows` is how many positions each layer's query looks at.
    """

    family: str
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    vocab_size: int
    sequence_len: int
    bias: bool
    tied_head: bool
    dropout: float
    windows: tuple[int, ...]
    value_embeddings: bool
    residual_scalars: bool
    loop: LoopPlan | None
    params: int
    params_matmul: int
    flops_per_token: int


@dataclass(frozen=True)
class DataPlan:
    """The corpus as it is or will be prepared. `exact` is false while it is only surveyed;
    `packing` is plain, or documents where attention stays within each."""

    source: str
    tokenizer: str
    text_field: str
    max_tokens: int | None
    val_tokens_asked: int | None
    vocab_size: int
    train_tokens: int
    val_tokens: int
    bytes_per_token: float
    inputs_sha256: str | None
    exact: bool
    packing: str


@dataclass(frozen=True)
class MachinePlan:
    """The machine of the run, and what of it will be used and why. `peak_tflops` and
    `usd_per_hour` are of all ranks and nodes together; `threads` of one rank."""

    device: str
    name: str
    threads: int
    precision: str
    precision_why: str
    attention: str
    compile: bool
    peak_tflops: float
    peak_source: str
    usd_per_hour: float
    price_source: str
    deterministic: bool
    nodes: int
    parallel: str
    activation_checkpointing: bool


@dataclass(frozen=True)
class GroupPlan:
    """How one kind of parameters moves. `optimizer` is adamw or muon (whose momentum is beta1);
    `learning_rate` is the peak, multiplied by the schedule."""

    optimizer: str
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float


@dataclass(frozen=True)
class OptimizerPlan:
    """Who moves what: a group for each kind of parameter that the model names."""

    name: str
    groups: dict[str, GroupPlan]
    eps: float
    grad_clip: float

    @property
    def learning_rate(self) -> float:
        """The matrices' peak: the one that is told and logged."""
        return self.groups["matrix"].learning_rate

    @property
    def weight_decay(self) -> float:
        """The matrices'."""
        return self.groups["matrix"].weight_decay


@dataclass(frozen=True)
class SchedulePlan:
    """Learning rate over progress: `shape` is cosine or wsd; fractions of the whole run."""

    shape: str
    warmup: float
    decay: float
    floor: float


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `accumulation` micro-batches of `micro_batch` sequences, on `ranks`
    processes with so many `workers` each."""

    batch_tokens: int
    batch_sequences: int
    micro_batch: int
    accumulation: int
    workers: int
    ranks: int
    max_steps: int | None
    seed: int


@dataclass(frozen=True)
class CadencePlan:
    """When to evaluate and save. Of each pair one is set: steps, or progress / seconds.

    `finish_seconds` is the allowance for the receipt and the exit, charged in advance. Checkpoints
    fill at most `keep_bytes` of the disk (None: no limit but the disk's own). Of each fixed prompt
    `fixed_tokens` new tokens are sampled, at the end alone.

    Once data repeats, an evaluation is also due when tokens have grown by `eval_growth` since the
    last one (None: never), so that `early_stop` sees validation turn in time.
    """

    eval_every_steps: int | None
    eval_every_progress: float | None
    eval_tokens: int
    eval_batch: int
    save_every_steps: int | None
    save_every_seconds: float | None
    keep_last: int
    keep_every_steps: int | None
    keep_bytes: int | None
    stall_seconds: float
    finish_seconds: float
    sample_prompt: str | None
    sample_tokens: int
    fixed_tokens: int = 0
    eval_growth: float | None = None
    early_stop: bool = False
    target_loss: float | None = None


@dataclass(frozen=True)
class SuitePlan:
    """A suite of tasks that the run is judged by, at its end and every `every_steps` before it
    (None: at the end alone).

    `items` of each task (None: all); `data` is where they lie (None: the user's cache, else they
    are downloaded). One evaluation reads `tokens` and takes `seconds`.
    """

    name: str
    items: int | None
    every_steps: int | None
    data: str | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TasksPlan:
    """The suites, in the order in which they are asked."""

    suites: tuple[SuitePlan, ...]

    @property
    def seconds(self) -> float:
        """Of all suites, once."""
        return sum(suite.seconds for suite in self.suites)

    def times_as_fast(self, times: float) -> "TasksPlan":
        """The same on so many times as many cores or GPUs."""
        return TasksPlan(tuple(replace(s, seconds=s.seconds / times) for s in self.suites))


@dataclass(frozen=True)
class Predicted:
    """What the run is expected to be. Phase seconds are middles; intervals are 80%.

    `eval_seconds` are of the loss and a sample, `fixed_seconds` of the fixed prompts.
    """

    step_seconds: Interval
    tokens_per_second: Interval
    mfu: Interval
    steps: Interval
    tokens: Interval
    hours: Interval
    usd: Interval
    phase_seconds: dict[str, float]
    eval_seconds: float
    save_seconds: float
    peak_memory_gib: Interval
    checkpoint_bytes: int
    disk_bytes: int
    epochs: float
    val_loss: Interval | None
    val_loss_source: str
    basis: str
    fixed_seconds: float = 0.0


@dataclass(frozen=True)
class InitPlan:
    """The weights that a run starts from: a folder, and the sha256 of its model.safetensors."""

    path: str
    sha256: str


@dataclass(frozen=True)
class TrackPlan:
    """Who else is told the figures. `tensorboard` None: where it is installed; `wandb` None: not,
    else offline or online."""

    tensorboard: bool | None = None
    wandb: str | None = None
    wandb_project: str = "tuppence"


@dataclass(frozen=True)
class Plan:
    """All that was solved; the trainer reads nothing else. `init` None: from drawn weights;
    `tasks` None: judged by the loss alone."""

    version: int
    name: str
    budget: Budget
    model: ModelPlan
    data: DataPlan
    machine: MachinePlan
    optimizer: OptimizerPlan
    schedule: SchedulePlan
    step: StepPlan
    cadence: CadencePlan
    predicted: Predicted
    warnings: tuple[Warning, ...]
    init: InitPlan | None = None
    tasks: TasksPlan | None = None
    track: TrackPlan = TrackPlan()
