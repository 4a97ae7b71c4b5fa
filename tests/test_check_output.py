"""At capture, a site's region and its spec give the same output on samples, or it is left alone.

Each fault is one that scores and masks do not show: how operands lie, which keys a head reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

import rewriter
from rewriter import decide
from rewriter.capture import Captured, export, from_exported
from rewriter.check_output import output_disagreement
from rewriter.decide import lifted_sites
from rewriter.frame import Lifted


class Grouped(nn.Module):
    """Causal self-attention with grouped keys and a learned sink, `[B, L, 32]`."""

    heads, kv_heads = 4, 2

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 32 + 2 * 16)
        self.sinks = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = self.qkv(x).split([32, 16, 16], dim=-1)
        q = q.view(B, L, self.heads, 8).transpose(1, 2)
        k, v = (x.view(B, L, self.kv_heads, 8).transpose(1, 2) for x in (k, v))
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = q @ k.mT * 8**-0.5
        scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
        column = self.sinks.view(1, -1, 1, 1).expand(B, -1, L, 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        return (weights @ v).transpose(1, 2).reshape(B, L, 32)


def captured(module: nn.Module) -> Captured:
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"x": {1: length}}
    return from_exported(export(module, (torch.randn(2, 9, 32),), dynamic_shapes=shapes))


def lifted() -> tuple[Lifted, Captured]:
    graph = captured(Grouped().eval())
    (site,) = lifted_sites(graph)
    return site, graph


def test_an_honest_site_agrees() -> None:
    site, graph = lifted()
    assert site.site.spec is not None
    assert (site.site.heads, site.site.kv_heads, site.site.notes) == (4, 2, ())
    assert output_disagreement(site, graph) == ""


def _with_spec(site: Lifted, **stages: Any) -> Lifted:
    assert site.site.spec is not None
    return replace(site, site=replace(site.site, spec=replace(site.site.spec, **stages)))


def _steps(operand: Any, *steps: Any) -> Any:
    return replace(operand, steps=(*operand.steps, *steps))


FAULTS: dict[str, Callable[[Lifted], Lifted]] = {
    "k used for v": lambda x: replace(x, v=x.k),
    "heads of q flipped": lambda x: replace(
        x, q=_steps(x.q, (torch.ops.aten.flip.default, ([1],)))
    ),
    "groups interleaved": lambda x: replace(
        x,
        **{
            n: _steps(getattr(x, n), (torch.ops.aten.repeat.default, ([1, 2, 1, 1],)))
            for n in ("k", "v")
        },
    ),
    "output transposed": lambda x: replace(x, out_order=(0, 2, 1, 3)),
    "sink doubled": lambda x: _with_spec(x, sink=2 * x.site.spec.sink),  # type: ignore[union-attr]
    "sink lost": lambda x: _with_spec(x, sink=None),
    "heads scaled": lambda x: _with_spec(x, heads=sympy.Rational(9, 10)),
    "queries and keys swapped": lambda x: replace(x, q=_steps(x.k, (_TWICE, ([1, 2, 1, 1],)))),
}
_TWICE = torch.ops.aten.repeat.default


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_scores_do_not_show_is_seen(fault: str) -> None:
    site, graph = lifted()
    assert "the output is" in output_disagreement(FAULTS[fault](site), graph)


def test_such_a_site_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = decide.lift
    monkeypatch.setattr(
        decide, "lift", lambda *args, **kwargs: FAULTS["k used for v"](honest(*args, **kwargs))
    )
    model, x = Grouped().eval(), torch.randn(2, 9, 32)
    before = model(x)
    rewriter.optimize(model, "fuse(from_scores=0)")
    assert torch.equal(model(x), before)
    (site,) = rewriter.inspect(model).attention
    assert site.decision == "kept"
    assert site.reason.startswith("its formula did not pass its check: the output is")


def test_active_dropout_is_checked_too() -> None:
    graph = captured(Grouped(dropout=0.5).train())
    (site,) = lifted_sites(graph)
    assert site.site.spec is not None
    assert (site.site.spec.dropout, site.site.notes) == (0.5, ())
    assert output_disagreement(site, graph) == ""
    assert output_disagreement(FAULTS["k used for v"](site), graph) != ""


def test_what_cannot_be_checked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.check_output.MAX_ELEMENTS", 10)
    site, _ = lifted()
    text = "its output was not checked against the graph: too large to be checked on samples"
    assert site.site.notes == (text,)
