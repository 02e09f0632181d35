"""What a val loss is of, and why two of them may not be compared.

A loss is nats per token: with another tokenizer, other tokens of the val split or another way of
measuring, a smaller number says nothing. Bits per byte do not depend on the tokenizer, but on the
text, and on how much of it was read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuppence.data.shards import load_manifest

METRIC_VERSION = 1  # of how loss.py measures; another number, another metric

WHO = ("weights_sha256", "tokenizer_sha256", "precision", "context", "loop")  # was asked

Fields = Mapping[str, Any]


def fields(data: Path, *, sequence_len: int) -> dict[str, Any]:
    """What a row of evals.jsonl and a result are recorded with, besides `tokens` and `of_tokens`.

    `val_tokens` are all that can be predicted; a part of them is cut into windows of `sequence_len`
    and depends on it.
    """
    manifest = load_manifest(data)
    return {
        "metric_version": METRIC_VERSION,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "val_sha256": manifest.val_sha256,
        "val_tokens": manifest.val_tokens - 1,
        "sequence_len": sequence_len,
    }


def refuse(a: Fields, b: Fields, *, unit: str = "loss") -> str | None:
    """Why two evaluations may not be compared, in one sentence with the values; None: they may.

    `unit` is what is to be compared: loss, or bpb, which holds across tokenizers on one text.
    """
    wanted = ["metric_version", "tokenizer_sha256", "val_sha256", "tokens", "of_tokens"]
    for name, each in (("first", a), ("second", b)):
        if missing := [key for key in wanted if each.get(key) is None]:
            return f"the {name} does not say its {' and '.join(missing)}; evaluate it again"
    if a["metric_version"] != b["metric_version"]:
        versions = f"{a['metric_version']} and {b['metric_version']}"
        return f"they were measured by versions {versions} of the metric; evaluate the older again"
    same_tokens = a["tokenizer_sha256"] == b["tokenizer_sha256"]
    if not same_tokens and (unit == "loss" or a["val_sha256"] != b["val_sha256"]):
        return f"their tokenizers differ ({_two(a, b, 'tokenizer_sha256')})"
    if a["val_sha256"] != b["val_sha256"]:
        return f"their val splits hold other tokens ({_two(a, b, 'val_sha256')})"
    if is_whole(a) and is_whole(b):
        return None
    counts = ("tokens", "of_tokens", "sequence_len")
    if same_tokens and all(a.get(key) == b.get(key) for key in counts):
        return None
    return f"they are of different parts of the val split: {_part(a)} against {_part(b)}"


def is_whole(row: Fields) -> bool:
    """Whether every token of the val split was predicted."""
    return bool(row["tokens"] == row["of_tokens"] == row.get("val_tokens"))


def _two(a: Fields, b: Fields, key: str) -> str:
    return f"{a[key][:12]} and {b[key][:12]}"


def _part(row: Fields) -> str:
    whole = row.get("val_tokens")
    of = f" of {whole:,}" if whole is not None else ""
    return f"{row['tokens']:,}{of} tokens in windows of {row.get('sequence_len')}"
