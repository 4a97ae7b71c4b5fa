"""What to do with each site of a graph: lift it, check it, apply the passes that select it, and see
who can run it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import sympy
import torch
from sympy import Expr
from torch import nn

from rewriter import lowering
from rewriter import symbols as sym
from rewriter.capture import Captured
from rewriter.check import fingerprint
from rewriter.errors import LoweringError, RewriterError
from rewriter.find import Found, find
from rewriter.formulas import on_one_axis
from rewriter.frame import Lifted
from rewriter.handed import Handed
from rewriter.indices import Bounds
from rewriter.lift import lift
from rewriter.passbase import Request, apply
from rewriter.reading import value_of
from rewriter.relatives import relatives
from rewriter.report import Decision, Report, SiteReport
from rewriter.sample import Skip
from rewriter.sites import RELATIVES, Site
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.taps import input_of, residual_of
from rewriter.verdicts import verdict

__all__ = ["Planned", "State", "Work", "layer_count", "lifted_sites", "plan_of", "split_request"]

FUSE_FROM_SCORES = 512 * 512
"""Scores of one head from which exact fusion pays on a CPU; measured by
benchmarks/cpu.py."""


@dataclass
class State:
    """What `optimize` keeps of a model; the model itself is untouched."""

    requests: tuple[Request, ...]
    target: str
    sites: list[SiteReport] = field(default_factory=list)
    graphs: int = 0
    notes: list[str] = field(default_factory=list)
    checked: bool = False
    failure: RewriterError | None = None
    """An implementation was asked for by name and cannot be had, or what was given does not fit;
    raised when the call is over."""
    only: frozenset[str] | None = None
    """Names of the sites that may be rewritten; None for all."""
    watcher: Callable[[Any, tuple[Any, ...]], Any] | None = None
    """Runs each graph instead, and sees its sites: called with a `Watched` and a call's inputs."""

    frames: list[int] = field(default_factory=list)
    """For each graph, torch's number of the code that it was made from."""
    handed: Handed = field(default_factory=Handed)
    """Masks that graphs of the model have made."""
    replaced: Any = None
    """What `Module.compile` had installed before."""
    gave_up: bool = False
    """The model runs as it was: under torch's compiler it fails."""
    prunes: bool = False
    """The model was optimized before: what its new passes do not ask for goes."""
    softmaxes: dict[int, int] = field(default_factory=dict)
    """Softmax nodes that are left in each graph."""
    breaks: set[str] = field(default_factory=set)
    """Places in the source where torch could not go on with a graph."""

    def report(self) -> Report:
        notes = tuple(dict.fromkeys(self.notes))
        recompiles = len(self.frames) - len(set(self.frames))
        left = sum(self.softmaxes.values())
        return Report(tuple(self.sites), self.graphs, notes, left, len(self.breaks), recompiles)


@dataclass(frozen=True)
class Work:
    """A site that was understood, and what it is to compute."""

    lifted: Lifted
    spec: Spec
    from_scores: int = 0
    exact: bool = True
    """Every pass that was applied says that the function stays the same."""


@dataclass
class Planned:
    """What becomes of the sites of one graph."""

    reports: list[SiteReport] = field(default_factory=list)
    changed: list[Work] = field(default_factory=list)
    """Sites that get an op node whatever their size, because their formula changed."""
    fused: list[Work] = field(default_factory=list)
    """Sites that get an op node where it pays."""
    kept: list[Work] = field(default_factory=list)
    """Sites that were understood and stay as they are."""


def layer_count(model: nn.Module, path: str = "") -> int:
    """How many layers the list of modules has that the path goes through, or the longest list of
    the model."""
    parts = path.split(".")
    for n, part in enumerate(parts):
        if part.isdigit():
            try:
                return len(cast(Any, model.get_submodule(".".join(parts[:n]))))
            except (AttributeError, TypeError):
                break
    return max(
        (len(m) for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)), default=0
    )


