"""Drawings for the page of a report: SVG text without script, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from rewriter.verify.rows import DECADES, Detail, VerifyRow

__all__ = ["heat_map", "histogram", "ratios"]

_CELL, _LABEL, _LINE = 20, 132, 18
_HEIGHT = 150
_LETTERS = 20  # of a label
_MANY = 48  # labels of heads and sites are thinned out beyond


def heat_map(rows: Sequence[VerifyRow]) -> str:
    """The largest |model - original| of each head, a line a site; darker is larger, by powers of
    ten."""
    shown = [(row, row.detail) for row in rows if row.detail is not None and row.detail.heads]
    values = [x for _, detail in shown for x in detail.heads]
    if not values:
        return ""
    levels = [math.log10(x) for x in values if 0 < x < math.inf]
    low, high = (min(levels), max(levels)) if levels else (0.0, 0.0)
    heads = max(len(detail.heads) for _, detail in shown)
    parts = []
    for line, (row, detail) in enumerate(shown):
        y = line * _CELL
        parts.append(_text(_LABEL - 8, y + 14, _short(row.name), "end"))
        for head, value in enumerate(detail.heads):
            shade = _shade(value, low, high)
            mark = "bad" if value == math.inf else "cell" if shade else "none"
            title = f"{row.name}, head {head}: {value:.2e}"
            parts.append(
                f'<rect class="{mark}" x="{_LABEL + head * _CELL}" y="{y}" width="{_CELL - 2}" '
                f'height="{_CELL - 2}" fill-opacity="{shade:.2f}">'
                f"<title>{escape(title)}</title></rect>"
            )
    bottom = len(shown) * _CELL
    step = 1 if heads <= _MANY else 8
    for head in range(0, heads, step):
        parts.append(_text(_LABEL + head * _CELL + _CELL / 2 - 1, bottom + 14, str(head)))
    parts.append(_text(_LABEL - 8, bottom + 14, "head", "end"))
    if levels:
        ends = " to ".join(f"{10**x:.0e}" for x in dict.fromkeys((low, high)))
        words = f"faintest to strongest: {ends}"
    else:
        words = "no difference: equal bit for bit"
    words += "; red: not finite" if math.inf in values else ""
    parts.append(_text(8, bottom + 34, words, "start"))
    width = max(_LABEL + heads * _CELL, 320)
    return _svg(width, bottom + 42, parts, "largest difference of each head")


def histogram(details: Sequence[Detail], label: str) -> str:
    """How many values have an error of which size, in the original and in the model."""
    ref = [sum(counts) for counts in zip(*(d.errors_ref for d in details), strict=True)]
    new = [sum(counts) for counts in zip(*(d.errors_new for d in details), strict=True)]
    used = [i for i in range(1, len(ref)) if ref[i] or new[i]]
    bins = [0, *range(min(used), max(used) + 1)] if used else [0]
    top = max(*ref, *new, 1)
    wide = 30 if len(bins) < 16 else 20
    parts = []
    for place, i in enumerate(bins):
        x = 40 + place * wide
        span = "exactly 0" if i == 0 else f"{_power(i)} to {_power(i + 1)}"
        for mark, count, shift in (("own", ref[i], 0), ("cell", new[i], wide / 2 - 2)):
            tall = _HEIGHT * math.log1p(count) / math.log1p(top)
            who = "original" if mark == "own" else "model"
            parts.append(
                f'<rect class="{mark}" x="{x + shift:g}" y="{_HEIGHT + 8 - tall:.1f}" '
                f'width="{wide / 2 - 3:g}" height="{tall:.1f}">'
                f"<title>{who}: {count} values, error {span}</title></rect>"
            )
        if i == 0:
            parts.append(_text(x + wide / 2 - 3, _HEIGHT + 24, "0"))
        elif i % 2 == 0:
            parts.append(_text(x, _HEIGHT + 24, _power(i)))
    ticks = sorted({1, round(math.expm1(math.log1p(top) / 2)), top})
    for count in ticks:
        y = _HEIGHT + 8 - _HEIGHT * math.log1p(count) / math.log1p(top)
        parts.append(f'<line x1="36" x2="{40 + len(bins) * wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(33, y + 4, _count(count), "end"))
    parts += [
        f'<rect class="own" x="40" y="{_HEIGHT + 34}" width="10" height="10"/>',
        _text(55, _HEIGHT + 43, "original", "start"),
        f'<rect class="cell" x="120" y="{_HEIGHT + 34}" width="10" height="10"/>',
        _text(135, _HEIGHT + 43, "model", "start"),
    ]
    return _svg(max(60 + len(bins) * wide, 220), _HEIGHT + 52, parts, label)


def ratios(rows: Sequence[VerifyRow], limit: float) -> str:
    """Error of the model over that of the original, a column a site, by powers of ten."""
    shown = [row for row in rows if row.err_new is not None]
    if not shown:
        return ""
    levels = [math.log10(min(max(row.ratio, 1e-3), 1e12)) for row in shown]
    low, high = min(*levels, -0.5), max(*levels, math.log10(limit) + 0.3)

    def height(level: float) -> float:
        return 8 + _HEIGHT * (high - level) / (high - low)

    wide = _LINE if len(shown) <= _MANY else 8
    width = 52 + len(shown) * wide
    right = max(width + 8, 230)
    parts = []
    crowded = high - low > 4  # the words at 1 and at the limit would meet
    lines = {0.0: "" if crowded else "1", math.log10(limit): f"{limit:g}"}
    if high > math.log10(limit) + 0.5:
        lines |= {high: f"{10**high:.1g}"}
    for level, words in lines.items():
        y = height(level)
        mark = ' class="limit"' if level == math.log10(limit) else ""
        parts.append(f'<line{mark} x1="46" x2="{right - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(42, y + 4, words, "end"))
    for place, (row, level) in enumerate(zip(shown, levels, strict=True)):
        x = 52 + place * wide + wide / 2
        mark = "cell" if row.ok else "bad"
        title = f"{row.name}: {row.ratio:.3g} times the error of the original"
        parts.append(
            f'<circle class="{mark}" cx="{x:g}" cy="{height(level):.1f}" r="{min(wide / 2, 5):g}">'
            f"<title>{escape(title)}</title></circle>"
        )
        if place % max(1, len(shown) // 12) == 0:
            parts.append(_text(x, _HEIGHT + 26, str(place)))
    return _svg(right, _HEIGHT + 34, parts, "error ratio of each site")


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    box = f"0 0 {width:g} {height:g}"
    size = f'viewBox="{box}" width="{width:g}" height="{height:g}"'
    return f'<svg role="img" aria-label="{escape(label)}" {size}>{"".join(parts)}</svg>'


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def _shade(value: float, low: float, high: float) -> float:
    if value == 0:
        return 0.0
    if value == math.inf or high == low:
        return 1.0
    return 0.12 + 0.88 * (math.log10(value) - low) / (high - low)


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else "…" + name[-_LETTERS + 1 :]


def _power(bin_: int) -> str:
    return f"1e{DECADES[0] + bin_ / 2:g}"


def _count(n: int) -> str:
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k" if n >= 1e4 else str(n)
