"""The options as a person decides from them: a table, warnings, two runs side by side, a guide.

The best first, what does not fit last with its reason; intervals are 80%.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from tuppence.config import DataPlan, Interval, Run, Warning
from tuppence.plan.claims import Guide
from tuppence.plan.describe import between
from tuppence.plan.options import Option
from tuppence.plan.prices import Book
from tuppence.plot import Curve, curves_plot, short

ROWS = 12  # of a table, unless all are asked for
NAME_WIDTH = 44  # of a machine in it
SHORTEST_NAME = 12
LEFT = 2  # columns that read from the left; numbers read from the right
DISPENSABLE = ("MFU", "store", "prepare", "held $", "tokens", "$/h", "GPUs")  # on a narrow screen

Document = dict[str, Any]


def options_text(
    options: Sequence[Document],
    *,
    rows: int = ROWS,
    width: int | None = None,
    more: str = "--all shows them",
    without: Sequence[str] = (),
) -> str:
    """The table of what fits, and how many machines do not and why. `options` as in the document,
    the best first; `width` is the screen's, None where it does not end; `more` says where the rest
    is shown, `without` which columns are not."""
    fitting = [o for o in options if o["fits"]]
    lines = _table(fitting[:rows], width, without)
    if len(fitting) > rows:
        lines.append(f"and {len(fitting) - rows} more that fit ({more})")
    refused = [o for o in options if not o["fits"]]
    if refused:
        lines += [
            f"{len(refused)} of {len(options)} cannot:",
            *_reasons(refused, every=rows > ROWS),
        ]
    return "\n".join(lines)


def _table(
    fitting: Sequence[Document], width: int | None, without: Sequence[str] = ()
) -> list[str]:
    names = _names(fitting)
    columns: dict[str, list[str]] = {
        "machine": names,
        "GPUs": [_gpus(o) for o in fitting],
        "$/h": [_price(o) for o in fitting],
        "tokens/s": [_spread(o, "tokens_per_second") for o in fitting],
        "MFU": [f"{o['mfu']:.0%}" for o in fitting],
        "held h": [hours(o["train_hours"]) for o in fitting],
        "tokens": [short(o["tokens"]) for o in fitting],
        "prepare": [dollars(o["usd"]["prepare"]) for o in fitting],
        "store": [dollars(o["usd"]["store"] + o["usd"]["egress"]) for o in fitting],
        "held $": [dollars(held_usd(o)) for o in fitting],
        "total $": [_spanned(o, "usd", dollars) for o in fitting],
        "val loss": [_spanned(o, "loss", "{:.3f}".format) for o in fitting],
    }
    columns = {name: cells for name, cells in columns.items() if name not in without}
    for name in [name for name in DISPENSABLE if name in columns]:
        lines = _aligned([tuple(columns), *zip(*columns.values(), strict=True)])
        if width is None or max(map(len, lines)) <= width:
            return lines
        del columns[name]
    lines = _aligned([tuple(columns), *zip(*columns.values(), strict=True)])
    over = max(map(len, lines)) - (width or 0)
    columns["machine"] = [_short(n, max(map(len, names)) - over) for n in names]
    return _aligned([tuple(columns), *zip(*columns.values(), strict=True)])


def _names(options: Sequence[Document]) -> list[str]:
    """Where each is; with its region where the name alone would stand twice."""
    plain = [where(o) for o in options]
    full = [
        where(o, region=True) if plain.count(name) > 1 else name
        for o, name in zip(options, plain, strict=True)
    ]
    return [_short(name, NAME_WIDTH) for name in full]


def _short(name: str, most: int) -> str:
    most = max(most, SHORTEST_NAME)
    return name if len(name) <= most else name[: most - 1] + "…"


def where(option: Document, *, region: bool = False) -> str:
    """`aws p5.48xlarge spot`; this machine is `here`."""
    if option["here"]:
        return "this machine"
    words = [option["cloud"], option["instance_type"], option["region"] if region else ""]
    return " ".join([w for w in words if w] + (["spot"] if option["spot"] else []))


def _reasons(refused: Sequence[Document], *, every: bool) -> list[str]:
    """By what is before the colon of a reason; each machine's figures are after it."""
    kinds: dict[str, list[str]] = {}
    for option in refused:
        why, _, figures = option["why_not"].partition(": ")
        kinds.setdefault(why, []).append(f"{where(option)} ({figures or 'no figures'})")
    lines = []
    for why, names in kinds.items():
        lines.append(f"  {len(names)}: {why}; for example {names[0]}")
        lines += [f"    {name}" for name in names] if every else []
    return lines


