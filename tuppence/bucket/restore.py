"""From the bucket back to a folder: to go on from there, or to look at what a run made.

What is here is set aside, never written over: where a newer attempt has the run on the bucket, this
folder is kept as NAME.1. Where the bucket holds nothing but what this folder sent, the folder is at
least as new, and stays as it is.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuppence import config
from tuppence.bucket.layout import (
    KEPT,
    MARKER,
    NOTE,
    OWNER,
    Damaged,
    Remote,
    age,
    attempt_of,
    documents,
    entries,
    identity_of,
    local_checkpoints,
    look,
    step_of,
    weights_sha256,
)
from tuppence.bucket.looking import Onlooker, bring, runs_below
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256, locked
from tuppence.folder import RunFolder, write_text
from tuppence.live import Live
from tuppence.plan.hardware import cache_folder
from tuppence.store import Away, Store, is_url, protocol_of


def local_root(url: str) -> Path:
    """Where the runs of this URL live here: a folder of the user's cache, one for each URL."""
    protocol_of(url)
    return cache_folder() / "buckets" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def attempts_begun(folder: RunFolder) -> int:
    """The highest attempt that the bucket knew of at the last restore: the next one is above it."""
    note = folder.read_json(NOTE)
    return int(note["attempt"]) if note else 0


def restore(folder: RunFolder, url: str) -> bool:
    """Make `folder` go on from the bucket, where that is ahead; True if something came.

    Call it before the folder is locked: a folder that was overtaken is renamed. Raises UserError
    where the bucket cannot be reached, Fault where every checkpoint there is damaged.
    """
    store = Store(url)
    store.reach()
    with _one_line(url):
        remote = look(store)
        if remote is None:
            return False
        here = _here(folder)
        head = remote.head()
        if here is not None and (head is None or not _overtaken(here, head)):
            came = head == here and _bring_newer(folder, remote, here)
            _note(folder, remote, {} if not came else _left(remote, folder))
            return came
        if here is not None:
            kept = _set_aside(folder)
            Live().say(f"a newer attempt has this run on {url}; {folder.path} is kept as {kept}")
        folder.path.mkdir(parents=True, exist_ok=True)
        return _bring(folder, remote, head)


def fetched(url: str, which: str | None = "best") -> RunFolder:
    """A run on a bucket, to be looked at: its documents, and a checkpoint (best, last or a step).

    It comes to a folder of its own in the user's cache, apart from one that trains. Raises
    UserError naming what is there, Fault where the checkpoint that was asked for is damaged.
    """
    runs, _, name = url.rstrip("/").rpartition("/")
    store = Store(url)
    store.reach()
    with _one_line(url):
        remote = look(store)
        head = remote.head() if remote else None
        if remote is None or head is None:
            raise UserError(f"no run {name!r} on {runs}{_close(name, runs)}")
        folder = RunFolder(local_root(runs) / "fetched" / name)
        folder.path.mkdir(parents=True, exist_ok=True)
        with locked(folder.file(".lock"), on_wait=lambda: None):
            there = store.entries(head)
            found = {name: there.get(f"{head}/{name}") for name in remote.documents(head)}
            bring(folder, store, head, {name: one for name, one in found.items() if one})
            if which is not None:
                _bring_asked(folder, remote, head, which)
            elif best := remote.read(f"{head}/checkpoints/best.json"):
                folder.checkpoints.mkdir(exist_ok=True)  # without weights: a receipt names them
                _point(folder, "best", best["path"], best["sha256"])
    return folder


def onlooker(url: str, *, brief: bool = False) -> Onlooker:
    """A run on a bucket, to be looked at again and again; `brief` is for a list of runs."""
    runs, _, name = url.rstrip("/").rpartition("/")
    place = local_root(runs) / ("listed" if brief else "watched") / name
    return Onlooker(url, place, brief=brief)


def names(url: str) -> list[str]:
    """The runs on a bucket."""
    store = Store(url)
    store.reach()
    with _one_line(url):
        return runs_below(store)


def _close(name: str, runs: str) -> str:
    if not is_url(runs + "/"):
        return ""
    there = names(runs)
    return config.nearest(name, there) if there else f"; {runs} holds no runs yet"


