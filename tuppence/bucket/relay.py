"""Machines that share no disk: what one of them has and another needs passes through the bucket.

    saving     another machine's part ──▶ aNNNNN-TOKEN/checkpoints/.step_X.../   as on a shared disk
               its sidecar, last      ──▶        its hashes; only with them the part is there
               the lead's machine     ◀── fetches and compares the part, and commits the checkpoint
               checkpoint.json, last  ──▶ mirror.py, which copies that part inside the bucket
    going on   the lead names a checkpoint and its marker's hash; every machine brings that one

So the lead's folder is whole, as it is where all machines see it, and nothing is complete on the
bucket before every rank's part was compared with its hash. A machine beside the lead's keeps a
checkpoint only to read it: each attempt there begins with an empty folder.
"""

import contextlib
import hashlib
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tuppence.bucket.layout import MARKER, OWNER, Damaged, Identity, document, identity_of, look
from tuppence.bucket.restore import bring_checkpoint, local_root
from tuppence.errors import Fault, Overtaken, UserError
from tuppence.files import file_sha256, flush, locked
from tuppence.folder import RunFolder, write_text
from tuppence.store import Away, Store

PATIENCE_SECONDS = 1500.0  # for a part or a checkpoint: the watchdog gives a save half an hour
POLL_SECONDS = 1.0
AT_ONCE = 4  # parts that the lead fetches
RETRY_SECONDS = (1.0, 60.0)  # the first wait after a failure, doubled up to the longest


