"""The plan of a run, on this machine and on every machine in the price book.

    words ──asked──▶ Run ──surveyed──▶ corpus ──┬─ solve ────▶ this machine, as `run` would train
                                                └─ options ──▶ the price book, the best first

What this version cannot train here it can still plan.
"""

import dataclasses
import datetime
import itertools
import math
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tuppence import config, host, origin, recipes
from tuppence.config import DataPlan, Plan, Run, Warning
from tuppence.corpus import refuse_unprepared, surveyed
from tuppence.errors import DoesNotFit, UserError
from tuppence.live import duration, folded, screen_width
from tuppence.pipeline import device_of, named, say, solved, threads_of
from tuppence.plan import shapes
from tuppence.plan.asked import check_budget, check_trainable, check_values, optimizer_of
from tuppence.plan.cost import Shape
from tuppence.plan.describe import local_option, plan_text
from tuppence.plan.flags import flags
from tuppence.plan.loss import Group, comparable, find_group
from tuppence.plan.market import Seller
from tuppence.plan.options import Option, Standing, option_of, options, ranked, usd_per_flop
from tuppence.plan.prices import Book, price_book
from tuppence.plan.stages import DOWNLOADED_BYTES_PER_TOKEN, preparation_interval
from tuppence.plan.table import (
    ROWS,
    chosen_text,
    document,
    log_steps,
    options_text,
    plot,
    side_by_side,
    warnings_text,
)
from tuppence.plot import short

QUICK_SECONDS = 2.0  # of a step that a plan may measure by itself
LONG_HOURS = 72.0  # a run that takes longer here stands in the table alone
CURVES = 5  # machines of a plot


@dataclass(frozen=True)
class Planned:
    """One run, planned. `here` is this machine's plan, or `not_here` says why there is none."""

    run: Run
    data: DataPlan
    book: Book
    here: Plan | None
    not_here: str | None
    options: list[Option]

    @property
    def chosen(self) -> Option | None:
        """The best machine of the book that fits."""
        return self.options[0] if self.options and self.options[0].fits else None

    @property
    def group(self) -> Group | None:
        """Whose law predicts the loss."""
        return find_group(
            source=self.data.source,
            tokenizer=self.data.tokenizer,
            family=shapes.laid_out(self.run.model).family or "",
            optimizer=optimizer_of(self.run),
        )

    @cached_property
    def corpus(self) -> dict[str, Any] | None:
        """What is known of a corpus by its name, and how long this machine would prepare it."""
        from tuppence.data.survey import survey
        from tuppence.text.corpora import CORPORA

        known = CORPORA.get(self.data.source)
        if known is None or Path(self.data.source).exists():
            return None
        tokens = self.data.train_tokens + self.data.val_tokens
        every = survey(source=known.name, tokenizer=self.data.tokenizer).tokens
        size = None if known.file_bytes is None else known.file_bytes * min(1.0, tokens / every)
        cores = threads_of(self.run)
        took = preparation_interval(tokens, vcpus=cores, file_bytes=size)
        told = (
            "name",
            "place",
            "revision",
            "licence",
            "tokens",
            "tokenizer",
            "documents",
            "evidence",
        )
        return {name: getattr(known, name) for name in told} | {
            "file_bytes": size if size is not None else tokens * DOWNLOADED_BYTES_PER_TOKEN,
            "cores": cores,
            "prepare_seconds": dataclasses.asdict(took),
        }

    @property
    def chosen_shape(self) -> Shape:
        assert self.chosen is not None
        return self.chosen.work.shape

    @cached_property
    def documents(self) -> list[dict[str, Any]]:
        """This machine and the book's as `--json` options, the best first."""
        every = [document(option) for option in self.options]
        every += [] if self.here is None else [local_option(self.here)]
        standings = [_standing(each, self.data) for each in every]
        return [every[i] for i in ranked(standings, self.run.budget)]

    @property
    def best_is_here(self) -> bool:
        return bool(self.documents[0]["here"])

    @cached_property
    def warnings(self) -> list[Warning]:
        """Of the best choice."""
        if self.here is not None and self.best_is_here:
            return list(self.here.warnings)
        assert self.chosen is not None
        year = datetime.date.today().year
        found = flags(self.run, self.data, self.chosen, year=year)
        why = why_not_trained(self.run)
        return [*found, Warning("plan_only", str(why))] if why else found


def why_not_trained(run: Run) -> UserError | DoesNotFit | None:
    """What keeps this version from training it on any machine."""
    try:
        check_trainable(dataclasses.replace(run, machine=config.Machine()))
        refuse_unprepared(run.data.source or "")
    except (UserError, DoesNotFit) as error:
        return error
    return None


