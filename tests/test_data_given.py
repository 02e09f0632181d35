"""Tokens that others made are read where they lie, and what is prepared here leaves for others.

Files are written byte by byte as nanoGPT, llm.c and modded-nanogpt write them.
"""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known import know_this_machine
from test_cli import TINY, Answer

from tuppence import cli, host, pipeline
from tuppence.config import DataPlan
from tuppence.data import export, given
from tuppence.data.given import token_files
from tuppence.data.loader import Loader
from tuppence.data.shards import MANIFEST, Manifest, load_manifest, open_shard
from tuppence.errors import UserError
from tuppence.files import asset
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration
from tuppence.store import Away, Store
from tuppence.tokenizer.spec import build_tokenizer, load_tokenizer

pytest_plugins = ["bucket_places"]

Command = Callable[..., Answer]
END = 50256  # GPT-2's end-of-text
ROOM = 10**9
FULL = "fineweb_{}_{:06d}.bin"


def drawn(count: int, *, seed: int, vocab_size: int = 50257) -> np.ndarray:
    """Tokens at random."""
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def nanogpt(folder: Path, train: np.ndarray, val: np.ndarray) -> Path:
    """A folder as nanoGPT's prepare.py leaves it."""
    folder.mkdir(parents=True)
    for name, tokens in (("train", train), ("val", val)):
        np.array(tokens, dtype=np.uint16).tofile(folder / f"{name}.bin")
    return folder


def llmc(path: Path, tokens: np.ndarray, *, wide: bool = False) -> Path:
    """A file as llm.c's write_datafile leaves it; `wide` is its llama-3 format."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = (20240801, 7, len(tokens)) if wide else (20240520, 1, len(tokens))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        header.tofile(file)
        np.array(tokens, dtype=np.uint32 if wide else np.uint16).tofile(file)
    return path


def char_folder(folder: Path, text: str) -> Path:
    """As nanoGPT's shakespeare_char leaves it, the text included."""
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([ids[character] for character in text])
    cut = int(len(text) * 0.9)
    nanogpt(folder, tokens[:cut], tokens[cut:])
    (folder / "input.txt").write_text(text, encoding="utf-8")
    return folder


def taken(source: Path | str, root: Path, tokenizer: str | None = "gpt2") -> tuple[Path, Manifest]:
    """The prepared folder that stands for a source of tokens, and its manifest."""
    root.mkdir(exist_ok=True)
    folder = given.given(str(source), tokenizer, root, cache_bytes=ROOM)
    assert folder is not None
    return folder, load_manifest(folder)


def tokens_of(folder: Path, split: str) -> list[int]:
    """All tokens of a split, in order."""
    shards = load_manifest(folder).of_split(split)
    return [t for shard in shards for t in open_shard(folder / shard.file).tolist()]


def batches(folder: Path) -> list[list[list[int]]]:
    """What would be trained on."""
    loader = Loader(folder, sequence_len=16, batch_size=8, seed=1)
    try:
        return [loader.batch(step).tolist() for step in range(5)]
    finally:
        loader.close()


