"""Small charts as SVG text: no script, no network, colours from the style sheet (light and dark). Torch-free.

Every function returns safe markup: all text that enters is escaped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

W, H = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 44
CROWDED = 8
"""Marks above which a label that finds no room is left out: its mark says who it is, by the key and when hovered."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One subject in a scatter plot."""

    label: str
    series: int
    """Colour and mark; negative for a floor."""
    x: float
    y: float
    x_ci: tuple[float, float] | None = None
    y_ci: tuple[float, float] | None = None
    href: str = ""
    note: str = ""


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
        return [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
    span = high - low
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if span / (step * m) <= 5.5)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _scale(values: Sequence[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.35, high * 1.35
    pad = 0.08 * ((high - low) or abs(high) or 1.0)
    return (0.0 if from_zero and low >= 0 else low - pad), high + pad


def _mapper(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    if log:
        low, high = math.log(low), math.log(high)
        return lambda v: start + (math.log(v) - low) / (high - low) * (end - start)
    return lambda v: start + (v - low) / (high - low) * (end - start)


def _tick_text(value: float) -> str:
    return f"{value:g}"


def _axes(
    xs: list[float], ys: list[float], x: Callable[[float], float], y: Callable[[float], float], names: tuple[str, str]
) -> str:
    parts = []
    for tick in ys:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{W - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{_tick_text(tick)}</text>'
        )
    for tick in xs:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{H - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{H - BOTTOM + 15}" text-anchor="middle">{_tick_text(tick)}</text>'
        )
    middle = (TOP + H - BOTTOM) / 2
    parts.append(
        f'<text class="axis" x="{(LEFT + W - RIGHT) / 2}" y="{H - 8}" text-anchor="middle">{escape(names[0])}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(names[1])}</text>"
    )
    return "".join(parts)


def _mark(series: int, x: float, y: float) -> str:
    if series < 0:
        return f'<circle class="floor" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
        f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 10.5h-12z"/>',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 6-6 6-6-6z"/>',
    )
    return f'<g class="s{series % 6}">{shapes[series % 4]}</g>'


def _place(
    label: str, x: float, y: float, taken: list[tuple[float, float, float, float]], crowded: bool
) -> tuple[float, float, str] | None:
    """Where a label goes: the first of eight spots that hits nothing placed before; on a crowded plot else nowhere."""
    width = 6.3 * len(label)
    spots = [
        (9, -6, "start"),
        (-9, -6, "end"),
        (9, 13, "start"),
        (-9, 13, "end"),
        (0, -12, "middle"),
        (0, 20, "middle"),
        (9, -20, "start"),
        (9, 27, "start"),
    ]
    best = None
    for dx, dy, anchor in spots:
        left = x + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
        box = (left, y + dy - 10, left + width, y + dy + 3)
        inside = box[0] >= LEFT and box[2] <= W - 2 and box[1] >= 0 and box[3] <= H - BOTTOM + 2
        free = all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken)
        if best is None or (inside and free):
            best = (x + dx, y + dy, anchor, box)
        if inside and free:
            break
    else:
        if crowded:
            return None
    assert best is not None
    taken.append(best[3])
    return best[0], best[1], best[2]


def scatter(points: Sequence[Point], x_name: str, y_name: str, title: str) -> Markup:
    """Points with 95 % error bars. An axis is logarithmic where all its values are positive and span a factor of 8."""
    if not points:
        return Markup("")
    xs = [v for p in points for v in (p.x, *(p.x_ci or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_ci or ()))]
    log_x, log_y = (min(v) > 0 and max(v) / min(v) > 8 for v in (xs, ys))
    (x0, x1), (y0, y1) = _scale(xs, log_x, False), _scale(ys, log_y, True)
    x, y = _mapper(x0, x1, LEFT, W - RIGHT, log_x), _mapper(y0, y1, H - BOTTOM, TOP, log_y)
    names = (x_name + (" (log)" if log_x else ""), y_name + (" (log)" if log_y else ""))
    body = [_axes(_ticks(x0, x1, log_x), _ticks(y0, y1, log_y), x, y, names)]
    taken = [(x(p.x) - 6, y(p.y) - 6, x(p.x) + 6, y(p.y) + 6) for p in points]
    for p in points:
        kind = "floor" if p.series < 0 else f"s{p.series % 6}"
        marks = []
        if p.y_ci:
            a, b = y(p.y_ci[0]), y(p.y_ci[1])
            marks.append(f'<path class="bar" d="M{x(p.x):.1f} {a:.1f}V{b:.1f}m-4 0h8M{x(p.x) - 4:.1f} {a:.1f}h8"/>')
        if p.x_ci:
            a, b = x(p.x_ci[0]), x(p.x_ci[1])
            marks.append(f'<path class="bar" d="M{a:.1f} {y(p.y):.1f}H{b:.1f}m0-4v8M{a:.1f} {y(p.y) - 4:.1f}v8"/>')
        spot = _place(p.label, x(p.x), y(p.y), taken, len(points) > CROWDED)
        marks.append(_mark(p.series, x(p.x), y(p.y)))
        if spot is not None:
            at = f'x="{spot[0]:.1f}" y="{spot[1]:.1f}" text-anchor="{spot[2]}"'
            marks.append(f'<text class="label" {at}>{escape(p.label)}</text>')
        group = f'<g class="point {kind}"><title>{escape(p.note or p.label)}</title>{"".join(marks)}</g>'
        body.append(
            f'<a href="{escape(p.href)}" aria-label="{escape(p.note or p.label)}">{group}</a>' if p.href else group
        )
    return _svg(W, H, "".join(body), title, role="group")  # role img would hide the links in it


def _svg(width: float, height: float, body: str, title: str, css: str = "chart", role: str = "img") -> Markup:
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}" role="{role}" aria-label="{escape(title)}">{body}</svg>'
    )


