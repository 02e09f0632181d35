"""The field's data, from wherever it comes: the right bytes, or one line that says what is not."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
import os
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from small_corpora import SHARED

from tuppence.errors import Fault, UserError
from tuppence.evals import bundle
from tuppence.evals.bundle import CORE_URL, core_bundle, core_files, core_tasks, hellaswag_rows
from tuppence.text import remote

if TYPE_CHECKING:
    from hub_server import Hub

pytest_plugins = ["hub_server"]
ARCHIVE, SWAG = SHARED / "core_eval.tar.xz", SHARED / "hellaswag_val.jsonl.xz"


def quiet(text: str) -> None:
    pass


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A bundle of made-up content, which is taken for the standard one here."""
    content = {name: json.dumps({"file": name}).encode() * 3 for name in core_files()}
    expected = {
        name: bundle.File(len(data), hashlib.sha256(data).hexdigest())
        for name, data in content.items()
    }
    monkeypatch.setattr(bundle, "core_files", lambda: expected)
    return content


def as_folder(place: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def as_zip(content: dict[str, bytes], root: str = "eval_bundle/") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(f"__MACOSX/{root}._{Path(name).name}", b"of a Mac")
            archive.writestr(f"{root}{name}", data)
    return packed.getvalue()


def as_tar(content: dict[str, bytes], mode: str, root: str = "core_eval/") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(f"{root}{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def given(place: Path, content: dict[str, bytes], kind: str) -> Path:
    """The content as a person may have it."""
    if kind.startswith("folder"):
        as_folder(place / kind.partition(" ")[2], content)
        return place
    path = place / "bundle"
    path.write_bytes(as_zip(content) if kind == "zip" else as_tar(content, f"w:{kind}"))
    return path


# ---------------------------------------------------------------- CORE, from what is given


@pytest.mark.parametrize("kind", ["folder", "folder eval_bundle", "zip", "xz", "gz"])
def test_a_bundle_in_any_form(tmp_path: Path, files: dict[str, bytes], kind: str) -> None:
    path = given(tmp_path, files, kind)
    listed = sorted(tmp_path.rglob("*"))
    found = core_bundle(str(path), say=quiet)
    for task in core_tasks():
        assert found.count(task) == 1
    assert sorted(tmp_path.rglob("*")) == listed, "nothing is unpacked"


@pytest.mark.parametrize("kind", ["folder", "zip", "xz"])
@pytest.mark.parametrize("name", ["core.yaml", "eval_data/reading_comprehension/squad.jsonl"])
def test_an_altered_file_is_named(
    tmp_path: Path, files: dict[str, bytes], kind: str, name: str
) -> None:
    path = given(tmp_path, files | {name: files[name].replace(b"f", b"F")}, kind)
    with pytest.raises(UserError, match=f"{name} is not the standard bundle's .sha256 ") as raised:
        core_bundle(str(path), say=quiet)
    assert CORE_URL in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_longer_file_is_another(tmp_path: Path, files: dict[str, bytes], kind: str) -> None:
    path = given(tmp_path, files | {"core.yaml": files["core.yaml"] + b"\n"}, kind)
    with pytest.raises(UserError, match=r"core\.yaml is not the standard bundle's"):
        core_bundle(str(path), say=quiet)


@pytest.mark.parametrize("kind", ["folder", "zip", "xz"])
def test_a_missing_file_is_named(tmp_path: Path, files: dict[str, bytes], kind: str) -> None:
    name = "eval_data/commonsense_reasoning/copa.jsonl"
    path = given(tmp_path, {key: data for key, data in files.items() if key != name}, kind)
    with pytest.raises(UserError, match=f"{name} is missing; the whole bundle is at https://"):
        core_bundle(str(path), say=quiet)


def test_members_that_lead_elsewhere_are_not_read(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(as_zip(files, root="../../"))
    with pytest.raises(UserError, match="is missing"):
        core_bundle(str(path), say=quiet)
    linked = io.BytesIO()
    with tarfile.open(fileobj=linked, mode="w") as archive:
        member = tarfile.TarInfo("core.yaml")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    path.write_bytes(linked.getvalue())
    with pytest.raises(UserError, match=r"core\.yaml is missing"):
        core_bundle(str(path), say=quiet)


DAMAGED = {
    "text": b"not an archive",
    "nothing": b"",
    "half a zip": as_zip({"core.yaml": bytes(5000)})[:-400],
    "half an xz": as_tar({"core.yaml": os.urandom(5000)}, "w:xz")[:-900],
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "b.zip"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"b\.zip cannot be read as a \.zip or \.tar") as raised:
        core_bundle(str(path), say=quiet)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value).replace(str(path), "")) < 220


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder; give CORE's bundle, from https:"):
        core_bundle(str(tmp_path / "nothing"), say=quiet)
    with pytest.raises(UserError, match="no such file; give HellaSwag's, from https:"):
        hellaswag_rows(str(tmp_path / "nothing"), say=quiet)


# ---------------------------------------------------------------- the standard bundle itself


def test_the_packages_tables_are_the_bundles() -> None:
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE.name} is not beside this checkout")
    yaml = pytest.importorskip("yaml")
    found = core_bundle(str(ARCHIVE), say=quiet)
    with tarfile.open(ARCHIVE) as archive:
        member = archive.extractfile("core_eval/core.yaml")
        metadata = archive.extractfile("core_eval/eval_meta_data.csv")
        assert member is not None
        assert metadata is not None
        listed = yaml.safe_load(member.read())["icl_tasks"]
        rows = csv.DictReader(io.StringIO(metadata.read().decode()))
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in rows}
    wanted = [
        (
            task["label"],
            task["dataset_uri"],
            task["icl_task_type"],
            task["num_fewshot"][0],
            task.get("continuation_delimiter", " "),
            0.01 * baselines[task["label"]],
        )
        for task in listed
    ]
    ours = core_tasks()
    assert wanted == [(t.label, t.file, t.kind, t.shots, t.delimiter, t.baseline) for t in ours]
    assert [found.count(task) for task in ours] == [task.items for task in ours]
    assert len(ours) == 22


