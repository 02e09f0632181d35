"""The small files of a run on the bucket: which of them are there as they are here.

An object cannot be appended to, so lines go whole each time. Parts would spare bytes that hardly
cost anything, and every reader would have to join them; instead a file that grew big goes less
often, and before each checkpoint: about BIG_BYTES every SYNC_SECONDS, however long the run.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from tuppence.bucket.layout import KEPT, documents, left_there, local_checkpoints
from tuppence.folder import RunFolder
from tuppence.store import Store

SYNC_SECONDS = 30.0
BIG_BYTES = 4 << 20


class Documents:
    """The small files, and which of them are on the bucket as they are here."""

    def __init__(
        self, folder: RunFolder, store: Store, prefix: str, fence: Callable[[], None]
    ) -> None:
        """`fence` is called before anything is sent."""
        self.folder, self.store, self.prefix, self.fence = folder, store, prefix, fence
        self._sent: dict[str, tuple[tuple[int, int], float]] = {}  # stamp and when, by name
        self._kept: bytes | None = None
        self._looked = -math.inf

    def send_if_due(self) -> None:
        """Inside a long send: as often as a beat would."""
        if time.monotonic() - self._looked >= SYNC_SECONDS:
            self.send()

    def send(self, *, all_of_them: bool = False) -> None:
        """What changed since it was last sent; lines that grew big wait their turn."""
        self._looked = time.monotonic()
        found = documents(self.folder)
        gone = self._sent.keys() - found.keys()
        due = {name: stamp for name, stamp in found.items() if self._due(name, stamp, all_of_them)}
        kept = self._kept_now()
        if not due and not gone and kept == self._kept:
            return
        self.fence()
        if kept != self._kept:
            self.store.write(f"{self.prefix}/{KEPT}", kept)
            self._kept = kept
        for name in sorted(due, key=lambda n: (n == "run.json", n)):
            with contextlib.suppress(FileNotFoundError):  # it was deleted just now
                content = _whole_lines(self.folder.file(name))
                self.store.write(f"{self.prefix}/{name}", content)
                self._sent[name] = (due[name], time.monotonic())
        for name in gone:
            self.store.delete(f"{self.prefix}/{name}")
            del self._sent[name]

    def _due(self, name: str, stamp: tuple[int, int], all_of_them: bool) -> bool:
        before, when = self._sent.get(name, (None, -math.inf))
        if before == stamp:
            return False
        turns = stamp[0] // BIG_BYTES
        return all_of_them or time.monotonic() - when >= turns * SYNC_SECONDS

    def _kept_now(self) -> bytes:
        names = {path.name for path in local_checkpoints(self.folder)}
        return json.dumps(sorted(names | left_there(self.folder).keys())).encode()


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1] if path.suffix == ".jsonl" else content
