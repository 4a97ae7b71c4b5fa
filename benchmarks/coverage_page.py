"""The page of the coverage, `docs/coverage.md`, from its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from coverage_reviewed import LEFT_ALONE, NEVER_READ, NOT_ATTENTION, left_alone
from coverage_zoo import architectures

__all__ = ["page", "summary", "targets", "trouble_of"]

Row = dict[str, Any]


def trouble_of(row: Row) -> str:
    """What is wrong with a row, in a few words; empty if nothing is."""
    if row["status"] in ("no such form", "not built"):
        return ""
    if row["status"] != "measured":
        return f"{row['status']}: {row['why']}"
    if row["missing"]:
        return f"not found: {_pairs(row['missing'])}"
    if row["equal"] is False:
        return f"differs: {row['difference']}"
    if row["unreviewed"]:
        return f"not reviewed: {_pairs(row['unreviewed'])}"
    unnamed = {p: r for p, r in _unrewritten(row) if p not in row["formulas"]}
    if unnamed:
        return f"left alone: {_pairs(unnamed)}"
    kept = [f"{row[f'opaque_{n}']} {n}" for n in ("masks", "biases") if row[f"opaque_{n}"]]
    return f"opaque: {', '.join(kept)}" if kept else ""


def _unrewritten(row: Row) -> list[tuple[str, str]]:
    """Places that stay as they are, without those that have a reviewed reason."""
    return [(p, r) for p, r in row["left"].items() if not left_alone(row["name"], p)]


def _pairs(values: dict[str, Any]) -> str:
    return "; ".join(f"`{place or '(model)'}` {text}" for place, text in values.items())


def _measured(rows: Iterable[Row]) -> list[Row]:
    return [r for r in rows if r["status"] == "measured"]


_SUMS = (
    "counted",
    "others",
    "sites",
    "found",
    "named",
    "lifted",
    "opaque_masks",
    "opaque_biases",
    "rewritten",
)


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """The sums that the targets are about."""
    measured = _measured(rows)
    compared = [r for r in measured if r["equal"] is not None]
    return {name: sum(r[name] for r in measured) for name in _SUMS} | {
        "architectures": len({r["name"] for r in measured}),
        "missing": sum(sum(r["missing"].values()) for r in measured),
        "unreviewed": sum(len(r["unreviewed"]) for r in measured),
        "compared": len(compared),
        "equal": sum(r["equal"] for r in compared),
        "crashes": sum(r["status"] in ("crash", "timeout") for r in rows),
    }


def targets(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """What has to hold, what was measured, and whether it does."""
    n = counts(rows)
    understood, due = n["lifted"] - n["opaque_masks"], n["sites"] - n["named"]
    share = understood / due if due else 0.0
    return [
        ("at least 300 architectures", str(n["architectures"]), n["architectures"] >= 300),
        (
            "every attention is found, or named with a reviewed reason",
            f"{n['sites'] - n['missing']} of {n['sites']}, {n['unreviewed']} not reviewed",
            n["sites"] > 0 and not n["missing"] and not n["unreviewed"],
        ),
        (
            "98 % of what is not named is lifted without an opaque mask",
            f"{understood} of {due}, {100 * share:.1f} %",
            share >= 0.98,
        ),
        (
            "every rewritten model is equal",
            f"{n['equal']} of {n['compared']}",
            n["equal"] == n["compared"] > 0,
        ),
        ("no crash", str(n["crashes"]), not n["crashes"]),
    ]


def summary(rows: Sequence[Row]) -> str:
    """The targets, one a line."""
    return "\n".join(
        f"{'met' if met else 'MISSED':7} {name}: {found}" for name, found, met in targets(rows)
    )


def page(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    rows = result["rows"]
    parts = [_head(result), _inductor(rows), _troubles(rows), _kept(rows), _left(rows)]
    parts += [_relatives(rows), _others(rows), _otherwise(rows)]
    return (
        "\n\n".join(p for p in (*parts, _table(rows), _formulas(rows), _unbuilt(rows)) if p) + "\n"
    )


def _head(result: dict[str, Any]) -> str:
    rows = result["rows"]
    n = counts(rows)
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    held = [f"| {a} | {b} | {'yes' if c else '**no**'} |" for a, b, c in targets(rows)]
    parts = [
        "# Coverage",
        f"{n['architectures']} architectures of transformers and diffusers, built offline, tiny, "
        "with random weights and a padded row where the model takes a mask. `make coverage` "
        "measures all of them and writes this page and `coverage.json`; `python "
        f"benchmarks/coverage.py NAME --print` shows one. {versions}, CPU.",
        "The count is independent: softmaxes and fused attentions that torch's dispatcher sees "
        "while the original runs, less a reviewed list of those that are no attention "
        f"({len(NOT_ATTENTION)} entries) or that no output depends on ({len(NEVER_READ)} entries). "
        "Equal is what `rewriter.verify` says: the error of the rewritten model against float64 is "
        "at most twice that of the original, and a few roundings.",
        "\n".join(["| has to hold | measured | |", "| --- | --- | --- |", *held]),
        f"Of {n['sites']} attentions {n['lifted']} are read as formulas, {n['rewritten']} are "
        f"rewritten, and {n['named']} are left alone for a reason below. {n['opaque_masks']} masks "
        f"and {n['opaque_biases']} biases keep a tensor of queries x keys.",
    ]
    return "\n\n".join(parts)


def _inductor(rows: Sequence[Row]) -> str:
    asked = [r for r in _measured(rows) if r["inductor"] is not None]
    if not asked:
        return ""
    sites, ours = sum(r["sites"] for r in asked), sum(r["rewritten"] for r in asked)
    theirs = sum(min(r["inductor"], r["sites"]) for r in asked)
    models = [sum(r[n] > 0 for r in asked if r["sites"]) for n in ("rewritten", "inductor")]
    with_sites = sum(r["sites"] > 0 for r in asked)
    return (
        "## Beside torch's own pattern matcher\n\n"
        "The eager forms in float32; inductor's count is that of its attention patterns on the "
        "graphs of the same call (`counters['inductor']['fuse_attention']`).\n\n"
        "| | attentions | architectures with at least one |\n| --- | --- | --- |\n"
        f"| there are | {sites} | {with_sites} |\n"
        f"| rewriter | {ours} | {models[0]} |\n| inductor | {theirs} | {models[1]} |"
    )


def _troubles(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        text = trouble_of(row)
        if text:
            found[text.partition(":")[0], row["name"], text].append(_form(row))
    if not found:
        return "## What fails\n\nNothing."
    lines = [
        f"| {name} | {', '.join(forms)} | {_cell(text, 400)} |"
        for (_, name, text), forms in sorted(found.items())
    ]
    return "## What fails\n\n| model | | what |\n| --- | --- | --- |\n" + "\n".join(lines)


def _form(row: Row) -> str:
    short = {"float32": "", "bfloat16": " bf16"}[row["dtype"]]
    return f"{row['implementation']}{short}"


def _kept(rows: Sequence[Row]) -> str:
    models: dict[str, set[str]] = defaultdict(set)
    for row in _measured(rows):
        for place, reason in _unrewritten(row):
            if place in row["formulas"]:
                models[reason].add(row["name"])
    if not models:
        return ""
    lines = [f"| {_cell(r, 300)} | {_names(n)} |" for r, n in sorted(models.items())]
    return (
        "## Attention that is read, and not rewritten\n\n"
        "| reason | models |\n| --- | --- |\n" + "\n".join(lines)
    )


def _cell(text: str, most: int) -> str:
    text = " ".join(str(text).split()).replace("|", "\\|")
    return text if len(text) <= most else f"{text[:most]} …"


def _left(rows: Sequence[Row]) -> str:
    models: dict[str, set[str]] = defaultdict(set)
    for row in _measured(rows):
        for place in row["left"]:
            reason = left_alone(row["name"], place)
            if reason:
                models[reason].add(row["name"])
    lines = [f"| {_cell(r, 300)} | {_names(n)} |" for r, n in sorted(models.items())]
    return (
        "## Attention that is found and left alone\n\nThe reasons are reviewed by hand "
        f"(`benchmarks/coverage_reviewed.py`, {len(LEFT_ALONE)} entries).\n\n"
        "| reason | models |\n| --- | --- |\n" + "\n".join(lines)
    )


def _relatives(rows: Sequence[Row]) -> str:
    models: dict[str, set[str]] = defaultdict(set)
    for row in _measured(rows):
        for reason in row.get("relatives", {}).values():
            models[reason].add(row["name"])
    if not models:
        return ""
    lines = [f"| {_cell(r, 300)} | {len(n)} | {_names(n)} |" for r, n in sorted(models.items())]
    return (
        "## Relatives of attention without a softmax\n\n"
        "They are named in the report, left alone, and no part of the counts above.\n\n"
        "| what it is | architectures | |\n| --- | --- | --- |\n" + "\n".join(lines)
    )


def _others(rows: Sequence[Row]) -> str:
    models: dict[str, set[str]] = defaultdict(set)
    for row in _measured(rows):
        for reason in row["other_reasons"]:
            models[reason].add(row["name"])
    lines = [f"| {_cell(r, 200)} | {_names(n)} |" for r, n in sorted(models.items())]
    return (
        "## Softmaxes that are no attention\n\n"
        "| what it is | models |\n| --- | --- |\n" + "\n".join(lines)
    )


OTHERWISE = ("equal with other weights", "compared at its", "nothing is rewritten")
"""How the notes begin of rows that were compared in another way, or not at all."""


def _otherwise(rows: Sequence[Row]) -> str:
    lines = [
        f"| {row['name']} | {row['implementation']} {row['dtype']} | {_cell(note, 300)} |"
        for row in _measured(rows)
        for note in row["notes"]
        if note.startswith(OTHERWISE)
    ]
    if not lines:
        return ""
    return (
        "## Compared in another way\n\nWhere rounding decides what a model chooses, its outputs "
        "are as far from float64 as they are large; and an output of a few elements may by chance "
        "be nearly exact. The first are compared site by site, the second with four other draws of "
        "the weights.\n\n| model | | how, and what the plain comparison says |\n| --- | --- | --- |"
        "\n" + "\n".join(lines)
    )


def _names(names: Iterable[str], most: int = 12) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def _table(rows: Sequence[Row]) -> str:
    """One line an architecture, those with trouble first, then those with most attention."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] != "no such form":
            by_name[row["name"]].append(row)
    ordered = sorted(by_name.items(), key=lambda x: (not any(map(trouble_of, x[1])), x[0]))
    head = (
        "| model | sites | found | lifted | opaque | rewritten | equal | graphs | inductor "
        "| ms a site |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    lines = [_line(name, _measured(group)) for name, group in ordered if _measured(group)]
    return (
        "## Every architecture\n\nSums over the forms that it has; graphs and inductor of the "
        "eager form; the time is that of finding, lifting and checking.\n\n"
        + head
        + "\n"
        + "\n".join(lines)
    )


def _line(name: str, group: Sequence[Row]) -> str:
    def total(key: str) -> int:
        return sum(r[key] for r in group)

    first = next((r for r in group if r["implementation"] == "eager"), group[0])
    theirs = next((str(r["inductor"]) for r in group if r["inductor"] is not None), "")
    equal = [r["equal"] for r in group]
    lines = max(total("found"), 1)
    cells = [
        name,
        total("sites"),
        total("found"),
        total("lifted"),
        total("opaque_masks") + total("opaque_biases"),
        total("rewritten"),
        "yes" if all(equal) else "**no**" if False in equal else "",
        first["graphs"],
        theirs,
        f"{total('rewrite_ms') / lines:.0f}" if total("found") else "",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _formulas(rows: Sequence[Row]) -> str:
    models: dict[str, set[str]] = defaultdict(set)
    for row in _measured(rows):
        for formulas in row["formulas"].values():
            for formula in formulas:
                models[formula.partition(", s = ")[0]].add(row["name"])
    ordered = sorted(models.items(), key=lambda x: (-len(x[1]), x[0]))
    lines = [f"| `{_cell(f, 160)}` | {len(n)} | {_names(n, 4)} |" for f, n in ordered]
    return (
        f"## What is read\n\n{len(ordered)} formulas, the commonest first, without the scale.\n\n"
        "| formula | models | |\n| --- | --- | --- |\n" + "\n".join(lines)
    )


def _unbuilt(rows: Sequence[Row]) -> str:
    """Architectures that were not measured, and why."""
    built = {r["name"] for r in rows if r["status"] == "measured"}
    reasons = {r["name"]: r["why"] for r in rows if r["name"] not in built}
    reasons |= {a.name: a.left_out for a in architectures() if a.left_out and a.name not in built}
    lines = [f"| {name} | {_cell(why, 120)} |" for name, why in sorted(reasons.items())]
    return (
        f"## Not measured\n\n{len(lines)} names that the libraries register and this measurement "
        "cannot build, or has no inputs for.\n\n| name | why |\n| --- | --- |\n" + "\n".join(lines)
    )
