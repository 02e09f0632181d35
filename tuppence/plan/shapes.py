"""From the architecture that was asked to its `Shape`: the dial, the families, their refusals.

    model.depth = L      width 64 L, heads of 128 (of 64 where the width is an odd multiple of 64)

The dial's aspect ratio of 64 is nanochat's; at L = 12 it is GPT-2 small's.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from tuppence.config import LoopPlan, Model, ModelPlan, Warning
from tuppence.errors import UserError
from tuppence.plan import cost
from tuppence.plan.cost import Shape

FAMILIES = ("gpt2", "depth", "looped")
ASPECT = 64  # channels a layer of the dial
SEQUENCE_LEN = {"gpt2": 1024, "depth": 2048, "looped": 2048}
LOOPED_ONLY = (
    "n_prelude",
    "n_recurrent",
    "n_coda",
    "mean_recurrence",
    "max_recurrence",
    "backprop_depth",
    "lora_rank",
    "mixture_of_depths",
)
GPT2_ONLY = ("bias", "tied_head", "dropout")
DEPTH_ONLY = ("window_pattern", "value_embeddings", "residual_scalars")
FOREIGN = {  # what a family has no part for
    "gpt2": (*DEPTH_ONLY, *LOOPED_ONLY),
    "depth": (*GPT2_ONLY, *LOOPED_ONLY),
    "looped": ("n_layer", "n_kv_head", *DEPTH_ONLY, *GPT2_ONLY),
}
UNEXPORTABLE = ("value_embeddings", "residual_scalars")  # no architecture of transformers has them
PADDED_TO, PADDED_FROM = 128, 1024  # rows of the head
LORA_RANK = 32
R_SIGMA = 0.5  # of a looped model's log-normal number of iterations
SHORT_WINDOW = 4  # a letter S of model.window_pattern looks at this part of the sequence


def is_sized(model: Model) -> bool:
    """Whether the person fixed the model's size; a looped model has no dial to turn."""
    return model.family == "looped" or model.depth is not None or model.n_layer is not None


def at_depth(model: Model, depth: int) -> Model:
    """The same request with the dial set."""
    return dataclasses.replace(model, depth=depth)


