"""Names and layouts: our tensors and `model.*` keys on one side, those of others on the other.

    gpt2     GPT2LMHeadModel     matrices of blocks stored transposed; biases always there
    depth    NanoChatForCausalLM query, key and value apart
    looped   its own file beside the weights (assets/modeling_looped.py): our names

    nanoGPT  our names behind `transformer.`, head tied

What the other side has a setting for and ours has not is refused, never dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tuppence.config import Model, ModelPlan
from tuppence.errors import UserError
from tuppence.model import layers, looped

Tensors = dict[str, Tensor]
Config = dict[str, Any]
READ = (
    "GPT2LMHeadModel, NanoChatForCausalLM and LoopedForCausalLM of transformers, nanoGPT's ckpt.pt"
)
LAYER_NORM_EPS = 1e-5
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D in transformers
GPT2_FIXED = {
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
NANOCHAT_FIXED = {
    "hidden_act": "relu2",
    "rms_norm_eps": layers.NORM_EPS,
    "final_logit_softcapping": layers.SOFTCAP,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
LOOPED_FIXED = {
    "rope_theta": layers.ROPE_BASE,
    "norm_eps": layers.NORM_EPS,
    "logit_softcap": layers.SOFTCAP,
    "state_std": looped.STATE_STD,
    "adapter_scale": looped.ADAPTER_SCALE,
}
LOOPED_KEYS = (
    "n_prelude",
    "n_recurrent",
    "n_coda",
    "mean_recurrence",
    "max_recurrence",
    "lora_rank",
    "mixture_of_depths",
)
NANOCHAT_NAMES = {
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_proj.weight": "mlp.fc2.weight",
}
NANOCHAT_ENDS = {
    "wte.weight": "model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Outside:
    """A model as transformers has it."""

    architecture: str
    config: Config
    tensors: Tensors


@dataclass(frozen=True)
class Inside:
    """A model as this package has it, and the architecture that it came as."""

    architecture: str
    model: Model
    tensors: Tensors


# ---------------------------------------------------------------- out


def outside(plan: ModelPlan, tensors: Tensors) -> Outside:
    """Our weights as transformers reads them. Raises UserError for what it has no place for."""
    build = {"gpt2": _to_gpt2, "depth": _to_nanochat, "looped": _to_looped}[plan.family]
    made = build(plan, tensors)
    head = {"architectures": [made.architecture], "dtype": "float32"}
    return Outside(
        made.architecture,
        head | made.config,
        {name: t.contiguous() for name, t in made.tensors.items()},
    )


def _to_gpt2(plan: ModelPlan, tensors: Tensors) -> Outside:
    named = {}
    for name, tensor in tensors.items():
        key = name if name == "lm_head.weight" else f"transformer.{name}"
        named[key] = tensor.T if name.endswith(TRANSPOSED) else tensor
        if not plan.bias and name.startswith(("h.", "ln_f.")):  # it has biases, whatever we have
            named[key.removesuffix("weight") + "bias"] = torch.zeros(tensor.shape[0])
    config = {
        "model_type": "gpt2",
        "vocab_size": plan.vocab_size,
        "n_positions": plan.sequence_len,
        "n_embd": plan.n_embd,
        "n_layer": plan.n_layer,
        "n_head": plan.n_head,
        "activation_function": "gelu_new",
        "tie_word_embeddings": plan.tied_head,
        "bias": plan.bias,  # nanoGPT's word: off says that the zeros are no parameters
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), plan.dropout),
        **GPT2_FIXED,
    }
    return Outside("GPT2LMHeadModel", config, named)


def _to_nanochat(plan: ModelPlan, tensors: Tensors) -> Outside:
    _check_plain(plan)
    head_dim = plan.n_embd // plan.n_head
    rows = [n * head_dim for n in (plan.n_head, plan.n_kv_head, plan.n_kv_head)]
    named = {theirs: tensors[ours] for ours, theirs in NANOCHAT_ENDS.items()}
    for i in range(plan.n_layer):
        ours, theirs = f"h.{i}.", f"model.layers.{i}."
        parts = torch.split(tensors[f"{ours}attn.c_attn.weight"], rows)
        for letter, part in zip("qkv", parts, strict=True):
            named[f"{theirs}self_attn.{letter}_proj.weight"] = part
        named |= {theirs + there: tensors[ours + here] for here, there in NANOCHAT_NAMES.items()}
    config = {
        "model_type": "nanochat",
        "vocab_size": plan.vocab_size,
        "max_position_embeddings": plan.sequence_len,
        "hidden_size": plan.n_embd,
        "intermediate_size": 4 * plan.n_embd,
        "num_hidden_layers": plan.n_layer,
        "num_attention_heads": plan.n_head,
        "num_key_value_heads": plan.n_kv_head,
        "rope_parameters": {"rope_type": "default", "rope_theta": layers.ROPE_BASE},
        **NANOCHAT_FIXED,
    }
    return Outside("NanoChatForCausalLM", config, named)


def _check_plain(plan: ModelPlan) -> None:
    """Refuse the parts that no architecture of transformers has."""
    parts = {
        "value_embeddings": plan.value_embeddings,
        "residual_scalars": plan.residual_scalars,
        "window_pattern": any(window < plan.sequence_len for window in plan.windows),
    }
    for key in (key for key, there in parts.items() if there):
        raise UserError(
            f"this model has model.{key}, which no architecture of transformers has; a run with "
            f"model.exportable=on trains without it"
        )


def _to_looped(plan: ModelPlan, tensors: Tensors) -> Outside:
    assert plan.loop is not None
    config = {
        "model_type": "tuppence_looped",
        "auto_map": {
            "AutoConfig": "modeling_looped.LoopedConfig",
            "AutoModelForCausalLM": "modeling_looped.LoopedForCausalLM",
        },
        "vocab_size": plan.vocab_size,
        "max_position_embeddings": plan.sequence_len,
        "hidden_size": plan.n_embd,
        "num_attention_heads": plan.n_head,
        "num_hidden_layers": plan.n_layer,
        "recurrence": max(1, round(plan.loop.mean_recurrence)),
        **{key: getattr(plan.loop, key) for key in LOOPED_KEYS},
        **LOOPED_FIXED,
        "tie_word_embeddings": False,
    }
    return Outside("LoopedForCausalLM", config, dict(tensors))


# ---------------------------------------------------------------- in


def reader_of(config: Config, source: str) -> Callable[[Config, Tensors, str], Inside]:
    """What reads the weights of a config.json. Raises UserError for an architecture it is not."""
    readers = {"gpt2": _from_gpt2, "nanochat": _from_nanochat, "tuppence_looped": _from_looped}
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in readers:
        return readers[kind]
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else kind
    raise UserError(f"{source} is a {name or 'model of no named architecture'}; read are {READ}")


def _from_gpt2(config: Config, tensors: Tensors, source: str) -> Inside:
    _check_fixed(config, GPT2_FIXED, source)
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(f"{source}: activation_function={activation}; gpt2 here has gelu_new")
    width = _size(config, "n_embd", source)
    if config.get("n_inner") not in (None, 4 * width):
        raise UserError(f"{source}: n_inner={config['n_inner']}; gpt2 here has 4 x {width}")
    ours = {}
    for name, tensor in tensors.items():
        key = name.removeprefix("transformer.")
        if not key.endswith((".attn.bias", ".attn.masked_bias")):  # masks of old files
            ours[key] = tensor.T if key.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    model = Model(
        family="gpt2",
        n_layer=_size(config, "n_layer", source),
        n_head=_size(config, "n_head", source),
        n_embd=width,
        vocab_size=_size(config, "vocab_size", source),
        sequence_len=_size(config, "n_positions", source),
        bias=True,
        tied_head=bool(config.get("tie_word_embeddings", True)),
    )
    if config.get("bias") is False:
        model, ours = _without_biases(model, ours)
    return _gpt2("GPT2LMHeadModel", model, ours, source)


def _without_biases(model: Model, tensors: Tensors) -> tuple[Model, Tensors]:
    """An export of ours without biases, unless someone has trained them since."""
    biases = [name for name in tensors if name.endswith("bias")]
    if any(tensors[name].any() for name in biases):
        return model, tensors
    return replace(model, bias=False), {n: t for n, t in tensors.items() if n not in biases}


def _gpt2(architecture: str, model: Model, tensors: Tensors, source: str) -> Inside:
    """With the head stored once where it is tied."""
    head, table = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if model.tied_head and head is not None:
        if table is None or not torch.equal(head, table):
            raise UserError(
                f"{source}: lm_head.weight differs from wte.weight, but its config ties them; "
                f"say tie_word_embeddings: false in config.json to keep both"
            )
        tensors = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    return Inside(architecture, model, _float(tensors))


def from_nanogpt(found: Any, source: str) -> Inside:
    """What nanoGPT's train.py saved. Raises UserError for another file."""
    document = found if isinstance(found, dict) else {}
    tensors, told = document.get("model"), document.get("model_args")
    if not isinstance(tensors, dict) or not isinstance(told, dict):
        raise UserError(f"{source}: not a ckpt.pt of nanoGPT (no model and model_args in it)")
    ours = {}
    for name, tensor in tensors.items():
        key = str(name).removeprefix("_orig_mod.").removeprefix("transformer.")
        if not key.endswith(".attn.bias"):  # a mask
            ours[key] = tensor
    model = Model(
        family="gpt2",
        n_layer=_size(told, "n_layer", source),
        n_head=_size(told, "n_head", source),
        n_embd=_size(told, "n_embd", source),
        vocab_size=_size(told, "vocab_size", source),
        sequence_len=_size(told, "block_size", source),
        bias=bool(told.get("bias", True)),
        tied_head=True,
    )
    return _gpt2("nanoGPT", model, ours, source)


