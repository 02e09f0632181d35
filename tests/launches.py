"""Launches that were never started: recipes planned on a price book, as stages and as a Launch."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from tuppence import planning
from tuppence.cloud.launch import LAUNCH_VERSION, Launch, Stage
from tuppence.cloud.machines import stages_of, words_of
from tuppence.config import Interval
from tuppence.plan.prices import Book

STORE = "s3://some-bucket/tuppence"
KIT = "0123456789abcdef" * 4


def planned(words: list[str], book: Book) -> planning.Planned:
    """The plan of a recipe on rented machines of this book alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "price_book", lambda own=None: book)
        return planning.planned(Namespace(words=words, prices=None), here=False)[0]


def launch_of(
    words: list[str], book: Book, *, plan: planning.Planned | None = None, **asked: Any
) -> Launch:
    """What `launch` would decide; `asked` are the arguments of `stages_of`."""
    found = plan or planned(words, book)
    stages = stages_of(found.run, found.data, found.book, found.options, **asked)
    chosen = found.options[0]
    recipe, overrides = words[0], [w for w in words[1:] if not w.startswith("machine.")]
    named = (recipe, *overrides, *words_of(found.run, chosen), f"name={found.run.name}")
    return replace(of(*stages), name=str(found.run.name), words=named, budget=found.run.budget)


def of(*stages: Stage, **values: Any) -> Launch:
    """A launch of these stages."""
    from tuppence.config import Budget

    usd = sum(stage.usd for stage in stages)
    plain = Launch(
        version=LAUNCH_VERSION,
        name="run",
        words=("llmc_gpt2_124m", "name=run"),
        store=STORE,
        stages=stages,
        budget=Budget(steps=10),
        kit=KIT,
        python=None,
        image=None,
        tasks=None,
        secrets=(),
        usd=Interval(usd, usd, usd),
        phases={},
        prices_from="a test, 2026-08-01",
    )
    return replace(plain, **values)
