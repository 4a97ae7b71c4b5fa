"""A report as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from rewriter.report import lines
from rewriter.report.groups import SiteGroup

if TYPE_CHECKING:
    from rewriter.report.report import Report

__all__ = ["table_of"]

_LETTERS = 600  # of a formula; a window batch with shifts takes three times as many


def table_of(report: Report, *, every: bool = False) -> Table:
    """A row for the sites that are alike, or for every site; the notes below."""
    groups = [SiteGroup((s,)) for s in report.sites] if every else report.groups
    table = Table(
        title=report.headline,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        leading=1,
        min_width=72,
    )
    many = report.graphs > 1
    if many:
        table.add_column("graph")
    table.add_column("layer", overflow="fold", max_width=9)
    table.add_column("attention", overflow="fold", ratio=5)
    table.add_column("formula", overflow="fold", ratio=8)
    table.add_column("decision", overflow="fold", ratio=5)
    for group in groups:
        cells = [group.layers, _site(group), _formula(group), _decision(group)]
        row = ([str(group.first.graph)] if many else []) + cells
        table.add_row(*(Text(x) for x in row))
    if report.notes:
        table.caption = Text("\n".join(report.notes))
        table.caption_justify = "left"
    return table


def _site(group: SiteGroup) -> str:
    line, count = group.first, len(group.sites)
    alike = [f"{count} sites alike"] if count > 1 else []
    return "\n".join([group.path, *alike, lines.kind_text(line.site), *lines.cost_text(line)])


def _formula(group: SiteGroup) -> str:
    return "\n".join(_formula_lines(group)) or "-"


def _formula_lines(group: SiteGroup) -> Iterator[str]:
    before, after = group.first.site.spec, group.first.after
    if before is None:
        return
    now = before if after is None else after
    yield _cut(str(now))
    if now != before:
        yield f"was: {_cut(str(before))}"
    yield f"mask: {lines.mask_text(now)}"
    yield f"positions: {lines.position_text(now)}"


def _decision(group: SiteGroup) -> str:
    texts = [lines.decision_text(group.first), *group.first.site.notes]
    return "\n".join(group.said(text) for text in texts)


def _cut(formula: str) -> str:
    if len(formula) <= _LETTERS:
        return formula
    return f"{formula[:_LETTERS]}… ({len(formula):,} letters; JSON and the page have all)"
