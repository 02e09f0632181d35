"""Bits per byte of any model on the text of a val split, whatever tokens the split is made of.

    val tokens ──their tokenizer──▶ documents ──the model's own──▶ ids, an end of text after each

Windows are as those of a run: one behind the other, each id predicted once. So a run's own model
gets the loss that loss.py gives it. A model whose texts begin with an id that does not end them
has that id before each window; it is not asked to predict it.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tuppence.data.loader import val_windows
from tuppence.data.shards import load_manifest
from tuppence.errors import UserError
from tuppence.evals.items import Ask, Text
from tuppence.evals.loss import Evaluation, Squares
from tuppence.evals.score import answers
from tuppence.evals.subject import Subject
from tuppence.ranks import ALONE, Ranks
from tuppence.tokenizer.spec import load_tokenizer

LONGEST = 2048  # ids of a window at most, whatever the model could read
AT_ONCE = 256  # documents encoded, and windows asked for, together

Ids = npt.NDArray[np.int64]


def text_loss(
    subject: Subject,
    data: Path,
    *,
    batch: int | None = None,
    tick: Callable[[], None] = lambda: None,
    told: Callable[[int, int], None] = lambda done, of: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Mean nats per token of the model's own tokenizer, and bits per byte, on the whole val split.

    `data` is a prepared folder. Raises UserError for a text that the model's tokenizer lacks.
    """
    started = time.monotonic()
    ids, text_bytes = _ids(subject.text, data)
    windows, unasked = _windows(subject.text, ids, context=min(subject.context, LONGEST))
    nats, tokens, of_tokens = 0.0, 0, sum(len(window) - 1 for window in windows)
    each = Squares()
    for first in range(0, len(windows), AT_ONCE):
        group = windows[first : first + AT_ONCE]
        asked = [(i, [Ask(window.tolist(), len(window) - 1)]) for i, window in enumerate(group)]
        keep = subject.context + 1  # the last id of a window is not fed
        found = dict(answers(subject, asked, batch=batch, keep=keep, ranks=ranks, tick=tick))
        for (answer,) in (found[i] for i in range(len(group))):
            nats, tokens = nats + answer.nats, tokens + answer.tokens
            each = each.seen(answer.nats, answer.tokens)
        told(tokens, of_tokens)
    if not tokens:
        raise UserError(f"the val split of {data} has no token to predict with this tokenizer")
    text_bytes -= unasked
    bpb = nats / math.log(2) / text_bytes if text_bytes else None
    loss, seconds = nats / tokens, time.monotonic() - started
    return Evaluation(loss, each.error(loss, tokens), bpb, tokens, of_tokens, seconds)


def _ids(text: Text, data: Path) -> tuple[Ids, int]:
    """The val split in ids of this text, and its bytes."""
    end = _end(text)
    parts: list[Ids] = []
    text_bytes = 0
    documents = list(_documents(data))
    for first in range(0, len(documents), AT_ONCE):
        group = documents[first : first + AT_ONCE]
        encoded = text.encode_batch([said for said, _ in group])
        for (said, ended), ids in zip(group, encoded, strict=True):
            text_bytes += len(said.encode())
            stop = [end] if ended and end is not None else []
            parts.append(np.array([*ids, *stop], dtype=np.int64))
    return np.concatenate(parts), text_bytes


def _documents(data: Path) -> Iterator[tuple[str, bool]]:
    """The val split's documents, and whether an end-of-text follows."""
    tokenizer, end = load_tokenizer(data / "tokenizer"), load_manifest(data).end_of_text
    stream = val_windows(data, sequence_len=1).stream
    tokens = stream.windows(np.zeros(1, np.int64), length=stream.tokens)[0]
    stops = [] if end is None else np.flatnonzero(tokens == end).tolist()
    first = 0
    for stop in stops:
        yield tokenizer.decode(tokens[first:stop].astype(np.uint32)), True
        first = stop + 1
    if first < len(tokens):
        yield tokenizer.decode(tokens[first:].astype(np.uint32)), False


def _end(text: Text) -> int | None:
    """What stands behind a document: the end of a text, which may be the beginning of the next."""
    return text.start if text.start in text.ends else min(text.ends, default=text.start)


def _windows(text: Text, ids: Ids, *, context: int) -> tuple[list[Ids], int]:
    """Ids of which each window predicts all but its first; the bytes of what none predicts."""
    start = text.start
    if start is None or start == _end(text):
        windows = [ids[i : i + context + 1] for i in range(0, len(ids) - 1, context)]
        return windows, len(text.decode(ids[:1].tolist()).encode())
    step = context - 1
    return [np.append(start, ids[i : i + step]) for i in range(0, len(ids), step)], 0
