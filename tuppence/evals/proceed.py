"""Many texts continued side by side, each up to a stop of its own.

    [ a context ......... | what follows ]      the rows of a pass, each one id longer every time;
    [ a longer context ...... | what ]          a row that has met its stop leaves

Nothing is kept between passes: any model that gives logits can be continued, at the cost of reading
its texts anew for every id.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuppence.evals.generate import sample_token
from tuppence.evals.subject import Subject
from tuppence.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Wanted:
    """A text's ids and how it goes on: `most` ids, or up to a text of `until`, which is left out.

    Temperature 0 is greedy.
    """

    ids: Sequence[int]
    most: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def proceed(
    subject: Subject,
    wanted: Sequence[Wanted],
    *,
    batch: int | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
    tick: Callable[[], None] = lambda: None,
) -> list[str]:
    """What follows each text, in fp32 the same however many are computed together and where.

    A text whose continuation has no room behind it loses its beginning.
    """
    groups = list(_groups(subject, wanted, batch or subject.batch))
    mine, many = groups[ranks.rank :: ranks.world], len(subject.workers)

    def write(model: nn.Module, group: list[int]) -> list[tuple[int, str]]:
        rows = [_Row(subject, i, wanted[i], seed) for i in group]
        _write(subject, model, rows)
        return [(row.number, row.said) for row in rows]

    subject.workers.train(False)
    here: list[tuple[int, str]] = []
    for first in range(0, len(mine), many):
        for each in subject.workers.map(write, mine[first : first + many]):
            here += each
        tick()
    subject.workers.train()
    return _gathered(here, ranks, of=repr((subject.identity, seed, wanted)))


def _groups(subject: Subject, wanted: Sequence[Wanted], batch: int) -> Iterator[list[int]]:
    """Texts of like length, so many that a pass has room for what they will be."""
    here: list[int] = []
    widest = 0
    for i in sorted(range(len(wanted)), key=lambda i: -len(wanted[i].ids)):
        width = max(widest, min(len(wanted[i].ids) + wanted[i].most, subject.context))
        if here and (len(here) == batch or (len(here) + 1) * width > subject.places):
            yield here
            here, widest = [], 0
        here.append(i)
        widest = max(widest, width)
    if here:
        yield here


def _gathered(here: list[tuple[int, str]], ranks: Ranks, *, of: str) -> list[str]:
    """What all ranks have written, in order."""
    name = f"continued {hashlib.sha256(of.encode()).hexdigest()}"  # one and the same says the same
    every = [
        (number, text)
        for rank in range(ranks.world)
        for number, text in ranks.told(f"{name} by {rank}", lambda: here, by=rank)
    ]
    return [text for _, text in sorted(every)]


# ---------------------------------------------------------------- a group


class _Row:
    """One text as it grows."""

    def __init__(self, subject: Subject, number: int, wanted: Wanted, seed: int) -> None:
        self.number, self._wanted, self._text = number, wanted, subject.text
        room = subject.context - wanted.most
        self.ids = list(wanted.ids)[-(room if room > 0 else max(1, subject.context // 2)) :]
        self._begun, self._end = len(self.ids), len(self.ids) + wanted.most
        self._end = min(self._end, subject.context)
        self._generator = torch.Generator().manual_seed(seed + number)
        self.open = self._end > self._begun

    @property
    def said(self) -> str:
        """What was added, up to a stop."""
        text = self._text.decode(self.ids[self._begun :])
        for stop in filter(None, self._wanted.until):
            text = text.split(stop)[0]
        return text

    def add(self, logits_V: Tensor) -> None:
        """Go on by the id that these logits give, or end."""
        wanted = self._wanted
        if wanted.top_p is not None and wanted.temperature:
            logits_V = nucleus(logits_V, wanted.top_p, temperature=wanted.temperature)
        token = sample_token(
            logits_V,
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            generator=self._generator,
        )
        if token in self._text.ends:
            self.open = False
            return
        self.ids.append(token)
        text = self._text.decode(self.ids[self._begun :])
        stopped = any(stop in text for stop in wanted.until if stop)
        self.open = len(self.ids) < self._end and not stopped


@torch.no_grad()
def _write(subject: Subject, model: nn.Module, rows: list[_Row]) -> None:
    """Continue rows until each has ended."""
    device = subject.workers.device
    while left := [row for row in rows if row.open]:
        width = max(len(row.ids) for row in left)
        idx_BT = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in left])
        last_B = torch.tensor([b * width + len(row.ids) - 1 for b, row in enumerate(left)])
        with subject.workers.autocast():
            logits_BV = subject.logits(model, idx_BT.to(device), last_B.to(device), None)
        for row, logits_V in zip(left, logits_BV.float().cpu(), strict=True):
            row.add(logits_V)


def nucleus(logits_V: Tensor, share: float, *, temperature: float) -> Tensor:
    """Logits of the likeliest ids that have this share of the probability; the others have none."""
    likely, order = (logits_V / temperature).softmax(-1).sort(descending=True)
    outside = order[likely.cumsum(-1) - likely >= share]
    return logits_V.index_fill(0, outside, float("-inf"))
