"""What those who watch a run have to say: an event, and a line that stays."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tuppence.folder import RunFolder


@dataclass(frozen=True)
class Notes:
    """Never raises: what cannot be written (a full disk, a closed terminal) is not the end of the
    run, and hides no other error."""

    folder: RunFolder
    say: Callable[[str], None]

    def warn(self, code: str, message: str, advice: str, **details: Any) -> None:
        """Something is amiss, and what to do about it."""
        line = f"warning   {message}: {advice} [{code}]"
        self.tell(line, code, message, advice=advice, **details)

    def tell(self, line: str, code: str, message: str, **details: Any) -> None:
        """An event, and how it is said."""
        with contextlib.suppress(Exception):
            self.folder.event(code, message, **details)
        with contextlib.suppress(Exception):
            self.say(line)
