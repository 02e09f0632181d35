"""Every damage of a checkpoint's bytes: no silent load, and the one before is found."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    equal,
    fresh,
    load_newest,
    run_folder,
    save_on,
    state_of,
    trained,
)

from tuppence import checkpoint
from tuppence.errors import Fault
from tuppence.folder import RunFolder

ONE = ("model.safetensors", "optimizer.safetensors", "state.json", "checkpoint.json")
TWO = tuple(
    f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (1, 2)
)
EACH_FILE = [(1, name) for name in ONE] + [(2, name) for name in (*TWO, *ONE[2:])]

folder = pytest.fixture(run_folder)


# ---------------------------------------------------------------- bytes

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 2),
    "half written": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
    "a byte longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "of zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "of noise": lambda file: file.write_bytes(random.Random(0).randbytes(file.stat().st_size)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "half old, half zeros": lambda file: file.write_bytes(
        file.read_bytes()[: file.stat().st_size // 2] + bytes(-(-file.stat().st_size // 2))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("world", "name"), EACH_FILE)
def test_a_damaged_file_is_passed_over_loudly(
    folder: RunFolder, world: int, name: str, damage: str
) -> None:
    good, made = trained(1), trained(2)
    older = save_on(folder, good, 1, world=world)
    before = {p.name: p.read_bytes() for p in older.iterdir()}
    path = save_on(folder, made, 2, world=world)
    DAMAGES[damage](path / name)
    other = fresh(seed=1)
    untouched = other.tensors()
    with pytest.raises(Fault, match="step_00000002 is damaged: ") as fault:
        checkpoint.load(path, other.model, other.optimizers)
    assert name in str(fault.value)
    assert "\n" not in str(fault.value)
    assert equal(other.tensors(), untouched)
    found = checkpoint.newest(folder)
    assert found.path == older
    assert [name in line for line in found.damaged] == [True]
    told = [(e["code"], e["path"]) for e in folder.rows("events") if e["code"] != "save"]
    assert told == [("checkpoint_damaged", path.name)]
    assert load_newest(folder, other.model, other.optimizers) == state_of(1)
    assert equal(other.tensors(), good.tensors())
    assert {p.name: p.read_bytes() for p in older.iterdir()} == before
    # and it is saved again in place of the damaged one
    assert save_on(folder, made, 2, world=world) == path
    checkpoint.verify(path)


@pytest.mark.parametrize(("world", "name"), EACH_FILE)
def test_any_flipped_bit_is_found(folder: RunFolder, world: int, name: str) -> None:
    path = save_on(folder, trained(), 2, world=world)
    whole = (path / name).read_bytes()
    right = checkpoint.manifest(path)
    passed = 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(damaged)
        try:
            checkpoint.verify(path)
        except Fault as fault:
            assert name in str(fault) or name == "checkpoint.json"  # noqa: PT017
            continue
        passed += 1  # the number of the attempt, which is no part of what is loaded
        assert name == "checkpoint.json"
        assert checkpoint.manifest(path).files == right.files
    assert passed <= 7


HASH = {"sha256": "0" * 64, "bytes": 1}
FILES = dict.fromkeys(ONE[:3], HASH)
SHARDS = dict.fromkeys([*TWO, "state.json"], HASH)


@pytest.mark.parametrize(
    "found",
    [
        b"",
        b"\xff",
        [],
        {"version": 2, "attempt": 1, "files": {}},
        {"version": 2, "files": FILES},
        {"version": 2, "attempt": 1, "files": FILES, "more": 1},
        {"version": 1, "sha256": dict.fromkeys(ONE[:3], "0" * 64)},
        {"version": 3, "attempt": 1, "files": FILES},
        {"version": 2, "attempt": 1, "files": {**FILES, "../run.json": HASH}},
        {"version": 2, "attempt": 1, "files": {k: FILES[k] for k in ONE[1:3]}},
        {"version": 2, "attempt": 1, "files": {k: SHARDS[k] for k in [*TWO[:3], "state.json"]}},
        {"version": 2, "attempt": 1, "files": {k: SHARDS[k] for k in [*TWO[1:], "state.json"]}},
        {"version": 2, "attempt": 1, "files": {**FILES, **SHARDS}},
        {"version": 2, "attempt": 1, "files": {**FILES, "state.json": {"bytes": 1}}},
    ],
    ids=range(14),
)
def test_a_manifest_that_does_not_say_what_is_there(folder: RunFolder, found: Any) -> None:
    path = save_on(folder, trained(), 2)
    text = found if isinstance(found, bytes) else json.dumps(found).encode()
    (path / "checkpoint.json").write_bytes(text)
    with pytest.raises(Fault, match=r"step_00000002 is damaged: checkpoint\.json"):
        checkpoint.verify(path)


def test_a_header_is_not_believed(folder: RunFolder) -> None:
    """Files that match their hashes and yet are no tensors: `read` does not fill in nonsense."""
    path = save_on(folder, trained(), 2, world=2)
    file = path / TWO[1]
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    parts = json.loads(header["__metadata__"]["pieces"])

    def refused(entry: dict[str, Any], part: Any = None) -> str:
        told = {**parts, **({"wte.weight": part} if part is not None else {})}
        changed = {**header, "__metadata__": {"pieces": json.dumps(told)}}
        changed["wte.weight"] = header["wte.weight"] | entry
        text = json.dumps(changed).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data)
        with pytest.raises(Fault) as fault:
            checkpoint.consolidated(path)
        return str(fault.value)

    begin, end = header["wte.weight"]["data_offsets"]
    assert "lie within" in refused({"data_offsets": [begin, end + 4]})
    assert "lie within" in refused({"data_offsets": [begin + 10**6, end + 10**6]})
    assert "lie within" in refused({"shape": [6, 6]})
    assert "damaged" in refused({"dtype": "F99"})
    assert "disagree on wte.weight" in refused({"dtype": "I32"})
    assert "disagree on wte.weight" in refused({}, {"start": 36, "shape": [12, 6]})
    assert "outside" in refused({}, {"start": 37, "shape": [11, 6]})
    assert "outside" in refused({}, {"start": -1, "shape": [11, 6]})
    assert "metadata" in refused({}, {"start": 36})
    assert "metadata" in refused({}, 5)
    assert "no file holds wte.weight" in refused({}, {"start": 30, "shape": [11, 6]})
    file.write_bytes((1 << 62).to_bytes(8, "little"))
    with pytest.raises(Fault, match="cut short"):
        checkpoint.consolidated(path)