def planned(args: Namespace, *, here: bool = True) -> list[Planned]:
    """A plan for each recipe among the words; the overrides go for all of them. Without `here`
    this machine is no choice, and nothing of it is measured."""
    specs = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    book = price_book(Path(args.prices) if args.prices else None)
    for problem in book.mine:
        say(f"{problem.row}: {problem.message} [{problem.code}]")
    return [_planned(spec, overrides, book, here) for spec in specs or [_default(overrides)]]


def _default(overrides: list[str]) -> str:
    """Without a recipe: the shipped default, or `auto` where a corpus is known by its name, or
    lies on the Hub."""
    from tuppence.text.corpora import CORPORA

    sources = [word.partition("=")[2] for word in overrides if word.startswith("data.source=")]
    known = sources and (sources[-1] in CORPORA or sources[-1].startswith("hf://"))
    return "auto" if known else recipes.DEFAULT


def _planned(spec: str, overrides: list[str], book: Book, is_choice: bool) -> Planned:
    run = origin.started(named(config.override(recipes.get(spec), overrides), spec))
    check_values(run)
    check_budget(run.budget)
    run = _with_tokenizer(run)
    data = surveyed(run)
    here, refusal = _on_this_machine(run, data) if is_choice else (None, why_not_trained(run))
    if not is_choice and (refusal is not None or _only_here(run)):
        raise refusal or UserError("machine.gpu=cpu: a launch rents GPUs; tuppence run trains here")
    found = [] if _only_here(run) else options(run, data, book)
    if here is None and not any(option.fits for option in found):
        own_fault = isinstance(refusal, DoesNotFit) or not found
        raise refusal if refusal and own_fault else DoesNotFit(_nothing_fits(found))
    return Planned(run, data, book, here, str(refusal) if refusal else None, found)


def _with_tokenizer(run: Run) -> Run:
    """The families' usual vocabularies: GPT-2's own, 32,768 learned tokens for the others."""
    if run.data.tokenizer is not None:
        return run
    gpt2 = shapes.laid_out(run.model).family == "gpt2"
    tokenizer = "gpt2" if gpt2 else "bpe:32768"
    return dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=tokenizer))


def _only_here(run: Run) -> bool:
    return run.machine.gpu == "cpu" or run.machine.gpu_count == 0


def _elsewhere(run: Run) -> bool:
    """Whether the words name a machine that is to be rented."""
    machine = run.machine
    rented = (machine.cloud, machine.instance_type, machine.spot or None, machine.mfu)
    named_card = machine.gpu not in (None, "cpu") and device_of(run) == "cpu"
    return any(value is not None for value in rented) or named_card


def _on_this_machine(run: Run, data: DataPlan) -> tuple[Plan | None, DoesNotFit | UserError | None]:
    """The plan that `run` would follow here; or why not, where that is no fault of the words."""
    try:
        check_trainable(run)
        refuse_unprepared(run.data.source or "")
    except (UserError, DoesNotFit) as error:
        return None, error
    if _elsewhere(run):
        return None, None
    if not shapes.is_sized(run.model):
        return None, UserError("the size is left to the budget: this version trains a fixed one")
    host.settle_threads(threads_of(run))
    try:
        return solved(run, data, quick=None if _only_here(run) else QUICK_SECONDS), None
    except DoesNotFit as error:
        return None, error


def _nothing_fits(found: list[Option]) -> str:
    """The first kind of reason, and how many kinds there are."""
    reasons = [option.why_not for option in found if option.why_not]
    kinds = {reason.partition(": ")[0] for reason in reasons}
    rest = len(kinds) - 1
    more = f" (and {rest} more reason{'s' * (rest > 1)})" if rest else ""
    machines = "the machine does not fit" if len(found) == 1 else f"none of {len(found)} fits"
    return f"{machines}: {reasons[0]}{more}; change the budget, machine.*, model.* or train.*"


# ---------------------------------------------------------------- told


def text(found: Planned, *, every: bool) -> str:
    """The plan as a person reads it."""
    parts = [_corpus_text(found)]
    if found.here is not None and found.here.predicted.hours.mid <= LONG_HOURS:
        parts.append(plan_text(found.here))
    if found.options:
        rows = len(found.documents) if every else ROWS
        parts.append(options_text(found.documents, rows=rows, width=screen_width()))
    if found.best_is_here:
        parts.append("chosen    this machine: tuppence run, with the same words, does it")
    elif found.chosen is not None:
        parts.append(chosen_text(found.run, found.data, found.chosen))
        if why_not_trained(found.run) is None:
            parts[-1] += "\nrent      tuppence launch, with the same words, does it there"
        parts.append(warnings_text(found.warnings))
    return folded("\n\n".join(part for part in parts if part))