# ---------------------------------------------------------------- which of the two is ahead


def _here(folder: RunFolder) -> str | None:
    """The attempt that wrote this folder; None where nothing was begun, or restoring was cut."""
    found = identity_of(folder.read_json(OWNER)) if folder.exists() else None
    return found.prefix if found else None


def _overtaken(here: str, head: str) -> bool:
    """Whether another attempt, not older than this folder's, has sent its documents."""
    return head != here and attempt_of(head) >= attempt_of(here)


def _bring_newer(folder: RunFolder, remote: Remote, here: str) -> bool:
    """A checkpoint that this folder sent and has lost."""
    there = {key: age for key, age in remote.checkpoints.items() if key[0] == here}
    newer = [key for key in there if there[key] > _newest_age(folder)]
    return bool(newer) and _bring_newest(folder, remote, newer) is not None


def _newest_age(folder: RunFolder) -> tuple[int, int]:
    here = local_checkpoints(folder)
    return age((here[0] / MARKER).read_bytes(), here[0].name) if here else (0, 0)


def _set_aside(folder: RunFolder) -> Path:
    number = 1
    while (kept := folder.path.with_name(f"{folder.path.name}.{number}")).exists():
        number += 1
    folder.close()
    os.replace(folder.path, kept)
    return kept


# ---------------------------------------------------------------- bring


def _bring(folder: RunFolder, remote: Remote, head: str | None) -> bool:
    """All that a folder with nothing of its own needs to go on."""
    for path in local_checkpoints(folder):  # of a restore that was cut; what is whole stays
        if not _is_of(path, remote):
            shutil.rmtree(path)
    if head is not None:
        _bring_documents(folder, remote, head)
    there = list(remote.checkpoints)
    newest = _bring_newest(folder, remote, there)
    if there and newest is None:
        raise Fault(
            f"all {len(there)} checkpoints on {remote.store.url} are damaged (events.jsonl says "
            f"how); restore one from a copy, or start over with another name"
        )
    if head is not None:
        _bring_best(folder, remote, head)
    _note(folder, remote, _left(remote, folder))
    return head is not None or newest is not None