def _from_nanochat(config: Config, tensors: Tensors, source: str) -> Inside:
    _check_fixed(config, NANOCHAT_FIXED, source)
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if (theta, rope.get("rope_type", "default")) != (layers.ROPE_BASE, "default"):
        raise UserError(f"{source}: rope_theta={theta}; depth here has {layers.ROPE_BASE:g}")
    width, heads = (_size(config, key, source) for key in ("hidden_size", "num_attention_heads"))
    inner = config.get("intermediate_size")
    if inner != 4 * width:
        raise UserError(f"{source}: intermediate_size={inner}; depth here has 4 x {width}")
    n_layer = _size(config, "num_hidden_layers", source)
    ours = dict(tensors)  # what is not taken keeps its name, and is refused by it
    for here, there in NANOCHAT_ENDS.items():
        _rename(ours, there, here)
    for i in range(n_layer):
        block = f"model.layers.{i}."
        qkv = [f"{block}self_attn.{letter}_proj.weight" for letter in "qkv"]
        if all(name in ours for name in qkv):
            ours[f"h.{i}.attn.c_attn.weight"] = torch.cat([ours.pop(name) for name in qkv])
        for here, there in NANOCHAT_NAMES.items():
            _rename(ours, block + there, f"h.{i}.{here}")
    model = Model(
        family="depth",
        n_layer=n_layer,
        n_head=heads,
        n_kv_head=config.get("num_key_value_heads") or heads,
        n_embd=width,
        vocab_size=_size(config, "vocab_size", source),
        sequence_len=_size(config, "max_position_embeddings", source),
        value_embeddings=False,
        residual_scalars=False,
    )
    return Inside("NanoChatForCausalLM", model, _float(ours))


