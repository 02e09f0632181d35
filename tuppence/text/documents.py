"""Look inside what was read: JSON to text, bytes to characters, and what is wrong with a document.

A broken document is counted and named; whether it is left out or ends the preparation is the
person's choice (`data.on_bad`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tuppence.text.formats import MOST_BYTES, Item, TooLong
from tuppence.text.inputs import InputFile, some_of

AS_LINES = "; of an array, jq -c '.[]' makes such lines, and jq -c . of objects over many lines"
ABSENT = object()


class Bad(NamedTuple):
    """A document that cannot be used: in a word why, and a line that names it."""

    why: str
    message: str


class Document(NamedTuple):
    """A text, or the stretch of one from character `offset` on; `shown` names it for people."""

    text: str
    shown: str
    offset: int
    last: bool


def documents_of(
    items: list[Item], files: Sequence[InputFile], *, text_field: str
) -> Iterator[Document | Bad]:
    """Each item's text, or what is wrong with it."""
    for item in items:
        file = files[item.file]
        shown = f"{file.shown}: {item.place}" if item.place else file.shown
        found = _text_of(item, shown, is_json=file.kind == "jsonl", text_field=text_field)
        if isinstance(found, Bad):
            yield found
        elif not found and item.whole:
            yield Bad("empty", f"{shown} is empty")
        else:
            yield Document(found, shown, item.offset, item.last)


def _text_of(item: Item, shown: str, *, is_json: bool, text_field: str) -> str | Bad:
    content = item.content
    if isinstance(content, str):
        return content
    if content is None:
        return Bad("no_text", f"{shown}: the text is null")
    if isinstance(content, TooLong):
        message = f"{shown} is {content.bytes:,} bytes long, and {MOST_BYTES:,} are the most"
        array = is_json and item.place in ("line 1", "the line at byte 0")
        return Bad("too_long", message + AS_LINES * array)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start:,} (0x{content[error.start]:02x})"
        return Bad("not_utf8", f"{shown}: not UTF-8 at {where}")
    return _json_text(text, shown, text_field=text_field) if is_json else text


def _json_text(line: str, shown: str, *, text_field: str) -> str | Bad:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number can have too many digits
        spread = AS_LINES * (line.strip() in ("[", "{", "[{"))
        return Bad("not_json", f"{shown} is not JSON ({error}){spread}")
    if not isinstance(row, dict):
        wanted = f'each line must look like {{"{text_field}": "..."}}'
        array = AS_LINES * isinstance(row, list)
        return Bad("no_text", f"{shown} holds {_json_name(row)}, not an object; {wanted}{array}")
    text = row[text_field] if text_field in row else _inside(row, text_field.split("."))
    if not isinstance(text, str):
        return Bad("no_text", f"{shown}: field {text_field!r} {_no_text(text, row, text_field)}")
    # only an escape such as \ud800 can put half a character into a string
    if "\\u" in line and any("\ud800" <= c <= "\udfff" for c in text):
        half = "half a surrogate pair (an escape \\ud800 to \\udfff), which is no character"
        return Bad("not_utf8", f"{shown} has {half}")
    return text


def _inside(row: object, names: list[str]) -> object:
    """What fields in fields lead to; ABSENT where they do not."""
    for name in names:
        if not isinstance(row, dict) or name not in row:
            return ABSENT
        row = row[name]
    return row


def _no_text(found: object, row: dict[str, object], text_field: str) -> str:
    """What a field holds that is no text, and which others there are."""
    what = "is missing" if found is ABSENT else f"is {_json_name(found)}, not a string"
    others = [name for name in row if name != text_field]
    if found is not ABSENT and not others:
        return what
    also = "" if found is ABSENT else "also "
    there = some_of(others) or "no fields at all"
    return f"{what}; the line has {also}{there}: choose one with data.text_field"


def _json_name(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), f"{value!r}")
