"""Drawings for the page of a report: SVG and HTML text without script, in the colours of the
page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from rewriter.report.grid import Grid
from rewriter.sites import Site

__all__ = ["HATCH", "heads", "picture"]

_CELL, _LEFT, _TOP = 10, 48, 18
_HEADS = 256  # squares that are drawn

HATCH = (
    '<svg width="0" height="0" aria-hidden="true" focusable="false"><defs>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect class="hatch" width="2" height="6"/></pattern>'
    "</defs></svg>"
)
"""What opaque pictures are filled with; once a page."""


def picture(grid: Grid, words: str) -> str:
    """Queries down, keys across; a cell is coloured where the query sees the key."""
    rows, columns = len(grid.queries), len(grid.keys)
    high, wide = rows * _CELL, columns * _CELL
    parts = [f'<rect class="field" x="{_LEFT}" y="{_TOP}" width="{wide}" height="{high}"/>']
    for line, row in enumerate(grid.cells):
        for start, end, shade in _runs(row):
            look = "" if shade == 1 else f' fill-opacity="{shade:g}"'
            look = ' fill="url(#hatch)"' if grid.opaque else f' class="seen"{look}'
            parts.append(
                f'<rect{look} x="{_LEFT + start * _CELL}" y="{_TOP + line * _CELL}" '
                f'width="{(end - start) * _CELL}" height="{_CELL}"/>'
            )
    parts += [
        f'<path class="mesh" d="{"".join(_mesh(rows, columns))}"/>',
        *_labels(grid.keys, grid.queries),
    ]
    size = f"{_LEFT + wide + 10:g} {_TOP + high + 4:g}"
    return (
        f'<svg class="grid" role="img" aria-label="{escape(_described(grid, words))}" '
        f'viewBox="0 0 {size}" width="{_LEFT + wide + 10}" height="{_TOP + high + 4}">'
        f"{''.join(parts)}</svg>"
    )


def heads(site: Site) -> str:
    """A square for each query head, those of one key head side by side in one colour."""
    if not site.heads or not site.kv_heads or site.heads > _HEADS or site.heads % site.kv_heads:
        return ""
    each = site.heads // site.kv_heads
    group = f"<span>{'<i></i>' * each}</span>"
    label = f"{site.heads} query heads"
    if each > 1:
        label += f", {each} for each of {site.kv_heads} key heads"
    kind = "heads" if each > 1 else "heads alone"
    return f'<span class="{kind}" role="img" aria-label="{label}">{group * site.kv_heads}</span>'


def _runs(row: Sequence[float]) -> Iterator[tuple[int, int, float]]:
    """Neighbours of one shade, hidden cells left out."""
    start = 0
    for i in range(1, len(row) + 1):
        if i == len(row) or row[i] != row[start]:
            if row[start] > 0:
                yield start, i, row[start]
            start = i


def _mesh(rows: int, columns: int) -> Iterator[str]:
    for i in range(1, rows):
        yield f"M{_LEFT} {_TOP + i * _CELL}h{columns * _CELL}"
    for i in range(1, columns):
        yield f"M{_LEFT + i * _CELL} {_TOP}v{rows * _CELL}"


def _labels(keys: Sequence[int], queries: Sequence[int]) -> Iterator[str]:
    last = len(keys) - 1
    for i, x, anchor in (
        (0, _LEFT, "start"),
        (len(keys) // 2, _LEFT + (len(keys) // 2 + 0.5) * _CELL, "middle"),
        (last, _LEFT + len(keys) * _CELL, "end"),
    ):
        yield _text(x, _TOP - 5, f"{keys[i]:,}", anchor)
    lines = (0, len(queries) // 2, len(queries) - 1) if len(queries) > 1 else ()
    for i in lines:
        yield _text(_LEFT - 5, _TOP + (i + 0.5) * _CELL + 4, f"{queries[i]:,}", "end")


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def _described(grid: Grid, words: str) -> str:
    """What a reader hears who does not see the picture."""
    queries, keys = (f"{x[0]:,} to {x[-1]:,}" for x in (grid.queries, grid.keys))
    who = f"queries {queries} by " if len(grid.queries) > 1 else "one query by "
    total = len(grid.queries) * len(grid.keys)
    told = f"{who}keys {keys}: {words}; {grid.seen} of {total} cells are seen"
    if grid.opaque:
        told += ", and a tensor of queries × keys takes part"
    return told
