"""Pictures as SVG that stand in a page: curves, a bar of parts; a plan's choices as a file.

    chart([Series("train", points), Series("val", points, kind="dots")], x_label=..., y_label=...)

A chart's colours are the page's: classes c0 to c5, and the rules of assets/page.css.
"""

import html
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]

LEFT, BOTTOM, TOP, RIGHT = 40, 40, 40, 12
MOST_POINTS = 400
LINES = ("line", "faint")
MANY_DOTS = 25  # more are drawn smaller
COLOURS_OF_PAGE = 6
LEAST_BAND = 5.0  # pixels wide and high, so that a narrow promise is seen


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class Series:
    """What is drawn of one thing: a `line`, a `faint` one, `dots` or `hollow` ones.

    `errors`, one for each point, are drawn as bars up and down; `colour` is one of the page's six.
    """

    name: str
    points: Points
    kind: str = "line"
    errors: Sequence[float] | None = None
    colour: int = 0


def chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    band: Sequence[tuple[float, float, float]] = (),
    log_x: bool = False,
    y_high: float | None = None,
    size: tuple[int, int] = (640, 320),
) -> str:
    """Series over one x. Returns an <svg> element, or a sentence where there is nothing to draw.

    `band` is (x, low, high) from left to right: what was promised; one of them is a bar there.
    A line of more than 400 points is drawn as means of neighbours. What lies above `y_high` is cut
    off; x begins at zero, or with `log_x` at the first point. `title` is for those who hear it.
    """
    drawn = [(one, _drawn(one, log_x)) for one in series]
    edges = [(x, y) for x, low, high in band for y in (low, high)]
    whole = [(x, y) for _, points in drawn for x, y, e in points for y in (y - e, y + e)]
    if not whole:
        return "<p>There is nothing to draw yet.</p>"
    frame = _frame([*whole, *edges], log_x, y_high, size)
    lines = [_line(one, points, frame) for one, points in drawn if one.kind in LINES]
    dots = [_dots(one, points, frame) for one, points in drawn if one.kind not in LINES]
    inside = (LEFT, TOP, size[0] - LEFT - RIGHT, size[1] - TOP - BOTTOM)
    cut = 'x="{}" y="{}" width="{}" height="{}"'.format(*inside)
    box = " ".join(map(str, inside))
    told = html.escape(title or f"{y_label} against {x_label}")
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
        f'role="img" aria-label="{told}" {frame.told()}>{_axes(frame, x_label, y_label)}'
        f'<svg {cut} viewBox="{box}">{_band(band, frame)}{"".join(lines)}</svg>'
        f"{''.join(dots)}</svg>"
    )


def legend(series: Sequence[Series], *, band: str = "") -> str:
    """What the colours of a chart mean, as a line of HTML; `band` says what was promised."""
    keys = [(one.name, f"{one.kind} c{one.colour % COLOURS_OF_PAGE}") for one in series]
    keys += [(band, "band")] if band else []
    said = (f'<span><i class="key {how}"></i>{html.escape(name)}</span>' for name, how in keys)
    return f'<p class="legend">{" ".join(said)}</p>'


@dataclass(frozen=True)
class _Frame:
    """What the edges of a chart stand for."""

    left: float
    right: float
    low: float
    high: float
    log_x: bool
    size: tuple[int, int]

    @property
    def floor(self) -> int:
        """Pixels from the top to the x axis."""
        return self.size[1] - BOTTOM

    @property
    def end(self) -> int:
        """Pixels from the left to the right edge."""
        return self.size[0] - RIGHT

    def told(self) -> str:
        """The edges as attributes, for a script that says what lies under a pointer."""
        edges = (self.left, self.right, self.low, self.high)
        numbers = " ".join(f"{edge:.9g}" for edge in edges)
        return f'data-edges="{numbers}"' + (" data-log" if self.log_x else "")

    def place(self, x: float, y: float) -> tuple[float, float]:
        to = math.log if self.log_x else float
        across = (to(x) - to(self.left)) / (to(self.right) - to(self.left))
        down = (self.high - y) / (self.high - self.low)
        return LEFT + across * (self.end - LEFT), TOP + down * (self.floor - TOP)


