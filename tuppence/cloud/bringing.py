"""A run's folder brought home from its store: every file compared, nothing fetched twice.

    STORE/runs/NAME on a bucket ┐
    STORE/runs/NAME in a folder ┴─▶ Found ──documents, tokenizer, one checkpoint──▶ RUNS/NAME

A document is whole when the store says the same of it as of what came; a checkpoint when each file
has the sha256 that its checkpoint.json says. Of the best checkpoint the weights alone come, for the
optimizer's state is twice as large and only training on needs it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tuppence.bucket.layout import (
    MARKER,
    STEP,
    SUFFIXES,
    Damaged,
    entries,
    look,
    step_of,
    weights_sha256,
)
from tuppence.cloud import record
from tuppence.cloud.store_made import opened
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256
from tuppence.folder import write_text
from tuppence.live import Live
from tuppence.plan.stages import GB
from tuppence.store import Store

BROUGHT = ".fetched.json"  # in the folder here: which run it is a copy of
MINE = (
    record.FILE,
    "guard.jsonl",
    "standing.json",
    "bucket.json",
    "attempt.json",
    "heartbeat.json",
)  # no copies
TRIES = 3  # at a document that changes while it comes
OPTIMIZER = "optimizer"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A run on a store: objects by the name that each has in a run folder. `checkpoints` are the
    complete ones by name, the newest first, with where they lie."""

    store: Store
    documents: dict[str, str]
    checkpoints: dict[str, str]
    pointers: dict[str, str] = field(default_factory=dict)

    def pointed(self, which: str) -> str | None:
        """The checkpoint that `best` or `last` names."""
        content = self.store.read(self.pointers[which]) if which in self.pointers else None
        try:
            return None if content is None else str(json.loads(content)["path"])
        except (ValueError, KeyError, TypeError):
            raise Fault(f"{which}.json on {self.store.url} is damaged: not JSON") from None


@dataclass
class Came:
    """What was brought, and what was here already."""

    bytes: int = 0
    files: int = 0
    same: int = 0
    checkpoints: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- there


def found(url: str) -> Found:
    """The run at a place, on a bucket or in a folder. Raises UserError where there is none."""
    store = opened(url)
    store.reach()
    if store.entry("run.json") is not None:
        return _in_folder(store)
    remote = look(store)
    head = remote.head() if remote else None
    if remote is None or head is None:
        raise UserError(f"no run on {url} yet: nothing of it has arrived")
    documents = {name: f"{head}/{name}" for name in remote.documents(head)}
    others = {n: n for n in remote.objects if n.startswith("evaluations/")}
    where: dict[str, str] = {}
    for prefix, name in remote.checkpoints:
        where.setdefault(name, f"{prefix}/checkpoints/{name}")
    pointers = {which: f"{head}/checkpoints/{which}.json" for which in ("best", "last")}
    there = {w: name for w, name in pointers.items() if name in remote.objects}
    return Found(store, _plain({**documents, **others}), where, there)


def _in_folder(store: Store) -> Found:
    """A plain run folder that lies elsewhere."""
    names = store.find()
    small = (n for n in names if _is_document(PurePosixPath(n)))
    marked = (PurePosixPath(n).parts for n in names if n.endswith(f"/{MARKER}"))
    steps = [p[1] for p in marked if len(p) == 3 and p[0] == "checkpoints" and STEP.fullmatch(p[1])]
    newest_first = sorted(steps, key=step_of, reverse=True)
    pointers = {w: f"checkpoints/{w}.json" for w in ("best", "last")}
    return Found(
        store,
        _plain({name: name for name in small}),
        {name: f"checkpoints/{name}" for name in newest_first},
        {w: name for w, name in pointers.items() if name in names},
    )


def _is_document(name: PurePosixPath) -> bool:
    if any(part.startswith(".") for part in name.parts):
        return False
    top = len(name.parts) == 1 and name.suffix in SUFFIXES
    return top or name.parts[0] in ("tokenizer", "evaluations")


def _plain(names: dict[str, str]) -> dict[str, str]:
    """Without what is another machine's own, and what would lie outside a folder."""
    return {
        name: there
        for name, there in names.items()
        if name not in MINE and ".." not in PurePosixPath(name).parts
    }


# ---------------------------------------------------------------- brought


def bring(there: Found, folder: Path, *, which: str, say: Say) -> Came:
    """Documents and what `which` names: best (weights alone), last, a step, all or none.

    Again after an interruption brings what is missing. Raises UserError where the folder is
    another run's or there is no such checkpoint, Fault where something is damaged there.
    """
    wanted = _wanted(there, which)
    _check_ours(there, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / BROUGHT, json.dumps({"url": there.store.url}) + "\n")
    came, live = Came(), Live()
    last = [n for n in there.documents if n != "run.json"] + ["run.json"]  # then it is a run folder
    for name in last:
        if name in there.documents:
            live.show(f"fetching {name}")
            _document(there, name, folder / name, came)
    for name in wanted:
        live.show(f"fetching {name}")
        _checkpoint(there, name, folder, came, weights_only=which == "best")
    live.clear()
    _pointers(there, folder, wanted)
    return came


