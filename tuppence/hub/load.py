"""Weights of others into `imports/NAME`, and from there into a model that is to be trained.

Our model is laid out on the meta device from the keys that were read: every tensor has to be there
in its shape before anything is written.
"""

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuppence import checkpoint, config, origin
from tuppence.config import DataPlan, InitPlan, Model, ModelPlan, Run
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256
from tuppence.folder import write_text
from tuppence.hub import files, formats
from tuppence.hub.formats import Inside
from tuppence.model import FAMILIES, Family
from tuppence.origin import Origin
from tuppence.plan.asked import solve_model
from tuppence.tokenizer.spec import load_tokenizer

HUB_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"


@dataclass(frozen=True)
class Imported:
    """A folder that `train.init_from` takes; `reused` where it was there already."""

    folder: Path
    origin: Origin
    reused: bool


def import_weights(source: str, *, name: str | None, parent: Path) -> Imported:
    """Turn weights of others into `parent/NAME`. Raises UserError for what cannot be read."""
    name = re.sub(r"\W+", "-", _name_of(source)).strip("-") if name is None else name
    if not name or name != Path(name).name or name.startswith("."):
        raise UserError(f"--name {name}: a name is one word that can name a folder")
    found, tokenizer, told = _read(source)
    _check(source, found)
    final, aside = parent / name, parent / f".{name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        made = _write(aside, found, told, tokenizer)
        reused = final.exists()
        if reused:
            _check_same(final, made)
        else:
            os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Imported(final, made, reused)


def _read(source: str) -> tuple[Inside, Path | None, str]:
    """Weights, their tokenizer.json where there is one, and where they come from."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        return formats.from_nanogpt(files.unpickled(path), source), None, source
    if path.is_file():
        raise UserError(f"{source}: weights without their config.json; name the folder of both")
    if path.is_dir():
        return _read_folder(path, source)
    if not re.fullmatch(HUB_ID, source):
        raise UserError(f"{source}: no such folder or file, nor the name of a model on the Hub")
    folder = files.download(source, check=lambda told: formats.reader_of(told, source))
    found, tokenizer, _ = _read_folder(folder, source)
    return found, tokenizer, f"{source}@{folder.name}"


def _read_folder(folder: Path, source: str) -> tuple[Inside, Path | None, str]:
    for name, what in (("import.json", "an import"), ("run.json", "a run")):
        if (folder / name).exists():
            raise UserError(f"{source} is {what} already; train.init_from={source} takes it")
    if not (folder / "config.json").exists():
        if (folder / "ckpt.pt").exists():
            return _read(str(folder / "ckpt.pt"))
        raise UserError(f"{source}: no config.json of transformers and no ckpt.pt of nanoGPT there")
    told = files.read_json(folder / "config.json")
    reader = formats.reader_of(told, source)
    found = reader(told, files.tensors_of(folder), source)
    if not (folder / "tokenizer.json").exists():
        return found, None, source
    load_tokenizer(folder)  # refuses what is none
    return found, folder / "tokenizer.json", source


def _name_of(source: str) -> str:
    path = Path(source).expanduser()
    return path.stem if path.is_file() else path.resolve().name


def _check(source: str, found: Inside) -> None:
    """Every tensor of our model is there in its shape, and no other."""
    keys = config.from_json(Model, json.dumps(dataclasses.asdict(found.model)))  # of their types
    kind = str(keys.family)
    with torch.device("meta"):
        model = FAMILIES[kind](plan_of(keys))
    wanted = {name: list(p.shape) for name, p in model.named_parameters()}
    there = {name: list(t.shape) for name, t in found.tensors.items()}
    for name in sorted(wanted.keys() | there.keys()):
        if name not in there:
            raise UserError(f"{source}: the weights lack {name} (in this package's names)")
        if name not in wanted:
            raise UserError(
                f"{source}: the weights have {name}, which {found.architecture} has not"
            )
        if wanted[name] != there[name]:
            raise UserError(
                f"{source}: {name} is {there[name]}, but its config makes it {wanted[name]}"
            )


def plan_of(model: Model) -> ModelPlan:
    """The model that these keys ask for. Raises UserError where they make none."""
    vocab_size = model.vocab_size or 1
    data = DataPlan("", "", "text", None, None, vocab_size, 0, 0, 1.0, None, False, "plain")
    return solve_model(Run(model=model), data)


def _write(folder: Path, found: Inside, told: str, tokenizer: Path | None) -> Origin:
    tensors = {name: t.contiguous() for name, t in found.tensors.items()}
    save_file(tensors, folder / origin.WEIGHTS)
    sha256 = file_sha256(folder / origin.WEIGHTS)
    made = Origin(origin.VERSION, told, found.architecture, found.model, sha256)
    if tokenizer is not None:
        (folder / "tokenizer").mkdir()
        shutil.copyfile(tokenizer, folder / "tokenizer" / "tokenizer.json")
    write_text(folder / "import.json", json.dumps(made.document(), indent=2) + "\n")
    return made


def _check_same(there: Path, made: Origin) -> None:
    known = origin.read(str(there)) if (there / "import.json").exists() else None
    if known is None or (known.model, known.sha256) != (made.model, made.sha256):
        raise UserError(f"{there} is there already and holds something else; give a --name")


# ---------------------------------------------------------------- into a model


@torch.no_grad()
def load_into(model: Family, init: InitPlan) -> None:
    """Fill every parameter from the weights that the plan names.

    Rows of tokens that the weights do not know are the mean of those they do; positions beyond the
    model's are cut; a head of its own starts as the tied one. Raises Fault where the weights are
    not those that were planned.
    """
    path = origin.weights_of(init.path)
    if _sha256(path) != init.sha256:
        raise Fault(
            f"{path} is missing or has changed since the run was planned; restore it, or start "
            f"over with --fresh"
        )
    tensors = checkpoint.consolidated(path) if path.is_dir() else load_file(path)
    parameters = dict(model.named_parameters())
    if "lm_head.weight" in parameters and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["wte.weight"]
    assert tensors.keys() == parameters.keys(), sorted(tensors.keys() ^ parameters.keys())
    for name, parameter in parameters.items():
        parameter.copy_(_fitted(name, tensors[name], parameter))


def _sha256(path: Path) -> str | None:
    """Of an import's weights or a checkpoint's; None where they are not there, or damaged."""
    if not path.exists():
        return None
    if not path.is_dir():
        return file_sha256(path)
    try:
        checkpoint.verify(path)
    except Fault:
        return None
    return checkpoint.weights_sha256(path)


def _fitted(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with as many rows as the parameter `like`."""
    if name == "wpe.weight":
        return tensor[: len(like)]
    missing = like.shape[0] - tensor.shape[0]
    if missing > 0:
        assert name == "lm_head.weight" or name.startswith(("wte.", "value_embeddings.")), name
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        tensor = torch.cat([tensor, mean.expand(missing, -1)])
    return tensor
