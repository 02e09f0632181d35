"""The real SkyPilot for tests: where its Python is, and what it says, offline and in one process.

It is looked for where `launch` makes it (the user's cache folder), in .sky beside the checkout, and
first at $SKY_PYTHON. `make sky` makes it. Tests that need it skip where there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tuppence.plan.hardware import cache_folder

ROOT = Path(__file__).parents[1]
VERSION = "0.14.1"
# Read here, before fixtures give each test folders of its own.
PLACES = (
    *([Path(os.environ["SKY_PYTHON"])] if "SKY_PYTHON" in os.environ else []),
    *(f / "bin" / "python" for f in (cache_folder() / f"sky-{VERSION}", ROOT / ".sky")),
)

Document = dict[str, Any]


def sky_python() -> Path:
    """The Python that has SkyPilot, or skip."""
    for place in PLACES:
        if place.exists():
            return place
    pytest.skip("SkyPilot is not installed: make sky, or SKY_PYTHON=.../bin/python")


def ask(home: Path, questions: list[Document], **environment: str) -> list[Document]:
    """Answers of sky_answers.py, in order, from one process whose HOME is `home`.

    Each is what sky_driver.py says to the question's "verb", or {"error": {"type", "message"}}.
    """
    python = sky_python()
    (home / "questions.json").write_text(json.dumps(questions))
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "TMPDIR")}
    done = subprocess.run(
        [str(python), str(ROOT / "tests" / "sky_answers.py"), str(home)],
        env=kept | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    answers = home / "answers.json"
    assert done.returncode == 0, done.stdout[-3000:]
    found: list[Document] = json.loads(answers.read_text())
    return found
