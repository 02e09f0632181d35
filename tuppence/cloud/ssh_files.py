"""What goes to a machine of one's own, and what comes back: text, code, and the run folder.

A file that comes back is written aside, compared with the machine's sha256, and renamed; one that
is here already with that sha256 is not brought again.
"""

import glob
import hashlib
import json
import os
import shlex
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tuppence.bucket.layout import MARKER, entries, step_of, weights_sha256
from tuppence.cloud.ssh_host import Host
from tuppence.errors import Fault, UserError
from tuppence.files import file_sha256
from tuppence.folder import RunFolder, write_text
from tuppence.store import is_url
from tuppence.text.sources import CORPORA

CHECKPOINTS = "checkpoints/"
LAST = "checkpoints/last.json"
OPTIMIZER = "optimizer"
GROWING = ("ledger", "metrics", "events", "evals", "samples", "heartbeat", "attempt")
NAMES_AT_ONCE = 400
BLOCK_BYTES = 1 << 20
UNPACK = """set -e
mkdir -p {folder} && cd {folder}
rm -rf .new && mkdir -p .new/kit && tar -xf - -C .new
tar -xzf .new/code.tar.gz -C .new/kit && rm .new/code.tar.gz
rm -rf kit && mv .new/* . && rmdir .new
"""


# ---------------------------------------------------------------- there


@dataclass(frozen=True)
class Sent:
    """Text of this disk: (name there, file here), and `source` as the machine finds it."""

    source: str
    place: str
    files: tuple[tuple[str, Path], ...]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for _, path in self.files)


def own_text(source: str, folder: str) -> Sent | None:
    """What of `data.source` lies on this disk; None where nothing does: names of corpora, URLs,
    and paths that are that machine's."""
    parts = [part.strip() for part in source.split(",")]
    found = [_found(part, f"{number:02d}") for number, part in enumerate(parts)]
    files = [file for part in found if part is not None for file in part[1]]
    if not files:
        return None
    digest = hashlib.sha256()
    for name, path in files:
        stat = path.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    place = f"{folder}/text-{digest.hexdigest()[:12]}"
    there = [
        part if seen is None else f"{place}/{seen[0]}"
        for part, seen in zip(parts, found, strict=True)
    ]
    return Sent(",".join(there), place, tuple(files))


def _found(part: str, under: str) -> tuple[str, list[tuple[str, Path]]] | None:
    """What `part` is called there, and its files; None where it is not of this disk."""
    if is_url(part) or "://" in part or part in CORPORA or not part:
        return None
    path = Path(part).expanduser()
    if path.is_file():
        return f"{under}/{path.name}", [(f"{under}/{path.name}", path)]
    if path.is_dir():
        inside = [each for each in sorted(path.rglob("*")) if each.is_file()]
        return under, [(f"{under}/{each.relative_to(path).as_posix()}", each) for each in inside]
    matches = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
    files = [each for each in matches if each.is_file()]
    if not files:
        return None
    root = Path(os.path.commonpath([each.parent for each in files]))
    return under, [(f"{under}/{each.relative_to(root).as_posix()}", each) for each in files]


def send_text(host: Host, own: Sent) -> bool:
    """False where it is there already."""
    place = shlex.quote(own.place)
    there = host.test(f"[ -d {place} ]")
    if not there:
        aside = f"{place}.part"
        host.send(
            own.files,
            f"set -e; rm -rf {aside}; mkdir -p {aside}; tar -xf - -C {aside}; mv {aside} {place}",
        )
    return not there


def send_job(host: Host, folder: str, *, code: Path, job: str, words: str) -> None:
    """The code, and what is started."""
    with tempfile.TemporaryDirectory() as aside:
        files = [("code.tar.gz", code)]
        for name, text in (("job.sh", job), ("words", words)):
            (Path(aside) / name).write_text(text + "\n", encoding="utf-8")
            files.append((name, Path(aside) / name))
        host.send(files, UNPACK.format(folder=shlex.quote(folder)))


def send_secrets(host: Host, folder: str, secrets: dict[str, str]) -> None:
    """By stdin, into a file that only the user may read and that the job removes as it begins."""
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in secrets.items())
    host.send(text.encode(), f"umask 077; cat >{shlex.quote(folder)}/secrets")


# ---------------------------------------------------------------- and back


def bring_run(
    host: Host, folder: str, name: str, to: Path, *, checkpoint: str = "best"
) -> dict[str, int]:
    """The run's documents and one checkpoint; how many files and bytes were brought. `checkpoint`
    is best (its weights alone), last, all, none or a step. Raises UserError, Fault."""
    sizes = run_files(host, folder, name)
    if "run.json" not in sizes:
        raise UserError(f"{host.name} has no run {name} in {folder} yet; see its log")
    there = _Run(host, folder, name, to, sizes)
    brought = bring(there, [each for each in sizes if _is_document(each)])
    for each in _meant(there, checkpoint):
        brought += _bring_checkpoint(there, each, weights_only=checkpoint == "best")
    _point_at_last(to)
    return {"files": len(brought), "bytes": sum(sizes[each] for each in brought)}


