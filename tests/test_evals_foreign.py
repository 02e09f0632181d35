"""Models of transformers as the one who is asked: what they answer, and which are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import as_gguf, begins_texts, written
from safetensors.torch import load_file, save_file
from small_runs import DEPTH, GPT2, best_model, finished

from tuppence.config import DataPlan
from tuppence.data.prepare import prepare
from tuppence.errors import UserError
from tuppence.evals import foreign, score
from tuppence.evals.items import Ask
from tuppence.evals.subject import Subject, of_run
from tuppence.files import asset
from tuppence.hub.export import export
from tuppence.plan.hardware import Calibration
from tuppence.tokenizer.spec import Tokenizer, build_tokenizer, load_tokenizer
from tuppence.workers import Workers

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a network
transformers = pytest.importorskip("transformers", reason="[dev] installs transformers")

KINDS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_positions": 64},
    "LlamaForCausalLM": {"max_position_embeddings": 64},
    "Gemma2ForCausalLM": {"max_position_embeddings": 64, "head_dim": 16},
    "MambaForCausalLM": {},
    "MistralForCausalLM": {"max_position_embeddings": 64, "sliding_window": 16},
}
SHARED = ("GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM")
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = asset("shakespeare.txt").read_text(encoding="utf-8")[:20_000]
    return build_tokenizer("bpe:300", texts=lambda: iter([text]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Folders:
    root = tmp_path_factory.mktemp("hub")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            written(root / kind, tokenizer, kind, sharp=4, **KINDS[kind])
        return root / kind

    return folder


@pytest.fixture
def copy(folders: Folders, tmp_path: Path) -> Path:
    """A folder of GPT-2's to change."""
    shutil.copytree(folders("GPT2LMHeadModel"), tmp_path / "copy")
    return tmp_path / "copy"


def subject_of(source: Path | str, **words: Any) -> Subject:
    given = {"precision": "fp32", "device": "cpu", "cores": 1, "say": lambda text: None}
    return foreign.of_transformers(str(source), **{**given, **words})


def items(count: int = 6) -> list[tuple[int, list[Ask]]]:
    """Four texts each that begin alike."""
    draw = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(256, (length,), generator=draw).tolist()

    stems = [ids(9 + 8 * i) for i in range(count)]
    return [(i, [Ask(stem + ids(3 + n), 3 + n) for n in range(4)]) for i, stem in enumerate(stems)]


def nats_of(subject: Subject) -> list[float]:
    got = dict(score.answers(subject, items()))
    return [answer.nats for i in sorted(got) for answer in got[i]]


# ---------------------------------------------------------------- what they answer


@pytest.mark.parametrize("kind", KINDS)
def test_nats_are_those_of_the_model_itself(kind: str, folders: Folders) -> None:
    said: list[str] = []
    subject = subject_of(folders(kind), say=said.append)
    assert subject.branching is (kind in SHARED)
    assert len(said) == (kind not in SHARED)
    assert subject.logits is foreign._at_the_head
    model = transformers.AutoModelForCausalLM.from_pretrained(folders(kind)).eval()
    expected = []
    for _, asks in items():
        for ask in asks:
            with torch.no_grad():
                lines = model(torch.tensor([ask.ids])).logits[0].log_softmax(-1)
            wanted = range(len(ask.ids) - ask.scored, len(ask.ids))
            expected.append(-sum(lines[i - 1, ask.ids[i]].item() for i in wanted))
    assert nats_of(subject) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("words", [{"cores": 2}, {"precision": "bf16"}])
def test_cores_and_precision(words: dict[str, Any], folders: Folders) -> None:
    plain = nats_of(subject_of(folders("LlamaForCausalLM")))
    near = 1e-4 if "cores" in words else 0.5
    found = nats_of(subject_of(folders("LlamaForCausalLM"), **words))
    assert found == pytest.approx(plain, abs=near)
    assert (found == plain) is ("cores" in words)


