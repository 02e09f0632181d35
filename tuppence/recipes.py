"""Recipes: functions that return a `Run`, a few lines each. Yours is the same, in a file of yours.

tuppence run shakespeare                      one of these
tuppence run my_recipe.py:small budget.usd=1  the function `small` of your own file
"""

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from tuppence.config import (
    Budget,
    Data,
    Machine,
    Model,
    Run,
    Train,
    from_json,
    nearest,
    to_json,
)
from tuppence.errors import UserError

DEFAULT = "shakespeare"


def shakespeare() -> Run:
    """Two cents: a character-level GPT on tiny Shakespeare, three minutes of two CPU cores."""
    return Run(
        budget=Budget(usd=0.02),
        model=Model(family="depth", n_layer=4, n_embd=192, sequence_len=256, exportable=True),
        data=Data(source="shakespeare", tokenizer="char"),
        train=Train(
            optimizer="muon", batch_tokens=8 * 256, learning_rate=0.01, weight_decay=0.1, decay=0.5
        ),
    )


def shakespeare_looped() -> Run:
    """The same text and budget, a looped model: four blocks stored, some nine run on average."""
    return Run(
        budget=Budget(usd=0.02),
        model=Model(
            family="looped",
            n_prelude=1,
            n_recurrent=2,
            n_coda=1,
            mean_recurrence=3,
            max_recurrence=8,
            lora_rank=8,
            n_embd=192,
            sequence_len=256,
        ),
        data=Data(source="shakespeare", tokenizer="char"),
        train=Train(batch_tokens=8 * 256, learning_rate=0.01, weight_decay=0.1, decay=0.5),
    )


def quickstart() -> Run:
    """nanoGPT's CPU quickstart shape (4 layers, width 128, T=64, batch 12), tuned for time."""
    return Run(
        budget=Budget(steps=1250),
        model=Model(family="gpt2", n_layer=4, n_head=4, n_embd=128, sequence_len=64),
        data=Data(source="shakespeare", tokenizer="char"),
        train=Train(
            batch_tokens=12 * 64,
            learning_rate=8e-3,
            schedule="wsd",
            warmup=0.05,
            decay=0.95,
            weight_decay=0.1,
            beta2=0.98,
        ),
    )


def gpt2_124m() -> Run:
    """GPT-2 small on your own text: `tuppence plan gpt2_124m data.source='texts/*.jsonl'`."""
    return Run(
        budget=Budget(usd=20.0),
        model=Model(family="gpt2", n_layer=12, n_head=12, n_embd=768, sequence_len=1024),
        data=Data(tokenizer="gpt2"),
        train=Train(batch_tokens=2**19, learning_rate=6e-4, weight_decay=0.1, beta2=0.95),
    )


def auto() -> Run:
    """Any corpus, any budget: size, tokens, batch, rates and machine are chosen by the planner."""
    return Run(budget=Budget(usd=100.0), model=Model(family="depth"), train=Train(optimizer="muon"))


# ---------------------------------------------------------------- the published guides


def nanogpt_openwebtext() -> Run:
    """nanoGPT's GPT-2 124M on OpenWebText: 600,000 steps on 8 A100s (guide 000)."""
    run = _nanogpt(steps=600_000)
    return dataclasses.replace(run, machine=Machine(gpu="A100-40GB", gpu_count=8))


def nanogpt_4b_tokens() -> Run:
    """The same on one A10G, 6,000 steps of a corpus cut to 4B tokens (guide 001)."""
    run = _nanogpt(steps=6_000)
    return dataclasses.replace(
        run,
        machine=Machine(gpu="A10G", gpu_count=1),
        data=dataclasses.replace(run.data, max_tokens=4_000_000_000),
    )


def _nanogpt(steps: int) -> Run:
    return Run(
        budget=Budget(steps=steps),
        model=Model(
            family="gpt2", n_layer=12, n_head=12, n_embd=768, sequence_len=1024, vocab_size=50304
        ),
        data=Data(source="openwebtext", tokenizer="gpt2"),
        train=Train(
            batch_tokens=480 * 1024,
            learning_rate=6e-4,
            lr_floor=0.1,
            warmup=2_000 / steps,
            weight_decay=0.1,
            beta2=0.95,
        ),
    )


def looped_546m() -> Run:
    """A looped transformer: 2 + 3 x 4 + 1 blocks run, 6 stored, 10B tokens (guide 002)."""
    return Run(
        budget=Budget(tokens=10_000_000_000),
        model=Model(
            family="looped",
            n_prelude=2,
            n_recurrent=3,
            n_coda=1,
            mean_recurrence=4,
            max_recurrence=16,
            lora_rank=32,
            n_head=18,
            n_embd=2304,
            sequence_len=2048,
        ),
        data=Data(source="fineweb_edu", tokenizer="bpe:32768"),
        train=Train(
            optimizer="muon",
            batch_tokens=2**19,
            activation_checkpointing=False,
            core_items=100_000,  # more than any task has: all of them, at the end
        ),
    )