def refused(source: Path | str, root: Path, tokenizer: str | None = "gpt2") -> str:
    """The line with which a source is refused."""
    with pytest.raises(UserError) as error:
        taken(source, root, tokenizer)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with more ids than 16 bits have."""
    path = tmp_path_factory.mktemp("many") / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {str(i): i for i in range(70_000)}, "unk_token": "0"}
    empty = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    rules = {"version": "1.0", "added_tokens": [], **dict.fromkeys(empty), "model": model}
    path.write_text(json.dumps(rules))
    return path


@pytest.fixture
def tuppence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    calibration: Calibration,
    data_plan: DataPlan,
) -> Iterator[Command]:
    """Runs one command line in this process and an empty folder, on a CPU that is known."""
    know_this_machine(calibration, data_plan, [TINY])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "settle_threads", lambda threads: {})
    monkeypatch.setattr(host, "process_start", time.time)
    monkeypatch.setattr(pipeline, "device_of", lambda run: "cpu")

    def tuppence(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["tuppence", *words])
        code = cli.main(list(words))
        return Answer(code, *capsys.readouterr())

    yield tuppence
    gc.unfreeze()  # what a training loop of this process froze
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(host.usable_cores())


def prepared(tuppence: Command, *words: str) -> dict[str, Any]:
    """The document of a preparation that works."""
    answer = tuppence("prepare", *words, "--json")
    assert answer.code == 0, answer.err
    document: dict[str, Any] = answer.document
    return document


# ---------------------------------------------------------------- files in place


def test_nanogpt_files_are_read_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = drawn(5000, seed=1), drawn(700, seed=2)
    train[[9, 99, 999]] = val[5] = END
    source = nanogpt(tmp_path / "owt", train, val)
    folder, manifest = taken(source, tmp_path / "data")
    assert tokens_of(folder, "train") == train.tolist()
    assert tokens_of(folder, "val") == val.tolist()
    files = [str(source / "train.bin"), str(source / "val.bin")]
    assert [shard.file for shard in manifest.shards] == files
    there = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert there == ["manifest.json", "tokenizer.json", "tokenizer.meta.json"]
    assert (manifest.train_tokens, manifest.val_tokens, manifest.tokens) == (5000, 700, 5700)
    ends = np.concatenate([train, val]) == END
    assert manifest.documents == ends.sum() == 4
    sizes = build_tokenizer("gpt2", texts=lambda: iter(())).token_bytes()
    assert manifest.bytes == sizes[train].sum() + sizes[val].sum()
    assert manifest.val_bytes == sizes[val].sum()
    monkeypatch.setattr(given, "_count", None)  # they are counted once
    assert taken(source, tmp_path / "data") == (folder, manifest)


def test_a_changed_file_is_counted_again(tmp_path: Path) -> None:
    source = nanogpt(tmp_path / "owt", drawn(50, seed=1), drawn(50, seed=2))
    first, before = taken(source, tmp_path / "data")
    np.array([1, 2, 3], dtype=np.uint16).tofile(source / "val.bin")
    second, after = taken(source, tmp_path / "data")
    assert first != second
    assert after.val_tokens == 3
    assert before.inputs_sha256 != after.inputs_sha256


@pytest.mark.parametrize("wide", [False, True], ids=["uint16", "uint32"])
@pytest.mark.parametrize("how", ["folder", "glob", "list"])
def test_files_with_headers(tmp_path: Path, many: Path, how: str, wide: bool) -> None:
    vocab_size = 70_000 if wide else 50_257
    parts = [drawn(n, seed=n, vocab_size=vocab_size) for n in (301, 40, 77)]
    for i in (2, 0, 1):  # written in another order than that of their names
        llmc(tmp_path / "fw" / FULL.format("train", i), parts[i], wide=wide)
    val = drawn(120, seed=9, vocab_size=vocab_size)
    llmc(tmp_path / "fw" / FULL.format("val", 0), val, wide=wide)
    names = [*(FULL.format("train", i) for i in range(3)), FULL.format("val", 0)]
    listed = ", ".join(str(tmp_path / "fw" / name) for name in reversed(names))
    source = {"folder": tmp_path / "fw", "glob": tmp_path / "fw/*.bin", "list": listed}[how]
    assert [path.name for path in token_files(str(source))] == names
    tokenizer = str(many) if wide else "gpt2"
    folder, manifest = taken(source, tmp_path / "data", tokenizer)
    train = np.concatenate(parts).tolist()
    assert tokens_of(folder, "train") == train
    assert tokens_of(folder, "val") == val.tolist()
    assert manifest.vocab_size == vocab_size
    at = {tuple(train[i : i + 17]) for i in range(len(train) - 16)}
    assert all(tuple(row) in at for batch in batches(folder) for row in batch)
    seen = given.glance(str(source), tokenizer)
    assert seen is not None
    assert (seen.train_tokens, seen.val_tokens) == (len(train), 120)


def test_a_name_says_its_split(tmp_path: Path) -> None:
    names = ["train.bin", "rival_train_1.bin", "owt_train_val.bin", "valid_0.bin", "x_val_000.bin"]
    for name in names:
        llmc(tmp_path / name, drawn(10, seed=0))
    files = [path.name for path in token_files(str(tmp_path))]
    assert files == ["rival_train_1.bin", "train.bin", "owt_train_val.bin", "valid_0.bin", names[4]]
    _, manifest = taken(tmp_path, tmp_path / "data")
    assert [shard.split for shard in manifest.shards] == ["train"] * 2 + ["val"] * 3


def test_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    source = nanogpt(tmp_path / "owt [2, 3]", drawn(50, seed=1), drawn(50, seed=2))
    assert len(token_files(str(source))) == 2
    assert len(token_files(str(source / "train.bin") + ",.")) == 0  # it has a comma and is no list


def test_a_list_too_long_for_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [FULL.format("train", i) for i in range(20)] + [FULL.format("val", 0)]
    for name in names:
        llmc(tmp_path / name, drawn(10, seed=0))
    _, manifest = taken(",".join(names), tmp_path / "data")
    assert manifest.train_tokens == 200


@pytest.mark.parametrize("token", [50_257, 4_000_000_000])
def test_a_token_that_the_tokenizer_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    monkeypatch.setattr(given, "_BLOCK_TOKENS", 100)
    train = drawn(1000, seed=3)
    train[[345, 350]] = token
    bad = llmc(tmp_path / "fw" / FULL.format("train", 1), train, wide=True)
    llmc(tmp_path / "fw" / FULL.format("val", 1), drawn(10, seed=1))
    said = refused(tmp_path / "fw", tmp_path / "data")
    assert said.startswith(f"{bad}: token {token:,} at 345, and gpt2 has 50,257; name the tok")
    assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir()]


def test_files_of_one_split_only(tmp_path: Path) -> None:
    train = llmc(tmp_path / "fw" / FULL.format("train", 1), drawn(10, seed=0))
    for source in (tmp_path / "fw", train):
        said = refused(source, tmp_path / "data")
        assert said.endswith("no file for validation, with val in its name")
    train.rename(train.with_name("val.bin"))
    assert "no file for training, with train in" in refused(tmp_path / "fw", tmp_path / "data")


def test_a_part_of_a_list_that_is_not_there(tmp_path: Path) -> None:
    nanogpt(tmp_path / "a", drawn(10, seed=0), drawn(10, seed=1))
    source = f"{tmp_path}/a/train.bin,{tmp_path}/a/train2.bin,{tmp_path}/a/val.bin"
    assert f"'{tmp_path}/a/train2.bin': no tokens there" in refused(source, tmp_path / "data")


@pytest.mark.parametrize("name", ["train.bin", FULL.format("train", 1)])
def test_a_file_that_was_cut_short(tmp_path: Path, name: str) -> None:
    write = llmc if name != "train.bin" else lambda path, ids: ids.astype(np.uint16).tofile(path)
    (tmp_path / "x").mkdir()
    write(tmp_path / "x" / name, drawn(10, seed=0))
    llmc(tmp_path / "x/val.bin", drawn(10, seed=0))
    content = (tmp_path / "x" / name).read_bytes()
    (tmp_path / "x" / name).write_bytes(content[:-1])
    said = refused(tmp_path / "x", tmp_path / "data")
    assert said.startswith(str(tmp_path / "x" / name))
    assert said.endswith("copy it again, or make it again where it comes from")


# ---------------------------------------------------------------- whose tokens they are


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_a_tokenizer_that_is_learned_from_text(tmp_path: Path, tokenizer: str) -> None:
    source = nanogpt(tmp_path / "x", drawn(10, seed=0), drawn(10, seed=1))
    said = refused(source, tmp_path / "data", tokenizer)
    assert f"is tokens, and data.tokenizer={tokenizer} is learned from text; name the" in said


def test_characters_of_the_text_beside(tmp_path: Path) -> None:
    text = "zwölf Boxkämpfer jagen Viktor\n" * 30
    source = char_folder(tmp_path / "mine_char", text)
    folder, manifest = taken(source, tmp_path / "data", "char")
    assert manifest.vocab_size == len(set(text))
    assert manifest.bytes == len(text.encode())
    tokenizer = load_tokenizer(folder / "tokenizer")
    whole = tokens_of(folder, "train") + tokens_of(folder, "val")
    assert tokenizer.decode(whole) == text
    _, named = taken(source, tmp_path / "data", f"char:{''.join(sorted(set(text)))}")
    assert named.tokenizer_sha256 == manifest.tokenizer_sha256
    said = refused(source, tmp_path / "data", "char:abc")
    assert "and char has 3; name the tokenizer" in said


@pytest.mark.parametrize("content", [b"another text entirely", b"", b"\xff\xfe"])
def test_another_text_beside(tmp_path: Path, content: bytes) -> None:
    source = char_folder(tmp_path / "x", "the text that it was " * 9)
    (source / "input.txt").write_bytes(content)
    said = refused(source, tmp_path / "data", "char")
    says = {b"\xff\xfe": "input.txt: not UTF-8", b"": "empty"}.get(content, "not made from")
    assert says in said


@pytest.mark.parametrize("key", ["max_tokens", "val_tokens"])
def test_what_is_read_in_place_is_not_cut(tuppence: Command, tmp_path: Path, key: str) -> None:
    nanogpt(tmp_path / "owt", drawn(100, seed=1), drawn(100, seed=2))
    words = ["data.source=owt", "data.tokenizer=gpt2"]
    answer = tuppence("prepare", *words, f"data.{key}=50")
    assert answer.code == 2
    assert f"data.{key}=50: owt is tokens already" in answer.line
    assert prepared(tuppence, *words)["manifest"]["train_tokens"] == 100


@pytest.mark.parametrize("stray", ["weights.bin", "train.bin"])
def test_texts_with_a_stray_bin_are_text(tuppence: Command, tmp_path: Path, stray: str) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(f"the text of {name}\n" * 50)
    (tmp_path / "texts" / stray).write_bytes(bytes(1000))
    (tmp_path / "texts/manifest.json").write_text('{"version": 2, "name": "of something else"}')
    made = prepared(tuppence, "data.source=texts", "data.tokenizer=byte")["manifest"]
    assert [Path(item["path"]).name for item in made["inputs"]] == ["a.txt", "b.txt"]
    assert made["documents"] == 2


# ---------------------------------------------------------------- a prepared folder


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A folder of texts, as a source."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / f"texts/{i:02d}.txt").write_text(f"document {i} says {'word ' * i}naïve\n" * 3)
    return f"data.source={tmp_path}/texts"


def test_a_prepared_folder_is_a_source(tuppence: Command, corpus: str) -> None:
    made = prepared(tuppence, corpus, "data.tokenizer=bpe:300")
    for tokenizer in ("none", "bpe:300"):
        words = [f"data.source={made['folder']}", f"data.tokenizer={tokenizer}"]
        again = prepared(tuppence, *words, "--data", "elsewhere")
        assert again == made | {"reused": True}
    for tokenizer in ("gpt2", "char", "bpe:301"):
        answer = tuppence("prepare", f"data.source={made['folder']}", f"data.tokenizer={tokenizer}")
        assert answer.code == 2
        assert "was made with bpe:300; data.tokenizer=none takes that" in answer.line


@pytest.mark.parametrize("place", ["s3", "file"])
def test_a_prepared_folder_on_a_bucket(
    tuppence: Command,
    corpus: str,
    place: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = request.getfixturevalue("s3") if place == "s3" else f"file://{tmp_path}/bucket/data"
    words = [corpus, "data.tokenizer=byte"]
    here = Path(prepared(tuppence, *words)["folder"])
    expected = batches(here)
    sent = Path(prepared(tuppence, *words, "--data", bucket)["folder"])
    assert batches(sent) == expected
    url = f"{bucket}/{sent.name}"
    assert sorted(Store(url).find()) == sorted(
        path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    found = prepared(tuppence, *words, "--data", bucket)
    assert found["reused"]
    assert batches(Path(found["folder"])) == expected
    monkeypatch.setattr(given, "_BLOCK_TOKENS", 100)
    source = prepared(tuppence, f"data.source={url}", "data.tokenizer=none", "--data", "mine")
    folder = Path(source["folder"])
    assert folder.parent == Path("mine")
    assert not list(folder.glob("*.bin"))  # they come when they are wanted
    assert batches(folder) == expected
    counted = prepared(tuppence, f"data.source={url}", "data.tokenizer=none", "--count")
    assert counted["count"]["checked"] == "sizes"
    out = prepared(tuppence, f"data.source={url}", "data.tokenizer=none", *EXPORT["nanogpt"])
    assert np.fromfile(out["exported"][0], dtype=np.uint16).tolist() == tokens_of(here, "train")


def test_another_content_on_the_bucket_is_another_folder(
    tuppence: Command, tmp_path: Path, corpus: str
) -> None:
    url, root = f"file://{tmp_path}/bucket/mine", tmp_path / "data"
    folders = []
    for tokenizer in ("byte", "bpe:300"):
        shutil.rmtree(tmp_path / "bucket", ignore_errors=True)
        shutil.copytree(
            prepared(tuppence, corpus, f"data.tokenizer={tokenizer}")["folder"],
            tmp_path / "bucket/mine",
        )
        folder, manifest = taken(url, root, None)
        folders.append(folder)
        assert manifest.tokenizer == tokenizer
        batches(folder)
    assert folders[0] != folders[1]
    again = given.given(url, None, root, cache_bytes=12_345)
    assert again == folders[1]
    assert json.loads((again / "bucket.json").read_text())["cache_bytes"] == 12_345


def test_a_bucket_that_goes_away_is_one_line(
    tuppence: Command, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared(tuppence, corpus, "data.tokenizer=byte")["folder"], tmp_path / "b/m")
    url = f"file://{tmp_path}/b/m"
    whole, read = Store.fetch, Store.read
    for name, real in (("fetch", whole), ("read", read)):

        def away(*_: Any) -> Any:
            raise Away("cannot do it: no network")

        monkeypatch.setattr(Store, name, away)
        assert f"{url}: cannot be reached" in refused(url, tmp_path / "d", None)
        monkeypatch.setattr(Store, name, real)
    taken(url, tmp_path / "d", None)  # nothing half made is in the way
    (tmp_path / "b/m/manifest.json").write_text("{half")
    answer = tuppence("prepare", f"data.source={url}", "data.tokenizer=none")
    assert answer.code == 1
    assert f"{url}/manifest.json: not a manifest" in answer.line


# ---------------------------------------------------------------- out

TWO = ("train", "val")
EXPORT = {how: ["--export", how, "--out", f"out/{how}"] for how in ("nanogpt", "llmc")}


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte", "char"])
@pytest.mark.parametrize("how", EXPORT)
def test_export_holds_the_same_tokens(
    tuppence: Command, tmp_path: Path, corpus: str, how: str, tokenizer: str
) -> None:
    (tmp_path / "one.txt").write_text("to be or not to be\n" * 60)
    source = "data.source=one.txt" if tokenizer == "char" else corpus
    made = prepared(tuppence, source, f"data.tokenizer={tokenizer}", *EXPORT[how])
    here = Path(made["folder"])
    files = [Path(path) for path in made["exported"]]
    names = [path.name for path in files]
    wanted = {"nanogpt": ["train.bin", "val.bin"], "llmc": [f"llmc_{s}_000000.bin" for s in TWO]}
    meta = ["meta.pkl"] if (how, tokenizer) == ("nanogpt", "char") else []
    assert names == wanted[how] + meta
    assert not list(tmp_path.rglob("out/*/*.tmp"))
    for split, path in zip(TWO, files, strict=False):
        content = path.read_bytes()
        if how == "llmc":
            header = np.frombuffer(content[:1024], dtype=np.int32)
            assert header.tolist() == [20240520, 1, (len(content) - 1024) // 2, *[0] * 253]
            content = content[1024:]
        assert np.frombuffer(content, dtype=np.uint16).tolist() == tokens_of(here, split)
    back = "char:\n benort" if tokenizer == "char" else tokenizer
    folder, manifest = taken(f"out/{how}", tmp_path / "back", back)
    original = load_manifest(here)
    assert manifest.val_sha256 == original.val_sha256
    assert tokens_of(folder, "train") == tokens_of(here, "train")
    assert (manifest.bytes, manifest.val_bytes) == (original.bytes, original.val_bytes)
    assert manifest.tokenizer_sha256 == original.tokenizer_sha256


@pytest.mark.parametrize("documents", [1, 2])
def test_characters_are_named_for_nanogpt(
    tuppence: Command, tmp_path: Path, documents: int
) -> None:
    for i in range(documents):
        (tmp_path / f"{i}.txt").write_text("zwölf 日本 \n" * 20)
    words = ["data.source=*.txt", "data.tokenizer=char"]
    made = prepared(tuppence, *words, *EXPORT["nanogpt"])
    meta = pickle.loads(Path(made["exported"][2]).read_bytes())
    alphabet = sorted(set("zwölf 日本 \n"))
    assert meta["stoi"] == {character: i for i, character in enumerate(alphabet)}
    end = {len(alphabet): "<|endoftext|>"} if documents == 2 else {}
    assert meta["itos"] == dict(enumerate(alphabet)) | end
    assert meta["vocab_size"] == made["manifest"]["vocab_size"] == len(alphabet) + len(end)
    answer = tuppence("prepare", words[0], "data.tokenizer=byte", *EXPORT["nanogpt"])
    assert answer.code == 2
    assert "meta.pkl tells nanoGPT of other tokens" in answer.line


def test_files_of_nanogpt_for_llmc(
    tuppence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get the header that they do not have, in parts that llm.c can seek in."""
    monkeypatch.setattr(export, "LARGEST_BYTES", 1024 + 2 * 400)
    train, val = drawn(1000, seed=1), drawn(400, seed=2)
    nanogpt(tmp_path / "owt", train, val)
    words = ["data.source=owt", "data.tokenizer=gpt2"]
    made = [Path(path) for path in prepared(tuppence, *words, *EXPORT["llmc"])["exported"]]
    names = [*(f"llmc_train_{i:06d}.bin" for i in range(3)), "llmc_val_000000.bin"]
    assert [path.name for path in made] == names
    assert [len(open_shard(path)) for path in made] == [400, 400, 200, 400]
    assert np.concatenate([open_shard(path) for path in made[:3]]).tolist() == train.tolist()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    answer = tuppence("prepare", *words, *EXPORT["llmc"])  # in fewer files
    assert answer.code == 2
    assert "llmc_train_000001.bin is of another export" in answer.line


