"""What a person watching sees: one line that renews itself, or plain lines where none can."""

import shutil
import sys
import textwrap
import time

PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.2


def duration(seconds: float) -> str:
    """Seconds as people write them: 42s, 3m05s, 2h10m, 4d03h."""
    total = round(seconds)
    for unit, name, below, lower in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if total >= unit:
            return f"{total // unit}{name}{total % unit // below:02d}{lower}"
    return f"{total}s"


def threads(count: int) -> str:
    """1 thread, 2 threads."""
    return f"{count} thread{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """A model's text for a terminal: control characters could do anything there."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


class Live:
    """Progress on stderr; on a terminal in place, elsewhere a line every ten seconds."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent, self.terminal = silent, sys.stderr.isatty()
        self._shown = 0.0 if self.terminal else time.monotonic()
        self._width = 0

    def show(self, text: str) -> None:
        """Renew the line, if it is time."""
        now = time.monotonic()
        if self.silent or now - self._shown < (LIVE_SECONDS if self.terminal else PLAIN_SECONDS):
            return
        self._shown = now
        if not self.terminal:
            sys.stderr.write(text + "\n")
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.silent:
            return
        self.clear()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the renewing line away."""
        if self.terminal and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            self._width = 0


def screen_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def folded(text: str, *, width: int | None = None) -> str:
    """Lines of `name      value` that are wider than the screen, continued under their value."""
    width = width or screen_width()
    if width is None or width < 40:
        return text
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=" " * 10, break_long_words=False)
        if len(line) > width and "  " in line[:12]
        else line
        for line in text.split("\n")
    )
