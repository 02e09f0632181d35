"""Tensors of others as they stand on disk or on the Hub, read without executing anything.

safetensors first, whole or in parts; a pickle only through torch's reader of plain tensors.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tuppence.errors import Fault, UserError

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FETCHED = ["config.json", "tokenizer.json", *SAFE, "model-*.safetensors"]


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file. Raises UserError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder of transformers. Raises UserError where there are none."""
    return {key: t for part in weight_files(folder) for key, t in _read(part).items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder of transformers has its weights in. Raises UserError for none."""
    for name in (*SAFE, *PICKLED):
        if (folder / name).exists():
            return _parts(folder / name) if name.endswith(".index.json") else [folder / name]
    raise UserError(f"{folder}: no weights there; this version reads {' or '.join(SAFE + PICKLED)}")


def _parts(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    listed = read_json(index).get("weight_map")
    names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    for name in names:
        if name != Path(name).name or not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is not a file beside it")
    if not names:
        raise UserError(f"{index} names no files")
    return [index.parent / name for name in names]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return only_tensors(unpickled(path), path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise Fault(f"{path} is damaged: {error}") from None


def only_tensors(found: Any, path: Path | str) -> dict[str, Tensor]:
    """A dictionary of tensors by name, of what a pickle held. Raises UserError for else."""
    if isinstance(found, dict):
        odd = [key for key, value in found.items() if not isinstance(value, Tensor)]
        if not odd and all(isinstance(key, str) for key in found):
            return found
    raise UserError(f"{path}: not a dictionary of tensors by name")


def unpickled(path: Path) -> Any:
    """Plain values and tensors of a pickle, read by torch without running any code in it.

    Raises UserError for one that holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, ... by what is wrong
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{path} holds code ({code[1]}) beside its tensors; it was not executed, and "
                f"cannot be read: save the tensors alone"
            ) from None
        raise UserError(
            f"{path} is not a checkpoint that torch reads without executing it"
        ) from None


def download(
    name: str, *, check: Callable[[dict[str, Any]], Any], fetched: list[str] = FETCHED
) -> Path:
    """The folder of a Hub model's config, tokenizer and safetensors, in the Hub's own cache.

    `check` sees config.json before the weights are fetched. Raises UserError in one line for
    whatever the Hub or the way to it refuses.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such folder or file here; to take it from the Hub: "
            f"pip install 'tuppence[hub]'"
        ) from None
    try:
        config = Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except Exception as error:  # the library and its HTTP client raise many kinds
        raise UserError(_unreachable(name, error)) from None
    check(read_json(config))
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=fetched))
    except Exception as error:
        raise UserError(_unreachable(name, error)) from None
    if not any((folder / file).exists() for file in SAFE):
        raise UserError(f"{name}: no safetensors on the Hub; this version fetches nothing else")
    return folder


def _unreachable(name: str, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (
        f"{name}: no such folder or file here, and the Hub did not give it "
        f"({type(error).__name__}: {reason.split('. ')[0][:200]})"
    )