def test_ids_that_nanogpt_cannot_hold(tuppence: Command, tmp_path: Path, many: Path) -> None:
    tokens = drawn(100, seed=1, vocab_size=70_000)
    for split in TWO:
        llmc(tmp_path / "fw" / FULL.format(split, 0), tokens, wide=True)
    words = ["data.source=fw", f"data.tokenizer={many}"]
    answer = tuppence("prepare", *words, *EXPORT["nanogpt"])
    assert answer.code == 2
    assert "nanoGPT's files hold ids below 65,536" in answer.line
    for path in prepared(tuppence, *words, *EXPORT["llmc"])["exported"]:
        assert open_shard(Path(path)).dtype == np.uint32
        assert open_shard(Path(path)).tolist() == tokens.tolist()


@pytest.mark.parametrize("option", [["--export", "llmc"], ["--out", "x"]])
def test_export_and_out_go_together(tuppence: Command, corpus: str, option: list[str]) -> None:
    answer = tuppence("prepare", corpus, "data.tokenizer=byte", *option)
    assert answer.code == 2
    assert option[0] in answer.line


@pytest.mark.parametrize("option", [["--rank", "0", "--world", "2"], ["--merge"]])
def test_tokens_are_not_shared_out(tuppence: Command, tmp_path: Path, option: list[str]) -> None:
    nanogpt(tmp_path / "owt", drawn(100, seed=1), drawn(100, seed=2))
    answer = tuppence("prepare", "data.source=owt", "data.tokenizer=gpt2", *option)
    assert answer.code == 2
    assert "data.source=owt is tokens already" in answer.line


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize("in_place", [False, True])
def test_count(tuppence: Command, tmp_path: Path, corpus: str, in_place: bool) -> None:
    words = [corpus, "data.tokenizer=gpt2"]
    if in_place:
        prepared(tuppence, *words, *EXPORT["llmc"])
        words = ["data.source=out/llmc", "data.tokenizer=gpt2"]
    folder = Path(prepared(tuppence, *words)["folder"])
    told = prepared(tuppence, *words, "--count")["count"]
    train, val = tokens_of(folder, "train"), tokens_of(folder, "val")
    assert told["tokens"] == {"train": len(train), "val": len(val)}
    assert told["shards"] == {"train": 1, "val": 1}
    assert told["documents"] == (train + val).count(END) == 40
    assert told["checked"] == "sha256"
    said = tuppence("prepare", *words, "--count").out
    assert f"{len(train) + len(val):,} tokens, 40 documents" in said


