"""Pictures as SVG: bars, a timeline, a strip of steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from math import ceil, floor, log10
from statistics import median

from ..text_tables import printable
from .runs import CALLER, PHASES, Save, Span

WIDTH = 960
LEFT = 84  # for labels
ROW = 20
BARS = 96


def bar_chart(values: Sequence[float], names: Sequence[str], failed: Sequence[bool], *, kind: str, unit: str) -> str:
    """Return bars from left to right.

    Args:
        values: how high, at least 0.
        names: what each is, shown where the pointer is.
        failed: which are red.
        kind: the class of the others.
        unit: of the values.
    """
    good = [value for value, bad in zip(values, failed, strict=True) if not bad]
    top = max([*values, 1e-12])
    pitch = min((WIDTH - LEFT) / len(values), 36)
    parts = [_line(LEFT, BARS + 4, WIDTH, BARS + 4), _label(LEFT - 8, 14, f"{top:.3g}"), _label(LEFT - 8, 30, unit)]
    for place, (value, name, bad) in enumerate(zip(values, names, failed, strict=True)):
        height = max(BARS * value / top, 2 if bad else 0.5)
        box = (LEFT + place * pitch, BARS + 4 - height, max(pitch - 2, 0.8), height)
        parts.append(_box(*box, "bad" if bad else kind, f"{name}: {value:.3g} {unit}"))
    if good:
        middle = BARS + 4 - BARS * median(good) / top
        parts.append(_line(LEFT, middle, WIDTH, middle, "median"))
    return _svg(BARS + 8, parts)


def timeline_chart(save: Save) -> str:
    """Return a save's phases, a row each, below the caller's steps."""
    rows: list[tuple[str, str, list[Span]]] = [("steps", "steps", list(save.steps))] if save.steps else []
    for name in PHASES:
        if spans := [span for span in save.spans if span[0] == name]:
            rows.append((name, "caller" if name in CALLER else "engine", spans))
    ended = max(stop for _, _, stop in save.spans)
    lead = ended * 0.06 if save.steps else 0.0
    start, stop = -lead, ended + lead
    scale = (WIDTH - LEFT) / (stop - start or 1.0)
    parts = []
    bottom = len(rows) * ROW
    for tick in _ticks(0.0, stop):
        x = LEFT + (tick - start) * scale
        text = f"{1000 * tick:.4g} ms" if stop < 2 else f"{tick:.4g} s"
        anchor = "end" if x > WIDTH - 50 else "middle"
        parts += [
            _line(x, 0, x, bottom + 4),
            f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{text}</text>',
        ]
    for place, (label, kind, spans) in enumerate(rows):
        y = place * ROW
        parts += [_label(LEFT - 8, y + 14, label), _line(LEFT, y + ROW, WIDTH, y + ROW)]
        for name, began, over in spans:
            left, right = max(began, start), min(over, stop)
            if right < left:
                continue
            x, width = LEFT + (left - start) * scale, max((right - left) * scale, 1.0)
            parts.append(_box(x, y + 3, width, ROW - 6, kind, f"{name}: {1000 * (over - began):.3g} ms"))
            if kind == "steps" and width > 9 * len(name):
                parts.append(f'<text class="inside" x="{x + 5:.1f}" y="{y + 14}">{_escaped(name)}</text>')
    return _svg(bottom + 24, parts)


def retention_strip(*, there: Collection[int], gone: Collection[int], failed: Collection[int]) -> str:
    """Return all steps in order, by what became of them."""
    steps = sorted({*there, *gone, *failed})
    pitch = min((WIDTH - 20) / len(steps), 24)
    radius = max(min(pitch / 2 - 1.5, 6), 0.8)
    parts = []
    for place, step in enumerate(steps):
        kind = "kept" if step in there else "bad" if step in failed else "gone"
        what = {"kept": "kept", "bad": "failed", "gone": "removed"}[kind]
        x = 10 + (place + 0.5) * pitch
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="12" r="{radius:.1f}"><title>step {step}: {what}</title></circle>'
        )
    ends = f'<text x="10" y="36">step {steps[0]}</text>'
    if len(steps) > 1:
        x = max(10 + len(steps) * pitch, 160)
        ends += f'<text x="{x:.1f}" y="36" text-anchor="end">step {steps[-1]}</text>'
    return _svg(42, [*parts, ends])


def _ticks(start: float, stop: float, about: int = 8) -> list[float]:
    """Return round numbers from start to stop."""
    rough = (stop - start) / about or 1.0
    power = 10.0 ** floor(log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough)
    return [step * n for n in range(ceil(start / step), floor(stop / step) + 1)]


def _escaped(text: str) -> str:
    return escape(printable(text, keep=""))


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _label(x: float, y: float, text: str) -> str:
    return f'<text class="value" x="{x:.1f}" y="{y:.1f}" text-anchor="end">{_escaped(text)}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" {place} rx="1.5"><title>{_escaped(title)}</title></rect>'
