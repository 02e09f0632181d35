"""Pictures as SVG that stand alone in a page, light or dark: a run's losses, a plan's choices."""

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 300, 52, 40, 16, 12
MOST_POINTS = 400


def smooth(points: Points, *, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of an equal share of neighbours."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    return [_mean(points[a:b]) for a, b in itertools.pairwise(edges)]


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def loss_plot(train: Points, val: Points, *, x_label: str, band: Points = ()) -> str:
    """Training loss as a line, validation loss as dots, the promised interval as a bar at the end.

    `band` is ((x, low), (x, high)). Returns an <svg> element; colours follow the page's.
    """
    shown = [*smooth(train), *val, *band]
    if not shown:
        return "<p>nothing was trained yet</p>"
    low_x, high_x = 0.0, max(x for x, _ in shown) or 1.0
    low_y, high_y = min(y for _, y in shown), max(y for _, y in shown)
    margin = 0.05 * (high_y - low_y) or 0.5
    low_y, high_y = low_y - margin, high_y + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(low_x, high_x, low_y, high_y, place, x_label)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in smooth(train)))
    parts.append(f'<polyline class="train" points="{path}"/>')
    if band:
        (x, top), (_, bottom) = place(*band[1]), place(*band[0])
        parts.append(f'<rect class="band" x="{x - 9:.1f}" y="{top:.1f}" width="9" ')
        parts.append(f'height="{max(1.0, bottom - top):.1f}"><title>promised</title></rect>')
    for x, y in (place(*p) for p in val):
        parts.append(f'<circle class="val" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    style = (
        "<style>.axis{stroke:currentColor;stroke-opacity:.25}.train{fill:none;stroke:#4c8bf5;"
        "stroke-width:1.5}.val{fill:#e8710a}.band{fill:#1e8e3e;fill-opacity:.5}"
        "text{fill:currentColor;font:12px system-ui,sans-serif}</style>"
    )
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over {x_label}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{style}{"".join(parts)}</svg>'


def score_plot(points: Sequence[tuple[float, float, float]], *, label: str, x_label: str) -> str:
    """A score over training: (x, score, standard error) as dots with bars, joined by a line."""
    high_x = max(x for x, _, _ in points) or 1.0
    low_y = min(score - error for _, score, error in points)
    high_y = max(score + error for _, score, error in points)
    margin = 0.05 * (high_y - low_y) or 0.05
    low_y, high_y = low_y - margin, high_y + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / high_x * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(0.0, high_x, low_y, high_y, place, x_label)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(x, y) for x, y, _ in points))
    parts.append(f'<polyline class="train" points="{line}"/>')
    for x, score, error in points:
        (at, middle), (_, top), (_, bottom) = (
            place(x, y) for y in (score, score + error, score - error)
        )
        parts.append(f'<line class="error" x1="{at:.1f}" x2="{at:.1f}" ')
        parts.append(f'y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(f'<circle class="val" cx="{at:.1f}" cy="{middle:.1f}" r="4"/>')
    style = (
        "<style>.axis{stroke:currentColor;stroke-opacity:.25}.train{fill:none;stroke:#4c8bf5;"
        "stroke-width:1.5}.val{fill:#e8710a}.error{stroke:#e8710a}"
        "text{fill:currentColor;font:12px system-ui,sans-serif}</style>"
    )
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label} over {x_label}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{style}{"".join(parts)}</svg>'


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
    left, right, height, top = 70, 290, 420, 34

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - low_x) / ((high_x - low_x) or 1.0)
        down = (high_y - y) / ((high_y - low_y) or 1.0)
        return left + across * (WIDTH - left - right), top + down * (height - top - BOTTOM)

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
    middle = left + (WIDTH - left - right) / 2
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
    box = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}"'
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
    decades = range(math.floor(low_x / math.log(10)), math.ceil(high_x / math.log(10)) + 1)
    for x in (m * 10.0**d for d in decades for m in (1, 2, 5)):
        if left <= x * 1.001 and x <= right * 1.001:
            x_px, bottom = place(x, low_y)
            out.append(
                f'<text x="{x_px:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{short(x)}</text>'
            )
    return "".join(out)


def _axes(
    low_x: float, high_x: float, low_y: float, high_y: float, place: Place, x_label: str
) -> str:
    out = []
    for i in range(5):
        y = low_y + i / 4 * (high_y - low_y)
        x_px, y_px = place(low_x, y)
        out.append(
            f'<line class="axis" x1="{x_px}" x2="{WIDTH - RIGHT}" y1="{y_px:.1f}" y2="{y_px:.1f}"/>'
        )
        out.append(f'<text x="{LEFT - 8}" y="{y_px + 4:.1f}" text-anchor="end">{y:.2f}</text>')
        x = low_x + i / 4 * (high_x - low_x)
        x_px, _ = place(x, low_y)
        anchor = "end" if i == 4 else "middle"
        out.append(
            f'<text x="{x_px:.1f}" y="{HEIGHT - 20}" text-anchor="{anchor}">{short(x)}</text>'
        )
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 3}" text-anchor="middle">{x_label}</text>')
    return "".join(out)


def short(value: float) -> str:
    """12,345,678 as 12.3M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