def test_count_names_a_shard_with_a_flipped_byte(tuppence: Command, corpus: str) -> None:
    words = [corpus, "data.tokenizer=byte"]
    path = Path(prepared(tuppence, *words)["folder"]) / "val_000000.bin"
    content = bytearray(path.read_bytes())
    content[1030] ^= 4
    path.write_bytes(content)
    assert tuppence("prepare", *words).code == 0  # whose size is right
    answer = tuppence("prepare", *words, "--count")
    assert answer.code == 1
    assert f"{path}: sha256" in answer.line


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("documents", lambda value: value + 1),
        ("tokens", lambda value: value - 1),
        ("train_tokens", lambda value: value + 5),
        ("val_tokens", lambda value: value * 2),
        ("val_sha256", lambda value: value[::-1]),
    ],
)
def test_count_names_what_the_manifest_says_wrong(
    tuppence: Command, corpus: str, name: str, change: Callable[[Any], Any]
) -> None:
    words = [corpus, "data.tokenizer=byte"]
    path = Path(prepared(tuppence, *words)["folder"]) / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {name: change(content[name])}))
    answer = tuppence("prepare", *words, "--count")
    assert answer.code == 1
    said, found = change(content[name]), content[name]
    assert f"{path}: {name} is {said}, and in the shards {found};" in answer.line


