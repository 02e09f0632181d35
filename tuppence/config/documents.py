"""Frozen dataclasses of plain values as JSON and back; their annotations are the only schema."""

import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

from tuppence.config.words import nearest
from tuppence.errors import UserError

T = TypeVar("T")


def to_json(value: Any) -> str:
    """A dataclass as JSON text: keys in the order of its fields, floats in full."""
    return json.dumps(dataclasses.asdict(value), indent=2, allow_nan=False) + "\n"


def from_json(kind: type[T], text: str) -> T:
    """The inverse of `to_json`: strict, every key known, present and of its type. A key that has a
    default may be missing, so that what an older version wrote is still read.

    Raises UserError naming the key.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error}") from None
    return typing.cast(T, _decode(kind, data, kind.__name__))


def _decode(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if data is None and types.NoneType in args:
            return None
        return _decode(next(a for a in args if a is not types.NoneType), data, where)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {k: _decode(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(hint, type) or type(data) is not hint:
        raise UserError(
            f"{where}: {json.dumps(data)[:60]} is not {getattr(hint, '__name__', hint)}"
        )
    return data


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if not isinstance(data, dict):
        raise UserError(f"{where}: {json.dumps(data)[:60]} is not an object")
    for key in data:
        if key not in hints:
            raise UserError(f"{where}: no key {key!r}{nearest(key, list(hints))}")
    for key in dataclasses.fields(kind):
        needed = key.default is key.default_factory is dataclasses.MISSING
        if needed and key.name not in data:
            raise UserError(f"{where}: the key {key.name!r} is missing")
    return kind(**{k: _decode(hints[k], value, f"{where}.{k}") for k, value in data.items()})
