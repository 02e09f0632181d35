"""What a run starts from where it is not from nothing: weights that `train.init_from` names.

    imports/NAME/  import.json model.safetensors tokenizer/      what `tuppence import` made
    runs/NAME/     checkpoints/best.json                         another run: its best checkpoint

Read without torch: the `model.*` keys of the weights, so that the plan has their shape, and their
sha256, so that it names them.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuppence import config
from tuppence.config import InitPlan, Model, ModelPlan, Run, Warning
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder
from tuppence.plan.shapes import ASPECT, windows

VERSION = 1
WEIGHTS = "model.safetensors"
# how to train: no weight depends on them
FREE = ("dropout", "backprop_depth", "exportable", "mean_recurrence")


@dataclass(frozen=True)
class Origin:
    """import.json. `model` are the keys of the weights, `sha256` is of model.safetensors."""

    version: int
    source: str
    architecture: str
    model: Model
    sha256: str

    def document(self) -> dict[str, Any]:
        """As JSON, only the model keys that are set."""
        keys = {k: v for k, v in dataclasses.asdict(self.model).items() if v is not None}
        return dataclasses.asdict(self) | {"model": keys}


def read(where: str) -> Origin:
    """The weights in a folder. Raises UserError where there are none, Fault where damaged."""
    folder = Path(where)
    if not where:
        raise UserError("train.init_from is empty; name a folder of weights, or leave it out")
    if (folder / "import.json").exists():
        return _of_import(folder / "import.json")
    if (folder / "run.json").exists():
        return _of_run(RunFolder(folder))
    there = folder.exists()
    remedy = f"tuppence import {where} makes one of it" if there else "tuppence import makes one"
    raise UserError(
        f"train.init_from={where}: {'neither an import nor a run' if there else 'no such folder'}; "
        f"{remedy} (docs/weights.md)"
    )


def weights_of(where: str) -> Path:
    """The file of an import's weights, or the checkpoint of a run's best ones."""
    if (Path(where) / "import.json").exists():
        return Path(where) / WEIGHTS
    return RunFolder(Path(where)).checkpoints / _best(RunFolder(Path(where)))["path"]


def is_here(where: str) -> bool:
    """Whether this machine has the weights that `train.init_from` names."""
    try:
        return weights_of(where).exists()
    except UserError:
        return False


def started(run: Run, begun: Run | None = None) -> Run:
    """The run with the keys of the weights it starts from.

    Where it was `begun` from the same, that has them: it goes on without the weights.
    """
    where = run.train.init_from
    if where is None:
        return run
    known = begun is not None and begun.train.init_from == where
    given = begun.model if begun is not None and known else read(where).model
    return dataclasses.replace(run, model=merged(run.model, given, where))


def pinned(where: str) -> InitPlan:
    """The weights as a plan names them."""
    return InitPlan(where, read(where).sha256)


def _of_import(path: Path) -> Origin:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        unset = dict.fromkeys(typing.get_type_hints(Model))
        return config.from_json(Origin, json.dumps(found | {"model": unset | found["model"]}))
    except (ValueError, TypeError, KeyError) as error:
        raise Fault(f"{path} is damaged: {error}; import the weights again") from None


def _of_run(folder: RunFolder) -> Origin:
    plan = folder.plan()
    return Origin(
        VERSION, str(folder.path), plan.model.family, keys_of(plan.model), _best(folder)["sha256"]
    )


def _best(folder: RunFolder) -> dict[str, str]:
    found: dict[str, str] | None = folder.read_json("checkpoints/best.json")
    if found is None:
        raise UserError(f"train.init_from={folder.path}: this run has no best checkpoint yet")
    return found


# ---------------------------------------------------------------- keys


def keys_of(plan: ModelPlan) -> Model:
    """The `model.*` keys that ask for just this model."""
    shared: dict[str, Any] = {"family": plan.family, "n_head": plan.n_head, "n_embd": plan.n_embd}
    shared |= {"vocab_size": plan.vocab_size, "sequence_len": plan.sequence_len}
    own: dict[str, Any]
    if plan.loop is not None:
        own = dataclasses.asdict(plan.loop)
    elif plan.family == "gpt2":
        own = {k: getattr(plan, k) for k in ("n_layer", "bias", "tied_head", "dropout")}
    else:
        kept = ("n_layer", "n_kv_head", "value_embeddings", "residual_scalars")
        own = {k: getattr(plan, k) for k in kept} | {"window_pattern": _pattern(plan)}
    return Model(**shared, **own)


def _pattern(plan: ModelPlan) -> str | None:
    """The letters of each layer's window; None where all see the whole sequence."""
    letters = "".join("L" if w >= plan.sequence_len else "S" for w in plan.windows)
    return letters if "S" in letters else None


def merged(asked: Model, given: Model, where: str) -> Model:
    """What is asked, and from the weights in `where` what is not.

    What is asked must be what the weights have, but for a larger vocabulary, fewer positions (or,
    where they are rotary, any number), and a head of its own in place of a tied one. Raises
    UserError naming both values.
    """
    wanted = {k: v for k, v in dataclasses.asdict(asked).items() if v is not None}
    for key, value in wanted.items():
        if not _agrees(key, asked, given):
            raise UserError(
                f"model.{key}={value}: the weights in {where} have {_theirs(key, given)}; "
                f"leave it out"
            )
    return dataclasses.replace(given, **wanted)


def _agrees(key: str, asked: Model, given: Model) -> bool:
    """Whether weights with the keys `given` can start what is asked of a key."""
    ours, theirs = getattr(asked, key), getattr(given, key)
    if key in FREE:
        return True
    if key == "depth":
        width = asked.n_embd or ASPECT * ours
        return (ours, width) == (given.n_layer, given.n_embd)
    if key == "vocab_size":
        return bool(ours >= theirs)
    if key == "sequence_len":
        return given.family != "gpt2" or bool(ours <= theirs)
    if key == "tied_head":
        return not ours or bool(theirs)
    if key == "window_pattern":
        return given.n_layer is None or _spans(ours, given) == _spans(theirs or "L", given)
    return theirs is None or ours == theirs  # None: not a part of theirs, refused as such later


def _spans(pattern: str, given: Model) -> tuple[int, ...] | None:
    return windows(pattern, given.n_layer or 0, given.sequence_len or 0)


def _theirs(key: str, given: Model) -> str:
    """What the weights have, for a person; how far from it one may ask."""
    value = getattr(given, key)
    if key == "depth":
        return f"model.n_layer={given.n_layer} and model.n_embd={given.n_embd}"
    if key == "vocab_size":
        return f"{value}, and it cannot be smaller"
    if key == "sequence_len":
        return f"{value} learned positions, and it cannot be larger"
    return "no windows" if value is None else str(value)


# ---------------------------------------------------------------- tokenizers


def other_tokenizer(where: str, tokenizer: Path) -> Warning | None:
    """A warning where the weights' own tokenizer is not the one in the folder `tokenizer`."""
    theirs = Path(where) / "tokenizer" / "tokenizer.json"
    if not theirs.exists() or _tokens(theirs) == _tokens(tokenizer / "tokenizer.json"):
        return None
    return Warning(
        "other_tokenizer",
        f"the weights in {where} were trained on other tokens than this run's: what they know of "
        f"each is lost; data.tokenizer={theirs.parent} takes theirs",
    )


def _tokens(path: Path) -> Any:
    """Each token's id. Files that differ in spelling only say the same of the weights."""
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in rules["added_tokens"]}
        vocab = rules["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Fault(f"{path} is damaged: {error!r}") from None
    return vocab | added if isinstance(vocab, dict) else (vocab, added)