def test_count_knows_the_document_that_a_cap_cuts(tuppence: Command, corpus: str) -> None:
    for source in (corpus, "shakespeare"):
        words = [source, "data.tokenizer=byte", "data.max_tokens=300"]
        documents = prepared(tuppence, *words)["manifest"]["documents"]
        assert prepared(tuppence, *words, "--count")["count"]["documents"] == documents


def test_count_names_what_is_wrong_on_a_bucket(
    tuppence: Command, tmp_path: Path, corpus: str
) -> None:
    words = [corpus, "data.tokenizer=byte", "--data", f"file://{tmp_path}/bucket", "--count"]
    name = Path(prepared(tuppence, *words)["folder"]).name
    shard = tmp_path / "bucket" / name / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert f"{name}/train_000000.bin has " in tuppence("prepare", *words).line
    shard.unlink()
    assert f"{name}/train_000000.bin is not there" in tuppence("prepare", *words).line


# ---------------------------------------------------------------- training


def losses(run: Path) -> list[tuple[int, float, str]]:
    """What was learned, and from which tokens."""
    folder = RunFolder(run)
    rows = [(row["step"], row["loss"], row["tokens_sha"]) for row in folder.rows("metrics")]
    return rows + [(row["step"], row["loss"], "") for row in folder.rows("evals")]


