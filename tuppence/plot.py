"""One picture: losses over a run as an SVG that stands alone in a page, light or dark."""

import itertools
from collections.abc import Callable, Sequence

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
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
