"""Imports point down. Read from the source, so that an import inside a function counts as well.

5  cli verbs pipeline    4  train report    3  checkpoint evals    2  model recipes
1  plan data folder ledger    0  config errors host live
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

import tuppence

ROOT = Path(tuppence.__file__).parent
LAYERS = {
    0: ["tuppence", "errors", "config", "host", "live", "plot"],
    1: ["plan", "data", "folder", "ledger"],
    2: ["model", "recipes"],
    3: ["checkpoint", "evals"],
    4: ["train", "report"],
    5: ["pipeline", "verbs", "cli", "__main__"],
}
LAYER = {part: layer for layer, parts in LAYERS.items() for part in parts}
APART = [{"plan", "data"}, {"train", "report"}]  # of one layer, and strangers to each other
HEAVY = {  # what a part must not import, however late
    "plan": {"torch", "numpy", "pyarrow", "safetensors", "tokenizers", "tiktoken"},
    "data": {"torch", "safetensors"},
    "report": {"torch", "numpy"},
    "ledger": {"torch", "numpy"},
    "folder": {"torch", "numpy"},
    "config": {"torch", "numpy"},
    "recipes": {"torch", "numpy"},
}
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part that a file belongs to: its package below tuppence, or its own name."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "tuppence" if first == "__init__" else first


def imports(text: str) -> set[str]:
    """Full names of all that is imported: `from a.b import c` gives a.b and a.b.c."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def parts(names: set[str]) -> set[str]:
    """The parts of tuppence among imported names; a name of the package itself is its __init__."""
    inside = {name.split(".")[1] for name in names if name.startswith("tuppence.")}
    return {part if part in LAYER else "tuppence" for part in inside} | (
        {"tuppence"} & {name for name in names if name == "tuppence"}
    )


def complaints(part: str, names: set[str]) -> list[str]:
    """What is wrong with `part` importing `names`."""
    wrong = []
    for other in parts(names):
        if LAYER[other] > LAYER[part]:
            wrong.append(f"{part} (layer {LAYER[part]}) imports {other} (layer {LAYER[other]})")
        if other != part and {part, other} in APART:
            wrong.append(f"{part} imports {other}: they never do")
    for name in names:
        package = name.partition(".")[0]
        if package in HEAVY.get(part, set()) | EXECUTES:
            wrong.append(f"{part} imports {package}")
    return wrong


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert part_of(path) in LAYER, "a new part: give it a layer here and in the design"
    assert complaints(part_of(path), imports(path.read_text(encoding="utf-8"))) == []


def test_every_part_is_there() -> None:
    assert {part_of(path) for path in modules()} == LAYER.keys()


def test_parts_of_a_layer_do_not_import_in_a_circle() -> None:
    uses: dict[str, set[str]] = {part: set() for part in LAYER}
    for path in modules():
        uses[part_of(path)] |= parts(imports(path.read_text(encoding="utf-8")))
    for a, b in itertools.combinations(LAYER, 2):
        assert not (b in uses[a] and a in uses[b]), f"{a} and {b} import each other"


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("plan", "from tuppence.data.survey import survey"),
        ("data", "from tuppence import plan"),
        ("data", "def f():\n    import torch"),
        ("plan", "import torch.nn as nn"),
        ("plan", "from tuppence.model import build"),
        ("train", "from tuppence.report import write"),
        ("report", "from tuppence import config, train"),
        ("config", "if True:\n    from tuppence import folder"),
        ("checkpoint", "import tuppence.train.loop"),
        ("recipes", "from tuppence.cli import main"),
        ("checkpoint", "from pickle import loads"),
    ],
)
def test_a_breach_is_seen(part: str, text: str) -> None:
    assert complaints(part, imports(text)) != []


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("plan", "from tuppence import config\nfrom tuppence.errors import UserError"),
        ("cli", "from tuppence import __version__, verbs"),
        ("train", "import torch\nfrom tuppence.data.loader import Loader"),
        ("ledger", "from tuppence.folder import RunFolder"),
    ],
)
def test_what_is_allowed_is_not_complained_of(part: str, text: str) -> None:
    assert complaints(part, imports(text)) == []


def test_files_are_of_a_readable_length() -> None:
    long = {p.name: n for p in modules() if (n := len(p.read_text().splitlines())) > 440}
    assert long == {}  # "a file over 400 lines asks to be two"