def plan_of(captured: Captured, model: nn.Module, state: State, number: int) -> Planned:
    """What to do with each site of a graph."""
    planned = Planned()
    seen: dict[str, int] = {}
    for lifted in lifted_sites(captured):
        ordinal = seen.get(lifted.site.path, 0)
        seen[lifted.site.path] = ordinal + 1
        lifted = replace(lifted, site=replace(lifted.site, ordinal=ordinal))
        report, work = _decide(lifted, captured, model, state)
        planned.reports.append(replace(report, graph=number))
        if work is not None:
            (planned.changed if work.spec != lifted.site.spec else planned.fused).append(work)
        elif lifted.site.spec is not None:
            planned.kept.append(Work(lifted, lifted.site.spec))
    return planned


def split_request(
    before: Sequence[SiteReport], now: Sequence[SiteReport], requests: Sequence[Request]
) -> str | None:
    """Why this graph does not fit the earlier ones of the model: a pass that changes the function
    was applied to a site in one of them (the prompt, say) and not in the other (a single token).
    A model that runs both is neither the original nor the rewritten one. None if they fit."""
    meant = [r.text for r in requests if r.action.contract != "exact"]
    for here in now:
        for there in before:
            if here.site.name != there.site.name or not here.site.path:
                continue
            for text in meant:
                if (text in here.passes) == (text in there.passes):
                    continue
                done, left = (here, there) if text in here.passes else (there, here)
                why = left.reason.removeprefix(f"{text}: ") or left.decision
                return (
                    f"{here.site.name}: {text} was applied in graph {done.graph}, and in graph "
                    f"{left.graph} it cannot be: {why}. Both graphs belong to this model, which "
                    "would be neither the original nor the rewritten one; give it inputs that the "
                    "pass takes, or select other sites"
                )
    return None


def lifted_sites(captured: Captured) -> list[Lifted]:
    """Every softmax of a graph, lifted and checked; equal sites are checked once. Then what is
    related to attention and has none."""
    verdicts: dict[tuple[Any, ...], tuple[str, str]] = {}
    result = []
    for found in find(captured.graph):
        result.append(_guarded(partial(_lifted, found, captured, verdicts), found))
    return [*result, *_relatives(captured)]


def _relatives(captured: Captured) -> list[Lifted]:
    try:
        return [lift(found, captured) for found in relatives(captured.graph, captured)]
    except Exception as error:  # what is only named must not stop what is rewritten
        why = f"{type(error).__name__}: {error}"
        captured.notes.append(f"relatives of attention could not be looked for: {why}")
        return []


def _lifted(
    found: Found, captured: Captured, verdicts: dict[tuple[Any, ...], tuple[str, str]]
) -> Lifted:
    lifted = lift(found, captured)
    if lifted.site.spec is None:
        return lifted
    key = _key(lifted, captured)
    if key not in verdicts:
        verdicts[key] = verdict(lifted, captured)
    problem, note = verdicts[key]
    return _opaque(lifted, captured, problem) if problem else _noted(lifted, note)


def _key(lifted: Lifted, captured: Captured) -> tuple[Any, ...]:
    """What two sites have in common that need one check between them: the graph that was read as
    well as the formula, or a misread site would pass for another one."""
    operands = [cast(Any, x).steps for x in (lifted.q, lifted.k, lifted.v)]
    sizes = tuple(cast(Bounds, lifted.bounds).sizes.values())
    layout = (str(operands), lifted.out_order, lifted.lead)
    try:
        graph = fingerprint(lifted, captured)
    except Skip:
        graph = lifted.site.path
    return cast(SoftmaxSpec, lifted.site.spec).digest(), sizes, layout, graph


