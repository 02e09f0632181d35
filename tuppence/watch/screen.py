"""The screen of `tuppence watch`, as lines of styled text: what fits, whatever the terminal's size.

    name  state                                 head: where it stands, of how much, until when
    ████████████▌          53%  $0.01 of $0.02
    loss ... val ... speed ... memory ...       figures, as many lines as they need
    2.1┤⠉⢆                                      chart: train in braille, ● val, ◆ best,
       │  ⠑⠢⠤⣀●⣀⣀◆⣀ ▒                           ▒ what was promised of the end
    12s  code  message                          events, the newest first; the last sample

Nothing here knows of a terminal: `watching` shows it, tests read it.
"""

import itertools
import shlex
import time
import unicodedata
from collections.abc import Iterable, Sequence

from tuppence.live import duration, printable
from tuppence.report.money import amount, share
from tuppence.watch.braille import Curve, chart
from tuppence.watch.standing import Standing
from tuppence.watch.tempo import last_step

Part = tuple[str, str]  # text, style
Line = list[Part]

STYLES = ("", "bold", "dim", "good", "warn", "bad", "train", "val", "promise")
STATES = {
    "running": ("●", "good"),
    "finished": ("■", "good"),
    "stopped": ("‖", "warn"),
    "dead": ("✕", "bad"),
    "failed": ("✕", "bad"),
    "unstarted": ("○", "dim"),
}
DOING = {
    "provision": "starting up",
    "prepare": "preparing its data",
    "compile": "compiling",
    "train": "training",
    "data_wait": "waiting for data",
    "evaluate": "evaluating",
    "save": "saving",
}
GRAVE = (
    "failed",
    "stalled",
    "stopped_by_guard",
    "checkpoint_damaged",
    "best_lost",
    "pointer_damaged",
)
CALM = ("data", "packing", "other_machine", "micro_batch", "stopped", "early_stop", "no_nvidia_smi")
GOOD = ("recovered", "upload_recovered")
QUIET_SECONDS = 30.0  # without a beat, after which it is said
EIGHTHS = " ▏▎▍▌▋▊▉"
LEAST_CHART = 5  # lines, its axis included