# ---------------------------------------------------------------- HellaSwag


def swag_rows() -> list[dict[str, object]]:
    if not SWAG.exists():
        pytest.skip(f"{SWAG.name} is not beside this checkout")
    lines = lzma.decompress(SWAG.read_bytes()).split(b"\n")
    return [json.loads(line) for line in lines if line]


def test_hellaswag_is_known_by_its_content_however_it_is_spelled(tmp_path: Path) -> None:
    path = tmp_path / "hs.jsonl"
    rows = [
        json.dumps(
            {"label": str(row["label"]), "endings": row["endings"], "ctx": row["ctx"]},
            ensure_ascii=False,
        )
        for row in swag_rows()
    ]
    path.write_text("\n".join(rows), "utf-8")
    assert hellaswag_rows(str(path), say=quiet) == hellaswag_rows(str(SWAG), say=quiet)


@pytest.mark.parametrize("change", ["label", "order", "fewer"])
def test_an_altered_hellaswag_is_refused(tmp_path: Path, change: str) -> None:
    rows = swag_rows()
    if change == "label":
        rows[7]["label"] = 3 - int(str(rows[7]["label"]))
    else:
        rows = rows[1:] + (rows[:1] if change == "order" else [])
    path = tmp_path / "hs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(UserError, match=r"is not HellaSwag's validation split \(10,04\d rows"):
        hellaswag_rows(str(path), say=quiet)


@pytest.mark.parametrize("content", [b"", b"no json", b"[1]", b'{"ctx": "a"}', b"\xff\xfe"])
def test_what_is_no_hellaswag_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hs.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not HellaSwag's validation split") as raised:
        hellaswag_rows(str(path), say=quiet)
    assert "\n" not in str(raised.value)


def test_a_damaged_xz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hs.jsonl.xz"
    path.write_bytes(lzma.compress(os.urandom(500))[:-40])
    with pytest.raises(UserError, match=r"hs\.jsonl\.xz cannot be read: "):
        hellaswag_rows(str(path), say=quiet)


# ---------------------------------------------------------------- downloads


@pytest.fixture
def away(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A place on loopback that has the bundle, and gives little of it at a time."""
    hub.web["eval_bundle.zip"] = as_zip(files)
    monkeypatch.setattr(bundle, "CORE_URL", f"{hub.url}/eval_bundle.zip")
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)
    return hub


def kept(cache: Path) -> Path:
    return cache / "tuppence" / "evaluations" / "eval_bundle.zip"


def test_a_bundle_is_downloaded_once(away: Hub, cache_home: Path) -> None:
    said: list[str] = []
    first = core_bundle(None, say=said.append)
    asked = len(away.asked)
    assert asked > 3
    assert said[0].startswith("CORE's tasks: 0 of ")
    assert core_bundle(None, say=said.append).sha256 == first.sha256
    assert len(away.asked) == asked
    assert kept(cache_home).read_bytes() == away.web["eval_bundle.zip"]
    assert not kept(cache_home).with_suffix(".zip.part").exists()


@pytest.mark.parametrize("fault", ["drop", "short", "cut", "503", "429"])
def test_a_download_outlasts_faults(away: Hub, fault: str) -> None:
    away.faults.extend([fault, fault])
    assert core_bundle(None, say=quiet).sha256
    assert not away.faults


def test_an_interrupted_download_goes_on(away: Hub, cache_home: Path) -> None:
    whole = away.web["eval_bundle.zip"]
    kept(cache_home).parent.mkdir(parents=True)
    kept(cache_home).with_suffix(".zip.part").write_bytes(whole[:2500])
    core_bundle(None, say=quiet)
    ranges = [each.range for each in away.ranged()]
    assert ranges[0] == "bytes=0-0", "the size is asked for"
    assert str(ranges[1]).startswith("bytes=2500-"), "then the rest"
    assert kept(cache_home).read_bytes() == whole


@pytest.mark.parametrize("left", [b"?" * 700, b"?" * 10**6])
def test_a_download_that_is_something_else_is_not_kept(
    away: Hub, cache_home: Path, left: bytes
) -> None:
    kept(cache_home).parent.mkdir(parents=True)
    part = kept(cache_home).with_suffix(".zip.part")
    part.write_bytes(left)
    if len(left) < 1000:
        with pytest.raises(Fault, match=r"is not what it was .*try again, or download it else"):
            core_bundle(None, say=quiet)
        assert not part.exists()
        assert not kept(cache_home).exists()
    assert core_bundle(None, say=quiet).sha256


def test_a_place_that_cannot_be_reached_is_one_line(away: Hub) -> None:
    away.always = "404"
    with pytest.raises(UserError, match=r"CORE's tasks: .*HTTP 404.*give its path \(--core-data"):
        core_bundle(None, say=quiet)


def test_a_file_in_the_cache_that_was_damaged_is_named(away: Hub, cache_home: Path) -> None:
    core_bundle(None, say=quiet)
    kept(cache_home).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"evaluations/eval_bundle\.zip cannot be read"):
        core_bundle(None, say=quiet)


def test_those_who_come_at_once_download_once(away: Hub) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(core_bundle(None, say=quiet).sha256))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    starts = [each.range for each in away.ranged()]
    assert len(starts) == len(set(starts)), "nothing is asked for twice"