def test_training_on_files_in_place_is_training_on_the_text(
    tuppence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the text, from nanoGPT's files of it, from llm.c's, and from a bucket."""
    text = asset("shakespeare.txt").read_text(encoding="utf-8")
    alphabet = "".join(sorted(set(text))).replace("\n", r"\n")
    bucket = f"file://{tmp_path}/bucket"
    out = ["--export", "llmc", "--out", "theirs"]
    name = Path(prepared(tuppence, "shakespeare", "--data", bucket, *out)["folder"]).name
    char_folder(tmp_path / "shakespeare_char", text)
    sides = {
        "text": [],
        "nano": ["data.source=shakespeare_char"],
        "llmc": ["data.source=theirs/*.bin", f"data.tokenizer=char:{alphabet}"],
        "away": [f"data.source={bucket}/{name}", "--data", "elsewhere"],
    }
    found = {}
    for side, words in sides.items():
        answer = tuppence("train", *TINY, "budget.steps=3", f"name={side}", *words)
        assert answer.code == 0, answer.err
        found[side] = losses(Path("runs") / side)
    assert len(found["text"]) == 4
    assert found["nano"] == found["llmc"] == found["away"] == found["text"]
    words = ["train", *TINY, "budget.steps=3", "name=nano", sides["nano"][0]]
    assert "is finished" in tuppence(*words).err
