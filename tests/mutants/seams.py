"""How each kind of mutant meets the harness: the rows that a check gives, one after another.

The checks are those of the package, with small sizes; `caught_by` stops when the check that a
mutant names has failed. An honest subject goes through the same functions and has to pass.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mutants import decoders, executors, forms, gradients, graphs, lifts, memories, round_trips
from mutants.catalogue import Kind, Mutant
from mutants.lowerings import HONEST as HONEST_TOY
from mutants.passes import MUTATED
from rewriter.lowering import BLOCKED, COMPACT, LINEAR, ROUTED, Lowering
from rewriter.op import attention
from rewriter.optimize import optimize
from rewriter.passbase import PATTERNS, Pass
from rewriter.passes.fuse import Fuse
from rewriter.passes.heads import HeadScale
from rewriter.passes.sparse import SlidingWindow
from rewriter.report import SiteReport
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.testing import laws
from rewriter.testing.cases import Case, Dims
from rewriter.testing.check import pass_rows
from rewriter.testing.conformance import lowering_rows
from rewriter.testing.grid import plan
from rewriter.testing.outcome import Outcome
from rewriter.testing.subject import Subject
from rewriter.verify import token_agreement, verify
from rewriter.verify.call import Call
from rewriter.verify.memory import SiteMeter, memory_of
from rewriter.watch import SiteCall
from verify.faults import implemented

__all__ = ["CONTROLS", "caught_by", "first", "raised", "rows_of"]


def rows_of(mutant: Mutant) -> Iterator[Outcome]:
    """What the check of this kind says, row by row."""
    torch.manual_seed(0)
    yield from _SEAMS[mutant.kind](mutant.made)


def first(rows: Iterable[Outcome]) -> Outcome | None:
    """The first row that fails."""
    return next((row for row in rows if row.verdict == "failed"), None)


def caught_by(mutant: Mutant) -> tuple[Outcome | None, Outcome | None]:
    """The first row that fails of the check that is expected to, and of any check.

    A row that failed because something raised has caught nothing: a crash is found by everybody.
    """
    earliest: Outcome | None = None
    for row in rows_of(mutant):
        if row.verdict != "failed" or raised(row):
            continue
        earliest = earliest or row
        if mutant.expected in row.check:
            return row, earliest
    return None, earliest


def raised(row: Outcome) -> bool:
    """The row failed because something raised: its reason begins with an exception, or says so.

    Steps of decoding give the text of the error alone; what they compared has a measure.
    """
    if row.check == "decode = parallel":
        return row.used is None
    found = _RAISED.search(row.reason)
    return found is not None and (found[1] or found[2]) in _exceptions(BaseException)


_RAISED = re.compile(r"raises (\w+)\b|^(\w+)(?::|$)")


def _exceptions(kind: type[BaseException]) -> set[str]:
    return {kind.__name__}.union(*map(_exceptions, type.__subclasses__(kind)))


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
    if isinstance(made, executors.OfPass):
        with made.broken.active():
            yield from pass_rows(Subject.of(made.kind))
        return
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
    """Round trips of a model of two layers."""
    made = import_module("rewriter.testing.round_trips").round_trips
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = round_trips.saved_model() if trip.saved else (graphs.Two(), graphs.inputs(9))
    sizes = lifts.Broken(((torch, "compile", _constant),) if trip.saved else ())
    with sizes.active(), trip.broken.active():
        found = made(model, trip.passes, inputs, only=trip.only)
    yield from (replace(row, check=f"round trip: {row.check}") for row in found.rows)


_compile = torch.compile


def _constant(function: Any, *, backend: Any, dynamic: Any = None) -> Any:
    """A capture at one size, which takes a third of the time."""
    return _compile(function, backend=backend, dynamic=False)


# --- forms ----------------------------------------------------------------------------------------


def _form(made: Any) -> Iterator[Outcome]:
    """The laws of the family, then the plain form."""
    shared = "heads" in made.family.laws
    dims = Dims(heads=4, kv_heads=2 if shared else 4, q_len=37, kv_len=37, head_dim=8, value_dim=8)
    case = Case.of("causal", dims)
    for name in made.family.laws:
        yield laws.LAWS[name](made.form, case)
    yield laws.forms_agree(made.form, made.family.plain, case)


# --- generation and memory ------------------------------------------------------------------------


def _generation(kind: type[decoders.Decoder]) -> Iterator[Outcome]:
    """`token_agreement` with the honest decoder."""
    made, original = decoders.decoder(kind), decoders.decoder()
    found = token_agreement(original, made, decoders.prompt(), new_tokens=8)
    for text in (found, *found.padded):
        name = f"generation, {text.name}" if text is not found else "generation"
        wrong = [x for x in text.partings if not x.tie]
        verdict: Any = "failed" if wrong else "passed"
        yield Outcome(f"{name}: tokens", "steps", verdict, f"{len(wrong)} rows part")
        for row in text.checks:
            verdict = "passed" if row.ok else "failed"
            yield Outcome(f"{name}: {row.name}", "steps", verdict, row.reason, row.used)


def _memory(forward: Callable[..., Tensor] | None) -> Iterator[Outcome]:
    """`memory_of` a model of one site that is computed by this function; None: as it is."""
    # the scores of one head are seen where they are more than a fused block, which is 4 MiB
    spec, q = memories.SPEC, torch.randn(3, 1, 4, 1152, 8)
    line = SiteReport(Site("site", 0, spec=spec), 0, spec, "rewritten", "torch.blocked")
    meter = SiteMeter("torch.blocked")
    with nullcontext() if forward is None else implemented(forward):
        out = attention(*q, (), (), spec, "torch.blocked")
        right = torch.allclose(out, attention(*q, (), (), spec, "reference"), atol=0.05)
        meter(line, SiteCall("site", out, *q, (), ()))
        models = (_Attention(spec, target) for target in ("reference", "torch.blocked"))
        found = memory_of(*models, Call.of(tuple(q), 0, gradients=False), meter)
    if not right:
        yield Outcome("right", "site", "failed", "it is another function: no fault of memory")
    failures = "; ".join(found.failures)
    yield Outcome(
        "memory: site", "1 x 4 x 1152 x 1152", "failed" if failures else "passed", failures
    )


class _Attention(nn.Module):
    def __init__(self, spec: SoftmaxSpec, target: str) -> None:
        super().__init__()
        self.spec, self.target = spec, target

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, (), (), self.spec, self.target)


_SEAMS: dict[Kind, Callable[[Any], Iterator[Outcome]]] = {
    "spec": _spec,
    "pass": _pass,
    "lowering": _lowering,
    "gradient": _lowering,
    "lift": _lift,
    "graph": _graph,
    "round trip": _trip,
    "form": _form,
    "generation": _generation,
    "memory": _memory,
}


def _honest_trip() -> Iterator[Outcome]:
    only = ("rewrite", "restore", "optimize twice", "plan", "export")
    yield from _trip(round_trips.Trip(NOTHING.broken, round_trips.LAYERED, only))


def _honest_save() -> Iterator[Outcome]:
    only = ("rewrite", "save and load", "plain load")
    yield from _trip(round_trips.Trip(NOTHING.broken, round_trips.SAVED, only, saved=True))


def _forms() -> Iterator[Outcome]:
    for family in forms.FAMILIES:
        for form in family.forms.values():
            yield from _form(forms.Form(family, form))


NOTHING = graphs.Planted(lifts.Broken(()))
ON_PURPOSE = graphs.Planted(lifts.Broken(()), graphs.WINDOWED)


def _lowered(lowering: Lowering) -> Callable[[], Iterator[Outcome]]:
    return lambda: _lowering(lowering)


def _passed(kind: type[Pass]) -> Callable[[], Iterator[Outcome]]:
    return lambda: _pass(kind)


CONTROLS: dict[str, tuple[Kind, Callable[[], Iterator[Outcome]]]] = {
    "the spec as it is": ("spec", lambda: _spec(lambda spec: spec)),
    "the window": ("pass", lambda: _pass(SlidingWindow)),
    "the scale of heads": ("pass", lambda: _pass(HeadScale)),
    **{kind.name: ("pass", _passed(kind)) for kind in MUTATED},
    "the honest lowering": ("lowering", _lowered(HONEST_TOY)),
    **{one.name: ("lowering", _lowered(one)) for one in (BLOCKED, LINEAR, ROUTED, COMPACT)},
    "the honest backward": ("gradient", _lowered(gradients.HONEST)),
    "the rules as they are": ("lift", lambda: _lift(lifts.Broken(()))),
    "the graph as it is": ("graph", lambda: _graph(NOTHING)),
    "the graph with a window": ("graph", lambda: _graph(ON_PURPOSE)),
    "honest round trips": ("round trip", _honest_trip),
    "honest saving": ("round trip", _honest_save),
    "the honest forms": ("form", _forms),
    "the honest decoder": ("generation", lambda: _generation(decoders.Decoder)),
    "torch.blocked as it is": ("memory", lambda: _memory(None)),
}
"""What is right, by the seam that it goes through."""
