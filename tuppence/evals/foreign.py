"""A model of transformers as the one who is asked: to hold our numbers against published ones.

    folder, Hub id ──AutoModelForCausalLM──▶ Subject: the same questions, passes and scores
    or .gguf file    AutoTokenizer                   as for a run of ours

No code of a model's own is executed. What transformers is trusted with is tried once, on random
ids: that a text's beginning does not see its end, and whether several continuations may share it.
"""

import hashlib
import inspect
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuppence.errors import UserError
from tuppence.evals.subject import PLACES, Subject
from tuppence.files import file_sha256
from tuppence.hub import files
from tuppence.hub.load import HUB_ID
from tuppence.model.branches import Branches
from tuppence.workers import Workers

FETCHED = [*files.FETCHED, "*token*.json", "generation_config.json", "vocab.*", "merges.txt"]
CONTEXTS = ("n_positions", "max_position_embeddings", "n_ctx")  # by which name a config tells it
UNTOLD_CONTEXT = 2048  # where neither the config nor the tokenizer does: lm-evaluation-harness's
WINDOWS = re.compile(r"(window|window_size|chunk_size)$")  # what keeps attention near
NEAR = 1e-3  # of how much logits differ: above another order of sums, below another mask
STEM, BRANCH = 9, 5  # ids of what is tried once
PLAIN = f"{string.printable} The cat sat on a mat."  # of which a tokenizer must know something
MISSING = "{} needs {}: pip install 'tuppence[hf]'"

Logits = Callable[[nn.Module, Tensor, Tensor, Branches | None], Tensor]


@dataclass(frozen=True)
class HubText:
    """A tokenizer of transformers. `adds_start` where it begins every text with `start` itself."""

    tokenizer: Any
    ends: frozenset[int]
    adds_start: bool

    @property
    def start(self) -> int | None:
        """Its beginning-of-text; its end-of-text, where it has none."""
        found: int | None = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if found is None else found

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; its special tokens are known by their names, as the field does."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def of_transformers(
    source: str, *, precision: str, device: str, cores: int, say: Callable[[str], None]
) -> Subject:
    """A folder, a model of the Hub or a .gguf file. Weights stay fp32; `precision` is matmuls'.

    Raises UserError in one line for what cannot be read, what would need code of its own, and what
    is no causal language model.
    """
    found = _found(source)
    model, tokenizer = _loaded(found)
    context = _context(model, tokenizer)
    _check_tokenizer(found, tokenizer, rows=_text_config(model).vocab_size)
    model.to(device).eval()
    count = cores if torch.device(device).type == "cpu" else 1
    read, branching = _tried(found, model, context=context, say=say)
    return Subject(
        workers=Workers(model, count=count, device=device, precision=precision),
        text=HubText(tokenizer, _ends(model, tokenizer), _adds_start(tokenizer)),
        context=context,
        vocab_size=_text_config(model).vocab_size,
        branching=branching,
        logits=read,
        identity={
            "name": found.name,
            "architecture": type(model).__name__,
            "weights_sha256": _weights_sha256(found),
            "tokenizer_sha256": _tokenizer_sha256(found, tokenizer),
            "precision": precision,
            "context": context,
        },
        places=PLACES[torch.device(device).type],
    )


# ---------------------------------------------------------------- where it is


@dataclass(frozen=True)
class _Found:
    """A folder of transformers, or the one file `gguf` in it; `source` is as the person gave it."""

    source: str
    name: str
    folder: Path
    gguf: str | None


def _found(source: str) -> _Found:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{source}: not a .gguf file; name the folder that has its config.json")
        return _Found(source, path.name, path.parent, path.name)
    if path.is_dir():
        _check_folder(path, source)
        return _Found(source, path.resolve().name, path, None)
    if not re.fullmatch(HUB_ID, source):
        raise UserError(f"{source}: no such folder or file, nor the name of a model on the Hub")
    folder = files.download(source, check=lambda told: _check_code(told, source), fetched=FETCHED)
    return _Found(source, f"{source}@{folder.name}", folder, None)


