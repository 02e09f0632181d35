"""RUN/guard.jsonl: what was seen of a launch from outside, and done about it; a line for each."""

import json
import time
from pathlib import Path
from typing import Any

Document = dict[str, Any]

FILE = "guard.jsonl"


def note(folder: Path, code: str, key: str, text: str, **more: Any) -> None:
    """Record something that was seen or done."""
    row = {"time": time.time(), "code": code, "key": key, "message": text, **more}
    with (folder / FILE).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def events(folder: Path) -> list[Document]:
    """What was told before; a torn line is none."""
    found = []
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