def frame(
    now: Standing, curve: Curve, *, width: int, height: int, note: str = "", hint: str = ""
) -> list[Line]:
    """At most `height` lines of at most `width` cells. `note` is a line to be said above all, such
    as that a bucket cannot be reached; `hint` one to be said below where there is room."""
    top = _head(now, width)
    top += _wrapped(note, width, "warn") + _said(now, width, max(1, height // 2 - len(top)))
    figures = _flow(_losses(now), width) + _flow(_speeds(now), width)
    rest = height - len(top) - len(figures)
    told, said = _events(now), _sample(now)
    few = min(len(told), max(1, rest // 4))
    below: list[Line] = told[:few]
    below += [said] if said and rest - len(below) > LEAST_CHART else []
    below += [[(hint, "dim")]] if hint and rest - len(below) > 2 * LEAST_CHART else []
    room = rest - len(below)
    drawn = chart(curve, now.promised_loss, width=width, height=room) if room >= LEAST_CHART else []
    return [_cut(line, width) for line in [*top, *figures, *drawn, *below]][:height]


def as_text(lines: Iterable[Line]) -> str:
    """The same without its styles."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def plain(now: Standing, *, note: str = "") -> str:
    """Where it stands, for a pipe: one line, and below it what there is to say of the state."""
    words = [now.name, state_words(now)]
    if now.limits:
        words += [share(now.limits[0]), f"{now.limits[0]['fraction']:.1%}"]
    if not _in_dollars(now):
        words.append(amount("usd", now.usd))
    words += [text for text, _ in itertools.chain.from_iterable([*_losses(now), *_speeds(now)])]
    line = "  ".join(_joined(words))
    left = "" if now.seconds_left is None else f"  {duration(now.seconds_left)} left"
    below = [_one_line(text) for text in [note, *_says(now)]]
    below += [f"goes on with: {printable(now.resume)}"] if now.resume else []
    return line + left + "".join(f"\n  {text}" for text in below if text)


def state_words(now: Standing) -> str:
    """The state, and what is being done."""
    if not now.running:
        return now.state
    if now.stopping is not None and now.doing == "train":
        return "annealing, to stop early"
    return DOING.get(now.doing or "", now.doing or "running")


def _in_dollars(now: Standing) -> bool:
    return any(limit["kind"] == "usd" for limit in now.limits)


def many(value: float) -> str:
    """1,204; 2.47M; 10.2B."""
    for below, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= below:
            return f"{value / below:.2f}{unit}"
    return f"{value:,.0f}"


# ---------------------------------------------------------------- head


def _head(now: Standing, width: int) -> list[Line]:
    mark, style = STATES[now.state]
    title: Line = [(printable(now.name), "bold"), (f"  {mark} {state_words(now)}", style)]
    cells: list[Line] = [title]
    if now.attempt > 1:
        cells.append([(f"attempt {now.attempt}", "dim")])
    if now.node:
        cells.append([(now.node, "dim")])
    silent = time.time() - now.alive_at if now.alive_at else 0.0
    if now.running and silent > QUIET_SECONDS:
        cells.append([(f"last heard of {duration(silent)} ago", "warn")])
    return [*_flow(cells, width), *_bar(now, width), *_flow(_times(now), width)]


def _bar(now: Standing, width: int) -> list[Line]:
    """The limit of which most is spent, as a bar and in words."""
    if not now.limits:
        return []
    first = now.limits[0]
    words = f" {first['fraction']:6.1%}  {share(first)}"
    room = width - len(words)
    if room < 8:
        return [[(words.strip(), "bold")]]
    eighths = round(min(1.0, first["fraction"]) * room * 8)
    full, part = divmod(eighths, 8)
    bar = "█" * full + (EIGHTHS[part] if part else "")
    return [[(bar, "good"), ("░" * (room - len(bar)), "dim"), (words, "bold")]]


def _times(now: Standing) -> list[Line]:
    cells: list[Line] = []
    if now.seconds_left is not None and now.ends_at is not None:
        far = "%a %H:%M" if now.seconds_left > 20 * 3600 else "%H:%M:%S"
        ends = time.strftime(far, time.localtime(now.ends_at))
        cells.append([(f"{duration(now.seconds_left)} left", "bold"), (f", ends {ends}", "")])
    promised = f" of {duration(now.promised_hours * 3600)} planned" if now.promised_hours else ""
    cells.append([(f"{duration(now.hours * 3600)} charged{promised}", "")])
    if not _in_dollars(now):
        planned = f" of {amount('usd', now.promised_usd)} planned" if now.promised_usd else ""
        cells.append([(f"{amount('usd', now.usd)}{planned}", "")])
    cells += [[(share(limit), "")] for limit in now.limits[1:]]
    if now.usd_per_hour is not None:
        assumed = " (assumed)" if now.price_source == "assumed" else ""
        cells.append([(f"${now.usd_per_hour:,.2f}/h{assumed}", "dim")])
    if now.saved_at is not None and now.state != "finished":
        age = duration(max(0.0, time.time() - now.saved_at))
        cells.append([(f"saved {age} ago", "dim")])
    return cells


def _says(now: Standing) -> list[str]:
    """What there is to say of the state."""
    found = [now.said] if now.said else []
    if now.running and now.stopping is not None:
        end = last_step(now.stopping)
        found.append(f"{now.stopping.get('test') or now.stopping['message']}; ends at step {end:,}")
    return found


def _said(now: Standing, width: int, height: int) -> list[Line]:
    """What there is to say, and the command that goes on: whole, since half of one is another."""
    style = STATES[now.state][1]
    lines = [line for text in _says(now) for line in _wrapped(text, width, style)]
    if len(lines) > height:
        lines = [*lines[: height - 1], [*lines[height - 1], (" …", style)]]
    command = _command(now.resume, width, style) if now.resume else []
    return lines + (command if len(lines) + len(command) <= height else [])


def _command(text: str, width: int, style: str) -> list[Line]:
    """In lines that a shell takes for one; none where a word is wider than the screen."""
    words = ["goes on with:", *map(shlex.quote, shlex.split(text))]
    if _one_line("".join(words)) != "".join(words) or max(map(cells_of, words)) > width - 2:
        return []
    lines = _flow([[(word, style)] for word in words], width - 2, gap=" ")
    return [*([*line, (" \\", style)] for line in lines[:-1]), lines[-1]]


# ---------------------------------------------------------------- figures


def _losses(now: Standing) -> list[Line]:
    cells: list[Line] = []
    if now.step:
        epochs = "" if now.epochs is None else f", {now.epochs:.2f} epochs"
        cells.append([(f"step {now.step:,}, {many(now.tokens)} tokens{epochs}", "")])
    if now.loss is not None:
        cells.append([(f"loss {now.loss:.4f}", "train")])
    if now.val_loss is not None:
        bits = "" if now.val_bpb is None else f" ({now.val_bpb:.4f} bits/byte)"
        error = "" if now.val_error is None else f" ± {now.val_error:.4f}"
        cells.append([(f"● val {now.val_loss:.4f}{error}{bits}", "val")])
    if now.best_val_loss is not None and now.best_step is not None:
        cells.append([(f"◆ best {now.best_val_loss:.4f} at step {now.best_step:,}", "val")])
    if now.promised_loss is not None:
        told = now.promised_loss
        words = f"▒ promised {told.mid:.3f} ({told.low:.3f} to {told.high:.3f})"
        cells.append([(words, "promise")])
    return cells


def _speeds(now: Standing) -> list[Line]:
    cells: list[Line] = []
    if now.tokens_per_second is not None:
        cells.append([(f"{now.tokens_per_second:,.0f} tok/s", "")])
    if now.mfu is not None and now.peak_tflops is not None:
        cells.append([(f"MFU {now.mfu:.0%} of {now.peak_tflops:,.2f} TFLOPS", "")])
    if now.memory_gib is not None:
        cells.append([(f"memory {now.memory_gib:.2f} GiB", "")])
    if now.data_wait is not None:
        style = "warn" if now.data_wait > 0.05 else ""
        cells.append([(f"data wait {now.data_wait:.1%}", style)])
    if now.lr is not None:
        cells.append([(f"lr {now.lr:.3g}", "")])
    return cells


# ---------------------------------------------------------------- what happened


def _events(now: Standing) -> list[Line]:
    """The newest first; of the same kind in a row the last, and how many they are."""
    found: list[Line] = []
    events = [event for event in now.events if now.said != event.get("message")]  # said above
    for code, group in itertools.groupby(reversed(events), key=lambda event: event["code"]):
        rows = list(group)
        age = duration(max(0.0, time.time() - rows[0].get("time", 0.0)))
        style = "bad" if code in GRAVE else "good" if code in GOOD else "warn"
        times = f" ×{len(rows)}" if len(rows) > 1 else ""
        message = _one_line(str(rows[0].get("message", "")))
        kind = "dim" if code in CALM else style
        found.append([(f"{age:>6} ", "dim"), (f"{printable(code)}{times}  ", kind), (message, "")])
    return found


def _sample(now: Standing) -> Line:
    """What the model said last, in a line."""
    if now.sample is None:
        return []
    text = _one_line(str(now.sample.get("text", "")))
    return [(f"step {now.sample.get('step', 0):,} says  ", "dim"), (text, "")] if text else []


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


# ---------------------------------------------------------------- text into a width


def _flow(cells: Sequence[Line], width: int, *, gap: str = "   ") -> list[Line]:
    """Cells one after the other, in as many lines as they need."""
    lines: list[Line] = []
    used = 0
    for cell in cells:
        size = sum(cells_of(text) for text, _ in cell)
        if lines and used + len(gap) + size <= width:
            lines[-1] += [(gap, ""), *cell]
            used += len(gap) + size
        else:
            lines.append(list(cell))
            used = size
    return lines


def _wrapped(text: str, width: int, style: str) -> list[Line]:
    """Words of a sentence in lines."""
    return _flow([[(word, style)] for word in _one_line(text).split()], width, gap=" ")


def _cut(line: Line, width: int) -> Line:
    """A line that is too wide ends with …"""
    if sum(cells_of(text) for text, _ in line) <= width:
        return line
    found: Line = []
    left = width - 1
    for text, style in line:
        kept = ""
        for char in text:
            left -= cells_of(char)
            if left < 0:
                return [*found, (kept + "…", style)]
            kept += char
        found.append((kept, style))
    return found


def cells_of(text: str) -> int:
    """Columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _joined(words: Iterable[str]) -> list[str]:
    """Without what only a chart's legend needs."""
    return [word.lstrip("●◆▒ ") for word in words]