def _drawn(one: Series, log_x: bool) -> list[tuple[float, float, float]]:
    """(x, y, error) of what can be drawn: finite, and few."""
    errors = one.errors if one.errors is not None else [0.0] * len(one.points)
    points = [
        (float(x), float(y), float(e))
        for (x, y), e in zip(one.points, errors, strict=True)
        if math.isfinite(x) and math.isfinite(y) and math.isfinite(e) and (x > 0 or not log_x)
    ]
    if one.kind not in ("line", "faint") or len(points) <= MOST_POINTS:
        return points
    return [(x, y, 0.0) for x, y in smooth([(x, y) for x, y, _ in points])]


def _frame(points: Points, log_x: bool, y_high: float | None, size: tuple[int, int]) -> _Frame:
    left = min(x for x, _ in points) if log_x else min(0.0, *(x for x, _ in points))
    right = max(x for x, _ in points)
    if right <= left:
        right = left + (abs(left) or 1.0)
    low, high = min(y for _, y in points), max(y for _, y in points)
    if y_high is not None and low < y_high:
        high = min(high, y_high)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    bottom = low - margin
    bottom = max(0.0, bottom) if low >= 0 else bottom
    return _Frame(left, right, bottom, high + margin, log_x, size)


def _line(one: Series, points: Sequence[tuple[float, float, float]], frame: _Frame) -> str:
    path = " ".join("{:.1f},{:.2f}".format(*frame.place(x, y)) for x, y, _ in points)
    return f'<polyline class="{one.kind} {_colour(one)}" points="{path}" {_named(one)}/>'


def _dots(one: Series, points: Sequence[tuple[float, float, float]], frame: _Frame) -> str:
    out, radius = [], 3.5 if len(points) <= MANY_DOTS else 2.4
    for x, y, error in points:
        if y > frame.high:
            continue
        across, down = frame.place(x, y)
        if error:
            (_, top), (_, bottom) = frame.place(x, y + error), frame.place(x, y - error)
            out.append(
                f'<line class="error {_colour(one)}" x1="{across:.1f}" x2="{across:.1f}" '
                f'y1="{top:.1f}" y2="{bottom:.1f}"/>'
            )
        spread = f" ± {error:.4g}" if error else ""
        said = html.escape(f"{one.name} {y:.5g}{spread} at {short(x)}")
        place = f'cx="{across:.1f}" cy="{down:.2f}" r="{radius}"'
        how = f'class="{one.kind} {_colour(one)}" {_named(one)}'
        out.append(f"<circle {place} {how}><title>{said}</title></circle>")
    return "".join(out)


def _colour(one: Series) -> str:
    return f"c{one.colour % COLOURS_OF_PAGE}"


def _named(one: Series) -> str:
    return f'data-name="{html.escape(one.name)}"'


