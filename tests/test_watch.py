"""A watched graph shows what its sites compute, in the code that defines it and in the code that
runs; `reinstalled` leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import rewriter
from rewriter.isolation import precise
from rewriter.optimize import reinstalled, requests_of
from rewriter.passbase import Pass
from rewriter.reference import reference
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.watch import SiteCall, Watched
from verify.small_models import Shape, Tower, batch

NAMES = ["blocks.0.attention", "blocks.1.attention"]
FUSE = "fuse(from_scores=0)"


@dataclass
class Seen:
    """What the sites of one call gave."""

    graph: Watched
    gold: list[SiteCall]
    base: list[SiteCall]
    ours: list[SiteCall]


@contextmanager
def watching(model: nn.Module, seen: list[Seen], **options: Any) -> Iterator[None]:
    def watcher(graph: Watched, args: tuple[Any, ...]) -> Any:
        wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        with precise(torch.float64):
            _, gold = graph.double().run(wide)
        _, base = graph.base.run(args)
        out, ours = graph.ours(args)
        seen.append(Seen(graph, gold, base, ours))
        return out

    with reinstalled(model, watcher=watcher, **options), torch.no_grad():
        yield


def seen_in(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Seen:
    seen: list[Seen] = []
    with watching(model, seen, **options):
        model(**inputs)
    (only,) = seen
    return only


def gap(a: SiteCall, b: SiteCall) -> float:
    return float((a.out.double() - b.out.double()).abs().max())


def test_three_runs_of_one_capture_show_every_site() -> None:
    model, inputs = Tower(Shape(slopes=True)).eval(), batch(0)
    seen = seen_in(rewriter.optimize(model, FUSE), inputs)
    assert [[c.name for c in calls] for calls in (seen.gold, seen.base, seen.ours)] == [NAMES] * 3
    assert list(seen.graph.reports) == NAMES
    assert {c.out.dtype for c in seen.gold} == {torch.float64}
    assert {c.out.dtype for c in seen.ours} == {torch.float32}
    for gold, base, ours in zip(seen.gold, seen.base, seen.ours, strict=True):
        assert 0 < gap(base, gold) < 1e-5
        assert 0 < gap(ours, gold) < 1e-5
        assert gold.q.shape == (2, 4, 11, 8)
        assert gold.k.shape == (2, 2, 11, 8)


def test_what_a_site_reads_is_what_its_formula_needs() -> None:
    model, inputs = Tower(Shape(cap=5.0, slopes=True)).eval(), batch(0)
    seen = seen_in(rewriter.optimize(model, FUSE), inputs)
    for call in seen.gold:
        spec = seen.graph.reports[call.name].site.spec
        assert spec is not None
        again = reference(spec, call.q, call.k, call.v, call.tensors, call.sizes)
        assert torch.allclose(again, call.out, rtol=0, atol=1e-12)


def test_where_a_pass_changes_the_function_its_formula_is_the_base() -> None:
    model, inputs = Tower().eval(), batch(0)
    seen = seen_in(rewriter.optimize(model, "sparse.window(window=2) @ 1"), inputs)
    assert gap(seen.ours[1], seen.base[1]) < 1e-5
    plain = seen_in(rewriter.optimize(model, FUSE), inputs)
    assert gap(seen.base[0], plain.base[0]) == 0
    assert gap(seen.base[1], plain.base[1]) > 0.01


class Doubled(Pass):
    """The scale is doubled, which is not what it says.

    Contract: exact.
    """

    name = "test.doubled"
    contract = "exact"
    stage = "score"
    identity = "test.doubled"

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        return replace(spec, scale=2 * spec.scale)


def test_where_a_pass_promises_the_same_function_the_code_of_the_model_is_the_base() -> None:
    model, inputs = Tower().eval(), batch(0)
    seen = seen_in(rewriter.optimize(model, Doubled()), inputs)
    assert gap(seen.base[0], seen.gold[0]) < 1e-5
    assert gap(seen.ours[0], seen.gold[0]) > 0.01


def test_reinstalling_leaves_no_trace() -> None:
    model, inputs = Tower().eval(), batch(0)
    rewriter.optimize(model, "sparse.window(window=2)")
    with torch.no_grad():
        before, report = model(**inputs)["hidden"], str(rewriter.inspect(model))
        with reinstalled(model, only=[NAMES[0]]) as reported:
            other = model(**inputs)["hidden"]
            assert [s.decision for s in reported().attention] == ["rewritten", "kept"]
        after = model(**inputs)["hidden"]
    assert not torch.equal(before, other)
    assert torch.equal(before, after)
    assert str(rewriter.inspect(model)) == report
    assert [r.text for r in requests_of(model)] == ["sparse.window(window=2)"]

    plain = Tower().eval()
    with reinstalled(plain, requests=()):
        plain(**inputs)
    assert "_compiled_call_impl" not in plain.__dict__
    assert requests_of(plain) == ()