def _gpus(option: Document) -> str:
    if not option["gpu_count"]:
        return "-"
    nodes = f"{option['nodes']} x " if option["nodes"] > 1 else ""
    return f"{nodes}{option['gpu_count']} {option['gpu']}"


def _price(option: Document) -> str:
    assumed = "?" if option["price"]["terms"].startswith("assumed") else ""
    return f"{option['usd_per_hour'] * option['nodes']:.2f}{assumed}"


def _spread(option: Document, key: str) -> str:
    """`1.36M ±22%`: half of the interval's logarithm."""
    low, high = option["intervals"][key]
    half = math.sqrt(high / low) - 1 if low > 0 else 0.0
    return short(option[key]) + (f" ±{half:.0%}" if half >= 0.005 else "")


def held_usd(option: Document) -> float:
    """The training machine's whole bill: all but what stands beside it."""
    usd = option["usd"]
    return float(usd["total"] - usd["prepare"] - usd["store"] - usd["egress"])


def dollars(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def hours(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < LEFT else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# ---------------------------------------------------------------- the chosen one


def chosen_text(run: Run, data: DataPlan, option: Option) -> str:
    """What would be run, on the machine at the head of the table."""
    shape, work, job = option.work.shape, option.work, option.job
    told = document(option)
    assert job is not None
    assert option.step_seconds
    assert option.peak_memory_gib
    assert option.stages
    recipe = work.recipe
    again = ", activation checkpointing" if job.checkpointing else ""
    phases = {k: v for k, v in option.stages.usd.items() if v >= 0.005}
    rows = [
        (
            "chosen",
            f"{where(told)}, {_gpus(told)}: {option.seller.price}; {option.seller.offer.source}",
        ),
        (
            "model",
            f"{shape.family}, {shape.layers_run:g} x {shape.n_embd}, T={shape.sequence_len}, "
            f"vocabulary {shape.vocab_size:,}: {shape.params:,} parameters "
            f"({shape.params_matmul:,} multiply), {shape.flops_per_token / 1e9:,.3f} GFLOP/token",
        ),
        (
            "data",
            f"{data.source}, {data.tokenizer} tokens: {data.train_tokens:,}; "
            f"{epochs(option.epochs)}",
        ),
        (
            "step",
            f"{recipe.batch_tokens:,} tokens = {job.accumulation} x {job.micro_batch} sequences x "
            f"{plural(job.replicas, 'GPU')}; {job.precision}, {job.parallel}{again}; "
            f"{seconds(option.step_seconds.mid)}",
        ),
        (
            "speed",
            f"MFU {option.mfu.mid:.0%} of {option.peak_tflops:,.0f} TFLOPS ({option.peak_source}); "
            f"as compiled PyTorch would, for no GPU run of tuppence has been timed"
            if option.mfu
            else "",
        ),
        ("rates", _rates(work.train.optimizer or "", recipe)),
        (
            "memory",
            f"{between(option.peak_memory_gib, '.1f')} GiB of {option.gpu.memory_gib:.0f} a GPU; "
            f"disk {option.disk_gb:,.1f} GB",
        ),
        ("dollars", ", ".join(f"{name} {dollars(v)}" for name, v in phases.items())),
        ("val loss", _loss_line(option)),
        *(("note", note.replace("_", " ", 1)) for note in option.stages.notes),
    ]
    return "\n".join(f"{name:9s} {value}" for name, value in rows if value)


def epochs(count: float) -> str:
    return f"{count:.1f} epochs" if count >= 1 else f"{count:.1%} of it"


def seconds(value: float) -> str:
    return f"{value * 1e3:,.3g} ms" if value < 1 else f"{value:,.3g} s"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _rates(optimizer: str, recipe: Any) -> str:
    adam = "" if recipe.one_rate else f", {recipe.embedding_rate:.3g} for embeddings"
    return (
        f"{optimizer}, learning rate {recipe.learning_rate:.3g}{adam}, "
        f"weight decay {recipe.weight_decay:.3g}"
    )


def _loss_line(option: Option) -> str:
    if option.loss is None:
        return option.loss_why
    return f"{between(option.loss.interval, '.3f')} {option.loss.metric}; {option.loss.why}"


def warnings_text(warnings: Sequence[Warning]) -> str:
    return "\n".join(f"warning   {w.message} [{w.code}]" for w in warnings)


# ---------------------------------------------------------------- the document


def document(option: Option) -> Document:
    """One option of `tuppence plan --json`: plain numbers are middles."""
    offer, job = option.seller.offer, option.job
    names = ("tokens_per_second", "mfu", "tokens", "usd", "train_hours", "peak_memory_gib")
    spans = {name: getattr(option, name) for name in (*names, "step_seconds")}
    usd = {} if option.stages is None else dict(option.stages.usd)
    return {
        "here": False,
        "cloud": offer.cloud,
        "instance_type": offer.instance_type,
        "region": offer.region,
        "gpu": option.gpu.name,
        "gpu_count": offer.gpu_count,
        "nodes": option.nodes,
        "spot": option.seller.spot,
        "usd_per_hour": option.seller.usd_per_hour,
        "price": {"terms": option.seller.price, "date": offer.date, "source": offer.source},
        "fits": option.fits,
        "why_not": option.why_not,
        "depth": option.work.depth,
        "params": option.work.shape.params,
        "flops_per_token": option.work.shape.flops_per_token,
        "precision": job.precision if job else None,
        "parallel": job.parallel if job else None,
        "activation_checkpointing": job.checkpointing if job else None,
        "micro_batch": job.micro_batch if job else None,
        "accumulation": job.accumulation if job else None,
        "batch_tokens": option.work.recipe.batch_tokens,
        "learning_rate": option.work.recipe.learning_rate,
        "weight_decay": option.work.recipe.weight_decay,
        "peak_memory_gib": _mid(option.peak_memory_gib),
        "tokens_per_second": _mid(option.tokens_per_second),
        "step_seconds": _mid(option.step_seconds),
        "mfu": _mid(option.mfu),
        "mfu_peak": {"tflops": option.peak_tflops, "source": option.peak_source},
        "train_hours": _mid(option.train_hours),
        "tokens": _mid(option.tokens),
        "epochs": option.epochs,
        "disk_gb": option.disk_gb,
        "usd": {**usd, "total": sum(usd.values())} if usd else None,
        "loss": dataclasses.asdict(option.loss.interval) if option.loss else None,
        "loss_metric": option.loss.metric if option.loss else None,
        "loss_source": option.loss.why if option.loss else option.loss_why,
        "intervals": {k: [v.low, v.high] for k, v in spans.items() if v is not None},
        "notes": list(option.stages.notes) if option.stages else [],
    }


def _mid(interval: Interval | None) -> float | None:
    return None if interval is None else interval.mid


# ---------------------------------------------------------------- two runs, side by side


def side_by_side(names: Sequence[str], chosen: Sequence[Document]) -> str:
    """The best machine of each run, quantity by quantity; `chosen` are options of the document."""

    def line(name: str, key: str, form: Callable[[float], str]) -> tuple[str, ...]:
        return (name, *(_spanned(option, key, form) for option in chosen))

    rows = [
        ("", *names),
        ("machine", *(where(o) for o in chosen)),
        ("GPUs", *(_gpus(o) for o in chosen)),
        line("parameters", "params", short),
        line("FLOP/token", "flops_per_token", short),
        line("tokens", "tokens", short),
        line("tokens/s", "tokens_per_second", short),
        line("held h", "train_hours", hours),
        line("peak GiB", "peak_memory_gib", lambda v: f"{v:.1f}"),
        line("dollars", "usd", dollars),
        line("val loss", "loss", lambda v: f"{v:.3f}"),
        ("", *(o["loss_metric"] or "" for o in chosen)),
    ]
    return "\n".join(_aligned(rows))


def _spanned(option: Document, key: str, form: Callable[[float], str]) -> str:
    """One figure of an option with its interval."""
    value = option[key]
    if value is None:
        return "unknown"
    if key == "loss":
        return f"{form(value['mid'])} ({form(value['low'])}-{form(value['high'])})"
    middle = form(value["total"] if key == "usd" else value)
    ends = [form(end) for end in option["intervals"].get(key, [])]
    return f"{middle} ({ends[0]}-{ends[1]})" if ends and ends[0] != ends[1] else middle


# ---------------------------------------------------------------- a guide's claims


def guide_text(guide: Guide) -> str:
    """What the guide said, what its own premises give, and what arithmetic says, with why."""
    rows: list[tuple[str, ...]] = [("claim", "", "said", "its premises give", "arithmetic says")]
    rows += [
        (c.what, c.unit, *(_figure(v) for v in (c.said, c.as_published, c.arithmetic)))
        for c in guide.claims
    ]
    right = [f"  {c.what}: {c.why}" for c in guide.claims if c.code is None]
    wrong = [f"warning   {c.what}: {c.why} [{c.code}]" for c in guide.claims if c.code]
    return "\n".join([guide.title, *_aligned(rows), *right, *wrong])


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.2f}" if 100 <= abs(value) < 10_000 else f"{value:,.5g}"


# ---------------------------------------------------------------- the price book


def book_text(book: Book) -> str:
    """Every machine with its prices, then the doubts by code."""
    rows: list[tuple[str, ...]] = [("machine", "GPUs", "$/h", "spot", "region", "of", "source")]
    for offer in book.offers:
        gpus = f"{offer.gpu_count} {offer.gpu or offer.accelerator}" if offer.gpu_count else "-"
        price, spot = (_listed(p) for p in (offer.usd_per_hour, offer.spot_usd_per_hour))
        name = f"{offer.cloud} {offer.instance_type}"
        rows.append((name, gpus, price, spot, offer.region, offer.date, offer.source[:60]))
    doubts: dict[str, list[str]] = {}
    for problem in book.problems:
        doubts.setdefault(problem.code, []).append(f"{problem.row} {problem.message}")
    lines = [f"{len(said)} {code}; for example {said[0]}" for code, said in doubts.items()]
    return "\n".join([*_aligned(rows), "", "doubts:", *lines])


def _listed(usd: float | None) -> str:
    return "-" if usd is None else f"{usd:.2f}"


# ---------------------------------------------------------------- dollars against loss


def plot(curves: Sequence[tuple[str, Sequence[Option]]], *, name: str) -> str:
    """An SVG of dollars against predicted loss, a curve for each machine.

    Where no loss is known the curves are the tokens that the dollars buy.
    """
    known = all(o.loss is not None for _, points in curves for o in points)
    drawn = []
    for label, points in curves:
        line = []
        for option in points:
            assert option.usd is not None
            assert option.tokens is not None
            told = option.loss.interval if known and option.loss else option.tokens
            scale = 1.0 if known else 1e-9
            line.append((option.usd.mid, *(scale * v for v in dataclasses.astuple(told))))
        drawn.append(Curve(label, tuple(line)))
    metric = next((o.loss.metric for _, ps in curves for o in ps if o.loss), "")
    y_label = f"predicted val loss, {metric}" if known else "training tokens, billions"
    return curves_plot(
        drawn,
        title=f"{name}: what dollars buy",
        x_label="dollars in all (logarithmic)",
        y_label=y_label,
    )


def log_steps(middle: float, *, factor: float = 4.0, count: int = 9) -> list[float]:
    """`count` values from middle / factor to middle x factor, evenly in the logarithm."""
    return [middle * math.exp(math.log(factor) * (2 * i / (count - 1) - 1)) for i in range(count)]
