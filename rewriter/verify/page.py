"""A report as one HTML page: no script, no font, no link, readable in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from rewriter.report import SiteReport
from rewriter.report.style import STYLE
from rewriter.verify.compare import RATIO
from rewriter.verify.plots import heat_map, histogram, ratios
from rewriter.verify.report import VerifyReport
from rewriter.verify.rows import Errors, Kind, VerifyRow

__all__ = ["page_of"]

_ROWS_WITH_ELEMENTS = 4
_TITLES: dict[Kind, str] = {"output": "Outputs", "site": "Sites", "gradient": "Gradients"}
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
        '<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>verify: {verdict}</title><style>{STYLE}</style>",
        f'<h1><span class="badge {"good" if report.ok else "bad"}">{verdict}</span></h1>',
        f"<p>{escape(report.headline)}</p>",
        _facts(_summary(report)),
        *_notes(report.notes),
        *_drawings(report),
        *_elements(report.rows),
        *_formulas(report.attention.sites if report.attention is not None else ()),
        *_memory(report),
        *_tables(report.rows),
        "<h2>Environment</h2>",
        _facts(report.environment),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(report: VerifyReport) -> Iterator[tuple[str, str]]:
    yield "errors against", report.gold
    yield "rule", f"err(model) ≤ {RATIO:g} · err(original) + floor, for mean and max"
    yield "compared", f"{len(report.rows)} tensors, {len(report.failures)} failed"
    worst = report.worst
    if worst is None:
        yield "worst", "nothing was compared"
    else:
        share = f"{worst.used:.0%} of" if worst.used < 10 else f"{worst.used:.2g} times"
        yield "worst", f"{worst.name}, {share} what is allowed"
    for name in ("generation", "structure", "memory"):
        part = getattr(report, name)
        if part is not None:
            yield name, str(part).removeprefix(f"{name}: ")


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        yield f'<ul class="notes">{items}</ul>'


def _drawings(report: VerifyReport) -> Iterator[str]:
    sites = [row for row in report.rows if row.kind == "site"]
    drawn = ratios(sites, RATIO)
    if drawn:
        yield "<h2>Error ratio by site</h2>"
        yield "<p>Error of the model over that of the original; sites as the graph runs them.</p>"
        yield f'<div class="wide">{drawn}</div>'
    drawn = heat_map(sites)
    if drawn:
        yield "<h2>Difference by site and head</h2>"
        yield "<p>The largest |model − original| of each head.</p>"
        yield f'<div class="wide">{drawn}</div>'
    figures = []
    for kind, title in _TITLES.items():
        details = [r.detail for r in report.rows if r.kind == kind and r.detail is not None]
        if details:
            plot = histogram(details, f"errors of {title.lower()}")
            figures.append(f'<figure class="wide"><figcaption>{title}</figcaption>{plot}</figure>')
    if figures:
        yield "<h2>Distribution of errors</h2>"
        yield "<p>|error| against gold, by half powers of ten; the counts are logarithmic.</p>"
        yield f'<div class="figures">{"".join(figures)}</div>'


def _elements(rows: Sequence[VerifyRow]) -> Iterator[str]:
    known = sorted((row for row in rows if row.detail is not None), key=lambda row: -row.used)
    known = [row for row in known if not row.ok] or known
    lines = []
    for row in known[:_ROWS_WITH_ELEMENTS]:
        for e in row.detail.worst if row.detail is not None else ():
            place = ", ".join(map(str, e.place))
            values = (f"{x:.6g}" for x in (e.gold, e.ref, e.new))
            name = f"<code>{escape(row.name)}[{place}]</code>"
            errors = (f"{abs(x - e.gold):.1e}" for x in (e.ref, e.new))
            lines.append(_line([name, *values, *errors], row.ok))
    if lines:
        yield "<h2>Worst elements</h2>"
        heads = ("element", "gold", "original", "model", "error of the original", "of the model")
        yield _table(heads, lines)


def _formulas(sites: Sequence[SiteReport]) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for line in sites:
        if not line.is_attention:
            continue
        before, after = line.site.spec, line.after
        what = f"{line.decision} by {', '.join(line.passes)}" if line.passes else line.decision
        what += f" ({line.lowering})" if line.lowering else ""
        what += f": {line.reason}" if line.reason else ""
        shown = (
            "not understood" if before is None else str(before),
            "" if after is None or after == before else str(after),
            what,
        )
        groups.setdefault(shown, []).append(line.site.name)
    if not groups:
        return
    yield "<h2>Formulas</h2>"
    for (before_text, after_text, decision), names in groups.items():
        changed = f"<br>now <code>{escape(after_text)}</code>" if after_text else ""
        where = ", ".join(f"<code>{escape(n)}</code>" for n in dict.fromkeys(names))
        yield f'<div class="formula"><p><code>{escape(before_text)}</code>{changed}</p>'
        yield f'<p class="soft">{escape(decision)}</p><p class="soft">{where}</p></div>'


def _memory(report: VerifyReport) -> Iterator[str]:
    if report.memory is None:
        return
    lines = []
    for site in report.memory.sites:
        name = f"<code>{escape(site.name)}</code>" + _reason(site.reason)
        sizes = (f"{n / 2**20:.2f}" for n in (site.peak, site.largest, site.scores))
        lines.append(_line([name, escape(site.lowering), *sizes], site.ok))
    yield "<h2>Memory</h2>"
    yield _table(("site", "by", "peak, MiB", "largest tensor", "scores, L × M"), lines)


def _tables(rows: Sequence[VerifyRow]) -> Iterator[str]:
    for kind, title in _TITLES.items():
        chosen = sorted((r for r in rows if r.kind == kind), key=lambda r: -r.used)
        if chosen:
            yield f"<h2>{title}, worst first</h2>"
            yield _table(_HEADS, [_line(_cells(row), row.ok) for row in chosen])


def _cells(row: VerifyRow) -> list[str]:
    name = f"<code>{escape(row.name)}</code>" + _reason(row.reason)
    cells = [name, escape(row.dtype), *_errors(row.err_ref), *_errors(row.err_new)]
    cells.append("" if row.err_new is None else f"{row.ratio:.2g}")
    share = min(row.used, 1.0)
    text = f"{row.used:.2g}" if row.allowed is not None else "equal" if row.ok else "differs"
    cells.append(f'{text} <span class="bar"><i style="width:{share:.0%}"></i></span>')
    return cells


def _errors(errors: Errors | None) -> list[str]:
    return ["", ""] if errors is None else [f"{errors.mean:.2e}", f"{errors.max:.2e}"]


def _reason(reason: str) -> str:
    return f'<br><span class="reason">{escape(reason)}</span>' if reason else ""


def _table(heads: Sequence[str], lines: Iterable[str]) -> str:
    top = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def _line(cells: Sequence[str], ok: bool) -> str:
    mark = "" if ok else ' class="failed"'
    return f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _facts(facts: Mapping[str, str] | Iterable[tuple[str, str]]) -> str:
    items = facts.items() if isinstance(facts, Mapping) else facts
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in items) + "</dl>"