@dataclass(frozen=True)
class _Run:
    """A run folder there, `to` where it comes, and the bytes of each of its files."""

    host: Host
    folder: str
    name: str
    to: Path
    sizes: dict[str, int]


def run_files(host: Host, folder: str, name: str) -> dict[str, int]:
    """Names and bytes of the run folder's files there."""
    found = {}
    for line in host.ask("files", folder, name).get("file", []):
        size, _, path = line.partition(" ")
        found[path] = int(size)
    return found


def bring(there: _Run, wanted: Iterable[str]) -> list[str]:
    """Bring these files of the run folder; gives the names of those that were not here."""
    names, brought = list(wanted), []
    for first in range(0, len(names), NAMES_AT_ONCE):
        sums = _sums(there, names[first : first + NAMES_AT_ONCE])
        missing = [each for each in sums if _differs(there.to / each, sums[each])]
        if missing:
            _take(there, missing, sums)
            brought += missing
    return brought


def _sums(there: _Run, names: list[str]) -> dict[str, str]:
    lines = there.host.ask("sums", there.folder, there.name, *names).get("sum", [])
    return {path: sha for sha, _, path in (line.partition("  ") for line in lines)}


def _differs(path: Path, sha: str) -> bool:
    return not path.is_file() or file_sha256(path) != sha


def _take(there: _Run, names: list[str], sums: dict[str, str]) -> None:
    left = set(names)
    with there.host.stream("take", there.folder, there.name, *names) as stream:
        try:
            with tarfile.open(fileobj=stream.file(), mode="r|") as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if member.name in left and content is not None:  # nothing that was not asked
                        _write(there.to / member.name, content, sums[member.name])
                        left.discard(member.name)
        except tarfile.TarError:
            pass  # the connection's end is told below
        stream.check()
    if left:
        raise Fault(
            f"{len(left)} file(s) of {there.name} did not come from {there.host.name}; fetch again"
        )


def _write(path: Path, content: IO[bytes], sha: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, digest = path.with_name(f".{path.name}.part"), hashlib.sha256()
    with aside.open("wb") as file:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != sha and not path.name.startswith(GROWING):
        aside.unlink()
        raise Fault(f"{path.name} did not arrive whole; fetch again")
    os.replace(aside, path)


def _is_document(name: str) -> bool:
    """All but checkpoints, and the pointer at the last: it points at the last that is here."""
    inside = name.startswith(CHECKPOINTS) and name.count("/") > 1
    return not inside and name != LAST and not name.endswith((".lock", ".tmp", "/lock"))


def _meant(there: _Run, which: str) -> list[str]:
    """Names of the checkpoints that are meant."""
    markers = [each for each in there.sizes if each.endswith(f"/{MARKER}")]
    whole = sorted(each.split("/")[1] for each in markers if each.startswith(CHECKPOINTS))
    if which == "none":
        return []
    if which == "all":
        return whole
    if which in ("best", "last"):
        if f"{CHECKPOINTS}{which}.json" not in there.sizes:
            return []
        bring(there, [f"{CHECKPOINTS}{which}.json"])
        step = RunFolder(there.to).read_json(f"{CHECKPOINTS}{which}.json")["step"]
    elif which.isdigit():
        step = int(which)
    else:
        raise UserError(f"--checkpoint {which}: best, last, all, none or a step")
    if f"step_{step:08d}" not in whole:
        steps = ", ".join(str(step_of(each)) for each in whole)
        raise UserError(f"--checkpoint {which}: there are those of steps {steps}")
    return [f"step_{step:08d}"]


def _bring_checkpoint(there: _Run, name: str, *, weights_only: bool) -> list[str]:
    """Its files, and then what makes them a checkpoint: checkpoint.json, which lists no optimizer
    where none was brought."""
    place = f"{CHECKPOINTS}{name}/"
    files = [each for each in there.sizes if each.startswith(place) and each != place + MARKER]
    wanted = [each for each in files if not (weights_only and each.startswith(place + OPTIMIZER))]
    brought = bring(there, wanted)
    marker = there.to / place / MARKER
    if weights_only and not brought and marker.is_file():
        return []
    brought += bring(there, [place + MARKER])
    if any(not (there.to / each).is_file() for each in files):
        content = json.loads(marker.read_text(encoding="utf-8"))
        kept = {n: e for n, e in content["files"].items() if not n.startswith(OPTIMIZER)}
        write_text(marker, json.dumps({**content, "files": kept}, indent=2) + "\n")
    return brought


def _point_at_last(to: Path) -> None:
    markers = sorted((to / CHECKPOINTS).glob(f"step_*/{MARKER}"))
    if markers:
        name = markers[-1].parent.name
        sha256 = weights_sha256(entries(markers[-1].read_bytes()))
        pointer = {"step": step_of(name), "path": name, "sha256": sha256}
        write_text(to / LAST, json.dumps(pointer) + "\n")
