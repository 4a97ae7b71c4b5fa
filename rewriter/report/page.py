"""A report as one HTML page: a row for the sites that are alike, with their masks as pictures. No
script, no font, no link, readable in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING

from rewriter.report import lines
from rewriter.report.grid import Grid, grid_of
from rewriter.report.groups import SiteGroup
from rewriter.report.pictures import HATCH, heads, picture
from rewriter.report.style import ROWS, STYLE
from rewriter.spec import Spec

if TYPE_CHECKING:
    from rewriter.report.report import Report, SiteReport

__all__ = ["page_of"]

_LETTERS = 600  # of a formula that is shown unfolded


def page_of(report: Report) -> str:
    """The whole page as text."""
    attention = [g for g in report.groups if g.first.is_attention]
    relatives = [g for g in report.groups if g.first.decision == "named"]
    others = [g for g in report.groups if g.first.decision == "not attention"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>attention: {escape(report.headline)}</title><style>{STYLE}{ROWS}</style>",
        HATCH,
        f"<h1>{escape(report.headline)}</h1>",
        *_notes(report.notes),
        *_totals(report),
        *_graphs(attention),
        *_listed("Relatives of attention, left alone", relatives),
        *_listed("Softmaxes that are no attention", others),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _totals(report: Report) -> Iterator[str]:
    if not report.sites:
        yield "<p>No attention was found in the model, so there is nothing to show.</p>"
        return
    found, rewritten = len(report.attention), len(report.rewritten)
    facts = [
        ("attention", f"{found} sites: {rewritten} rewritten, {found - rewritten} kept"),
        (
            "graphs",
            f"{report.graphs}, with {_counted(report.breaks, 'break')} and "
            f"{_counted(report.recompiles, 'recompilation')}",
        ),
        ("opaque reads", f"{_counted(report.opaque, 'tensor')} of queries × keys kept alive"),
    ]
    named = len(report.relatives)
    if named:
        facts.append(("relatives of attention", f"{named}, listed below"))
    others = len(report.sites) - found - named
    if others:
        facts.append(("other softmaxes", f"{others}, listed below"))
    yield _facts((name, escape(text)) for name, text in facts)
    yield (
        '<p class="soft">A row is the sites that are alike. In a picture queries go down, '
        "keys across; a cell is coloured where the query sees the key. "
        "A window counts the query's own key."
        "</p>"
    )


def _notes(notes: Iterable[str]) -> Iterator[str]:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    if items:
        yield f'<ul class="notes">{items}</ul>'


def _graphs(groups: list[SiteGroup]) -> Iterator[str]:
    numbers = dict.fromkeys(g.first.graph for g in groups)
    for number in numbers:
        if len(numbers) > 1:
            yield f"<h2>Graph {number}</h2>"
        yield from (_row(g) for g in groups if g.first.graph == number)


# --- a row ----------------------------------------------------------------------------------------


def _row(group: SiteGroup) -> str:
    line = group.first
    label = "layers" if len({s.site.layer for s in group.sites}) > 1 else "layer"
    path = f"<code>{escape(group.path)}</code>"
    layer = f"<b>{escape(group.layers)}</b>" if group.layers else "<b>-</b>"
    return "".join(
        [
            f'<section class="row"><div class="layer"><small>{label}</small>{layer}</div>',
            f'<div class="pictures">{"".join(_pictures(line))}</div>',
            f'<div class="sheet"><p class="path">{path} {_badge(line)}</p>',
            *_formulas(line),
            _facts(_sheet(group)),
            *_notes(group.said(note) for note in line.site.notes),
            *_members(group),
            "</div></section>",
        ]
    )


def _badge(line: SiteReport) -> str:
    kind = "good" if line.decision == "rewritten" else "plain"
    return f'<span class="badge {kind}">{escape(line.decision)}</span>'


def _formulas(line: SiteReport) -> Iterator[str]:
    before, after = line.site.spec, line.after
    if before is None:
        yield '<p class="soft">not understood</p>'
        return
    changed = after is not None and after != before
    yield _formula(str(after if changed else before))
    if changed:
        yield _formula(str(before), "was ")


def _formula(text: str, label: str = "") -> str:
    kind = "formula soft" if label else "formula"
    if len(text) <= _LETTERS:
        return f'<p class="{kind}">{label}<code>{escape(text)}</code></p>'
    return (
        f'<details class="{kind}"><summary>{label}<code>{escape(text[:120])}…</code> '
        f"({len(text):,} letters)</summary><code>{escape(text)}</code></details>"
    )


def _sheet(group: SiteGroup) -> Iterator[tuple[str, str]]:
    """The data sheet of a site, as names and HTML."""
    line, site = group.first, group.first.site
    spec = _now(line)
    if spec is not None:
        yield "kind", f"{escape(lines.kind_text(site))} {heads(site)}"
        yield "mask", escape(lines.mask_text(spec))
        yield "positions", escape(lines.position_text(spec))
    cost = lines.cost_text(line)
    if cost:
        yield "cost", "<br>".join(escape(x) for x in cost)
    origins = [f"{name}: {where}" for name, where in group.origins]
    if origins:
        yield "reads", "<br>".join(escape(x) for x in origins)
    yield "decision", escape(group.said(lines.decision_text(line)))


def _members(group: SiteGroup) -> Iterator[str]:
    if len(group.sites) == 1:
        return
    items = "".join(f"<li><code>{escape(s.site.name)}</code></li>" for s in group.sites)
    yield f"<details><summary>{len(group.sites)} sites alike</summary><ul>{items}</ul></details>"


def _now(line: SiteReport) -> Spec | None:
    return line.site.spec if line.after is None else line.after


# --- pictures -------------------------------------------------------------------------------------


def _pictures(line: SiteReport) -> Iterator[str]:
    before, after = line.site.spec, _now(line)
    if before is None or after is None:
        return
    origins = dict(line.site.origins)
    now = grid_of(after, origins)
    was = now if after == before else grid_of(before, origins)
    if was is not None and now is not None and was.cells != now.cells:
        yield _figure(now, after, "now")
        yield _figure(was, before, "was")
    elif now is not None:
        yield _figure(now, after)
    else:
        yield '<p class="soft">not drawn: the formula has no value on samples</p>'


def _figure(grid: Grid, spec: Spec, title: str = "") -> str:
    words = lines.mask_text(spec)
    told = [*([title] if title else []), _scale(grid)]
    told += grid.assumed if title != "was" else ()
    if grid.opaque:
        told.append("hatched: a tensor of queries × keys")
    if grid.is_shaded and not any(x.startswith(("faint", "shades")) for x in told):
        told.append("stronger colour: larger bias")
    caption = "; ".join(escape(x) for x in told)
    mark = ' class="was"' if title == "was" else ""
    return f"<figure{mark}>{picture(grid, words)}<figcaption>{caption}</figcaption></figure>"


def _scale(grid: Grid) -> str:
    step = grid.keys[1] - grid.keys[0]
    if step == 1:
        return f"{len(grid.queries)} × {len(grid.keys)} positions"
    return f"{step * len(grid.keys):,} positions in steps of {step:,}"


# --- the rest -------------------------------------------------------------------------------------


def _listed(title: str, groups: list[SiteGroup]) -> Iterator[str]:
    if not groups:
        return
    yield f"<h2>{title}</h2>"
    yield '<ul class="others">'
    for group in groups:
        count = f", {len(group.sites)} sites" if len(group.sites) > 1 else ""
        name = f"<code>{escape(group.path)}</code> ({escape(group.first.site.kind)}{count})"
        told = [group.first.reason or group.first.site.reason, *group.first.site.notes]
        why = "; ".join(escape(group.said(x)) for x in told if x)
        yield f'<li>{name}<br><span class="soft">{why}</span></li>'
    yield "</ul>"


def _counted(n: int, what: str) -> str:
    return f"{n or 'no'} {what}{'' if n == 1 else 's'}"


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    """Names and HTML."""
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts) + "</dl>"
