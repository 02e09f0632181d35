"""The run folder's copy on a bucket, kept up to date by one thread.

    committed here ──▶ its files ──▶ documents and lines ──▶ checkpoint.json ──▶ pointers ──▶ retire

Each round makes the bucket like the folder, whatever was done before: a round that failed is begun
again, and finds what has arrived already. The training loop waits for none of it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuppence.bucket.documents import SYNC_SECONDS, Documents
from tuppence.bucket.layout import (
    MARKER,
    OWNER,
    POINTERS,
    Damaged,
    Entry,
    Identity,
    Remote,
    age,
    document,
    entries,
    identity_of,
    left_there,
    local_checkpoints,
    look,
)
from tuppence.bucket.relay import drop_parts
from tuppence.bucket.retire import Age, Standing, doomed
from tuppence.errors import Fault, Overtaken
from tuppence.folder import RunFolder
from tuppence.store import Away, Digest, Store

HELD = ".bucket"  # beside the checkpoints: links to the files that are being sent
RETRY_SECONDS = (1.0, 60.0)  # the first wait after a failure, doubled up to the longest


@dataclass(frozen=True)
class Sent:
    """A checkpoint that is complete on the bucket: its marker's hash, and how new it is."""

    marker: str
    age: Age


class Mirror:
    """Sends what `folder` holds to `url`. The attempt in attempt.json owns the run from here on."""

    def __init__(
        self,
        folder: RunFolder,
        url: str,
        *,
        is_milestone: Callable[[Path], bool] = lambda path: True,
    ) -> None:
        """Take the run over on the bucket.

        `is_milestone` says which checkpoints that are only on the bucket stay there for good.
        Raises UserError where it cannot be reached, Fault where a newer attempt has the run.
        """
        claimed = folder.read_json(OWNER)
        ours, self._claimed = identity_of(claimed), json.dumps(claimed).encode() + b"\n"
        assert ours is not None, "an attempt is claimed before its mirror is made"
        self.folder, self.store, self.identity = folder, Store(url), ours
        self.is_milestone = is_milestone
        self._documents = Documents(folder, self.store, ours.prefix, self.fence)
        self._complete: dict[str, Sent] = {}  # on the bucket, below this attempt's name
        self._refused: dict[str, str] = {}  # hash of the marker of those that are damaged here
        self._best_is_next = True
        self._pointed: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._asked, self._done, self._waiting_since = 1, 0, time.monotonic()
        self._last_beat = time.monotonic()
        self._closing = self._given_up = False
        self._failing = False
        self._fault: Fault | None = None
        shutil.rmtree(folder.file(HELD), ignore_errors=True)  # of an attempt that was killed
        self.store.reach()
        self._claim()
        self._thread = threading.Thread(target=self._work, name="bucket", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ what the loop calls

    def checkpoint(self, path: Path) -> None:
        """`path` was committed here: send it, and the documents that go with it."""
        assert path.parent == self.folder.checkpoints, path
        self._ask()

    def beat(self) -> None:
        """Send the small files that changed, every SYNC_SECONDS; cheap to call at each step."""
        if time.monotonic() - self._last_beat >= SYNC_SECONDS:
            self._last_beat = time.monotonic()
            self._ask()

    def check(self) -> None:
        """Raises Fault where a newer attempt has the run. Failures that pass raise nothing."""
        if self._fault is not None:
            raise self._fault

    def lag(self) -> float:
        """Seconds since the oldest thing that is not on the bucket yet was asked for."""
        with self._changed:
            behind = self._done < self._asked
            return time.monotonic() - self._waiting_since if behind else 0.0

    def close(self, timeout: float) -> bool:
        """Send what is left and stop; False, with an event, where `timeout` seconds were too few.

        The local folder has it all, and the next attempt's mirror sends the rest.
        """
        with self._changed:
            if not self._closing:
                self._closing = True
                self._ask()
            self._changed.wait_for(self._idle, timeout)
            sent = self._done == self._asked
            self._given_up = not sent
            self._changed.notify_all()
        if sent:
            self._thread.join()
        elif self._fault is None:
            message = f"{self.store.url} is not up to date; {self.folder.path} has all of it"
            self.folder.event("upload_unfinished", message)
        return sent

    def _ask(self) -> None:
        with self._changed:
            if self._done == self._asked:
                self._waiting_since = time.monotonic()
            self._asked += 1
            self._changed.notify_all()

    def _idle(self) -> bool:
        return self._done == self._asked or self._fault is not None

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        wait = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._done < self._asked or self._closing)
                if self._done == self._asked:
                    return
                asked, since = self._asked, time.monotonic()
            try:
                self._round()
            except Fault as fault:
                return self._stop(fault)
            except OSError as error:
                wait = min(max(2 * wait, RETRY_SECONDS[0]), RETRY_SECONDS[1])
                self._failed(error)
                if self._sleep(wait):
                    return
            except Exception as error:  # ours to mend; the loop hears of it at its next check
                return self._stop(Fault(f"the upload to {self.store.url} stopped: {error!r}"))
            else:
                wait = 0.0
                self._succeeded()
                with self._changed:
                    self._done, self._waiting_since = asked, since
                    self._changed.notify_all()

    def _sleep(self, seconds: float) -> bool:
        """Until it is time to try again or `close` is called; True where `close` gave up."""
        with self._changed:
            if self._closing:  # within what its time-out leaves
                self._changed.wait_for(lambda: self._given_up, min(seconds, RETRY_SECONDS[0]))
            else:
                self._changed.wait_for(lambda: self._closing, seconds)
            return self._given_up

    def _stop(self, fault: Fault) -> None:
        with self._changed:
            self._fault = fault
            self._changed.notify_all()

    def _failed(self, error: OSError) -> None:
        if not self._failing:
            self._failing = True
            self.folder.event("upload_failed", f"{error}; tried again until it works")

    def _succeeded(self) -> None:
        if self._failing:
            self._failing = False
            self.folder.event("upload_recovered", f"{self.store.url} is up to date again")

    # ------------------------------------------------------------ a round

    def _round(self) -> None:
        self._documents.send(all_of_them=self._closing)
        while (path := self._unsent()) is not None:
            self._send(path)
            self._point()
            self._retire()
        self._point()
        self._retire()
        if self._closing:
            drop_parts(self.store, self.identity.prefix)  # no save is under way any more
            self._documents.send(all_of_them=True)  # also what this round had to say

    def _unsent(self) -> Path | None:
        """The newest checkpoint that is not on the bucket as it is here.

        Every other time the best one, which would wait for ever where saves are faster than sends.
        """
        found = []
        for path in local_checkpoints(self.folder):
            marker, sent = _hash_of(path), self._complete.get(path.name)
            known = (sent.marker if sent else None, self._refused.get(path.name))
            if marker is not None and marker not in known:
                found.append(path)
        best = [path for path in found if path.name == self._named("best")]
        self._best_is_next = not self._best_is_next
        return next(iter([*best, *found] if self._best_is_next else found), None)

    def _named(self, pointer: str) -> str | None:
        """The checkpoint that a pointer of the folder names."""
        path = self.folder.checkpoints / f"{pointer}.json"
        found = document(path.read_bytes()) if path.exists() else None
        return str(found["path"]) if found else None

    def _send(self, path: Path) -> None:
        """All of a checkpoint, its marker last. One that was deleted just now is for `_retire`."""
        held = self._hold(path)
        try:
            self._send_held(held, path)
        except FileNotFoundError:
            return
        finally:
            if held != path:
                shutil.rmtree(held, ignore_errors=True)

    def _hold(self, path: Path) -> Path:
        """The same files under another name, where they stay while they are sent.

        A save may be followed by two more before it has arrived, and the folder keeps few.
        """
        held = self.folder.file(HELD) / path.name
        shutil.rmtree(held, ignore_errors=True)
        try:
            held.mkdir(parents=True)
            for file in path.iterdir():
                os.link(file, held / file.name)
        except OSError:  # this file system has no hard links: then it is sent from where it is
            return path
        return held

    def _send_held(self, held: Path, path: Path) -> None:
        started = time.monotonic()
        target = f"{self.identity.prefix}/checkpoints/{path.name}"
        marker = (held / MARKER).read_bytes()
        try:
            files = entries(marker)
            self._unmark(target, marker)
            there = look(self.store)
            for name, entry in files.items():
                self._send_file(held / name, f"checkpoints/{path.name}/{name}", entry, there)
                self._documents.send_if_due()
        except Damaged as error:
            return self._refuse(path, marker, error)
        self._documents.send(all_of_them=True)  # the lines up to its step go before it
        self.fence()
        self.store.write(f"{target}/{MARKER}", marker)
        self._complete[path.name] = Sent(_sha256(marker), age(marker, path.name))
        seconds, size = time.monotonic() - started, sum(e.bytes for e in files.values())
        message = f"{path.name} is on {self.store.url}"
        self.folder.event("upload", message, path=path.name, seconds=seconds, bytes=size)
        return None

    def _unmark(self, target: str, marker: bytes) -> None:
        """A checkpoint of this name with other content: incomplete from before its files change."""
        if self.store.read(f"{target}/{MARKER}") not in (None, marker):
            self.fence()
            self.store.delete(f"{target}/{MARKER}")
            self._complete.pop(Path(target).name, None)

    def _send_file(self, file: Path, inside: str, entry: Entry, there: Remote | None) -> None:
        """A file that is on the bucket already is not sent again: kept, or copied there."""
        digest = self.store.digest(file)
        if (digest.sha256, digest.bytes) != (entry.sha256, entry.bytes):
            raise Damaged(f"{file.name} does not match its sha256")
        target = f"{self.identity.prefix}/{inside}"
        places = [f"{prefix}/{inside}" for prefix in there.prefixes()] if there else []
        places += there.parts(self.identity.prefix, inside) if there else []
        same = [p for p in places if there and there.objects.get(p) == digest.bytes]
        if target in same and self.store.holds(target, digest):
            return
        if any(self._copied(other, target, digest) for other in same if other != target):
            return
        self.fence()
        self.store.send(file, target, digest)

    def _copied(self, other: str, target: str, digest: Digest) -> bool:
        if not self.store.holds(other, digest):
            return False
        with contextlib.suppress(Away):  # then it is sent
            self.store.copy(other, target)
        return self.store.holds(target, digest)

    def _refuse(self, path: Path, marker: bytes, error: Damaged) -> None:
        """A checkpoint that is damaged here is not sent, unless it is replaced."""
        self._refused[path.name] = _sha256(marker)
        message = f"{path} is damaged and stays here: {error}"
        self.folder.event("upload_refused", message, path=path.name)

    def _point(self) -> None:
        """Pointers, where what they point at is on the bucket, be it an earlier attempt's."""
        for name in POINTERS:
            path = self.folder.checkpoints / f"{name}.json"
            content = path.read_bytes() if path.exists() else None
            if content is None or content == self._pointed.get(name):
                continue
            found = document(content)
            if found and found["path"] in self._complete.keys() | self._refused.keys():
                self.fence()
                self.store.write(f"{self.identity.prefix}/checkpoints/{path.name}", content)
                self._pointed[name] = content

    # ------------------------------------------------------------ what goes again

    def _retire(self) -> None:
        """Delete what was deleted here, and what earlier attempts left, once newer is complete."""
        if not self._complete:
            return
        there = look(self.store)
        assert there is not None
        standing = Standing(
            mine=self.identity.prefix,
            attempt=self.identity.attempt,
            here=[path.name for path in local_checkpoints(self.folder)],
            sent={name: sent.age for name, sent in self._complete.items()},
            refused=self._refused.keys(),
            best=self._named("best"),
            pointed={str(document(content)["path"]) for content in self._pointed.values()},
            left=left_there(self.folder),
        )
        names = doomed(there, standing, lambda name: self.is_milestone(self._path(name)))
        if names:
            self.fence()
        for prefix in {name.partition("/")[0] for name in names} - {self.identity.prefix}:
            with contextlib.suppress(Away):  # a right of its own, which these credentials may lack
                self.store.drop_unfinished(prefix)
        for name in names:
            self.store.delete(name)
            if name.endswith(f"/{MARKER}") and name.startswith(self.identity.prefix):
                self._complete.pop(name.split("/")[-2], None)

    def _path(self, name: str) -> Path:
        return self.folder.checkpoints / name

    # ------------------------------------------------------------ whose it is

    def _claim(self) -> None:
        self._refuse_newer(identity_of(document(self.store.read(OWNER))))
        self.store.probe(OWNER, self._claimed)

    def fence(self) -> None:
        """Raises Fault where another attempt has taken the run."""
        found = identity_of(document(self.store.read(OWNER)))
        self._refuse_newer(found)
        if found != self.identity:  # an older attempt's claim came late, or was deleted
            self._claim()

    def _refuse_newer(self, found: Identity | None) -> None:
        if found in (None, self.identity) or found.attempt < self.identity.attempt:
            return
        raise Overtaken(
            f"attempt {found.attempt} has taken this run over on {self.store.url}; this one "
            f"(attempt {self.identity.attempt}) stops and writes nothing more there"
        )


def _hash_of(path: Path) -> str | None:
    """Of a checkpoint's marker; None where it has just been deleted."""
    try:
        return _sha256((path / MARKER).read_bytes())
    except FileNotFoundError:
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
