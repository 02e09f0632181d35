"""Weights out to transformers, and back."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    DEPTH,
    GPT2,
    LOOPED,
    best_model,
    config_with,
    finished,
    model_of,
    refusal,
    rewrite,
    text_ids,
)

from tuppence import checkpoint, cli
from tuppence.config import DataPlan
from tuppence.data.prepare import prepare
from tuppence.evals.generate import generate
from tuppence.folder import RunFolder
from tuppence.plan.hardware import Calibration
from tuppence.tokenizer.spec import build_tokenizer, load_tokenizer
from tuppence.workers import Workers

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a network
transformers = pytest.importorskip("transformers", reason="[dev] installs transformers")

MODELS = {
    "gpt2": GPT2,
    "gpt2 biased": [*GPT2, "model.bias=on"],
    "gpt2 untied": [*GPT2, "model.tied_head=off", "model.bias=on"],
    "gpt2 untied, no bias": [*GPT2, "model.tied_head=off"],
    "depth": DEPTH,
    "depth grouped": [*DEPTH, "model.n_kv_head=1"],
    "looped": LOOPED,
    "looped mixed": [*LOOPED, "model.mixture_of_depths=on"],
}
Runs = Callable[..., RunFolder]
Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return prepare(source="shakespeare", tokenizer="char", root=root).folder


@pytest.fixture(scope="session")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    calibration: Calibration,
    data_plan: DataPlan,
    shards: Path,
) -> Runs:
    """A finished run with these words; trained once."""
    made: dict[tuple[str, ...], RunFolder] = {}

    def run(*words: str) -> RunFolder:
        if words not in made:
            path = tmp_path_factory.mktemp("runs") / "small"
            made[words] = finished(path, list(words), data_plan, shards, calibration)
        return made[words]

    return run


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies modelling files to: not the person's cache."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def tuppence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs one command line with --json in an empty folder; the document it prints."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def tuppence(*words: str) -> dict[str, Any]:
        code = cli.main([*words, "--json"])
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert code == document.get("error", {}).get("exit_code", 0)
        return document

    return tuppence


def theirs(folder: Path, **options: Any) -> Any:
    """A folder as transformers loads it, every weight found and none left over."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


# ---------------------------------------------------------------- out


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_the_logits_of_the_run(name: str, runs: Runs, tuppence: Command) -> None:
    run = runs(*MODELS[name])
    told = tuppence("export", str(run.path), "--to", "hf")
    assert told["folder"] == str(run.path / "export" / "hf")
    looped = name.startswith("looped")
    assert told["needs_trust_remote_code"] is looped
    peer = theirs(run.path / "export" / "hf", **({"trust_remote_code": True} if looped else {}))
    assert type(peer).__name__ == told["architecture"]
    idx = text_ids(65)
    with torch.no_grad():
        ours, logits = best_model(run)(idx), peer(idx).logits
    assert ours.std() > 1e-2
    assert (ours - logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "depth grouped", "looped"])
def test_transformers_goes_on_as_sample_does(name: str, runs: Runs, tuppence: Command) -> None:
    run = runs(*MODELS[name])
    tuppence("export", str(run.path), "--out", "out")
    peer = theirs(Path("out"), **({"trust_remote_code": True} if name == "looped" else {}))
    prompt = text_ids(65, length=4)[:1]
    found = peer.generate(prompt, max_new_tokens=12, do_sample=False)
    ours = generate(
        Workers(best_model(run), count=1, device="cpu", precision="fp32"),
        prompt[0].tolist(),
        new_tokens=12,
        context=16,
        temperature=0,
    )
    assert found[0].tolist() == ours


@pytest.mark.parametrize("padding", [0, 7])
def test_a_vocabulary_padded_beyond_the_tokenizers(
    padding: int, runs: Runs, tuppence: Command
) -> None:
    run = runs(*GPT2, f"model.vocab_size={65 + padding}")
    tuppence("export", str(run.path), "--out", "out")
    assert theirs(Path("out")).lm_head.weight.shape[0] == 65 + padding
    assert len(transformers.AutoTokenizer.from_pretrained("out")) == 65


