"""A report as a compact table for a terminal: every output, and of sites and gradients the
worst."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rewriter.verify.rows import Kind, VerifyRow

if TYPE_CHECKING:
    from rewriter.verify.report import VerifyReport

__all__ = ["table_of"]

_SHOWN: dict[Kind, int] = {"site": 6, "gradient": 12}
"""Rows in the table, the worst ones; `to_dict` and `save` have all."""
_EXPLAINED = 4  # failures whose reason the text gives


def table_of(report: VerifyReport) -> Group:
    """The verdict, the rows, why some failed, and what weakens the result."""
    return Group(*_lines(report))


def _lines(report: VerifyReport) -> Iterator[Table | Text]:
    table = Table(
        title="verify: " + report.headline,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        expand=False,
    )
    table.add_column("tensor", overflow="fold")
    table.add_column("kind")
    table.add_column("dtype")
    for column in ("original mean", "max", "model mean", "max", "ratio", "used", ""):
        table.add_column(column, justify="right", no_wrap=True)
    shown = _shown(report)
    for row in shown:
        table.add_row(*_cells(row))
    yield table
    kept = {id(row) for row in shown}
    for kind in _SHOWN:
        hidden = [row for row in report.rows if row.kind == kind and id(row) not in kept]
        if hidden:
            wrong = sum(not row.ok for row in hidden)
            found = f"{wrong} of them FAIL" if wrong else "all within what is allowed"
            yield Text(f"and {len(hidden)} more {kind}s, {found}")
    for row in report.failures[:_EXPLAINED]:
        yield Text(f"FAIL {row.name}: {row.reason}")
    for part in (report.generation, report.structure, report.memory):
        if part is not None:
            yield Text(str(part))
    for failure in report.memory.failures if report.memory is not None else ():
        yield Text(f"FAIL memory: {failure}")
    for note in report.notes:
        yield Text(f"note: {note}")


def _shown(report: VerifyReport) -> list[VerifyRow]:
    keep: set[int] = set()
    for kind, count in _SHOWN.items():
        rows = sorted((r for r in report.rows if r.kind == kind), key=lambda r: -r.used)
        keep |= {id(r) for r in rows[:count]}
    return [r for r in report.rows if r.kind == "output" or id(r) in keep]


def _cells(row: VerifyRow) -> list[str | Text]:
    errors = [
        *(_number(e) for e in row.err_ref or (None, None)),
        *(_number(e) for e in row.err_new or (None, None)),
    ]
    ratio = "" if row.err_new is None or row.ratio == float("inf") else f"{row.ratio:.2g}"
    used = f"{row.used:.0%}" if row.used < 10 else f"{row.used:.2g}x"
    used = "" if row.allowed is None else used
    verdict = Text("ok", "green") if row.ok else Text("FAIL", "bold red")
    return [Text(row.name), row.kind, row.dtype, *errors, ratio, used, verdict]


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}" if x else "0"