def _corpus_text(found: Planned) -> str:
    """A named corpus: whose it is, how much, and how long until it can be trained on."""
    corpus = found.corpus
    if corpus is None:
        return ""
    texts = f" in {short(corpus['documents'])} documents" if corpus["documents"] else ""
    low, mid, high = (duration(s) for s in corpus["prepare_seconds"].values())
    lines = [
        f"corpus    {corpus['name']}: {corpus['licence']}; {short(corpus['tokens'])} "
        f"{corpus['tokenizer']} tokens{texts} ({corpus['evidence']})"
    ]
    if corpus["place"]:
        lines.append(
            f"prepare   {mid} ({low} to {high}) on {corpus['cores']} cores here: "
            f"{corpus['file_bytes'] / 1e9:.3g} GB from hf://{corpus['place']}"
        )
    return "\n".join(lines)


def as_document(found: Planned) -> dict[str, Any]:
    """The `--json` document: options cheapest first, and which of them is chosen."""
    model = found.here.model if found.here and found.best_is_here else found.chosen_shape
    counts = {k: getattr(model, k) for k in ("params", "params_matmul", "flops_per_token")}
    by_dollars = sorted(found.documents, key=_dollars)
    return {
        "run": config.asked(found.run),
        "model": counts,
        "options": by_dollars,
        "chosen": by_dollars.index(found.documents[0]),
        "warnings": [dataclasses.asdict(w) for w in found.warnings],
        "plan": dataclasses.asdict(found.here) if found.here is not None else None,
        "not_here": found.not_here,
        "corpus": found.corpus,
        "price_problems": [p._asdict() for p in found.book.problems],
    }


def _dollars(option: dict[str, Any]) -> tuple[bool, float]:
    return not option["fits"], option["usd"]["total"] if option["fits"] else 0.0


def _standing(option: dict[str, Any], data: DataPlan) -> Standing:
    if not option["fits"]:
        return Standing(False, math.inf, math.inf, None)
    usd = option["usd"]["total"]
    each = usd_per_flop(
        usd,
        tokens=option["tokens"],
        unique=float(data.train_tokens),
        flops_per_token=option["flops_per_token"],
    )
    return Standing(True, usd, each, option["loss"]["mid"] if option["loss"] else None)


def compared(found: list[Planned]) -> str:
    """Two or more runs side by side, each on its best machine; and whether losses compare."""
    names = [str(each.run.name) for each in found]
    parts = [side_by_side(names, [each.documents[0] for each in found])]
    for name, each in zip(names, found, strict=True):
        codes = ", ".join(warning.code for warning in each.warnings)
        parts.append(f"{name} is warned of: {codes or 'nothing'}")
    return "\n".join([*parts, warnings_text(incomparable(found))])


def incomparable(found: list[Planned]) -> list[Warning]:
    """Of each pair of runs, why their losses cannot be compared."""
    return [
        Warning("losses_not_comparable", f"{a.run.name} and {b.run.name}: {why}")
        for a, b in itertools.combinations(found, 2)
        if (why := _why_incomparable(a.group, b.group))
    ]


def _why_incomparable(a: Group | None, b: Group | None) -> str | None:
    if a is None or b is None:
        return "not comparable: no loss is known for one of them"
    return comparable(a, b)


def drawn(found: Planned) -> str:
    """Dollars against predicted loss for the best machines, as an SVG."""
    fitting = [option for option in found.options if option.fits]
    if not fitting:
        raise DoesNotFit("--plot: no rented machine fits, so there is nothing to draw")
    seen: dict[str, Option] = {}
    for option in fitting:  # the best of each kind of machine
        told = document(option)
        seen.setdefault(f"{told['gpu_count']} {told['gpu']}", option)
    assert fitting[0].usd is not None
    budgets = log_steps(fitting[0].usd.mid)
    curves = []
    for label, option in list(seen.items())[:CURVES]:
        points = [_at(found, option.seller, usd) for usd in budgets]
        line = [point for point in points if point.fits]
        if len(line) > 1:
            terms = " spot" if option.seller.spot else ""
            curves.append((f"{label}, {option.seller.offer.cloud}{terms}", line))
    if not curves:
        raise DoesNotFit("--plot: the budget is too near the cost of booting a machine to vary it")
    return plot(curves, name=str(found.run.name))


def _at(found: Planned, seller: Seller, usd: float) -> Option:
    """The same machine with another budget."""
    run = dataclasses.replace(found.run, budget=config.Budget(usd=usd))
    return option_of(run, found.data, found.book, seller)
