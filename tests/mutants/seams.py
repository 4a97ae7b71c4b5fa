"""How each kind of mutant meets the harness: the rows that a check gives, one after another.

The checks are those of the package, with small sizes; `first` stops at the first row that fails.
An honest subject goes through the same functions and has to pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from mutants import forms, gradients, graphs, lifts
from mutants.catalogue import Kind, Mutant
from mutants.lowerings import HONEST as HONEST_TOY
from rewriter.lowering import BLOCKED, Lowering
from rewriter.optimize import optimize
from rewriter.passbase import PATTERNS, Pass
from rewriter.passes.fuse import Fuse
from rewriter.passes.heads import HeadScale
from rewriter.passes.sparse import SlidingWindow
from rewriter.testing import laws
from rewriter.testing.cases import Case, Dims
from rewriter.testing.check import pass_rows
from rewriter.testing.conformance import lowering_rows
from rewriter.testing.grid import plan
from rewriter.testing.outcome import Outcome
from rewriter.testing.subject import Subject
from rewriter.verify import verify

__all__ = ["CONTROLS", "first", "rows_of"]


def rows_of(mutant: Mutant) -> Iterator[Outcome]:
    """What the check of this kind says, row by row."""
    torch.manual_seed(0)
    yield from _SEAMS[mutant.kind](mutant.made)


def first(rows: Iterable[Outcome]) -> Outcome | None:
    """The first row that fails."""
    return next((row for row in rows if row.verdict == "failed"), None)


# --- specs and passes -----------------------------------------------------------------------------


def _spec(edit: Callable[[Any], Any]) -> Iterator[Outcome]:
    """`check` of a pass that claims to be exact, up to the implementations of its specs."""

    @dataclass(frozen=True)
    class Edit(Pass):
        """Claims to change nothing."""

        name = "mutant"
        contract = "exact"
        stage = "score"
        identity = "mutant"
        patterns = PATTERNS
        laws = Fuse.laws

        def rewrite(self, site: Any, spec: Any) -> Any:
            return edit(spec)

    yield from _of_functions(pass_rows(Subject.of(Edit)))


def _pass(made: Any) -> Iterator[Outcome]:
    kind, broken = made if isinstance(made, tuple) else (made, lifts.Broken(()))
    with broken.active():
        yield from _of_functions(pass_rows(Subject.of(kind)))


_IMPLEMENTATIONS = ("torch.", "triton", "onnx", "reference,", "dynamic", "model")


def _of_functions(rows: Iterable[Outcome]) -> Iterator[Outcome]:
    """Without the rows that compare implementations of what the pass made: they are right."""
    for row in rows:
        if row.check.startswith(_IMPLEMENTATIONS):
            return
        yield row


# --- lowerings and gradients ----------------------------------------------------------------------


def _lowering(made: Any) -> Iterator[Outcome]:
    active = made.active() if isinstance(made, gradients.Patched) else nullcontext(made)
    with active as lowering:
        yield from lowering_rows(lowering, plan("call"))


# --- graphs ---------------------------------------------------------------------------------------


def _lift(broken: Any) -> Iterator[Outcome]:
    """The checks of every formula at capture."""
    with broken.active():
        found = lifts.complaints()
    yield from (Outcome("check at capture", "spellings", "failed", text) for text in found)
    if not found:
        yield Outcome("check at capture", "spellings", "passed")


def _graph(planted: Any) -> Iterator[Outcome]:
    """`verify`, at the length of the capture and at another one."""
    with planted.broken.active():
        yield from _verified(planted.passes, in_place=planted.in_place)


def _verified(passes: tuple[str, ...], *, in_place: bool) -> Iterator[Outcome]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    original = graphs.Two(in_place)
    model = optimize(copy.deepcopy(original), *passes)
    against: Any = "original" if passes == graphs.FUSED else "reference"
    for length, seed, what in ((9, 0, "verify"), (14, 1, "verify at another length")):
        report = verify(original, model, graphs.inputs(length, seed), raises=False, against=against)
        for row in report.rows:
            verdict: Any = "passed" if row.ok else "failed"
            yield Outcome(f"{what}: {row.kind}", row.name, verdict, row.reason)
    found = report.structure
    count = 0 if found is None else found.rewritten
    verdict = "passed" if count == len(original.layers) else "failed"
    yield Outcome("verify: structure", "sites", verdict, f"{count} sites are rewritten")


def _trip(trip: Any) -> Iterator[Outcome]:
    """Round trips of the model of two layers."""
    round_trips = import_module("rewriter.testing.round_trips").round_trips
    torch._dynamo.reset()
    torch.manual_seed(0)
    with trip.broken.active():
        found = round_trips(graphs.Two(), trip.passes, graphs.inputs(9), only=trip.only)
    yield from (replace(row, check=f"round trip: {row.check}") for row in found.rows)


# --- forms ----------------------------------------------------------------------------------------


def _form(made: Any) -> Iterator[Outcome]:
    """The laws of the family, then the plain form."""
    shared = "heads" in made.family.laws
    dims = Dims(heads=4, kv_heads=2 if shared else 4, q_len=37, kv_len=37, head_dim=8, value_dim=8)
    case = Case.of("causal", dims)
    for name in made.family.laws:
        yield laws.LAWS[name](made.form, case)
    yield laws.forms_agree(made.form, made.family.plain, case)


_SEAMS: dict[Kind, Callable[[Any], Iterator[Outcome]]] = {
    "spec": _spec,
    "pass": _pass,
    "lowering": _lowering,
    "gradient": _lowering,
    "lift": _lift,
    "graph": _graph,
    "round trip": _trip,
    "form": _form,
}


def _honest_trip() -> Iterator[Outcome]:
    from mutants import round_trips

    only = ("rewrite", "restore", "optimize twice", "plan", "export")
    yield from _trip(round_trips.Trip(lifts.Broken(()), round_trips.LAYERED, only))


def _forms() -> Iterator[Outcome]:
    for family in forms.FAMILIES:
        for form in family.forms.values():
            yield from _form(forms.Form(family, form))


NOTHING = graphs.Planted(lifts.Broken(()))
ON_PURPOSE = graphs.Planted(lifts.Broken(()), graphs.WINDOWED)


def _lowered(lowering: Lowering) -> Callable[[], Iterator[Outcome]]:
    return lambda: _lowering(lowering)


CONTROLS: dict[str, tuple[Kind, Callable[[], Iterator[Outcome]]]] = {
    "the spec as it is": ("spec", lambda: _spec(lambda spec: spec)),
    "the window": ("pass", lambda: _pass(SlidingWindow)),
    "the scale of heads": ("pass", lambda: _pass(HeadScale)),
    "the honest lowering": ("lowering", _lowered(HONEST_TOY)),
    "torch.blocked": ("lowering", _lowered(BLOCKED)),
    "the honest backward": ("gradient", _lowered(gradients.HONEST)),
    "the rules as they are": ("lift", lambda: _lift(lifts.Broken(()))),
    "the graph as it is": ("graph", lambda: _graph(NOTHING)),
    "the graph with a window": ("graph", lambda: _graph(ON_PURPOSE)),
    "honest round trips": ("round trip", _honest_trip),
    "the honest forms": ("form", _forms),
}
"""What is right, by the seam that it goes through."""