def _rename(tensors: Tensors, old: str, new: str) -> None:
    if old in tensors:
        tensors[new] = tensors.pop(old)


def _from_looped(config: Config, tensors: Tensors, source: str) -> Inside:
    _check_fixed(config, LOOPED_FIXED, source)
    missing = [key for key in LOOPED_KEYS if key not in config]
    if missing:
        raise UserError(f"{source}: config.json has no {missing[0]}")
    model = Model(
        family="looped",
        n_head=_size(config, "num_attention_heads", source),
        n_embd=_size(config, "hidden_size", source),
        vocab_size=_size(config, "vocab_size", source),
        sequence_len=_size(config, "max_position_embeddings", source),
        **{key: config[key] for key in LOOPED_KEYS},
    )
    return Inside("LoopedForCausalLM", model, _float(tensors))


def _float(tensors: Tensors) -> Tensors:
    return {name: t.float().contiguous() for name, t in tensors.items()}


def _size(config: Config, key: str, source: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{source}: its config has {key}={value!r}; a whole number is needed")
    return value


def _check_fixed(config: Config, fixed: dict[str, Any], source: str) -> None:
    """Refuse a setting that this package's model has not."""
    for key, ours in fixed.items():
        theirs = config.get(key, ours)
        if theirs != ours:
            raise UserError(f"{source}: {key}={theirs}; the model here has {ours}")
