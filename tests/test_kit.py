"""The kit: the same files have the same name, and arrive on the store once and whole."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from bucket_runs import objects, store_at

from tuppence.cloud import kit
from tuppence.errors import Fault, UserError
from tuppence.store import Away, Store

pytest_plugins = ["bucket_places"]


def names_in(path: Path) -> set[str]:
    with tarfile.open(path) as tar:
        return set(tar.getnames())


def test_what_is_in_it(tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text("x = 1\n")
    made = kit.make_kit(own)
    names = names_in(made.path)
    wanted = {"tuppence/cli.py", "tuppence/assets/node.sh", "requirements/base.txt", "own/mine.py"}
    assert wanted <= names
    assert made.recipe == "own/mine.py"
    assert "requirements/dev.txt" not in names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("/", ".."))]
    with tarfile.open(made.path) as tar:
        base = tar.extractfile("requirements/base.txt")
        bucket = tar.extractfile("requirements/bucket.txt")
        sha = tar.extractfile("KIT")
        assert base is not None
        assert bucket is not None
        assert sha is not None
        assert any(line.startswith(b"torch>=") for line in base.readlines())
        assert any(line.startswith(b"s3fs") for line in bucket.readlines())
        assert sha.read().decode().strip() == made.sha
        assert {(member.mtime, member.uid) for member in tar} == {(0, 0)}


def test_the_same_files_have_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "mine.py"
    own.write_text("x = 1\n")
    first, content = kit.make_kit(own), kit.make_kit(own).path.read_bytes()
    os.utime(own, (1, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    again = kit.make_kit(own)
    assert (again.sha, again.path.read_bytes()) == (first.sha, content)
    assert again.path != first.path
    own.write_text("x = 2\n")
    assert kit.make_kit(own).sha != first.sha
    assert kit.make_kit().sha != first.sha


def test_what_pip_noted_is_what_pyproject_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is installed and not a checkout there is no pyproject.toml."""
    project = kit._project()
    assert project is not None
    noted = [f"{name}" for name in project[0]]
    noted += [f"{n}; extra == '{extra}'" for extra, ns in project[1].items() for n in ns]
    monkeypatch.setattr(kit.importlib.metadata, "requires", lambda name: noted)
    assert kit._installed() == project


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no such file"):
        kit.make_kit(tmp_path / "none.py")


def test_to_a_folder(tmp_path: Path) -> None:
    made = kit.make_kit()
    assert kit.send_kit(str(tmp_path), made)
    place = Path(kit.place_of(str(tmp_path), made.sha))
    assert {path.name for path in place.iterdir()} == {"code.tar.gz", "node.sh"}
    before = place.joinpath("code.tar.gz").stat()
    assert not kit.send_kit(f"{tmp_path}/", made)
    assert place.joinpath("code.tar.gz").stat() == before
    place.joinpath("code.tar.gz").write_bytes(b"half")
    assert kit.send_kit(str(tmp_path), made)
    assert place.joinpath("code.tar.gz").read_bytes() == made.path.read_bytes()


def test_to_a_bucket(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, sends = kit.make_kit(), []
    send = Store.send

    def counted(self: Store, local: Path, name: str, digest: Any) -> None:
        sends.append(name)
        send(self, local, name, digest)

    monkeypatch.setattr(Store, "send", counted)
    assert kit.send_kit(url, made)
    assert sends == ["node.sh", "code.tar.gz"]  # the last says that all of it is there
    assert not kit.send_kit(url, made)
    assert objects(url) == {f"kit/{made.sha}/{name}" for name in ("node.sh", "code.tar.gz")}
    assert store_at(url).read(f"kit/{made.sha}/code.tar.gz") == made.path.read_bytes()
    store_at(url).write(f"kit/{made.sha}/code.tar.gz", b"half")
    assert kit.send_kit(url, made)


def test_a_store_that_is_away_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise Away("no network")

    monkeypatch.setattr(Store, "send", away)
    with pytest.raises(Fault, match="the code could not be sent"):
        kit.send_kit(s3, kit.make_kit())