def test_the_checkpoint_that_is_asked_for(runs: Runs, tuppence: Command) -> None:
    run = runs(*GPT2, "budget.steps=4", "train.save_every=2")
    for which in ("2", "last"):
        tuppence("export", str(run.path), "--checkpoint", which, "--out", which)
    saved = [load_file(p / "model.safetensors")["wte.weight"] for p in checkpoint.complete(run)]
    for which, weights in zip(("2", "last"), saved, strict=True):
        found = load_file(f"{which}/model.safetensors")["transformer.wte.weight"]
        assert torch.equal(found, weights)
    assert not torch.equal(*saved)


def test_the_card_tells_of_the_receipt(runs: Runs, tuppence: Command, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(runs(*GPT2).path, path)
    tuppence("export", str(path))
    card = path / "export" / "hf" / "README.md"
    assert "promised" not in card.read_text()
    receipt = tuppence("receipt", str(path))
    (path / "export" / "hf" / "stale.txt").write_text("of an earlier export")
    assert "stale.txt" not in tuppence("export", str(path))["files"]
    assert f"{receipt['actual']['val_loss']:.4f}" in card.read_text()
    assert str(tmp_path) not in card.read_text()


@pytest.mark.parametrize(
    "word", ["model.value_embeddings=on", "model.residual_scalars=on", "model.window_pattern=SL"]
)
def test_a_part_that_transformers_has_not(word: str, runs: Runs, tuppence: Command) -> None:
    off = ["model.value_embeddings=off", "model.residual_scalars=off"]
    run = runs("model.family=depth", "model.n_layer=2", *off, word)
    line = refusal(tuppence("export", str(run.path)))
    assert word.partition("=")[0] in line
    assert "model.exportable=on trains without it" in line
    assert not (run.path / "export").exists()


def test_what_export_refuses(runs: Runs, tuppence: Command) -> None:
    run = str(runs(*GPT2).path)
    Path("full").mkdir()
    Path("full", "thesis.txt").write_text("years of work")
    assert "full is there already" in refusal(tuppence("export", run, "--out", "full"))
    assert "full/thesis.txt" in refusal(tuppence("export", run, "--out", "full/thesis.txt"))
    assert Path("full", "thesis.txt").read_text() == "years of work"
    assert "'onnx'" in refusal(tuppence("export", run, "--to", "onnx"))
    assert "steps" in refusal(tuppence("export", run, "--checkpoint", "99"))
    assert "no run 'nope'" in refusal(tuppence("export", "nope"))


def test_a_damaged_checkpoint_is_not_exported(
    runs: Runs, tuppence: Command, tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(runs(*GPT2).path, path)
    weights = checkpoint.choose(RunFolder(path), "best") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    told = tuppence("export", str(path), "--out", "out")
    assert told["error"]["exit_code"] == 1
    assert "does not match its sha256" in told["error"]["message"]
    assert not Path("out").exists()


TEXT = "ROMEO:\nWhat's  here? <|endoftext|> 's n't I 'm 12,345 . !\n\n\n\tAy"


@pytest.mark.parametrize("spec", ["char", "byte", "gpt2", "bpe:300"])
def test_their_tokenizer_encodes_and_decodes_as_ours(
    spec: str, runs: Runs, tuppence: Command, tmp_path: Path
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(runs(*GPT2).path, path)
    ours = build_tokenizer(spec, texts=lambda: iter([TEXT, "to be or not to be, that is " * 9]))
    shutil.rmtree(path / "tokenizer")
    ours.save(path / "tokenizer")
    tuppence("export", str(path), "--out", "out")
    peer = transformers.AutoTokenizer.from_pretrained("out")
    texts = [TEXT[:50], TEXT[50:] * 3] + ([] if spec == "char" else ["naïve ☃ \U0001d4d0\x00\r\n"])
    for text in texts:
        ids = ours.encode(text).tolist()
        assert peer(text)["input_ids"] == ids
        assert peer.decode(ids) == ours.decode(ids) == text
    assert len(peer) == ours.vocab_size
    assert peer.eos_token_id == ours.end_of_text
    assert peer.model_max_length == 16


def test_a_looped_export_refuses_what_it_cannot_do(runs: Runs, tuppence: Command) -> None:
    tuppence("export", str(runs(*LOOPED).path), "--out", "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out", trust_remote_code=True)
    assert tokenizer("to be")["input_ids"] == load_tokenizer(Path("out")).encode("to be").tolist()
    assert Path("out/README.md").read_text().count("trust_remote_code=True)") == 2
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained("out", trust_remote_code=False)
    peer, idx = theirs(Path("out"), trust_remote_code=True), text_ids(65)
    left = torch.ones_like(idx)
    left[0, :3] = 0
    with pytest.raises(ValueError, match="pad on the right"):
        peer(idx, attention_mask=left)
    with pytest.raises(ValueError, match="use_cache=False"):
        peer.generate(idx, max_new_tokens=2, use_cache=True)
    with torch.no_grad():
        padded = peer(idx, attention_mask=left.flip(1)).logits
        assert torch.equal(padded, peer(idx).logits)
        peer.config.recurrence = 5
        longer = best_model(runs(*LOOPED))
        longer.recurrence = 5
        assert (peer(idx).logits - longer(idx)).abs().max() < 1e-4
        assert (peer(idx).logits - padded).abs().max() > 1e-4


# ---------------------------------------------------------------- in


@pytest.mark.parametrize("name", MODELS)
def test_an_export_comes_back_bit_for_bit(name: str, runs: Runs, tuppence: Command) -> None:
    run = runs(*MODELS[name])
    tuppence("export", str(run.path), "--out", "out")
    told = tuppence("import", "out", "--name", "back")
    assert told["folder"] == "imports/back"
    assert told == {"folder": "imports/back", "reused": False} | json.loads(
        Path("imports/back/import.json").read_text()
    )
    before = dict(best_model(run).named_parameters())
    after = load_file("imports/back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    plan = run.plan().model
    for key in ("n_embd", "n_head", "vocab_size", "sequence_len"):
        assert told["model"][key] == getattr(plan, key)
    assert load_tokenizer(Path("imports/back/tokenizer")).vocab_size == 65
    assert tuppence("import", "out", "--name", "back")["reused"] is True


def test_biases_trained_after_an_export_stay(runs: Runs, tuppence: Command) -> None:
    tuppence("export", str(runs(*GPT2).path), "--out", "out")
    assert tuppence("import", "out", "--name", "before")["model"]["bias"] is False
    rewrite(Path("out"), lambda t: t | {"transformer.ln_f.bias": torch.full((32,), 0.5)})
    assert tuppence("import", "out", "--name", "after")["model"]["bias"] is True
    assert model_of(Path("imports/after")).ln_f.bias.eq(0.5).all()


NANOCHAT = [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "rope_theta=10000.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0; the model here has 15.0"),
    ({"intermediate_size": 100}, "intermediate_size=100; depth here has 4 x 32"),
    ({"hidden_act": "silu"}, "hidden_act=silu; the model here has relu2"),
    ({"num_hidden_layers": 1}, "the weights have model.layers.1."),
    ({"num_key_value_heads": "two"}, "two"),
]


@pytest.mark.parametrize(("settings", "says"), NANOCHAT, ids=[says for _, says in NANOCHAT])
def test_a_nanochat_that_is_not_read(
    settings: dict[str, Any], says: str, runs: Runs, tuppence: Command
) -> None:
    tuppence("export", str(runs(*DEPTH).path), "--out", "out")
    config_with(**settings)(Path("out"))
    assert says in refusal(tuppence("import", "out"))
