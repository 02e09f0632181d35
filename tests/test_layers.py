"""Imports point down. Read from the source, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

import tuppence

ROOT = Path(tuppence.__file__).parent
LAYERS = {
    0: ["tuppence", "errors", "config", "host", "live", "plot", "files", "store", "assets"],
    1: ["plan", "tokenizer", "text", "data", "folder", "ledger", "origin", "held"],
    2: ["model", "recipes"],
    3: ["checkpoint", "bucket", "evals", "workers", "ranks", "hub"],
    4: ["train", "report", "watch", "compare", "cloud"],
    5: [
        "environment",
        "corpus",
        "pipeline",
        "spending",
        "planning",
        "preparing",
        "evaluating",
        "watching",
        "comparing",
        "asking",
        "subjects",
        "drill",
        "launching",
        "fetching",
        "following",
        "guarding",
        "node",
        "rented_options",
        "verbs",
        "cli",
        "__main__",
    ],
}
LAYER = {part: layer for layer, parts in LAYERS.items() for part in parts}
APART = [
    {"plan", "data"},
    {"plan", "text"},
    {"train", "report"},
    {"train", "watch"},
    {"train", "compare"},
    *({"cloud", part} for part in ("train", "report", "watch", "compare")),
]  # of one layer, and strangers to each other
HEAVY = {  # what a part must not import, however late
    "plan": {"torch", "numpy", "pyarrow", "safetensors", "tokenizers", "tiktoken"},
    "tokenizer": {"torch", "safetensors", "pyarrow"},
    "text": {"torch", "safetensors"},
    "data": {"torch", "safetensors"},
    **{
        part: {"torch", "numpy"}
        for part in ("ledger", "folder", "config", "recipes", "origin", "bucket", "held")
    },
    **{part: {"torch"} for part in ("report", "watch", "compare", "cloud")},
    "assets": {"tuppence", "numpy"},  # what leaves the package stands alone
}
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
SOURCES = sorted(ROOT.rglob("*.py"))


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
    inside = [name.split(".")[1:2] for name in names if name.split(".")[0] == "tuppence"]
    return {part[0] if part and part[0] in LAYER else "tuppence" for part in inside}


def complaints(part: str, names: set[str]) -> list[str]:
    """What is wrong with `part` importing `names`."""
    above = [p for p in parts(names) if LAYER[p] > LAYER[part]]
    strangers = [p for p in parts(names) if p != part and {part, p} in APART]
    refused = HEAVY.get(part, set()) | EXECUTES | ({"sky"} if part != "assets" else set())
    return above + strangers + [name for name in names if name.partition(".")[0] in refused]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert part_of(path) in LAYER, "a new part: give it a layer here and in CONTRIBUTING.md"
    assert complaints(part_of(path), imports(path.read_text(encoding="utf-8"))) == []


def test_parts_of_a_layer_do_not_import_in_a_circle() -> None:
    uses: dict[str, set[str]] = {part: set() for part in LAYER}
    for path in SOURCES:
        uses[part_of(path)] |= parts(imports(path.read_text(encoding="utf-8")))
    for a, b in itertools.combinations(LAYER, 2):
        assert not (b in uses[a] and a in uses[b]), f"{a} and {b} import each other"


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("plan", "from tuppence.data.survey import survey"),
        ("data", "def f():\n    import torch"),
        ("report", "from tuppence import config, train"),
        ("config", "if True:\n    from tuppence import folder"),
        ("checkpoint", "import tuppence.train.loop"),
        ("checkpoint", "from pickle import loads"),
        ("cloud", "import sky"),
        ("cloud", "from tuppence.report import money"),
    ],
)
def test_a_breach_is_seen(part: str, text: str) -> None:
    assert complaints(part, imports(text)) != []
    assert complaints("train", imports("import torch\nfrom tuppence import data, plan")) == []
