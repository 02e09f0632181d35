"""The kit: what a machine needs to run this very code. Made here, sent to the store once.

    STORE/kit/SHA/code.tar.gz     tuppence/ requirements/ own/ KIT: unpacked it runs as it is
    STORE/kit/SHA/node.sh         what a task calls; it unpacks the other (assets/node.sh)
    STORE/kit/SHA/env-x86_64.tar  the environment, packed by the first machine that built it

SHA is over names and contents of what code.tar.gz holds, so the same files have the same name on
the store whoever packed them. `requirements/base.txt` and one file an extra say what to install.
"""

import gzip
import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import tarfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tuppence.errors import Fault, UserError
from tuppence.files import asset
from tuppence.plan.hardware import cache_folder
from tuppence.store import Away, Store, is_url

PACKAGE = Path(__file__).resolve().parents[1]
CODE, NODE = "code.tar.gz", "node.sh"
LEFT_OUT = ("__pycache__",)


@dataclass(frozen=True)
class Kit:
    """Code ready to be sent. `recipe` is the person's own file as machines find it, if any."""

    sha: str
    path: Path
    recipe: str | None


def make_kit(recipe_file: Path | None = None) -> Kit:
    """Pack the package, and a recipe file of the person's own. Raises UserError where that file is
    not there."""
    files = _package() | _requirements()
    recipe = None
    if recipe_file is not None:
        if not recipe_file.is_file():
            raise UserError(f"recipe {recipe_file}: there is no such file")
        recipe = f"own/{recipe_file.name}"
        files[recipe] = recipe_file.read_bytes()
    sha = _sha(files)
    files["KIT"] = f"{sha}\n".encode()
    path = cache_folder() / "kits" / sha / CODE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{CODE}.{os.getpid()}")  # another launch may be packing it now
        aside.write_bytes(_packed(files))
        os.replace(aside, path)
    return Kit(sha, path, recipe)


def place_of(store: str, sha: str) -> str:
    """Where a kit lies on a store: a URL, or a folder's path."""
    return f"{store.rstrip('/')}/kit/{sha}"


def send_kit(store: str, kit: Kit) -> bool:
    """Put the kit on the store; False where it was there already. Raises Fault or UserError."""
    files = {
        NODE: asset(NODE),
        CODE: kit.path,
    }  # in this order: code.tar.gz means that all is there
    if not is_url(store):
        return _to_folder(Path(place_of(store, kit.sha)), files)
    there = Store(place_of(store, kit.sha))
    sent = False
    try:
        for name, path in files.items():
            digest = there.digest(path)
            if not there.holds(name, digest):
                there.send(path, name, digest)
                sent = True
    except Away as error:
        raise Fault(f"the code could not be sent to {store}: {there.advice(error)}") from error
    return sent


def _to_folder(folder: Path, files: dict[str, Path]) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    sent = False
    for name, path in files.items():
        there = folder / name
        if not there.exists() or there.read_bytes() != path.read_bytes():
            aside = folder / f".{name}.{os.getpid()}"
            shutil.copyfile(path, aside)
            os.replace(aside, there)
            sent = True
    return sent


# ---------------------------------------------------------------- what is in it


def _package() -> dict[str, bytes]:
    """The package's own files: sources and assets."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file())
    names = {path.relative_to(PACKAGE): path for path in files}
    return {
        f"tuppence/{name.as_posix()}": path.read_bytes()
        for name, path in names.items()
        if not any(part in LEFT_OUT or part.startswith(".") for part in name.parts)
    }


def _requirements() -> dict[str, bytes]:
    """What to install: `requirements/base.txt`, and a file for each extra."""
    base, extras = _project() or _installed()
    lists = {"base": base, **{k: v for k, v in extras.items() if k != "dev"}}
    return {
        f"requirements/{name}.txt": ("\n".join(wanted) + "\n").encode()
        for name, wanted in lists.items()
    }


def _project() -> tuple[list[str], dict[str, list[str]]] | None:
    """From pyproject.toml beside the package: a checkout."""
    path = PACKAGE.parent / "pyproject.toml"
    if not path.is_file():
        return None
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != "tuppence":
        return None
    return project["dependencies"], project["optional-dependencies"]


def _installed() -> tuple[list[str], dict[str, list[str]]]:
    """From what pip noted when the package was installed."""
    base: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("tuppence") or []:
        wanted, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        (extras.setdefault(extra[1], []) if extra else base).append(wanted)
    return base, extras


def _sha(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name]
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _packed(files: dict[str, bytes]) -> bytes:
    """A tar.gz without times, owners or order of its own."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0) as zipped,
        tarfile.open(mode="w", fileobj=zipped, format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(files[name]), 0o644
            tar.addfile(entry, io.BytesIO(files[name]))
    return out.getvalue()