def _check_folder(folder: Path, source: str) -> None:
    if (folder / "run.json").exists():
        raise UserError(f"{source} is a run, not a model of transformers: tuppence eval {source}")
    if (folder / "import.json").exists():
        raise UserError(f"{source} is an import; evaluate the folder that it was made of")
    if not (folder / "config.json").exists():
        raise UserError(f"{source}: no config.json of transformers there")
    _check_code(files.read_json(folder / "config.json"), source)
    files.weight_files(folder)


def _check_code(told: dict[str, Any], source: str) -> None:
    """Raises UserError for a model that transformers does not know by itself."""
    known = _transformers(source).models.auto.configuration_auto.CONFIG_MAPPING
    kind = told.get("model_type")
    if kind in known:
        return
    if kind == "tuppence_looped":
        raise UserError(
            f"{source}: a looped model's export needs its own modelling file, which is not "
            f"executed here; evaluate its run: tuppence eval RUN"
        )
    code = " and brings code for it, which is not executed" if "auto_map" in told else ""
    raise UserError(f"{source}: transformers has no model_type {kind!r} of its own{code}")


def _transformers(source: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(MISSING.format(source, "transformers")) from None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


# ---------------------------------------------------------------- loaded


def _loaded(found: _Found) -> tuple[Any, Any]:
    """The model, every weight of it found, and its tokenizer."""
    library = _transformers(found.source)
    words = {} if found.gguf is None else {"gguf_file": found.gguf}
    try:
        model, told = library.AutoModelForCausalLM.from_pretrained(
            found.folder,
            dtype=torch.float32,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
            **words,
        )
        tokenizer = library.AutoTokenizer.from_pretrained(
            found.folder, trust_remote_code=False, **words
        )
    except ImportError as error:
        raise UserError(f"{found.source}: {_first_line(error)}") from None
    except Exception as error:  # as many kinds as there are models
        raise UserError(
            f"{found.source}: transformers {library.__version__} does not load it "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from None
    missing = sorted(told["missing_keys"])
    if missing:
        raise UserError(f"{found.source}: the weights lack {missing[0]} (of {len(missing)})")
    return model, tokenizer


def _check_tokenizer(found: _Found, tokenizer: Any, *, rows: int) -> None:
    """Raises UserError for one that is empty, as transformers makes it where the files are missing,
    and for one whose ids the model does not know; what was added for padding may be beyond."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if not set(tokenizer(PLAIN, add_special_tokens=False)["input_ids"]) - special:
        raise UserError(
            f"{found.source}: its tokenizer makes nothing of plain text; are its files there "
            f"(tokenizer.json, or vocab.json and merges.txt)?"
        )
    starts = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    highest = max(set(tokenizer.get_vocab().values()) - special | starts)
    if highest >= rows:
        raise UserError(
            f"{found.source}: its tokenizer has ids up to {highest:,} and its model knows those "
            f"below {rows:,}; they are not of one model"
        )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _context(model: Any, tokenizer: Any) -> int:
    """The most ids that the model reads, as lm-evaluation-harness finds it."""
    told = (getattr(_text_config(model), name, None) for name in CONTEXTS)
    found = next((int(value) for value in told if value is not None), None)
    if found is None and tokenizer.model_max_length < 1e9:
        found = int(tokenizer.model_max_length)
    return UNTOLD_CONTEXT if found is None else found


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends a text that the model writes."""
    told = getattr(model.generation_config, "eos_token_id", None)
    several = told if isinstance(told, list) else [told]
    return frozenset(int(i) for i in [*several, tokenizer.eos_token_id] if i is not None)


def _adds_start(tokenizer: Any) -> bool:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    begun = tokenizer("a")["input_ids"]
    return bool(begun != plain and begun[0] == tokenizer.bos_token_id)


# ---------------------------------------------------------------- what it is


def _weights_sha256(found: _Found) -> str:
    """Of the one file, or of the hashes of several."""
    paths = [found.folder / found.gguf] if found.gguf else files.weight_files(found.folder)
    each = [file_sha256(path) for path in paths]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def _tokenizer_sha256(found: _Found, tokenizer: Any) -> str:
    """Of tokenizer.json, so that an export has that of its run; else of what was made of others."""
    path = found.folder / "tokenizer.json"
    if found.gguf is None and path.exists():
        return file_sha256(path)
    rules = getattr(tokenizer, "backend_tokenizer", None)
    text = rules.to_str() if rules is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- read


def _at_the_head(
    model: nn.Module, idx_BT: Tensor, read_N: Tensor, branches: Branches | None
) -> Tensor:
    """Logits at the places that are asked for: only these reach the head, for vocabularies are
    wide."""
    whole: Any = model

    def cut(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTC = inputs[0]
        return (hidden_BTC.flatten(0, 1)[None, read_N], *inputs[1:])

    hook = whole.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        logits: Tensor = whole(idx_BT, **_words(branches)).logits
    finally:
        hook.remove()
    return logits.flatten(0, 1).float()


def _of_all(model: nn.Module, idx_BT: Tensor, read_N: Tensor, branches: Branches | None) -> Tensor:
    """The same, where a model has no head of its own: logits everywhere, of which most go."""
    logits: Tensor = model(idx_BT, **_words(branches)).logits
    return logits.flatten(0, 1)[read_N].float()


def _words(branches: Branches | None) -> dict[str, Any]:
    if branches is None:
        return {"use_cache": False}
    mask = branches.mask(torch.float32)[:, None]
    return {"use_cache": False, "position_ids": branches.position_BT, "attention_mask": mask}


# ---------------------------------------------------------------- tried


@torch.no_grad()
def _tried(
    found: _Found, model: Any, *, context: int, say: Callable[[str], None]
) -> tuple[Logits, bool]:
    """How logits are read, and whether continuations may share a stem: both held to plain passes
    over random ids. Raises UserError for a model that is no causal one."""
    stem, size = max(1, min(STEM, context // 2)), _text_config(model).vocab_size
    branch = max(1, min(BRANCH, context - stem))
    ids = torch.randint(size, (stem + 2 * branch,), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    texts = [ids[: stem + branch], torch.cat([ids[:stem], ids[stem + branch :]])]
    apart = [_of_all(model, text[None], _every(text), None) for text in texts]
    if _far(apart[0][:stem], apart[1][:stem]):
        raise UserError(
            f"{found.source}: {type(model).__name__} lets the beginning of a text see its end; "
            f"only a causal language model can be asked what comes next"
        )
    read: Logits = _at_the_head if _has_head(model, texts[0], apart[0]) else _of_all
    reason = _near_only(model, context)
    if reason is None:
        expected = torch.cat([apart[0], apart[1][stem:]])
        reason = _unshared(model, read, ids, expected, stem=stem, branch=branch)
    if reason is not None:
        say(f"{found.name}: {reason}: every continuation is read with the whole text before it")
    return read, reason is None


def _has_head(model: Any, text: Tensor, expected: Tensor) -> bool:
    if not isinstance(model.get_output_embeddings(), nn.Module):
        return False
    try:
        return not _far(_at_the_head(model, text[None], _every(text), None), expected)
    except (RuntimeError, ValueError, IndexError):  # code that knows the shape of all logits
        return False


def _near_only(model: Any, context: int) -> str | None:
    """What of a config keeps attention near, by places in a row and not in a text."""
    told = _text_config(model).to_dict()
    for name, value in sorted(told.items()):
        if WINDOWS.search(name) and isinstance(value, int) and 0 < value < context:
            return f"its {name} is {value}"
    return None


def _unshared(
    model: Any, read: Logits, ids: Tensor, expected: Tensor, *, stem: int, branch: int
) -> str | None:
    """Why two continuations in one row are not what they are apart; None where they are."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no positions"
    own = torch.arange(stem, stem + branch)
    position = torch.cat([torch.arange(stem), own, own])
    number = torch.tensor([0] * stem + [1] * branch + [2] * branch)
    branches = Branches(position[None].to(ids.device), number[None].to(ids.device))
    try:
        found = read(model, ids[None], _every(ids), branches)
    except Exception as error:  # as many kinds as there are models
        return f"it does not take a mask of ours ({type(error).__name__})"
    return "it goes by a mask of its own" if _far(found, expected) else None


def _every(ids: Tensor) -> Tensor:
    return torch.arange(len(ids), device=ids.device)


def _far(a_NV: Tensor, b_NV: Tensor) -> bool:
    """Whether any id is likelier here than there, as this model's ids go."""
    spread = b_NV.std(-1).mean()
    apart = (a_NV.log_softmax(-1) - b_NV.log_softmax(-1)).abs().max()
    return bool(apart > NEAR * spread + 1e-6)
