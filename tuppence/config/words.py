"""`key=value`: overrides act on `Run` alone, so nothing is changed after something was derived."""

import dataclasses
import difflib
import types
import typing
from typing import Any

from tuppence.config.run import Budget, Model, Run
from tuppence.errors import UserError

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
