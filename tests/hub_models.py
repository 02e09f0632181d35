"""Small models of transformers with a tokenizer, as folders: for tests of models of others."""

import json
from pathlib import Path
from typing import Any

import torch

from tuppence.tokenizer.spec import Tokenizer

SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
}


def written(
    folder: Path, tokenizer: Tokenizer, architecture: str, *, sharp: float = 1.0, **config: Any
) -> Path:
    """A random model in `folder`; `sharp` makes its choices differ more than a fresh one's do."""
    import transformers

    torch.manual_seed(0)
    name = architecture.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    small = {"n_layer": 2, "n_head": 2, "n_embd": 32} if name == "GPT2" else SMALL
    end = tokenizer.end_of_text
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    words = small | ids | {"vocab_size": tokenizer.vocab_size} | config
    model = getattr(transformers, architecture)(getattr(transformers, f"{name}Config")(**words))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharp if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "tokenizer.meta.json").unlink()
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def begins_texts(folder: Path, token: str) -> Path:
    """Make the folder's tokenizer put this special token before every text, as Llama's does."""
    rules = json.loads((folder / "tokenizer.json").read_text())
    number = next(each["id"] for each in rules["added_tokens"] if each["content"] == token)
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"bos_token": token}))
    return folder


def as_gguf(folder: Path, path: Path) -> Path:
    """A Llama of a folder and its tokenizer in the one file that llama.cpp reads."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    rules = json.loads((folder / "tokenizer.json").read_text())
    heads = config["num_attention_heads"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_name("small")
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(heads)
    file.add_head_count_kv(heads)
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_vocab_size(config["vocab_size"])
    vocab = rules["model"]["vocab"] | {t["content"]: t["id"] for t in rules["added_tokens"]}
    file.add_tokenizer_model("gpt2")
    file.add_token_list(sorted(vocab, key=vocab.__getitem__))
    file.add_token_types(
        [3 if name.startswith("<|") else 1 for name in sorted(vocab, key=vocab.get)]
    )
    file.add_token_merges([" ".join(pair) for pair in rules["model"]["merges"]])
    file.add_bos_token_id(config["eos_token_id"])
    file.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:  # rotary pairs stand side by side there
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).flatten(0, 2)
        told = names.get_name(name, try_suffixes=(".weight",))
        file.add_tensor(told, tensor.contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path