def llmc_gpt2_124m() -> Run:
    """llm.c's GPT-2 124M on 10B tokens of FineWeb, on the cheapest machine (guide 003)."""
    return Run(
        budget=Budget(steps=18_865),
        model=Model(
            family="gpt2", n_layer=12, n_head=12, n_embd=768, sequence_len=1024, vocab_size=50304
        ),
        data=Data(source="fineweb_10bt", tokenizer="gpt2", max_tokens=10_000_000_000),
        train=Train(
            batch_tokens=2**19,
            learning_rate=6e-4,
            warmup=700 / 18_865,
            weight_decay=0.1,
            beta2=0.95,
            hellaswag_every=250,
        ),
    )


def depth_1000usd() -> Run:
    """A thousand dollars of 8 H100 PCIe on sums in 17 characters: 4.2B parameters (guide 004)."""
    return Run(
        budget=Budget(usd=1000.0, hours=31.0),
        machine=Machine(gpu="H100-PCIe", gpu_count=8, usd_per_hour=32.0, disk_gb=270.0),
        model=Model(family="depth", depth=44, sequence_len=2048, vocab_size=32),
        data=Data(source="arithmetic", tokenizer="char"),
        train=Train(optimizer="muon", batch_tokens=2**19),
    )


def all_recipes() -> dict[str, Callable[[], Run]]:
    """The shipped recipes by name, in the order of this file."""
    ours = (shakespeare, shakespeare_looped, quickstart, gpt2_124m, auto)
    guides = (nanogpt_openwebtext, nanogpt_4b_tokens, looped_546m, llmc_gpt2_124m, depth_1000usd)
    return {f.__name__: f for f in (*ours, *guides)}


def get(spec: str) -> Run:
    """The run of a recipe: a name of this file, or `path/to/file.py:function`.

    Raises UserError when there is no such recipe, or when what is there does not return a Run.
    """
    if ".py" in spec:
        return _own(spec)
    known = all_recipes()
    if spec not in known:
        close = nearest(spec, list(known))
        raise UserError(f"no recipe {spec!r}{close}; your own is path/to/file.py:function")
    return dataclasses.replace(known[spec](), recipe=spec)


def _own(spec: str) -> Run:
    path_text, _, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"recipe {spec}: there is no file {path}")
    loaded = importlib.util.spec_from_file_location(path.stem, path)
    assert loaded
    assert loaded.loader
    module = importlib.util.module_from_spec(loaded)
    sys.modules.setdefault(path.stem, module)
    try:
        loaded.loader.exec_module(module)
    except Exception as error:  # whatever their file raises is theirs to read
        raise _their_fault(spec, str(path), error) from error
    return _call(spec, name, {k: f for k, f in vars(module).items() if _is_recipe(f, module)})


def _is_recipe(value: object, module: object) -> bool:
    mine = inspect.isfunction(value) and value.__module__ == getattr(module, "__name__", "")
    return mine and not value.__name__.startswith("_")  # type: ignore[attr-defined]


def _call(spec: str, name: str, functions: dict[str, Callable[[], Run]]) -> Run:
    if not name and len(functions) == 1:
        name = next(iter(functions))
    if name not in functions:
        raise UserError(
            f"recipe {spec}: name one of its functions: {', '.join(functions) or 'none'}"
        )
    if inspect.signature(functions[name]).parameters:
        raise UserError(f"recipe {spec}: {name} must be callable without arguments")
    run = _guarded(spec, functions[name])
    if not isinstance(run, Run):
        raise UserError(
            f"recipe {spec}: {name} returned {type(run).__name__}, not tuppence.config.Run"
        )
    return dataclasses.replace(run, recipe=spec, name=run.name or name)


def _guarded(spec: str, recipe: Callable[[], Run]) -> Run:
    try:
        run = recipe()
    except Exception as error:
        raise _their_fault(spec, recipe.__name__, error) from error
    if isinstance(run, Run):
        try:
            from_json(Run, to_json(run))
        except (UserError, ValueError, TypeError) as error:
            raise UserError(f"recipe {spec}: {recipe.__name__} returned {error}") from None
    return run


def _their_fault(spec: str, where: str, error: Exception) -> UserError:
    lines = " ".join(str(error).split())
    return UserError(f"recipe {spec}: {where} fails with {type(error).__name__}: {lines}")
