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
        model=Model(family="gpt2", n_layer=4, n_head=4, n_embd=192, sequence_len=128),
        data=Data(source="shakespeare", tokenizer="char"),
        train=Train(
            batch_tokens=16 * 128, learning_rate=3e-3, warmup=0.1, weight_decay=0.5, beta2=0.99
        ),
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


def all_recipes() -> dict[str, Callable[[], Run]]:
    """The shipped recipes by name, in the order of this file."""
    return {f.__name__: f for f in (shakespeare, quickstart, gpt2_124m)}


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
