"""A report as one HTML page: no script, no font, no link, readable in light and in dark."""

from __future__ import annotations

import platform
from html import escape

import torch

from rewriter.verify.report import Errors, VerifyReport, VerifyRow

__all__ = ["page_of"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2a8f4f; --bad: #d03b3b; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } .badge { color: #fff;
border-radius: .4rem; padding: .1rem .6rem; } .good { background: var(--good); } .bad { background:
var(--bad); } table { border-collapse: collapse; width: 100%; font-size: .9rem; } th, td { padding:
.25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; } th { position: sticky; top:
0; background: Canvas; } .wide { overflow-x: auto; } th:first-child, td:first-child { text-align:
left; overflow-wrap: anywhere; } td { font-variant-numeric: tabular-nums; } tr.failed td {
background: #d03b3b22; } code { font-family: ui-monospace, monospace; } .reason { color: var(--bad);
font-size: .85rem; } .bar { background: var(--soft); height: .6rem; width: 7rem; display:
inline-block; } .bar i { display: block; height: 100%; background: var(--good); }
.failed .bar i {
background: var(--bad); } dt { float: left; clear: left; width: 9rem; color: GrayText; } dd {
margin-left: 9rem; }
"""

_HEADS = (
    "tensor",
    "dtype",
    "original mean",
    "max",
    "model mean",
    "max",
    "ratio",
    "share of what is allowed",
)


def page_of(report: VerifyReport) -> str:
    """The whole page as text."""
    verdict = "equivalent" if report.ok else "not equivalent"
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>verify: {verdict}</title><style>{_STYLE}</style>",
        f'<h1><span class="badge {"good" if report.ok else "bad"}">{verdict}</span></h1>',
        f"<p>{escape(report.headline)}</p>",
        _facts(report),
    ]
    for kind, title in (("output", "Outputs"), ("gradient", "Gradients")):
        rows = sorted((r for r in report.rows if r.kind == kind), key=lambda r: -r.used)
        if rows:
            parts += [f"<h2>{title}, worst first</h2>", _table(rows)]
    if report.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        parts.append(f"<h2>Notes</h2><ul>{items}</ul>")
    parts.append("</html>")
    return "\n".join(parts) + "\n"


def _facts(report: VerifyReport) -> str:
    facts = {
        "errors against": report.gold,
        "rule": "err(model) ≤ 2 · err(original) + floor, for mean and max",
        "compared": f"{len(report.rows)} tensors, {len(report.failures)} failed",
        "worst": report.worst.name if report.worst else "nothing was compared",
        "made with": f"torch {torch.__version__}, Python {platform.python_version()}",
    }
    if report.generation is not None:
        facts["text"] = str(report.generation)
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"


def _table(rows: list[VerifyRow]) -> str:
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(map(_row, rows))}</table></div>'


def _row(row: VerifyRow) -> str:
    name = f"<code>{escape(row.name)}</code>"
    if row.reason:
        name += f'<br><span class="reason">{escape(row.reason)}</span>'
    cells = [name, escape(row.dtype), *_cells(row.err_ref), *_cells(row.err_new)]
    cells.append("" if row.err_new is None else f"{row.ratio:.2g}")
    share = min(row.used, 1.0)
    text = f"{row.used:.2g}" if row.allowed is not None else "equal" if row.ok else "differs"
    cells.append(f'{text} <span class="bar"><i style="width:{share:.0%}"></i></span>')
    line = "".join(f"<td>{cell}</td>" for cell in cells)
    mark = "" if row.ok else ' class="failed"'
    return f"<tr{mark}>{line}</tr>"


def _cells(errors: Errors | None) -> list[str]:
    return ["", ""] if errors is None else [f"{errors.mean:.2e}", f"{errors.max:.2e}"]
