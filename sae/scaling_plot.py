"""Measured against fitted scaling laws as one SVG: L over width for each k, and L over compute. Torch-free."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 520, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 40, 52
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d")


@dataclass(frozen=True)
class Series:
    """Points and, where there is one, the curve that was fitted to them."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    curve_x: Sequence[float] = ()
    curve_y: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One plot with logarithmic axes."""

    title: str
    x_label: str
    series: Sequence[Series]


def ticks(low: float, high: float) -> list[float]:
    """Values of 1, 2 and 5 times powers of ten in [low, high]; powers of ten alone over more than three decades, and
    equal round steps where the range is below a factor of five."""
    if high / low < 5:
        step = next(s for s in (m * 10.0 ** math.floor(math.log10(high - low) - 1) for m in (1, 2, 5, 10, 20, 50))
                    if (high - low) / s <= 8)  # fmt: skip
        return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
    found = [factor * 10.0**d for d in decades for factor in factors]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.06, 1.02)
    return low / margin, high * margin


def _panel(panel: Panel, at: int) -> str:
    xs = [v for s in panel.series for v in (*s.x, *s.curve_x)]
    ys = [v for s in panel.series for v in (*s.y, *s.curve_y)]
    x_range, y_range = _range(xs), _range(ys)

    def place(value: float, limits: tuple[float, float], start: float, end: float) -> float:
        return start + (end - start) * math.log(value / limits[0]) / math.log(limits[1] / limits[0])

    def px(value: float) -> float:
        return at + place(value, x_range, LEFT, WIDTH - RIGHT)

    def py(value: float) -> float:
        return place(value, y_range, HEIGHT - BOTTOM, TOP)

    out = [f'<text x="{at + LEFT}" y="22" class="title">{escape(panel.title)}</text>']
    for value in ticks(*x_range):
        x = px(value)
        out.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" class="grid"/>')
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for value in ticks(*y_range):
        y = py(value)
        out.append(f'<line x1="{at + LEFT}" y1="{y:.1f}" x2="{at + WIDTH - RIGHT}" y2="{y:.1f}" class="grid"/>')
        out.append(f'<text x="{at + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = at + (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{escape(panel.x_label)}</text>')
    out.append(f'<text transform="translate({at + 14},{HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">L</text>')
    for i, series in enumerate(panel.series):
        colour = COLOURS[i % len(COLOURS)]
        if len(series.curve_x):
            line = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(series.curve_x, series.curve_y, strict=True))
            out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, y in zip(series.x, series.y, strict=True):
            out.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.2" fill="{colour}"/>')
    legend = [
        f'<tspan style="fill:{COLOURS[i % len(COLOURS)]}" dx="10">{escape(series.label)}</tspan>'
        for i, series in enumerate(panel.series)
    ]
    out.append(f'<text x="{at + WIDTH - RIGHT}" y="22" text-anchor="end">{"".join(legend)}</text>')
    return "\n".join(out)


def draw(panels: Sequence[Panel]) -> str:
    """The SVG of panels side by side; a panel needs at least one series with a point. ``ValueError`` otherwise."""
    for panel in panels:
        if not any(len(series.x) for series in panel.series):
            raise ValueError(f"the panel {panel.title!r} has nothing to draw")
    total = WIDTH * len(panels)
    style = "text{font:12px sans-serif;fill:#333}.title{font-weight:bold;font-size:14px}.grid{stroke:#ddd}"
    body = "\n".join(_panel(panel, i * WIDTH) for i, panel in enumerate(panels))
    size = f'width="{total}" height="{HEIGHT}" viewBox="0 0 {total} {HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>'
        f'<rect width="{total}" height="{HEIGHT}" fill="#fff"/>\n{body}\n</svg>\n'
    )


def save(panels: Sequence[Panel], path: Path) -> None:
    """Write :func:`draw`."""
    path.write_text(draw(panels), encoding="utf-8")


def spread(low: float, high: float, n: int = 60) -> list[float]:
    """``n`` values from low to high, evenly in the logarithm."""
    return [float(v) for v in np.geomspace(low, high, n)]