def _opaque(lifted: Lifted, captured: Captured, problem: str) -> Lifted:
    """The site lifted again with what meets its scores read as whole tensors; left alone if that
    fails too."""
    again = _guarded(lambda: lift(lifted.found, captured, opaque=True), lifted.found)
    still, note = again.site.reason, ""
    if again.site.spec is not None:
        still, note = verdict(again, captured)
    if still:
        reason = f"its formula did not pass its check: {problem}"
        return replace(lifted, site=replace(lifted.site, spec=None, reason=reason))
    read = f"read as whole tensors, because the formula did not pass its check: {problem}"
    return _noted(_noted(again, read), note)


def _noted(lifted: Lifted, note: str) -> Lifted:
    if not note:
        return lifted
    return replace(lifted, site=replace(lifted.site, notes=(*lifted.site.notes, note)))


def _guarded(work: Callable[[], Lifted], found: Any) -> Lifted:
    """A mistake of ours in reading one site leaves that site as it was."""
    try:
        return work()
    except Exception as error:
        reason = f"it could not be read: {type(error).__name__}: {error}"
        return Lifted(Site(path="", layer=None, reason=reason), found)


def _decide(
    lifted: Lifted, captured: Captured, model: nn.Module, state: State
) -> tuple[SiteReport, Work | None]:
    site, spec = lifted.site, lifted.site.spec
    if spec is None:
        return SiteReport(site, 0, None, _without_spec(site), reason=site.reason), None
    if site.reason:
        return SiteReport(site, 0, spec, "kept", "original", site.reason), None
    if state.only is not None and site.name not in state.only:
        return SiteReport(site, 0, spec, "kept", "original", "it is to be left alone"), None
    requests, shared = _selectable(state.requests, captured)
    if any(r.action.stage != "none" for r in requests):
        site = _surveyed(lifted, captured, model)
    serves_several = _serves_several(site.path, captured, model)
    asked = replace(site, layer=None) if serves_several else site
    after, applied, refusals = apply(requests, asked, spec, layer_count(model, site.path))
    refusals = (*shared, *refusals)
    if serves_several and any(t.source and t.source.parameters for t in after.tensors):
        reason = "a graph break inside the layer: all layers would share the new parameters"
        return SiteReport(site, 0, spec, "kept", "original", reason), None
    sizes = cast(Bounds, lifted.bounds).sizes
    if isinstance(after, SoftmaxSpec) and after != spec and sizes[sym.q] == sizes[sym.k]:
        after = on_one_axis(after)
    reason = "; ".join(refusals)
    if not applied:
        reason = reason or "no pass selects it"
        return SiteReport(site, 0, spec, "kept", "original", reason), None
    name, why = lowering.explain(after, _shapes_at_capture(lifted), state.target)
    if name is None:
        if state.target != "auto":
            state.failure = LoweringError(
                f"{site.name}: target {state.target!r} does not take it: {why}"
            )
        return SiteReport(site, 0, spec, "kept", "original", why), None
    start = _pays_from(state.requests, applied) if after == spec else 0
    scores = sympy.expand(sizes[sym.q] * sizes[sym.k])
    if scores.is_Integer and scores < start:
        size = f"{sizes[sym.q]} x {sizes[sym.k]}"
        why = f"{size} scores a head are fewer than {start}: the original code is faster"
        return SiteReport(site, 0, spec, "kept", "original", why), None
    note = f"from {start} scores a head on; the original code below" if start else ""
    reason = "; ".join(x for x in (note, reason) if x)
    exact = all(r.action.contract == "exact" for r in requests if r.text in applied)
    work = Work(lifted, after, start, exact)
    site = replace(site, notes=(*site.notes, *_empty_rows(spec, applied, requests)))
    return SiteReport(site, 0, after, "rewritten", name, reason, applied), work


def _without_spec(site: Site) -> Decision:
    if site.kind == "attention":
        return "kept"
    return "named" if site.kind in RELATIVES else "not attention"