def key(names: Sequence[str], floors: bool) -> Markup:
    """Which mark is which architecture, as a list; ``names`` in the order of their series."""
    if not names:
        return Markup("")

    def item(series: int, name: str) -> str:
        kind = "floor" if series < 0 else f"s{series % 6}"
        mark = f'<svg viewBox="0 0 16 16" aria-hidden="true"><g class="point {kind}">{_mark(series, 8, 8)}</g></svg>'
        return f"<li>{mark} {escape(name)}</li>"

    items = [item(i, name) for i, name in enumerate(names)] + ([item(-1, "floor")] if floors else [])
    return Markup(f'<ul class="key" aria-label="Marks">{"".join(items)}</ul>')


def strip(
    value: float,
    interval: tuple[float | None, float | None],
    others: Sequence[tuple[float, str]],
    floors: Sequence[tuple[float, str]],
    title: str,
) -> Markup:
    """A value with its interval on one line with those of others (rings) and of floors (ticks), each with its name."""
    width, height, middle = 240.0, 18.0, 9.0
    known = [v for v in (value, *interval) if v is not None] + [v for v, _ in (*others, *floors)]
    low, high = min(known), max(known)
    span = (high - low) or 1.0

    def x(v: float) -> float:
        return 8 + (v - low) / span * (width - 16)

    body = f'<line class="rail" x1="4" x2="{width - 4:g}" y1="{middle:g}" y2="{middle:g}"/>'
    for v, name in floors:
        body += (
            f'<line class="tickfloor" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="3" y2="15">'
            f"<title>{escape(name)}: {v:.4g}</title></line>"
        )
    for v, name in others:
        body += (
            f'<circle class="peer" cx="{x(v):.1f}" cy="{middle:g}" r="4">'
            f"<title>{escape(name)}: {v:.4g}</title></circle>"
        )
    a, b = interval
    if a is not None and b is not None:
        body += f'<line class="ci" x1="{x(a):.1f}" x2="{x(b):.1f}" y1="{middle:g}" y2="{middle:g}"/>'
    body += f'<circle class="dot" cx="{x(value):.1f}" cy="{middle:g}" r="4"/>'
    return _svg(width, height, body, title, "strip")