def _bring_documents(folder: RunFolder, remote: Remote, head: str) -> None:
    """Documents and lines of an attempt; what it has not is not here either."""
    folder.close()  # lines that are open would go on in the old file
    found = remote.documents(head)
    for name in documents(folder).keys() - set(found):
        folder.file(name).unlink()
    for name in [n for n in found if n != "run.json"] + ["run.json"]:
        target = folder.file(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.fetch")
        remote.store.fetch(f"{head}/{name}", aside)
        os.replace(aside, target)


def _bring_newest(folder: RunFolder, remote: Remote, there: list[tuple[str, str]]) -> str | None:
    """The first that is whole; each that is not is told of. `last` points at it."""
    for prefix, name in there:
        try:
            _point(folder, "last", name, bring_checkpoint(folder, remote, prefix, name))
        except Damaged as error:
            _tell(folder, remote, prefix, name, error)
            continue
        return name
    return None


def _bring_best(folder: RunFolder, remote: Remote, head: str) -> None:
    """What the best pointer of the newest attempt names, where it is whole."""
    best = remote.read(f"{head}/checkpoints/best.json")
    for prefix, name in remote.checkpoints if best else ():
        if name == best["path"]:
            try:
                sha256 = bring_checkpoint(folder, remote, prefix, name)
            except Damaged as error:
                _tell(folder, remote, prefix, name, error)
                continue
            if sha256 == best["sha256"]:
                return _point(folder, "best", name, sha256)
    if best:
        folder.event("best_lost", f"{best['path']} is not on the bucket", path=best["path"])


def _bring_asked(folder: RunFolder, remote: Remote, head: str, which: str) -> None:
    """The one checkpoint that a person asked for."""
    there = list(remote.checkpoints)
    steps = ", ".join(str(s) for s in sorted({step_of(name) for _, name in there})) or "none"
    if which == "last" and there:
        name = there[0][1]
    elif which == "best" and (best := remote.read(f"{head}/checkpoints/best.json")):
        name = best["path"]
    elif which.isascii() and which.isdigit():
        name = f"step_{int(which):08d}"
    else:
        name = ""
    found = [(prefix, each) for prefix, each in there if each == name]
    if not found:
        url = remote.store.url
        raise UserError(f"--checkpoint {which}: not on {url}; steps there: {steps}")
    for path in local_checkpoints(folder):
        if not _is_of(path, remote):
            shutil.rmtree(path)
    try:
        sha256 = bring_checkpoint(folder, remote, *found[0])
    except Damaged as error:
        raise Fault(
            f"checkpoint {name} on {remote.store.url} is damaged: {error}; use another "
            f"(--checkpoint), there are steps {steps}"
        ) from None
    if which in ("best", "last"):
        _point(folder, which, name, sha256)


def bring_checkpoint(folder: RunFolder, remote: Remote, prefix: str, name: str) -> str:
    """Bring one checkpoint and compare every file with its sha256; gives that of the weights.

    Raises Damaged. It appears here complete or not at all.
    """
    source, final = f"{prefix}/checkpoints/{name}", folder.checkpoints / name
    marker = remote.store.read(f"{source}/{MARKER}")
    if marker is None:
        raise Damaged(f"{MARKER} is missing")
    files = entries(marker)
    if _same(final, marker):
        return weights_sha256(files)
    aside = folder.checkpoints / f".{name}.fetch"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for file, entry in files.items():
            _bring_file(remote, f"{source}/{file}", aside / file, entry.sha256)
        (aside / MARKER).write_bytes(marker)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return weights_sha256(files)


def _bring_file(remote: Remote, name: str, local: Path, sha256: str) -> None:
    if name not in remote.objects:
        raise Damaged(f"{local.name} is missing")
    try:
        remote.store.fetch(name, local)
    except FileNotFoundError:
        raise Damaged(f"{local.name} is missing") from None
    if file_sha256(local) != sha256:
        raise Damaged(f"{local.name} does not match its sha256")


def _same(path: Path, marker: bytes) -> bool:
    """Whether a checkpoint is here already. Its files were compared when it came."""
    return (path / MARKER).exists() and (path / MARKER).read_bytes() == marker


def _is_of(path: Path, remote: Remote) -> bool:
    """Whether a checkpoint here is one on the bucket."""
    there = [prefix for prefix, name in remote.checkpoints if name == path.name]
    markers = (remote.store.read(f"{p}/checkpoints/{path.name}/{MARKER}") for p in there)
    return any(marker is not None and _same(path, marker) for marker in markers)


def _point(folder: RunFolder, pointer: str, name: str, sha256: str) -> None:
    found = {"step": step_of(name), "path": name, "sha256": sha256}
    write_text(folder.checkpoints / f"{pointer}.json", json.dumps(found) + "\n")


def _tell(folder: RunFolder, remote: Remote, prefix: str, name: str, error: Damaged) -> None:
    message = f"{name} of {prefix} on {remote.store.url} is damaged and passed over: {error}"
    folder.event("checkpoint_damaged", message, path=name)
    Live().say(message)


# ---------------------------------------------------------------- what stays there


def _left(remote: Remote, folder: RunFolder) -> dict[str, str]:
    """Older checkpoints that the run keeps (milestones) and that did not come: where they are."""
    newest, brought = _newest_age(folder), {path.name for path in local_checkpoints(folder)}
    read = (remote.read(f"{prefix}/{KEPT}") for prefix in remote.prefixes())
    kept: list[str] = next((names for names in read if names), [])
    left: dict[str, str] = {}
    for (prefix, name), made in remote.checkpoints.items():
        if name in kept and name not in brought and made < newest:
            left.setdefault(name, prefix)
    return left


def _note(folder: RunFolder, remote: Remote, left: dict[str, str]) -> None:
    """Keep what the next attempt's mirror must know, and what an earlier restore left there."""
    before = folder.read_json(NOTE)
    attempt = max(remote.owner.attempt, before["attempt"] if before else 0)
    left = left or (before["left"] if before else {})
    folder.write_json(NOTE, {"attempt": attempt, "left": left})


@contextmanager
def _one_line(url: str) -> Iterator[None]:
    """A bucket that goes away at the start is the person's to mend."""
    try:
        yield
    except Away as error:
        raise UserError(f"{error}; check the network, then run the same command") from error