def _wanted(there: Found, which: str) -> list[str]:
    steps = ", ".join(str(step_of(n)) for n in sorted(there.checkpoints, key=step_of)) or "none"
    if which == "none":
        return []
    if which == "all":
        return list(there.checkpoints)
    if which == "last":
        name = next(iter(there.checkpoints), None)
    elif which == "best":
        name = there.pointed("best")
        if name is None and not there.checkpoints:
            return []  # an early run has none, and its documents are worth having
    else:
        digits = which.isascii() and which.isdigit()
        name = f"step_{int(which):08d}" if digits else None
    if name not in there.checkpoints:
        raise UserError(
            f"--checkpoint {which}: not on {there.store.url}; write best, last, all, none or one "
            f"of the steps {steps}"
        )
    return [name]


def _check_ours(there: Found, folder: Path) -> None:
    """A folder that holds another run stays as it is."""
    if not (folder / "run.json").exists():
        return
    note = folder / BROUGHT
    url = json.loads(note.read_text())["url"] if note.exists() else None
    if url != there.store.url:
        raise UserError(f"{folder} holds a run that was not fetched from there; name --out DIR")


def _document(there: Found, name: str, local: Path, came: Came) -> None:
    """One document, as the store has it now."""
    source = there.documents[name]
    if local.is_file() and there.store.holds(source, there.store.digest(local)):
        came.same += 1
        return
    local.parent.mkdir(parents=True, exist_ok=True)
    aside = local.with_name(f".{local.name}.fetch")
    for _ in range(TRIES):
        try:
            there.store.fetch(source, aside)
        except FileNotFoundError:  # a run that goes on has replaced it by a newer attempt's
            return
        grows = there.store.protocol == "file" and local.suffix == ".jsonl"
        if grows or there.store.holds(source, there.store.digest(aside)):
            os.replace(aside, local)
            came.files, came.bytes = came.files + 1, came.bytes + local.stat().st_size
            return
    aside.unlink()
    raise Fault(f"{name} on {there.store.url} does not arrive as it is there; try again")


def _checkpoint(there: Found, name: str, folder: Path, came: Came, *, weights_only: bool) -> None:
    """One checkpoint: complete here, with its weights alone or whole, or not here at all."""
    source, final = there.checkpoints[name], folder / "checkpoints" / name
    marker = there.store.read(f"{source}/{MARKER}")
    try:
        files = entries(marker or b"")
    except Damaged as error:
        raise _damaged(there, name, str(error)) from None
    came.checkpoints.append(name)
    here = final / MARKER
    if here.exists() and here.read_bytes() in (marker, *([_light(marker)] * weights_only)):
        came.same += len(files)
        return
    aside = folder / "checkpoints" / f".{name}.fetch"
    aside.mkdir(parents=True, exist_ok=True)
    for file in _chosen(files, weights_only):
        local = aside / file
        if local.is_file() and file_sha256(local) == files[file].sha256:
            came.same += 1  # of a fetch that was interrupted
            continue
        try:
            there.store.fetch(f"{source}/{file}", local)
        except FileNotFoundError:
            raise _damaged(there, name, f"{file} is missing") from None
        if file_sha256(local) != files[file].sha256:
            local.unlink()
            raise _damaged(there, name, f"{file} does not match its sha256")
        came.files, came.bytes = came.files + 1, came.bytes + files[file].bytes
    assert marker is not None
    (aside / MARKER).write_bytes(_light(marker) if weights_only else marker)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)


def _chosen(files: object, weights_only: bool) -> Iterator[str]:
    assert isinstance(files, dict)
    return (name for name in files if not (weights_only and name.startswith(OPTIMIZER)))


def _light(marker: bytes | None) -> bytes:
    """checkpoint.json without the optimizer's files."""
    content = json.loads(marker or b"{}")
    files = content.get("files", {})
    content["files"] = {name: files[name] for name in _chosen(files, True)}
    return json.dumps(content, indent=2).encode() + b"\n"


def _damaged(there: Found, name: str, why: str) -> Fault:
    steps = ", ".join(str(step_of(n)) for n in there.checkpoints if n != name) or "none"
    return Fault(
        f"checkpoint {name} on {there.store.url} is damaged: {why}; --checkpoint takes another, "
        f"there are steps {steps}"
    )


def _pointers(there: Found, folder: Path, wanted: list[str]) -> None:
    """`best` and `last` here: the first as there, also without its weights, for a receipt names
    them; the second the newest that is here."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    best = there.store.read(there.pointers["best"]) if "best" in there.pointers else None
    if best is not None:
        write_text(checkpoints / "best.json", best.decode())
    if not wanted:
        return
    newest = max(wanted, key=step_of)
    sha256 = weights_sha256(entries((checkpoints / newest / MARKER).read_bytes()))
    pointer = {"step": step_of(newest), "path": newest, "sha256": sha256}
    write_text(checkpoints / "last.json", json.dumps(pointer) + "\n")


def words(came: Came, folder: Path, usd: float) -> str:
    """What came, and what it cost."""
    what = ", ".join(came.checkpoints) or "no checkpoint"
    cost = f"; ${usd:.2f} of egress" if usd >= 0.005 else ""
    return f"{folder}: {came.files} files, {came.bytes / GB:.3g} GB ({what}){cost}"