def laid_out(model: Model) -> Model:
    """The request with the dial's consequences written out; what the person set stands."""
    family = model.family or ("gpt2" if model.depth is None else "depth")
    if family not in FAMILIES:
        raise UserError(f"model.family={family}: there are {', '.join(FAMILIES)}")
    for key in (k for k in FOREIGN[family] if getattr(model, k) is not None):
        owners = " or ".join(f for f in FAMILIES if key not in FOREIGN[f])
        raise UserError(
            f"model.{key}={getattr(model, key)}: {family} has no such part; it is of {owners} "
            f"(model.{key}=none leaves it out)"
        )
    depth = model.depth
    if depth is not None and depth < 1:
        raise UserError(f"model.depth={depth}: at least 1")
    if depth is not None and family == "looped":
        raise UserError(f"model.depth={depth}: a looped model is sized by model.n_embd")
    if depth is not None and model.n_layer not in (None, depth):
        raise UserError(
            f"model.depth={depth} and model.n_layer={model.n_layer}: the dial sets the layers; "
            f"model.n_layer=none model.n_head=none model.n_embd=none leaves them to it"
        )
    width = model.n_embd if depth is None or model.n_embd is not None else ASPECT * depth
    heads = model.n_head
    if heads is None and width is not None:
        wanted = max(1, width // (64 if family == "gpt2" or width % 128 else 128))
        heads = nearest_divisor(width, wanted) if width > 0 else 1
    if family == "depth":
        model = _parts(model)
    if family == "looped" and model.exportable:
        raise UserError(
            "model.exportable=on: a looped model is exported with a modelling file of its own; "
            "model.exportable=none takes that"
        )
    return dataclasses.replace(
        model,
        family=family,
        n_layer=model.n_layer if depth is None else depth,
        n_embd=width,
        n_head=heads,
        sequence_len=SEQUENCE_LEN[family] if model.sequence_len is None else model.sequence_len,
    )


def _parts(model: Model) -> Model:
    """The modern decoder's optional parts, all said: what is exportable has none."""
    given = {key: getattr(model, key) for key in UNEXPORTABLE}
    odd = [key for key, value in given.items() if value]
    if "S" in (model.window_pattern or ""):
        odd.append("window_pattern")
    if model.exportable and odd:
        raise UserError(
            f"model.exportable=on and model.{odd[0]}: no architecture of "
            f"transformers has that part; leave one of the two out"
        )
    on = not model.exportable
    said: dict[str, Any] = {k: on if value is None else value for k, value in given.items()}
    return dataclasses.replace(model, **said)


def unexportable(model: Model) -> list[str]:
    """The parts of a laid out model that no architecture of transformers has."""
    parts = [key for key in UNEXPORTABLE if getattr(model, key)]
    return parts + (["window_pattern"] if "S" in (model.window_pattern or "") else [])


def export_warnings(model: Model) -> list[Warning]:
    """Said of a model that could not be exported without code of ours."""
    parts = unexportable(laid_out(model))
    if not parts:
        return []
    message = (
        f"no architecture of transformers has {' or '.join(parts)}: tuppence export will refuse "
        f"this model (model.exportable=on trains one without)"
    )
    return [Warning("not_exportable", message)]


def padded(vocab_size: int) -> int:
    """The rows of the embedding and the head: of a large vocabulary a multiple of 128, which matrix
    units work in (Karpathy's 50,304 for GPT-2's 50,257); ids beyond the tokenizer's never occur."""
    return vocab_size if vocab_size < PADDED_FROM else -(-vocab_size // PADDED_TO) * PADDED_TO


def shape_of(model: Model, vocab_size: int) -> Shape:
    """The counted shape of a request over a vocabulary of `vocab_size` tokens.

    Raises UserError for a value that is missing, too small, or does not divide.
    """
    full = laid_out(model)
    check_heads(full)
    vocab = padded(vocab_size) if full.vocab_size is None else full.vocab_size
    if vocab < vocab_size:
        raise UserError(
            f"model.vocab_size={vocab}: the tokenizer has {vocab_size} tokens; at least that many, "
            f"or leave it out"
        )
    build: dict[str | None, Callable[[Model, int], Shape]] = {
        "gpt2": _gpt2,
        "depth": _depth,
        "looped": _looped,
    }
    return build[full.family](full, vocab)


def number(model: Model, key: str, *, least: int = 1) -> int:
    """A size that has to be there. Raises UserError where it is not, or is too small."""
    value = getattr(model, key)
    if value is None:
        raise UserError(f"model.{key} is not set: the recipe or you must say it")
    if value < least:
        raise UserError(f"model.{key}={value}: at least {least}")
    return int(value)


def check_heads(model: Model) -> None:
    """Heads divide the width; key-value heads divide the heads."""
    width, heads, kv_heads = number(model, "n_embd"), number(model, "n_head"), model.n_kv_head
    if width % heads:
        nearest_width = max(1, (2 * width + heads) // (2 * heads)) * heads
        nearest_heads = nearest_divisor(width, heads)
        raise UserError(
            f"model.n_head={heads} does not divide model.n_embd={width}; the nearest that fit: "
            f"model.n_embd={nearest_width}, or model.n_head={nearest_heads}"
        )
    if model.family != "gpt2" and width // heads % 2:
        raise UserError(
            f"model.n_embd={width} and model.n_head={heads} make heads of {width // heads}: rotary "
            f"positions turn pairs of channels; the nearest that fits is "
            f"model.n_embd={(width // heads + 1) * heads}"
        )
    if model.family == "gpt2" and kv_heads not in (None, heads):
        raise UserError(f"model.n_kv_head={kv_heads}: gpt2 has as many as n_head={heads}")
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise UserError(
            f"model.n_kv_head={kv_heads} does not divide model.n_head={heads}; the nearest is "
            f"{nearest_divisor(heads, kv_heads)}"
        )


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n nearest to `wanted`, the smaller of two."""
    return min(divisors(n), key=lambda d: (abs(d - wanted), d))


def _gpt2(model: Model, vocab_size: int) -> Shape:
    return cost.gpt2(
        n_layer=number(model, "n_layer"),
        n_head=number(model, "n_head"),
        n_embd=number(model, "n_embd"),
        vocab_size=vocab_size,
        sequence_len=number(model, "sequence_len"),
        bias=bool(model.bias),
        tied_head=True if model.tied_head is None else model.tied_head,
    )


def _depth(model: Model, vocab_size: int) -> Shape:
    if model.value_embeddings and number(model, "n_embd") < cost.GATE_CHANNELS:
        raise UserError(
            f"model.n_embd={model.n_embd}: value embeddings are gated by {cost.GATE_CHANNELS} "
            f"channels; at least that many, or model.value_embeddings=off"
        )
    return cost.depth(
        n_layer=number(model, "n_layer"),
        n_head=number(model, "n_head"),
        n_kv_head=model.n_kv_head,
        n_embd=number(model, "n_embd"),
        vocab_size=vocab_size,
        sequence_len=number(model, "sequence_len"),
        windows=windows(
            model.window_pattern, number(model, "n_layer"), number(model, "sequence_len")
        ),
        value_embeddings=bool(model.value_embeddings),
        residual_scalars=bool(model.residual_scalars),
    )


def windows(pattern: str | None, n_layer: int, sequence_len: int) -> tuple[int, ...] | None:
    """Each layer's window by a repeated pattern of L (whole sequence) and S (a quarter of it).

    The last layer is always whole. Raises UserError for another letter.
    """
    if pattern is None:
        return None
    if not pattern or set(pattern) - set("LS"):
        raise UserError(f"model.window_pattern={pattern}: letters L and S, for example SSSL")
    span = {"L": sequence_len, "S": max(1, sequence_len // SHORT_WINDOW)}
    spans = [span[pattern[i % len(pattern)]] for i in range(n_layer)]
    return (*spans[:-1], sequence_len)


def _looped(model: Model, vocab_size: int) -> Shape:
    number(model, "mean_recurrence")
    mean, most = model.mean_recurrence or 0.0, number(model, "max_recurrence")
    if mean > most:
        raise UserError(
            f"model.mean_recurrence={mean:g} is above model.max_recurrence={most}; raise that or "
            f"lower this"
        )
    sizes: dict[str, Any] = {
        "n_prelude": number(model, "n_prelude", least=0),
        "n_recurrent": number(model, "n_recurrent"),
        "n_coda": number(model, "n_coda", least=0),
        "mean_recurrence": mean,
        "max_recurrence": most,
        "backprop_depth": model.backprop_depth,
        "lora_rank": LORA_RANK if model.lora_rank is None else model.lora_rank,
        "n_head": number(model, "n_head"),
        "n_embd": number(model, "n_embd"),
        "vocab_size": vocab_size,
        "sequence_len": number(model, "sequence_len"),
        "mixture_of_depths": bool(model.mixture_of_depths),
    }
    # training draws r; what fits has to fit the most of it
    return dataclasses.replace(
        cost.looped(recurrence=mean, **sizes), most=cost.looped(recurrence=most, **sizes)
    )


# ---------------------------------------------------------------- of a plan


def planned_shape(model: ModelPlan, *, recurrence: float | None = None) -> Shape:
    """The counted shape of a plan's model; a looped one at `recurrence` iterations, or its mean."""
    sizes = {
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "vocab_size": model.vocab_size,
        "sequence_len": model.sequence_len,
    }
    if model.family == "gpt2":
        return cost.gpt2(**sizes, bias=model.bias, tied_head=model.tied_head)
    if model.family == "depth":
        return cost.depth(
            **sizes,
            n_kv_head=model.n_kv_head,
            windows=model.windows,
            value_embeddings=model.value_embeddings,
            residual_scalars=model.residual_scalars,
        )
    loop = model.loop
    assert loop is not None
    del sizes["n_layer"]
    return cost.looped(
        **sizes,
        n_prelude=loop.n_prelude,
        n_recurrent=loop.n_recurrent,
        n_coda=loop.n_coda,
        recurrence=loop.mean_recurrence if recurrence is None else recurrence,
        mean_recurrence=loop.mean_recurrence,
        max_recurrence=loop.max_recurrence,
        backprop_depth=loop.backprop_depth,
        lora_rank=loop.lora_rank,
        mixture_of_depths=loop.mixture_of_depths,
    )


def expected_recurrence(loop: LoopPlan) -> float:
    """The mean of r as it is drawn: log-normal of median `mean_recurrence`, rounded, from 1 to
    `max_recurrence`."""

    def below(r: float) -> float:
        """The probability of less."""
        z = math.log(r / loop.mean_recurrence) / R_SIGMA
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    most = loop.max_recurrence
    # the sum over r of P(drawn >= r), with all above the most counted as the most
    return 1.0 + sum(1 - below(r - 0.5) for r in range(2, most + 1))


def expected_flops(model: ModelPlan) -> float:
    """FLOPs per token of a usual step: those of the plan, of a looped model at its mean r."""
    if model.loop is None:
        return float(model.flops_per_token)
    return planned_shape(model, recurrence=expected_recurrence(model.loop)).flops_per_token
