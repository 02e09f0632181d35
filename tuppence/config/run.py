"""What a person asked: sparse, frozen; `None` means \"not asked\". The fields are the keys."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """What may be spent. Any mix; the first limit reached ends the run."""

    usd: float | None = None
    hours: float | None = None
    tokens: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Machine:
    """Where to run. `usd_per_hour` is what one such machine costs while it is held.

    `disk_gb` is the room for shards and checkpoints; `mfu` plans with a fixed share of the data
    sheet's peak in place of the roofline.
    """

    gpu: str | None = None
    gpu_count: int | None = None
    nodes: int | None = None
    cloud: str | None = None
    instance_type: str | None = None
    spot: bool | None = None
    usd_per_hour: float | None = None
    threads: int | None = None
    disk_gb: float | None = None
    mfu: float | None = None


@dataclass(frozen=True)
class Model:
    """The architecture. Widths in channels, `sequence_len` in tokens.

    `depth` is the one dial: width 64 x depth, heads of 128. `exportable` leaves out what no
    architecture of transformers has. `n_prelude` and the keys after it are the looped family's
    (docs/models.md).
    """

    family: str | None = None
    depth: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_kv_head: int | None = None
    n_embd: int | None = None
    vocab_size: int | None = None
    sequence_len: int | None = None
    bias: bool | None = None
    tied_head: bool | None = None
    dropout: float | None = None
    window_pattern: str | None = None
    value_embeddings: bool | None = None
    residual_scalars: bool | None = None
    exportable: bool | None = None
    n_prelude: int | None = None
    n_recurrent: int | None = None
    n_coda: int | None = None
    mean_recurrence: float | None = None
    max_recurrence: int | None = None
    backprop_depth: int | None = None
    lora_rank: int | None = None
    mixture_of_depths: bool | None = None


@dataclass(frozen=True)
class Data:
    """Text and how it becomes tokens (docs/data.md).

    Documents are put in an order drawn from `seed`, unless `shuffle` is off. `dedup` leaves out
    documents that came before; `on_bad` says what becomes of a broken one; `packing` whether
    attention crosses from one document into the next. `workers` and `cache_gb` bound the processes
    of a preparation and the disk that training from a bucket may use.
    """

    source: str | None = None
    tokenizer: str | None = None
    text_field: str | None = None
    max_tokens: int | None = None
    val_tokens: int | None = None
    shuffle: bool | None = None
    seed: int | None = None
    dedup: str | None = None
    on_bad: str | None = None
    packing: str | None = None
    workers: int | None = None
    cache_gb: float | None = None


@dataclass(frozen=True)
class Train:
    """The optimisation. `*_every` count steps; unset, the plan spaces them by progress and time.

    `learning_rate` is the matrices', and everything's in GPT-2 under AdamW; `momentum` is Muon's.
    `init_from` is a folder of weights to start from (tuppence import). Of checkpoints the newest
    `keep_last` stay, and those of every `keep_every`th step. A rank that stands still for
    `stall_seconds` ends the attempt.

    `core_items` is how many items of each of CORE's tasks judge the run, at its end and every
    `core_every` steps; either of the two turns it on. `core_data` is where the tasks lie (else they
    are downloaded). HellaSwag's keys mean the same of its one task.

    `early_stop` (on) ends a run whose validation loss has turned, `target_loss` one that reached
    it (nats per token). `tensorboard` writes RUN/tensorboard (on where it is installed), `wandb` is
    offline or online.
    """

    init_from: str | None = None

    batch_tokens: int | None = None
    micro_batch: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    embedding_rate: float | None = None
    head_rate: float | None = None
    scalar_rate: float | None = None
    momentum: float | None = None
    lr_floor: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    decay: float | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    grad_clip: float | None = None
    precision: str | None = None
    attention: str | None = None
    parallel: str | None = None
    activation_checkpointing: bool | None = None
    compile: bool | None = None
    seed: int | None = None
    eval_every: int | None = None
    eval_tokens: int | None = None
    save_every: int | None = None
    keep_last: int | None = None
    keep_every: int | None = None
    stall_seconds: float | None = None
    sample_prompt: str | None = None
    sample_tokens: int | None = None
    core_every: int | None = None
    core_items: int | None = None
    core_data: str | None = None
    hellaswag_every: int | None = None
    hellaswag_items: int | None = None
    hellaswag_data: str | None = None
    early_stop: bool | None = None
    target_loss: float | None = None
    tensorboard: bool | None = None
    wandb: str | None = None
    wandb_project: str | None = None


@dataclass(frozen=True)
class Run:
    """All that was asked: a recipe's choices with the person's `key=value` on top."""

    name: str | None = None
    recipe: str | None = None
    budget: Budget = field(default_factory=Budget)
    machine: Machine = field(default_factory=Machine)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
