"""The groups of published losses that must not be mixed, and how a row says which it is.

Used by bench/fit_loss.py, which fits them, and bench/published_loss.py, which judges the fits.
"""

from dataclasses import dataclass

from tuppence.plan import cost

Row = dict[str, str]


@dataclass(frozen=True)
class Known:
    """What a group is; see plan/loss.py's Group. `family` names whose law's shape it takes."""

    family: str
    source: str
    tokenizer: str
    families: tuple[str, ...]
    optimizers: tuple[str, ...]
    recipe: str
    evaluated_on: str
    metric: str = "nats/token"
    counts: str = "body+head"
    bytes_per_token: float | None = None
    tokens_per_param: float | None = None
    tokens_known: bool = True


FINEWEB_VAL = "FineWeb val (first 10.5M tokens)"
C4_VAL = "C4 val (shards 0-10)"
OWT_VAL = "OpenWebText val"


def _openlm(source: str) -> Known:
    plain = ("gpt2", "depth")
    return Known("openlm", source, "gpt-neox", plain, ("adamw",), "OpenLM", C4_VAL)


def _fineweb(recipe: str, families: tuple[str, ...], optimizers: tuple[str, ...]) -> Known:
    return Known("gpt2", "fineweb", "gpt2", families, optimizers, recipe, FINEWEB_VAL)


def _nanochat(
    source: str, vocab: int, recipe: str, evaluated_on: str, *, answers: bool = True, **more: float
) -> Known:
    families, optimizers = (("depth",), ("muon",)) if answers else ((), ())
    return Known(
        "nanochat",
        source,
        f"bpe:{vocab}",
        families,
        optimizers,
        recipe,
        evaluated_on,
        "bits/byte",
        **more,  # type: ignore[arg-type]
    )


GROUPS: dict[str, Known] = {
    "gpt2-fineweb": _fineweb("llm.c GPT-2, AdamW", ("gpt2",), ("adamw",)),
    "gpt2-fineweb-undecayed": _fineweb("llm.c GPT-2, AdamW, while its rate is high", (), ()),
    "gpt2-fineweb-modded/adamw": _fineweb("rotary, tuned AdamW", ("depth",), ("adamw",)),
    "gpt2-fineweb-modded/muon": _fineweb("rotary, Muon", ("gpt2",), ("muon",)),
    "gpt2-fineweb-modded/modern": _fineweb(
        "rotary, ReLU^2, QK-norm, zero-init, Muon", ("depth",), ("muon",)
    ),
    "gpt2-fineweb-modded/modern-adam": _fineweb("rotary, ReLU^2, QK-norm, zero-init, Adam", (), ()),
    "gpt2-owt": Known(
        "gpt2", "openwebtext", "gpt2", ("gpt2",), ("adamw",), "nanoGPT GPT-2, AdamW", OWT_VAL
    ),
    "gpt2-webtext-on-owt": Known(
        "gpt2", "webtext", "gpt2", (), (), "OpenAI GPT-2", OWT_VAL, tokens_known=False,
        tokens_per_param=20.0,
    ),
    "nanochat-isoflop-jan26": _nanochat(
        "fineweb_edu", 32768, "nanochat, January 2026", "FineWeb-Edu val (2026)"
    ),
    "nanochat-2026-fwe-32k": _nanochat(
        "fineweb_edu", 32768, "nanochat, 2026", "FineWeb-Edu val (2026)", answers=False
    ),
    "nanochat-2026-climbmix-32k": _nanochat("climbmix", 32768, "nanochat, 2026", "ClimbMix val"),
    "nanochat-2025-fwe-65k": _nanochat(
        "fineweb_edu", 65536, "nanochat, 2025", "FineWeb-Edu val (2025)"
    ),
    "nanochat-2026-unknown-data": _nanochat(
        "unnamed", 32768, "nanochat, 2026", "an unnamed val", answers=False
    ),
    "nanochat-jan11-ablation": _nanochat(  # its tokens are not given: 20 a parameter fit best
        "fineweb_edu", 32768, "nanochat, before its loader cut documents at their start",
        "FineWeb-Edu val (2025, loader of January 11)", answers=False, tokens_per_param=20.0,
    ),
    "openlm-c4_original": _openlm("c4"),
    "openlm-rpj": _openlm("redpajama"),
    "openlm-rw_original": _openlm("refinedweb"),
    "chinchilla-epoch-svg": Known(
        "chinchilla", "massivetext", "sentencepiece:32000", (), (), "Chinchilla",
        "MassiveText train (smoothed)", counts="total",
    ),
}  # fmt: skip

# Warm-up of the OpenLM runs by body+head parameters: steps x sequences x 2,048 tokens, from the
# hyperparameters in mlfoundations/scaling exp_data/models/*.json. The shortest runs end inside it.
WARMUP_TOKENS: dict[float, float] = {
    5_727_840: 100 * 64 * 2048,
    53_092_864: 400 * 512 * 2048,
    124_628_544: 400 * 512 * 2048,
    359_973_888: 2000 * 512 * 2048,
}
NANOCHAT_VOCAB = 32768  # where a row leaves it blank


def key_of(row: Row) -> str | None:
    """The group of a row of loss_points.csv; None where there is none that is known."""
    name = row["group"]
    if name == "gpt2-fineweb" and row["lr_schedule_complete"] == "no":
        return "gpt2-fineweb-undecayed"
    if name == "gpt2-fineweb-modded":
        return f"{name}/{_recipe(row)}"
    return name if name in GROUPS else None


def _recipe(row: Row) -> str:
    """Of modded-nanogpt's records: by optimizer, and by the record's folder for the first Muon."""
    optimizer = row["optimizer"]
    if optimizer.startswith("AdamW"):
        return "adamw"
    if "Muon" not in optimizer:
        return "modern-adam"
    return "muon" if "2024-10-10_Muon" in row["source"] else "modern"


def scaling_params(row: Row) -> float | None:
    """N as the row's group counts it, from what the row gives; None where it gives no size."""
    total, stated = number(row, "n_total"), number(row, "n_body_plus_head")
    if row["model_family"] == "Chinchilla":
        return total or stated
    if stated:
        return stated
    layers, dim = number(row, "layers"), number(row, "dim")
    if layers and dim:
        return float(shape_of(row).params_matmul)
    return total


def shape_of(row: Row) -> cost.Shape:
    """The shape of a row with layers and width; its heads do not change what is counted."""
    layers, dim = int(float(row["layers"])), int(float(row["dim"]))
    vocab, length = int(number(row, "vocab") or 0), int(number(row, "seq_len") or 2048)
    if row["model_family"] == "nanochat":
        return cost.depth(
            n_layer=layers,
            n_head=max(1, dim // 128),
            n_embd=dim,
            vocab_size=vocab or NANOCHAT_VOCAB,
            sequence_len=length,
            windows=_sliding(layers, length),
        )
    return cost.gpt2(
        n_layer=layers,
        n_head=max(1, dim // 64),
        n_embd=dim,
        vocab_size=vocab or 50257,
        sequence_len=length,
    )


def _sliding(layers: int, length: int) -> tuple[int, ...]:
    """nanochat's SSSL pattern of January 2026: three half windows, one whole; the last is whole."""
    return tuple(length if i % 4 == 3 or i == layers - 1 else length // 2 for i in range(layers))


def number(row: Row, column: str) -> float | None:
    try:
        return float(row[column]) or None
    except (KeyError, ValueError):
        return None
