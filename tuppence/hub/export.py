"""A run's weights as a folder that transformers loads, and what reads its format.

    config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
    README.md

gpt2 and depth load without code of ours; looped carries its own modelling file. The folder is
written aside and renamed: it is complete or absent.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tuppence import checkpoint
from tuppence.config import Plan
from tuppence.errors import UserError
from tuppence.files import asset
from tuppence.folder import RunFolder
from tuppence.hub import formats
from tuppence.hub.formats import Outside
from tuppence.text.sources import slug_of
from tuppence.tokenizer.spec import load_tokenizer

MODELING = "modeling_looped.py"


@dataclass(frozen=True)
class Exported:
    """A folder of transformers; `code` where it loads only with its own modelling file."""

    folder: Path
    architecture: str
    code: bool
    files: list[str]


def export(run: RunFolder, *, which: str, out: Path | None) -> Exported:
    """Write a checkpoint (best, last or a step) of a run for transformers.

    Without `out` it goes to `export/hf` in the run folder, in place of an earlier one. Raises
    UserError for a model that transformers has no architecture for, or an `out` that is not empty.
    """
    plan, chosen = run.plan(), checkpoint.choose(run, which)
    final = run.path / "export" / "hf" if out is None else out.resolve()
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already; name a folder that is new or empty")
    checkpoint.verify(chosen)
    made = formats.outside(plan.model, checkpoint.consolidated(chosen))
    aside = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {final}: cannot write there ({error.strerror})") from None
    try:
        _write(aside, run, plan, chosen, made)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    names = sorted(path.name for path in final.iterdir())
    return Exported(final, made.architecture, MODELING in names, names)


def _write(folder: Path, run: RunFolder, plan: Plan, chosen: Path, made: Outside) -> None:
    end = load_tokenizer(run.tokenizer).end_of_text
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    save_file(made.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _json(folder / "config.json", made.config | ends)
    cached = {"use_cache": plan.model.family != "looped"}
    _json(folder / "generation_config.json", ends | cached)
    shutil.copyfile(run.tokenizer / "tokenizer.json", folder / "tokenizer.json")
    rules = json.loads((run.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    last = next((t["content"] for t in rules["added_tokens"] if t["id"] == end), None)
    _json(folder / "tokenizer_config.json", _tokenizer_config(last, plan))
    if plan.model.family == "looped":
        shutil.copyfile(asset(MODELING), folder / MODELING)
    card = _card(plan, chosen.name, made.architecture, run.read_json("receipt.json"))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _tokenizer_config(end_of_text: str | None, plan: Plan) -> dict[str, Any]:
    """Settings under which transformers encodes as we do: what looks like a special token in a text
    is text, and spaces stay where they are. It also begins with what documents end with."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": plan.model.sequence_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **({} if end_of_text is None else {"bos_token": end_of_text, "eos_token": end_of_text}),
    }


# ---------------------------------------------------------------- the card

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {family} language model: {params:,} parameters, {context:,} tokens of context, a vocabulary of
{vocabulary:,}; {checkpoint} of a run that tuppence trained on {source}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder"{trust})
tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})
```
"""
LOOPED_CARD = """
Its modelling file is in this folder ({file}), so that loading it takes `trust_remote_code=True`.
`model.config.recurrence` is how often the core runs; it has no key-value cache.
"""
RECEIPT = """
| | promised | paid |
|---|---|---|
"""


def _card(plan: Plan, chosen: str, architecture: str, receipt: dict[str, Any] | None) -> str:
    """README.md: what it is, how it loads, and the receipt's headline where there is one."""
    looped = plan.model.family == "looped"
    text = CARD.format(
        name=plan.name,
        family=f"{plan.model.family} ({architecture})",
        params=plan.model.params,
        context=plan.model.sequence_len,
        vocabulary=plan.model.vocab_size,
        checkpoint=chosen,
        source=slug_of(plan.data.source),
        trust=", trust_remote_code=True" if looped else "",
    )
    text += LOOPED_CARD.format(file=MODELING) if looped else ""
    return text if receipt is None else text + RECEIPT + _headline(receipt)


def _headline(receipt: dict[str, Any]) -> str:
    """What was promised and what was paid, a row each."""
    promised, paid = receipt["predicted"], receipt["actual"]
    loss = promised["val_loss"]
    rows = [
        ("dollars", promised["usd"], paid["usd"], "${:.4f}"),
        ("hours", promised["hours"], paid["hours"], "{:.3f}"),
        ("tokens", promised["tokens"], paid["tokens"], "{:,.0f}"),
        ("val loss, nats/token", loss and loss["mid"], paid["val_loss"], "{:.4f}"),
        ("val bits/byte", promised["val_bpb"], paid["val_bpb"], "{:.4f}"),
    ]

    def told(value: float | None, how: str) -> str:
        return "-" if value is None else how.format(value)

    return "".join(f"| {name} | {told(a, how)} | {told(b, how)} |\n" for name, a, b, how in rows)