def bars(
    heights: Sequence[float], edges: tuple[str, str], title: str, *, log: bool = False, notes: Sequence[str] = ()
) -> Markup:
    """A histogram; ``log`` draws log(1 + count)."""
    if not len(heights) or max(heights) <= 0:
        return Markup("")
    width, height, floor = 300.0, 96.0, 78.0
    drawn = [math.log1p(max(0.0, float(h))) if log else max(0.0, float(h)) for h in heights]
    top, step = max(drawn), width / len(drawn)
    body, outline = [], []
    for i, value in enumerate(drawn):
        tall = value / top * (floor - 6)
        tall = max(tall, 1.0) if value > 0 else 0.0
        if log:  # the linear chart beside it carries the counts; one path keeps the page light
            outline.append(f"M{i * step:.1f} {floor:g}v{-tall:.1f}h{step * 0.85:.1f}v{tall:.1f}z" if tall else "")
            continue
        note = escape(notes[i] if i < len(notes) else f"{heights[i]:g}")
        body.append(
            f'<path d="M{i * step:.1f} {floor:g}v{-tall:.1f}h{step * 0.85:.1f}v{tall:.1f}z">'
            f"<title>{note}</title></path>"
        )
    if log:
        body.append(f'<path d="{"".join(outline)}"/>')
    body = [f'<g class="hist">{"".join(body)}</g>']
    body.append(f'<line class="rail" x1="0" x2="{width:g}" y1="{floor:g}" y2="{floor:g}"/>')
    body.append(f'<text class="tick" x="0" y="{height - 4:g}">{escape(edges[0])}</text>')
    body.append(f'<text class="tick" x="{width:g}" y="{height - 4:g}" text-anchor="end">{escape(edges[1])}</text>')
    return _svg(width, height, "".join(body), title, "chart small")


def overlaid(values: Sequence[float], floors: Sequence[float], title: str, n_bins: int = 24) -> Markup:
    """Two histograms on one axis, as shares of each: values filled, floors as an outline."""
    known = [v for v in (*values, *floors) if math.isfinite(v)]
    if len(known) < 2 or min(known) == max(known):
        return Markup("")
    width, height, base = 300.0, 76.0, 60.0
    low, high = min(known), max(known)
    shares = []
    for group in (values, floors):
        counts = [0] * n_bins
        for v in group:
            if math.isfinite(v):
                counts[min(n_bins - 1, int((v - low) / (high - low) * n_bins))] += 1
        shares.append([c / max(1, sum(counts)) for c in counts])
    top, step = max(max(s) for s in shares), width / n_bins
    tall = [[share / top * (base - 6) for share in group] for group in shares]
    bars_of = [(i * step, t) for i, t in enumerate(tall[0]) if t]
    filled = "".join(f"M{x:.1f} {base:g}v{-t:.1f}h{step * 0.85:.1f}v{t:.1f}z" for x, t in bars_of)
    body = f'<g class="hist"><path d="{filled}"/></g>'
    if floors:
        outline = "".join(f"V{base - t:.1f}h{step:.1f}" for t in tall[1])
        body += f'<path class="line floor" d="M0 {base:g}{outline}V{base:g}"/>'
    body += f'<line class="rail" x1="0" x2="{width:g}" y1="{base:g}" y2="{base:g}"/>'
    for x, anchor, v in ((0, "start", low), (width, "end", high)):
        body += f'<text class="tick" x="{x:g}" y="{height - 4:g}" text-anchor="{anchor}">{v:.2g}</text>'
    return _svg(width, height, body, title, "chart small")


def lines(series: Sequence[tuple[str, Sequence[float], Sequence[float]]], x_name: str, title: str) -> Markup:
    """Curves (name, x, y) on common axes; y logarithmic where it spans a factor of 8. Non-finite points are dropped."""
    kept = [
        (n, [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]) for n, x, y in series
    ]
    kept = [(n, pairs) for n, pairs in kept if len(pairs) > 1]
    if not kept:
        return Markup("")
    xs, ys = [a for _, p in kept for a, _ in p], [b for _, p in kept for _, b in p]
    log = min(ys) > 0 and max(ys) / min(ys) > 8
    (y0, y1), x0, x1 = _scale(ys, log, False), min(xs), max(xs)
    if x1 <= x0:
        return Markup("")
    fx, fy = _mapper(x0, x1, LEFT, W - RIGHT, False), _mapper(y0, y1, H - BOTTOM, TOP, log)
    body = [_axes(_ticks(x0, x1, False), _ticks(y0, y1, log), fx, fy, (x_name, title + (" (log)" if log else "")))]
    for i, (name, pairs) in enumerate(kept):
        every = max(1, len(pairs) // 240)
        pairs = [*pairs[:-1:every], pairs[-1]]
        path = "".join(f"{'L' if j else 'M'}{fx(a):.1f} {fy(b):.1f}" for j, (a, b) in enumerate(pairs))
        body.append(f'<path class="line s{i % 6}" d="{path}"><title>{escape(name)}</title></path>')
    return _svg(W, H, "".join(body), title)
