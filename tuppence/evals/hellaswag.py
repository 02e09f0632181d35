"""HellaSwag's validation split, scored as llm.c scores it.

    context + " " + ending, encoded apart, without end-of-text before them
    acc         the ending of least summed nats
    acc_norm    the ending of least mean nats

The Eleuther harness cleans the texts first and counts bytes, so its figures differ: GPT-2 124M has
28.92 and 31.14 there, and 28.59 and 29.55 here. Items come in an order shuffled by Random(1337), so
that the first n of them are a fair sample.
"""

import math
import random
from dataclasses import dataclass

from tuppence.errors import UserError
from tuppence.evals.bundle import HELLASWAG_SHA256, HellaSwag
from tuppence.evals.items import Answer, Ask, Judged, Task, Text
from tuppence.evals.statistics import Count, Document

VERSION = 1
SHUFFLE_SEED = 1337
CHANCE = 0.25
PUBLISHED = (  # acc, acc_norm: dev/data/hellaswag.py of llm.c says both
    ("GPT-2 124M", 0.2859, 0.2955),
    ("GPT-2 1.6B", 0.3842, 0.4893),
    ("GPT-2 124M, Eleuther harness", 0.2892, 0.3114),
    ("GPT-2 1.6B, Eleuther harness", 0.4004, 0.5089),
)


def suite(rows: HellaSwag) -> Document:
    """What the items depend on; how many are asked changes none of them."""
    return {"metric": "hellaswag", "version": VERSION, "sha256": rows.sha256}


def tasks(rows: HellaSwag, text: Text, *, max_items: int | None) -> list[Task]:
    """One task of at most so many items, whose texts are encoded when they are asked."""
    order = list(range(len(rows.rows)))
    random.Random(SHUFFLE_SEED).shuffle(order)
    items = _Items(rows, text, order[:max_items])
    return [Task("hellaswag", len(items.order), items.asks, items.judge)]


@dataclass(frozen=True)
class _Items:
    """Rows in the order in which they are asked."""

    rows: HellaSwag
    text: Text
    order: list[int]

    def asks(self, number: int) -> list[Ask]:
        """One for each ending."""
        row = self.rows.rows[self.order[number]]
        try:
            context, *endings = self.text.encode_batch(
                [row.context, *(f" {ending}" for ending in row.endings)]
            )
        except UserError as error:
            raise UserError(
                f"HellaSwag cannot be read with this model's tokenizer ({error}); train with "
                f"data.tokenizer=gpt2, byte or bpe:N"
            ) from None
        return [Ask([*context, *ending], len(ending)) for ending in endings]

    def judge(self, number: int, answers: list[Answer]) -> Judged:
        """By sum, and by mean."""
        label = self.rows.rows[self.order[number]].label
        sums = [answer.nats for answer in answers]
        means = [a.nats / a.tokens if a.tokens else math.inf for a in answers]
        choice, choice_norm = sums.index(min(sums)), means.index(min(means))
        return {
            "choice": choice,
            "correct": choice == label,
            "choice_norm": choice_norm,
            "correct_norm": choice_norm == label,
        }


def summary(judged: dict[str, list[Judged]], *, sha256: str = HELLASWAG_SHA256) -> Document:
    """The result; accuracies are None where no item was answered. `sha256` is the rows' own."""
    found = judged.get("hellaswag", [])
    told: Document = {"metric": "hellaswag", "version": VERSION, "n": len(found), "sha256": sha256}
    for ending in ("", "_norm"):
        right = sum(bool(each[f"correct{ending}"]) for each in found)
        count = Count(right, len(found), CHANCE) if found else None
        told[f"acc{ending}"] = count.accuracy if count else None
        told[f"error{ending}"] = count.error if count else None
    return told


def table(document: Document) -> str:
    """For people: both accuracies, and what is published."""
    lines = [_line("HellaSwag", "n", "acc", "+-", "acc_norm", "+-")]
    keys = ("acc", "error", "acc_norm", "error_norm")
    cells = ["-" if document[key] is None else f"{document[key]:.2%}" for key in keys]
    lines.append(_line("this model", f"{document['n']:,}", *cells))
    lines += [_line(name, "10,042", f"{a:.2%}", "", f"{b:.2%}", "") for name, a, b in PUBLISHED]
    return "\n".join(lines)


def _line(name: str, n: str, acc: str, error: str, acc_norm: str, error_norm: str) -> str:
    return f"{name:32}{n:>8}{acc:>10}{error:>7}{acc_norm:>10}{error_norm:>7}".rstrip()