def test_a_mask_that_a_model_ignores_is_seen(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = foreign._words
    monkeypatch.setattr(
        foreign, "_words", lambda branches: {**given(branches), "position_ids": None}
    )
    said: list[str] = []
    assert not subject_of(folders("LlamaForCausalLM"), say=said.append).branching
    assert "a mask of its own" in said[0]


def test_a_model_without_a_head_of_its_own(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nats_of(subject_of(folders("GPT2LMHeadModel")))
    kind = transformers.GPT2LMHeadModel
    monkeypatch.setattr(kind, "get_output_embeddings", lambda model: None)
    subject = subject_of(folders("GPT2LMHeadModel"))
    assert subject.logits is foreign._of_all
    assert nats_of(subject) == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("words", [GPT2, [*GPT2, "model.bias=on"], DEPTH])
def test_an_export_answers_as_its_run(
    words: list[str], data_plan: DataPlan, calibration: Calibration, tmp_path: Path
) -> None:
    shards = prepare(source="shakespeare", tokenizer="char", root=tmp_path / "data").folder
    run = finished(tmp_path / "small", words, data_plan, shards, calibration)
    theirs = subject_of(export(run, which="best", out=None).folder)
    workers = Workers(best_model(run), count=1, device="cpu", precision="fp32")
    ours = of_run(workers, load_tokenizer(run.tokenizer), context=16, identity={})
    assert theirs.context == 16
    assert theirs.branching
    text = "ROMEO: what light through yonder window breaks"
    ids = ours.text.encode_batch([text])
    assert theirs.text.encode_batch([text]) == ids
    assert theirs.text.decode(ids[0]) == text
    asked = [(n, [Ask([*ids[0][n : n + 10], i], 3) for i in (2, 5, 9)]) for n in range(20)]
    found = [dict(score.answers(subject, asked)) for subject in (ours, theirs)]
    for n in range(20):
        for mine, other in zip(found[0][n], found[1][n], strict=True):
            assert mine.nats == pytest.approx(other.nats, abs=1e-4)
            assert mine.greedy == other.greedy
    told = json.loads((run.tokenizer / "tokenizer.meta.json").read_text())
    assert theirs.identity["tokenizer_sha256"] == told["sha256"]


# ---------------------------------------------------------------- text


def test_where_texts_begin_and_end(copy: Path, tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text
    text = subject_of(copy).text
    assert isinstance(text, foreign.HubText)
    assert text.start == end
    assert text.ends == {end}
    assert not text.adds_start
    plain = text.encode_batch(["to be", "", "or not<|endoftext|>"])
    assert plain[0] == tokenizer.encode("to be").tolist()
    assert plain[1] == []
    assert plain[2][-1] == end
    assert text.decode(plain[2]) == "or not"
    assert text.encode_batch([]) == []
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    begins_texts(copy, "<|endoftext|>")
    begun = subject_of(copy).text
    assert isinstance(begun, foreign.HubText)
    assert begun.adds_start
    assert begun.ends == {7, 8, end}
    assert begun.encode_batch(["to be"]) == plain[:1]


# ---------------------------------------------------------------- what it is


def test_identity_is_of_what_is_read(copy: Path, tmp_path: Path) -> None:
    first = subject_of(copy).identity
    shutil.copytree(copy, tmp_path / "elsewhere" / "copy")
    assert subject_of(tmp_path / "elsewhere" / "copy").identity == first
    assert subject_of(copy, precision="bf16").identity == first | {"precision": "bf16"}
    weights = load_file(copy / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = subject_of(copy).identity
    assert changed.keys() == first.keys()
    assert [key for key in first if changed[key] != first[key]] == ["weights_sha256"]
    begins_texts(copy, "<|endoftext|>")
    assert subject_of(copy).identity["tokenizer_sha256"] != first["tokenizer_sha256"]


def test_weights_in_several_files(folders: Folders, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("LlamaForCausalLM"))
    shutil.copytree(folders("LlamaForCausalLM"), tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    whole, parts = subject_of(folders("LlamaForCausalLM")), subject_of(tmp_path / "parts")
    assert nats_of(parts) == nats_of(whole)
    assert parts.identity["weights_sha256"] != whole.identity["weights_sha256"]


def test_a_model_of_the_hub(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="[dev] installs huggingface_hub")
    here, asked = tmp_path / "0123abcd", []
    shutil.copytree(folders("GPT2LMHeadModel"), here)

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        for path in here.iterdir():  # what would not be fetched is not there
            if not any(path.match(pattern) for pattern in allow_patterns):
                path.unlink()
        return str(here)

    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: str(here / file))
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    found = subject_of("someone/small")
    assert asked == ["someone/small"]
    assert found.identity["name"] == "someone/small@0123abcd"
    same = subject_of(folders("GPT2LMHeadModel")).identity
    assert found.identity == same | {"name": "someone/small@0123abcd"}
    (here / "config.json").write_text(json.dumps({"model_type": "secret"}))
    assert "someone/small" in refused("someone/small")
    assert asked == ["someone/small"]  # before its weights are fetched


def test_a_gguf_file(folders: Folders, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="[dev] installs gguf")
    folder = folders("LlamaForCausalLM")
    path = as_gguf(folder, tmp_path / "small.gguf")
    whole, file = subject_of(folder), subject_of(path)
    assert nats_of(file) == pytest.approx(nats_of(whole), abs=1e-4)
    assert (file.context, file.branching) == (64, True)
    assert file.text.start == whole.text.start
    assert file.text.encode_batch(["to be"]) == whole.text.encode_batch(["to be"])
    assert file.identity["name"] == "small.gguf"
    assert file.identity["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(file.identity["tokenizer_sha256"]) == 64


# ---------------------------------------------------------------- what is refused


def refused(source: Path | str) -> str:
    with pytest.raises(UserError) as told:
        subject_of(source)
    line = str(told.value)
    assert "\n" not in line
    assert str(source) in line
    return line


def change_config(folder: Path, **words: Any) -> Path:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | words))
    return folder


def test_a_model_that_is_not_causal(tmp_path: Path, tokenizer: Tokenizer) -> None:
    words = {"is_decoder": False, "max_position_embeddings": 64, "pad_token_id": 0}
    written(tmp_path / "bert", tokenizer, "BertLMHeadModel", **words)
    assert "see its end" in refused(tmp_path / "bert")


def test_code_of_a_models_own_is_not_executed(copy: Path) -> None:
    (copy / "own.py").write_text("raise SystemExit('executed')")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(copy, model_type="secret", auto_map=own)
    assert "not executed" in refused(copy)
    change_config(copy, model_type="gpt2")  # which transformers knows by itself
    assert subject_of(copy).identity["architecture"] == "GPT2LMHeadModel"


def test_a_looped_export_is_sent_to_its_run(copy: Path) -> None:
    change_config(copy, model_type="tuppence_looped", auto_map={})
    assert "tuppence eval RUN" in refused(copy)


def test_what_is_no_model(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    assert "not a .gguf file" in refused(tmp_path / "notes.txt")
    assert "nor the name of a model" in refused("no such/model at all")
    assert "the Hub did not give it" in refused("nobody/nothing")
    for name, hint in (("run.json", "tuppence eval"), ("import.json", "made of")):
        (tmp_path / name.split(".")[0]).mkdir()
        (tmp_path / name.split(".")[0] / name).write_text("{}")
        assert hint in refused(tmp_path / name.split(".")[0])
    (tmp_path / "broken.gguf").write_bytes(b"no such thing")
    assert "does not load it" in refused(tmp_path / "broken.gguf")
    (copy / "model.safetensors").unlink()
    assert "no weights there" in refused(copy)
    (copy / "config.json").unlink()
    assert "no config.json" in refused(copy)


def test_a_weight_that_is_missing(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "transformer.h.1.mlp.c_fc.weight" in refused(copy)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_a_folder_without_a_tokenizer(kind: str, folders: Folders, tmp_path: Path) -> None:
    """Of which transformers makes an empty one: text is no ids, or unknown ones."""
    shutil.copytree(folders(kind), tmp_path / kind)
    for path in (tmp_path / kind).glob("*token*"):
        path.unlink()
    assert "its tokenizer makes nothing of plain text" in refused(tmp_path / kind)


def test_a_tokenizer_of_another_model(copy: Path) -> None:
    rules = json.loads((copy / "tokenizer.json").read_text())
    rules["added_tokens"].append({**rules["added_tokens"][0], "id": 400, "content": "<pad>"})
    (copy / "tokenizer.json").write_text(json.dumps(rules))
    assert subject_of(copy).text.encode_batch(["to be"])  # padding is never read
    names = rules["model"]["vocab"]
    names["zzz"] = len(names) + 20
    (copy / "tokenizer.json").write_text(json.dumps(rules))
    line = refused(copy)
    assert f"ids up to {names['zzz']}" in line
    assert "below 300" in line


def test_loading_shows_no_bars(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.enable_progress_bar()
    subject_of(copy)
    assert "%|" not in capfd.readouterr().err


def test_without_transformers(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "tuppence[hf]" in refused(folders("GPT2LMHeadModel"))