def _empty_rows(
    spec: SoftmaxSpec, applied: Sequence[str], requests: Sequence[Request]
) -> tuple[str, ...]:
    """A note, where a pass changes what a query gives that sees no key."""
    names = [r.action.name for r in requests if r.text in applied and not r.action.empty_rows]
    hides_keys = any(not t.has(sym.q) for t in sympy.And.make_args(spec.mask))
    if not names or spec.masked == "zero" or spec.is_unmasked or not hides_keys:
        return ()
    gave = "NaN" if spec.masked == "nan" else "the mean of all values"
    return (f"a query that sees no key, which is padding, gave {gave} and gives 0 ({names[0]})",)


def _surveyed(lifted: Lifted, captured: Captured, model: nn.Module) -> Site:
    """The site with what passes may want to know of the graph around it."""
    sizes = cast(Bounds, lifted.bounds).sizes
    x, stream = input_of(lifted, captured), residual_of(lifted, captured)
    return replace(
        lifted.site,
        q_len=int(sizes[sym.q]) if sizes[sym.q].is_Integer else 0,
        kv_len=int(sizes[sym.k]) if sizes[sym.k].is_Integer else 0,
        input_dim=0 if x is None else x.dim,
        residual_dim=0 if stream is None else stream.dim,
        layers=layer_count(model, lifted.site.path),
    )


def _selectable(
    requests: Sequence[Request], captured: Captured
) -> tuple[list[Request], tuple[str, ...]]:
    """The requests that can be told where they apply, and why the others cannot.

    After a graph break inside a layer, Dynamo compiles that layer once and calls the graph with the
    weights of each layer in turn: what is done for one of them is done for all.
    """
    if captured.is_root:
        return list(requests), ()
    chosen = [r for r in requests if r.selector.layers is None and r.selector.path is None]
    reason = "a graph break splits the model, and layers that share a graph cannot be told apart"
    return chosen, tuple(f"{r.text}: {reason}" for r in requests if r not in chosen)


def _serves_several(path: str, captured: Captured, model: nn.Module) -> bool:
    """The graph may be called with the weights of several layers in turn: it starts below the
    model and does not hold every layer of the list that the path goes through."""
    stack = re.match(r"(.*?\b)\d+(?=\.|$)", path)
    if captured.is_root or stack is None:
        return False
    origins = (text.partition(" ")[2] for _, text in captured.inputs.values())
    held = {x.removeprefix(stack[1]).partition(".")[0] for x in origins if x.startswith(stack[1])}
    return held != {str(n) for n in range(layer_count(model, path))}


def _pays_from(requests: Sequence[Request], applied: Sequence[str]) -> int:
    """Scores of one head from which a site that computes what it did before runs new code."""
    chosen = [r.action for r in requests if r.text in applied and hasattr(r.action, "from_scores")]
    asked = [cast(Any, action).from_scores for action in chosen]
    return min((FUSE_FROM_SCORES if n is None else int(n) for n in asked), default=0)


def _shapes_at_capture(lifted: Lifted) -> lowering.Shapes:
    q, v = value_of(cast(Any, lifted.q).node), value_of(cast(Any, lifted.v).node)
    sizes = cast(Any, lifted.bounds).sizes
    hints = _hints(lifted)

    def number(x: Expr) -> int:
        value = x.xreplace(hints)
        return int(value) if value.is_Integer else 16

    site = lifted.site
    return lowering.Shapes(
        device=q.device.type,
        dtype=q.dtype,
        batch=number(sizes[sym.b]),
        heads=site.heads or number(sizes[sym.h]),
        kv_heads=site.kv_heads or number(sizes[sym.h]),
        q_len=number(sizes[sym.q]),
        kv_len=number(sizes[sym.k]),
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        grad=bool(torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)),
    )


def _hints(lifted: Lifted) -> dict[Any, Expr]:
    hints: dict[Any, Expr] = {}
    for operand in (lifted.q, lifted.k, lifted.v):
        for size in value_of(cast(Any, operand).node).shape:
            if isinstance(size, torch.SymInt) and size.node.hint is not None:
                expr = size.node.expr
                if isinstance(expr, sympy.Symbol):
                    hints[expr] = sympy.Integer(int(size.node.hint))
    return hints
