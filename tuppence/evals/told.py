"""A result in one line."""

from collections.abc import Mapping
from typing import Any


def line(told: Mapping[str, Any]) -> str:
    """`CORE 0.0312 ± 0.0110 (2,200 items)`; of HellaSwag both accuracies."""
    if told["metric"] == "bpb":
        bits = "" if told["bpb"] is None else f", {told['bpb']:.4f} bits/byte"
        on = f" on {told['val']}'s val split" if told.get("val") else ""
        error = f" ± {told['error']:.4f}" if told.get("error") is not None else ""
        return f"val loss {told['loss']:.4f}{error}{bits}{on} ({told['tokens']:,} tokens)"
    if told["metric"] == "lm_eval":
        return ", ".join(
            f"{row['task']} {metric} {value['value']:.4f}"
            + ("" if value["error"] is None else f" ± {value['error']:.4f}")
            for row in told["tasks"]
            for metric, value in row["metrics"].items()
            if isinstance(value["value"], int | float)
        )
    return f"{name(told)} {', '.join(scores(told))} ({told['n']:,} items)"


def name(told: Mapping[str, Any]) -> str:
    """As a person writes it."""
    return {"core": "CORE", "hellaswag": "HellaSwag"}[told["metric"]]


def scores(told: Mapping[str, Any]) -> list[str]:
    """Each number with its error; a score without all its tasks is none."""
    if told["metric"] == "core":
        return ["-" if told["score"] is None else f"{told['score']:.4f} ± {told['error']:.4f}"]
    keys = (("acc", "error"), ("acc_norm", "error_norm"))
    return [
        f"{key} " + ("-" if told[key] is None else f"{told[key]:.2%} ± {told[error]:.2%}")
        for key, error in keys
    ]
