"""Weights of others: from folders of transformers, from nanoGPT and from the Hub."""

from __future__ import annotations

import base64
import itertools
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import built, model_plan
from safetensors.torch import load_file, save_file
from small_runs import config_with, model_of, refusal, rewrite, text_ids

from tuppence import cli

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks a network
transformers = pytest.importorskip("transformers", reason="[dev] installs transformers")

SORTER = Path(__file__).parents[2] / "shared/data/weights/gpt-nano-sort-model.json"
Command = Callable[..., dict[str, Any]]


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


def gpt2_folder(path: Path, *, shard: str = "1GB", **settings: Any) -> Any:
    """A GPT-2 of transformers with all its weights drawn, and saved by it."""
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(3)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, **settings))
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0, 0.3)
    peer.save_pretrained(path, max_shard_size=shard)
    return peer.eval()


def bare(path: Path) -> None:
    """The names of GPT2Model, with the masks of old files."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
        return masks | {name.removeprefix("transformer."): t for name, t in tensors.items()}

    rewrite(path, change)


def pickled(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def with_head(path: Path) -> None:
    """The tied head written as well."""
    rewrite(path, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})


SAVED = {
    "tied": (True, "1GB", None),
    "untied": (False, "1GB", None),
    "tied, sharded": (True, "20KB", None),
    "untied, sharded": (False, "20KB", None),
    "bare names": (True, "1GB", bare),
    "pickled": (False, "1GB", pickled),
    "tied head written": (True, "1GB", with_head),
}


@pytest.mark.parametrize("how", SAVED)
def test_a_gpt2_of_transformers(how: str, tuppence: Command) -> None:
    tied, shard, change = SAVED[how]
    peer = gpt2_folder(Path("peer"), shard=shard, tie_word_embeddings=tied)
    assert Path("peer/model.safetensors.index.json").exists() == (shard != "1GB")
    if change:
        change(Path("peer"))
    told = tuppence("import", "peer")
    assert (told["architecture"], told["model"]["tied_head"]) == ("GPT2LMHeadModel", tied)
    idx = text_ids(50)
    with torch.no_grad():
        assert (model_of(Path("imports/peer"))(idx) - peer(idx).logits).abs().max() < 1e-4


def nanogpt(path: Path, *, bias: bool = True, prefix: str = "", **more: Any) -> Any:
    """A ckpt.pt as nanoGPT's train.py writes it after three steps, and its model in our code."""
    keys = {"n_layer": 2, "n_head": 4, "n_embd": 32, "bias": bias, "vocab_size": 50}
    model = built(model_plan(**{k: v for k, v in keys.items() if k != "vocab_size"}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(text_ids(50), text_ids(50).roll(-1, 1)).backward()
        optimizer.step()
    named = {f"transformer.{n}": p.detach() for n, p in model.named_parameters()}
    named["lm_head.weight"] = named["transformer.wte.weight"]
    document = {
        "model": {prefix + name: tensor for name, tensor in named.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {**keys, "block_size": 16, "dropout": 0.0},
        "iter_num": 3,
        "best_val_loss": torch.tensor(3.5),
        "config": {"out_dir": "out", "learning_rate": 1e-2},
    }
    torch.save(document | more, path)
    return model


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt(prefix: str, bias: bool, tuppence: Command) -> None:
    Path("out").mkdir()
    model = nanogpt(Path("out/ckpt.pt"), bias=bias, prefix=prefix)
    told = tuppence("import", "out/ckpt.pt")
    assert told["architecture"] == "nanoGPT"
    assert told["model"]["bias"] is bias
    idx = text_ids(50)
    with torch.no_grad():
        assert torch.equal(model_of(Path("imports/ckpt"))(idx), model(idx))
    assert tuppence("import", "out")["folder"] == "imports/out"  # nanoGPT's folder


class Evil:
    """Pickles as a call."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.victim),))


def test_a_pickle_with_code_in_it_is_not_executed(tuppence: Command) -> None:
    nanogpt(Path("ckpt.pt"), config=Evil(Path("owned")))
    line = refusal(tuppence("import", "ckpt.pt"))
    assert "ckpt.pt holds code (posix.mkdir)" in line
    gpt2_folder(Path("peer"))
    Path("peer/model.safetensors").unlink()
    torch.save({"wte.weight": Evil(Path("owned"))}, "peer/pytorch_model.bin")
    assert "holds code" in refusal(tuppence("import", "peer"))
    assert not Path("owned").exists()
    assert not Path("imports").exists()
    torch.load("ckpt.pt", weights_only=False)  # what others would have done
    assert Path("owned").exists()


def test_the_sorting_model_comes_in_and_sorts(tuppence: Command) -> None:
    if not SORTER.exists():
        pytest.skip(f"the trained sorting model is not at {SORTER}")
    stored = json.loads(SORTER.read_text())
    keys = ("n_layer", "n_head", "n_embd", "vocab_size")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    config |= {key: stored["config"][key] for key in keys}
    config |= {"n_positions": stored["config"]["block_size"], "tie_word_embeddings": False}
    tensors = {}
    for name, entry in stored.items():
        if name.endswith(("weight", "bias")) and not name.endswith(".attn.bias"):
            raw = np.frombuffer(base64.b64decode(entry["data"]), dtype="<f4")
            tensor = torch.from_numpy(raw.reshape(entry["shape"]).copy())
            matrix = ".c_" in name and tensor.dim() == 2
            tensors[name] = tensor.T.contiguous() if matrix else tensor
    Path("sorter").mkdir()
    Path("sorter/config.json").write_text(json.dumps(config))
    save_file(tensors, "sorter/model.safetensors")
    tuppence("import", "sorter")
    model = model_of(Path("imports/sorter"))
    unsorted = torch.tensor(list(itertools.product(range(3), repeat=6)))
    idx = unsorted
    for _ in range(6):
        with torch.no_grad():
            idx = torch.cat([idx, model(idx[:, -11:])[:, -1].argmax(-1, keepdim=True)], 1)
    assert len(idx) == 729
    assert torch.equal(idx[:, 6:], unsorted.sort(1).values)


# ---------------------------------------------------------------- what is not read


def without(name: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda t: {k: v for k, v in t.items() if k != name})


def with_tensor(name: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda t: t | {name: torch.zeros(32)})


def index_elsewhere(path: Path) -> None:
    (path / "model.safetensors").rename(path.parent / "elsewhere.safetensors")
    index = {"weight_map": {"wte.weight": "../elsewhere.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


ODD = [
    (config_with(model_type="llama", architectures=["LlamaForCausalLM"]), "is a LlamaForCausalLM"),
    (config_with(model_type=None, architectures=None), "is a model of no named architecture"),
    (config_with(activation_function="gelu"), "activation_function=gelu"),
    (config_with(layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06; the model here has 1e-05"),
    (config_with(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    (config_with(n_inner=64), "n_inner=64; gpt2 here has 4 x 32"),
    (config_with(n_layer="two"), "n_layer='two'; a whole number is needed"),
    (config_with(n_head=5), "model.n_head=5 does not divide model.n_embd=32"),
    (config_with(n_layer=1), "the weights have h.1."),
    (config_with(n_layer=3), "the weights lack h.2."),
    (config_with(vocab_size=51), "wte.weight is [50, 32], but its config makes it [51, 32]"),
    (config_with(tie_word_embeddings=False), "the weights lack lm_head.weight"),
    (with_tensor("lm_head.weight"), "lm_head.weight differs from wte.weight"),
    (with_tensor("score.weight"), "the weights have score.weight"),
    (without("transformer.h.1.ln_2.bias"), "the weights lack h.1.ln_2.bias"),
    (index_elsewhere, "names ../elsewhere.safetensors, which is not a file beside it"),
    (no_weights, "no weights there"),
    (lambda path: (path / "config.json").write_text("[]"), "config.json is not a JSON object"),
    (lambda path: (path / "config.json").write_text("{"), "config.json is not JSON"),
    (lambda path: (path / "config.json").unlink(), "no config.json of transformers"),
    (lambda path: (path / "run.json").write_text("{}"), "is a run already"),
    (lambda path: (path / "import.json").write_text("{}"), "is an import already"),
    (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer.json"),
]


@pytest.mark.parametrize(("change", "says"), ODD, ids=[says for _, says in ODD])
def test_a_folder_that_is_not_read(change: Any, says: str, tuppence: Command) -> None:
    gpt2_folder(Path("peer"))
    change(Path("peer"))
    assert says in refusal(tuppence("import", "peer"))
    assert not list(Path().glob("imports/*"))


def test_files_that_are_no_weights(tuppence: Command) -> None:
    Path("notes.txt").write_text("not a pickle")
    assert "notes.txt is not a checkpoint" in refusal(tuppence("import", "notes.txt"))
    torch.save({"state_dict": {}}, "lightning.ckpt")
    assert "not a ckpt.pt of nanoGPT" in refusal(tuppence("import", "lightning.ckpt"))
    save_file({"a": torch.zeros(1)}, "alone.safetensors")
    assert "without their config.json" in refusal(tuppence("import", "alone.safetensors"))
    assert "no such folder or file" in refusal(tuppence("import", "not/a/model/name"))
    assert "--name a/b" in refusal(tuppence("import", "notes.txt", "--name", "a/b"))


def test_a_name_that_is_taken(tuppence: Command) -> None:
    gpt2_folder(Path("one"))
    gpt2_folder(Path("two"), tie_word_embeddings=False)
    tuppence("import", "one", "--name", "x")
    assert "imports/x is there already" in refusal(tuppence("import", "two", "--name", "x"))
    assert tuppence("import", "two", "--name", "x", "--out", "more")["folder"] == "more/x"


def test_a_damaged_safetensors(tuppence: Command) -> None:
    gpt2_folder(Path("peer"))
    Path("peer/model.safetensors").write_bytes(b"\0" * 100)
    told = tuppence("import", "peer")
    assert told["error"]["exit_code"] == 1
    assert "model.safetensors is damaged" in told["error"]["message"]


# ---------------------------------------------------------------- the Hub


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> list[Any]:
    """A stand-in for huggingface_hub that has one model, or no network; what it was asked."""
    asked: list[Any] = []

    def one(name: str, file: str) -> str:
        asked.append((name, file))
        if folder is None:
            raise ConnectionError("Connection refused\nmore of it")
        return str(folder / file)

    def many(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    fake = types.SimpleNamespace(hf_hub_download=one, snapshot_download=many)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return asked


def test_a_model_of_the_hub(tuppence: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = gpt2_folder(Path("cache/0a1b2c"))
    asked = hub(monkeypatch, Path("cache/0a1b2c"))
    told = tuppence("import", "openai-community/gpt2")
    assert told["folder"] == "imports/gpt2"
    assert told["source"] == "openai-community/gpt2@0a1b2c"
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked[1][1])
    with torch.no_grad():
        ours = model_of(Path("imports/gpt2"))(text_ids(50))
        assert (ours - peer(text_ids(50)).logits).abs().max() < 1e-4


def test_what_the_hub_cannot_give(tuppence: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, None)
    line = refusal(tuppence("import", "openai-community/gpt2"))
    assert "openai-community/gpt2: no such folder or file here, and the Hub" in line
    assert "Connection refused" in line
    gpt2_folder(Path("llama"))
    config_with(model_type="llama", architectures=["LlamaForCausalLM"])(Path("llama"))
    asked = hub(monkeypatch, Path("llama"))
    assert "LlamaForCausalLM" in refusal(tuppence("import", "meta/llama"))
    assert len(asked) == 1  # its weights were not fetched
    gpt2_folder(Path("old"))
    pickled(Path("old"))
    hub(monkeypatch, Path("old"))
    assert "no safetensors on the Hub" in refusal(tuppence("import", "old-model/x"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'tuppence[hub]'" in refusal(tuppence("import", "openai-community/gpt2"))