def _band(band: Sequence[tuple[float, float, float]], frame: _Frame) -> str:
    """What was promised: an area of at least some pixels."""
    if not band:
        return ""
    upper = [frame.place(x, high) for x, _, high in band]
    lower = [frame.place(x, low) for x, low, _ in band]
    wide = max(0.0, LEAST_BAND - (upper[-1][0] - upper[0][0])) / 2
    tall = max(0.0, LEAST_BAND - max(b[1] - a[1] for a, b in zip(upper, lower, strict=True))) / 2
    edge = [(x, y - tall) for x, y in upper] + [(x, y + tall) for x, y in reversed(lower)]
    middle = (upper[0][0] + upper[-1][0]) / 2
    if wide:
        (top, bottom) = (upper[0][1] - tall, lower[0][1] + tall)
        middle = min(middle, frame.end - LEAST_BAND / 2)
        left, right = middle - LEAST_BAND / 2, middle + LEAST_BAND / 2
        edge = [(left, top), (right, top), (right, bottom), (left, bottom)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
    return f'<polygon class="band" points="{path}"><title>promised</title></polygon>'


def _axes(frame: _Frame, x_label: str, y_label: str) -> str:
    """Numbers stand on their lines, at the left; so they find room at every size of letters."""
    out, end, floor = [], frame.end, frame.floor
    for y in ticks(frame.low, frame.high, most=max(3, (floor - TOP) // 36)):
        _, down = frame.place(frame.left, y)
        out.append(f'<line class="grid" x1="0" x2="{end}" y1="{down:.1f}" y2="{down:.1f}"/>')
        out.append(f'<text x="0" y="{down:.1f}" dy="-.3em">{_tick(y)}</text>')
    most = max(4, (end - LEFT) // 80)
    marks = (
        decades(frame.left, frame.right)
        if frame.log_x
        else ticks(frame.left, frame.right, most=most)
    )
    for x in marks:
        across, _ = frame.place(x, frame.low)
        how = "end" if across > end - 18 else "middle"
        out.append(f'<line class="tick" x1="{across:.1f}" x2="{across:.1f}" y1="{floor}" ')
        out.append(f'y2="{floor + 4}"/><text class="{how}" x="{across:.1f}" y="{floor + 6}" ')
        out.append(f'dy=".9em">{_tick(x)}</text>')
    out.append(f'<line class="base" x1="{LEFT}" x2="{end}" y1="{floor}" y2="{floor}"/>')
    out.append(f'<text class="label" x="0" y="0" dy="1em">{html.escape(y_label)}</text>')
    out.append(f'<text class="label end" x="{end}" y="0" dy="1em">')
    out.append(f"against {html.escape(x_label)}</text>")
    return "".join(out)


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers between two, as many as go up to `most`: steps of 1, 2 or 5 of a decade."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return []
    decade = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (m * decade for m in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [n * step for n in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade between two numbers, or its ones where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = (1,) if high / low > 1e3 else (1, 2, 5)
    every = (m * 10.0**power for power in powers for m in marks)
    return [x for x in every if low <= x * 1.001 and x <= high * 1.001]


def _tick(value: float) -> str:
    """A round number as short as it goes."""
    return short(value) if abs(value) >= 1e4 else f"{value:.6g}"


def smooth(points: Points, *, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of an equal share of neighbours."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    return [_mean(points[a:b]) for a, b in itertools.pairwise(edges)]


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


# ---------------------------------------------------------------- a bar of parts


def stack(
    parts: Iterable[tuple[str, float, str]], *, total: float | None = None, title: str = ""
) -> str:
    """One bar of (name, value, label) from left to right; `total` is what its full width stands
    for (else their sum). A part's class is `part-NAME`, its label is told where one points."""
    shown = [(name, value, label) for name, value, label in parts if value > 0]
    whole = total or sum(value for _, value, _ in shown) or 1.0
    out, at = [], 0.0
    for name, value, label in shown:
        width = value / whole * 1000
        known = "".join(c if c.isalnum() else "-" for c in name.lower())
        said = html.escape(label or name)
        out.append(
            f'<rect class="part-{known}" x="{at:.2f}" y="0" width="{width:.2f}" height="10">'
            f"<title>{said}</title></rect>"
        )
        at += width
    told = html.escape(title or ", ".join(label or name for name, _, label in shown))
    return (
        f'<svg class="stack" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 10" '
        f'preserveAspectRatio="none" role="img" aria-label="{told}">{"".join(out)}</svg>'
    )


def mark(low: float, mid: float, high: float, paid: float) -> str:
    """What was paid as a dot on the interval that was promised; hollow where it lies outside."""
    least, most = min(low, paid), max(high, paid)
    wide = max(most - least, 0.2 * abs(mid)) or 1.0
    least -= (wide - (most - least)) / 2

    def at(value: float) -> float:
        return 6 + (value - least) / wide * 108

    within = low <= paid <= high
    how, said = ("dot", "within the interval") if within else ("hollow", "outside the interval")
    return (
        f'<svg class="mark" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 120 12" role="img" '
        f'aria-label="{said}"><line class="grid" x1="0" x2="120" y1="6" y2="6"/>'
        f'<rect class="band" x="{at(low):.1f}" y="2" width="{max(1.0, at(high) - at(low)):.1f}" '
        f'height="8"/><line class="mid" x1="{at(mid):.1f}" x2="{at(mid):.1f}" y1="2" y2="10"/>'
        f'<circle class="{how}" cx="{at(paid):.1f}" cy="6" r="3.2"/></svg>'
    )


# ---------------------------------------------------------------- a plan's choices


@dataclass(frozen=True)
class Curve:
    """One line of a picture: (x, low, middle, high) from left to right."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]


COLOURS = ("#4c8bf5", "#e8710a", "#1e8e3e", "#a142f4", "#d93025", "#12a4af")


def curves_plot(curves: Sequence[Curve], *, title: str, x_label: str, y_label: str) -> str:
    """Curves with their bands over a logarithmic x, named on the right. Returns a whole <svg>."""
    every = [point for curve in curves for point in curve.points]
    low_x, high_x = (math.log(f(p[0] for p in every)) for f in (min, max))
    low_y, high_y = min(p[1] for p in every), max(p[3] for p in every)
    width, left, right, height, top, bottom = 720, 70, 290, 420, 34, 40

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - low_x) / ((high_x - low_x) or 1.0)
        down = (high_y - y) / ((high_y - low_y) or 1.0)
        return left + across * (width - left - right), top + down * (height - top - bottom)

    parts = [_log_axes(low_x, high_x, low_y, high_y, place)]
    ends: list[tuple[float, float, str, str]] = []
    for curve, colour in zip(curves, itertools.cycle(COLOURS)):
        mid = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(p[0], p[2]) for p in curve.points))
        edge = [place(p[0], p[3]) for p in curve.points]
        edge += [place(p[0], p[1]) for p in reversed(curve.points)]
        around = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
        parts.append(f'<polygon points="{around}" fill="{colour}" fill-opacity=".12"/>')
        parts.append(f'<polyline points="{mid}" fill="none" stroke="{colour}" stroke-width="2"/>')
        ends.append((*place(curve.points[-1][0], curve.points[-1][2])[::-1], curve.name, colour))
    lowest = 0.0
    for y, x, name, colour in sorted(ends):  # apart, in the order of the curves
        lowest = max(y + 4, lowest + 14)
        said = html.escape(name)
        parts.append(f'<text x="{x + 6:.1f}" y="{lowest:.1f}" fill="{colour}">{said}</text>')
    parts.append(f'<text x="{left}" y="18" font-weight="bold">{html.escape(title)}</text>')
    middle = left + (width - left - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 4}" text-anchor="middle">{x_label}</text>')
    parts.append(
        f'<text x="14" y="{height / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {height / 2})">{y_label}</text>'
    )
    style = (
        "<style>svg{background:#fff;color:#202124}.axis{stroke:currentColor;stroke-opacity:.2}"
        "text{font:12px system-ui,sans-serif}text:not([fill]){fill:currentColor}"
        "@media(prefers-color-scheme:dark){svg{background:#202124;color:#e8eaed}}</style>"
    )
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{style}{"".join(parts)}</svg>\n'


def _log_axes(low_x: float, high_x: float, low_y: float, high_y: float, place: Place) -> str:
    """Lines at five heights, and at 1, 2 and 5 of every decade."""
    out = []
    left, right = math.exp(low_x), math.exp(high_x)
    for i in range(5):
        y = low_y + i / 4 * (high_y - low_y)
        (x1, y1), (x2, _) = place(left, y), place(right, y)
        out.append(f'<line class="axis" x1="{x1}" x2="{x2}" y1="{y1:.1f}" y2="{y1:.1f}"/>')
        out.append(f'<text x="{x1 - 6}" y="{y1 + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in decades(left, right):
        x_px, bottom = place(x, low_y)
        out.append(
            f'<text x="{x_px:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{short(x)}</text>'
        )
    return "".join(out)


def short(value: float) -> str:
    """12,345,678 as 12.3M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
