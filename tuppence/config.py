"""What a person asked (`Run`), what was solved (`Plan`), and how both are read and written.

    recipe() ──▶ Run ──key=value──▶ Run ──plan.solve──▶ Plan ──▶ run.json, plan.json

`Run` is sparse: a `None` means "not asked". `Plan` is total: every number explicit. Overrides act
on `Run` alone, so nothing is ever changed after something else was derived from it. Both are frozen
dataclasses of plain values; their fields are the keys, their annotations the only schema.
"""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tuppence.errors import UserError

T = TypeVar("T")


# ---------------------------------------------------------------- asked


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
    """Text and how it becomes tokens. `val_tokens` come off the end of the corpus."""

    source: str | None = None
    tokenizer: str | None = None
    text_field: str | None = None
    max_tokens: int | None = None
    val_tokens: int | None = None


@dataclass(frozen=True)
class Train:
    """The optimisation. `*_every` count steps; unset, the plan spaces them by progress and time.

    `learning_rate` is the matrices', and everything's in GPT-2 under AdamW; `momentum` is Muon's.
    `init_from` is a folder of weights to start from (tuppence import). Of checkpoints the newest
    `keep_last` stay, and those of every `keep_every`th step. A rank that stands still for
    `stall_seconds` ends the attempt.
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


# ---------------------------------------------------------------- solved


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
    """The corpus as it is or will be prepared. `exact` is false while it is only surveyed."""

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
    fill at most `keep_bytes` of the disk (None: no limit but the disk's own).
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


@dataclass(frozen=True)
class Predicted:
    """What the run is expected to be. Phase seconds are middles; intervals are 80%."""

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


@dataclass(frozen=True)
class InitPlan:
    """The weights that a run starts from: a folder, and the sha256 of its model.safetensors."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Plan:
    """All that was solved; the trainer reads nothing else. `init` None: from drawn weights."""

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


# ---------------------------------------------------------------- key=value

FOR_NEW_WEIGHTS = (  # what a recipe says of training its own model, not one that is trained already
    *("optimizer", "learning_rate", "embedding_rate", "head_rate", "scalar_rate"),
    *("weight_decay", "beta1", "beta2", "momentum"),
)


def override(run: Run, assignments: list[str]) -> Run:
    """Apply `key=value` strings to a run, left to right.

    A `budget.*` among them replaces the recipe's budget as a whole (the person's budget is the
    budget), a `train.init_from` the recipe's model and what it says of training that one (the
    weights' model is the model). Raises
    UserError for an unknown key or a value of the wrong type.
    """
    pairs = [_split(a) for a in assignments]
    if any(key.startswith("budget.") for key, _ in pairs):
        run = dataclasses.replace(run, budget=Budget())
    if any(key == "train.init_from" and text.lower() != "none" for key, text in pairs):
        kept = dataclasses.replace(run.train, **dict.fromkeys(FOR_NEW_WEIGHTS))
        run = dataclasses.replace(run, model=Model(), train=kept)
    for key, text in pairs:
        run = _assign(run, key, text)
    return run


def keys() -> dict[str, Any]:
    """Every key of a run and its type, in order: `{"budget.usd": float | None, ...}`."""
    out: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Run).items():
        if dataclasses.is_dataclass(kind):
            nested = typing.get_type_hints(kind)
            out |= {f"{name}.{inner}": hint for inner, hint in nested.items()}
        else:
            out[name] = kind
    return out


def asked(run: Run) -> dict[str, Any]:
    """The keys of a run that are set, flat: `{"budget.usd": 0.02, ...}`."""
    flat = {}
    for key in keys():
        value: Any = run
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None:
            flat[key] = value
    return flat


def _split(assignment: str) -> tuple[str, str]:
    key, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(f"{assignment!r} is not key=value; write for example budget.usd=0.02")
    return key.strip(), text.strip()


def _assign(run: Run, key: str, text: str) -> Run:
    known = keys()
    if key == "recipe":
        raise UserError(f"recipe={text}: name the recipe without recipe=, as the first word")
    if key not in known:
        raise UserError(f"{key}={text}: no key {key!r}{nearest(key, list(known))}")
    value = parse_value(key, text, known[key])
    group, _, leaf = key.rpartition(".")
    if not group:
        return dataclasses.replace(run, **{leaf: value})
    inner = dataclasses.replace(getattr(run, group), **{leaf: value})
    return dataclasses.replace(run, **{group: inner})


def nearest(word: str, words: list[str]) -> str:
    """`; did you mean X?`, or the list of what there is when nothing is near."""
    leaves = {w.rpartition(".")[2]: w for w in words}
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    close = close or [leaves[c] for c in difflib.get_close_matches(word, leaves, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(words)}"


def parse_value(key: str, text: str, hint: Any) -> Any:
    """Read `text` as the annotated type. `none` unsets; integers may be written 4e9 or 4_000."""
    kind = next(a for a in (typing.get_args(hint) or (hint,)) if a is not types.NoneType)
    if text.lower() == "none":
        return None
    if kind is bool:
        words = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
        if text.lower() not in words:
            raise UserError(f"{key}={text}: not a yes or no; write on or off")
        return words[text.lower()]
    if kind is str:
        return text
    try:
        number = float(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"{key}={text}: not {wanted}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise UserError(f"{key}={text}: not a finite number")
    if kind is float:
        return number
    if number != int(number):
        raise UserError(f"{key}={text}: not a whole number; the nearest is {round(number)}")
    return int(text) if text.lstrip("+-").isdigit() else int(number)


# ---------------------------------------------------------------- JSON


def to_json(value: Any) -> str:
    """A dataclass as JSON text: keys in the order of its fields, floats in full."""
    return json.dumps(dataclasses.asdict(value), indent=2, allow_nan=False) + "\n"


def from_json(kind: type[T], text: str) -> T:
    """The inverse of `to_json`: strict, every key known, present and of its type.

    Raises UserError naming the key.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error}") from None
    return typing.cast(T, _decode(kind, data, kind.__name__))


def _decode(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if data is None and types.NoneType in args:
            return None
        return _decode(next(a for a in args if a is not types.NoneType), data, where)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {k: _decode(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(hint, type) or type(data) is not hint:
        raise UserError(
            f"{where}: {json.dumps(data)[:60]} is not {getattr(hint, '__name__', hint)}"
        )
    return data


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if not isinstance(data, dict):
        raise UserError(f"{where}: {json.dumps(data)[:60]} is not an object")
    for key in data:
        if key not in hints:
            raise UserError(f"{where}: no key {key!r}{nearest(key, list(hints))}")
    for key in hints:
        if key not in data:
            raise UserError(f"{where}: the key {key!r} is missing")
    return kind(**{k: _decode(h, data[k], f"{where}.{k}") for k, h in hints.items()})