@dataclass(frozen=True)
class Relay:
    """One attempt's way over the bucket, on the lead and on each machine that sees no such disk."""

    store: Store
    identity: Identity

    @property
    def _prefix(self) -> str:
        return f"{self.identity.prefix}/checkpoints"

    # ------------------------------------------------------------ on another machine

    def prove(self, rank: int) -> None:
        """See that this machine may use the bucket, and what its tags say. Raises Fault."""
        name = f"{self._prefix}/.rank-{rank}"
        try:
            self.store.reach()
            self.store.probe(name, b"here\n")
            self.store.delete(name)
        except (UserError, Away) as error:
            raise Fault(
                f"{error}; {platform.node()} writes its part of each checkpoint there"
            ) from error

    def send(
        self, aside: Path, names: Iterable[str], *, patience: float = PATIENCE_SECONDS
    ) -> None:
        """This rank's files of a save, in this order; they are not kept here. Tried again while the
        store is away, `patience` seconds for each. Raises Away, or Fault where a newer attempt has
        the run."""
        for name in names:
            self._send(aside / name, f"{self._prefix}/{aside.name}/{name}", patience)
            (aside / name).unlink()

    def _send(self, file: Path, target: str, patience: float) -> None:
        digest, until, wait = self.store.digest(file), time.monotonic() + patience, RETRY_SECONDS[0]
        while True:
            try:
                self._fence()
                return self.store.send(file, target, digest)
            except Away:
                if time.monotonic() + wait > until:
                    raise
            time.sleep(wait)
            wait = min(2 * wait, RETRY_SECONDS[1])

    def _fence(self) -> None:
        found = identity_of(document(self.store.read(OWNER)))
        if found not in (None, self.identity) and found.attempt >= self.identity.attempt:
            raise Overtaken(
                f"attempt {found.attempt} has taken this run over on {self.store.url}; this one "
                f"(attempt {self.identity.attempt}) stops and writes nothing more there"
            )

    def fetch(self, folder: RunFolder, name: str, sha256: str) -> None:
        """Bring the checkpoint whose marker has this hash, and compare its files with theirs.

        It is waited for: the lead's mirror may not have sent it yet, or be copying it to this
        attempt's place. Raises Fault where it does not come whole.
        """
        for other in folder.checkpoints.glob("step_*"):
            if other.name != name:
                shutil.rmtree(other)
        until, why = time.monotonic() + PATIENCE_SECONDS, ""
        while time.monotonic() < until:
            try:
                if self._fetched(folder, name, sha256):
                    return
                why = "it is not there yet"
            except (Away, Damaged) as error:
                why = str(error)
            time.sleep(POLL_SECONDS)
        raise Fault(
            f"{name} did not come whole from {self.store.url} in {PATIENCE_SECONDS:g} s ({why}); "
            f"see to the bucket, then run the same command"
        )

    def _fetched(self, folder: RunFolder, name: str, sha256: str) -> bool:
        """From whichever attempt's place has it whole."""
        remote, damaged = look(self.store), None
        for prefix in remote.prefixes() if remote else ():
            assert remote is not None
            marker = f"{prefix}/checkpoints/{name}/{MARKER}"
            content = self.store.read(marker) if marker in remote.objects else None
            if content is None or hashlib.sha256(content).hexdigest() != sha256:
                continue
            try:
                bring_checkpoint(folder, remote, prefix, name)
            except Damaged as error:  # or it has just gone from there
                damaged = error
                continue
            return True
        if damaged is not None:
            raise damaged
        return False

    # ------------------------------------------------------------ on the lead's machine

    def bring(self, aside: Path, sidecars: Iterable[str]) -> None:
        """The parts that have come whole to the bucket, into the lead's folder aside: sidecars
        last. Raises Fault for a part that is not what its rank wrote; a store that is away is asked
        again with the next call."""
        late = [name for name in sidecars if not (aside / name).exists()]
        place = f"{self._prefix}/{aside.name}"
        with contextlib.suppress(Away):
            there = self.store.find(place) if late else {}
            came = [name for name in late if f"{place}/{name}" in there]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda name: self._bring_part(aside, place, name), came))

    def _bring_part(self, aside: Path, place: str, sidecar: str) -> None:
        content = self.store.read(f"{place}/{sidecar}") or b""
        said = document(content) or {"files": {}}
        for name, entry in said["files"].items():
            local = aside / Path(name).name
            try:
                self.store.fetch(f"{place}/{local.name}", local)
            except FileNotFoundError:
                raise Fault(f"{local.name} has gone from {self.store.url}") from None
            if file_sha256(local) != entry["sha256"]:
                raise Fault(f"{local.name} on {self.store.url} does not match its sha256")
            flush(local)
        write_text(aside / sidecar, content.decode())

    def sweep(self, is_dead: Callable[[Path], bool]) -> None:
        """Delete the parts of saves that are over; what cannot be deleted now, with a later one."""
        with contextlib.suppress(Away):
            drop_parts(self.store, self.identity.prefix, is_dead)


def drop_parts(
    store: Store, prefix: str, is_dead: Callable[[Path], bool] = lambda aside: True
) -> None:
    """Delete what machines beside the lead's have sent of saves. A checkpoint has its own copy."""
    for name in store.find(f"{prefix}/checkpoints"):
        aside = Path(name).parent
        if aside.name.startswith(".step_") and is_dead(aside):
            store.delete(name)


def beside(url: str, identity: Identity, *, rank: int) -> tuple[RunFolder, Relay]:
    """What a rank has whose machine does not see the lead's folder: an empty one of its own, and
    the way to the lead. Raises Fault where the bucket cannot be used from here."""
    runs, _, name = url.rstrip("/").rpartition("/")
    relay = Relay(Store(url), identity)
    relay.prove(rank)
    folder = RunFolder(local_root(runs) / "beside" / name, writes=False)
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.path.with_name(f".{name}.lock"), on_wait=lambda: None):
        if identity_of(folder.read_json(OWNER)) != identity:  # the first of this machine's ranks
            shutil.rmtree(folder.path, ignore_errors=True)
            folder.checkpoints.mkdir(parents=True)
            folder.write_json(OWNER, {"attempt": identity.attempt, "token": identity.token})
    return folder, relay
