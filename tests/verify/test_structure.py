"""Counts of what became of the graphs, as a test asserts them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.errors import CheckFailed, InputError
from rewriter.report import Report, SiteReport
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.verify.structure import Structure, structure_of
from verify.faults import FUSE, Looped
from verify.small_models import Shape, Tower, batch


def line(name: str, decision: str, graph: int = 0) -> SiteReport:
    return SiteReport(Site(name, 0, spec=SoftmaxSpec()), graph, None, decision)  # type: ignore[arg-type]


def test_a_site_of_several_graphs_counts_once_and_is_rewritten_only_in_all() -> None:
    lines = (line("a", "rewritten"), line("b", "rewritten"), line("c", "not attention"))
    report = Report((*lines, line("a", "rewritten", 1), line("b", "kept", 1)), graphs=2)
    assert Structure.of(report) == Structure(2, 1, 0, 2, 0, 0)
    assert Structure.of(report, {"a": True, "b": True}).rewritten == 2
    assert Structure.of(report, {"a": True}).rewritten == 1


def test_a_count_that_differs_is_told_with_both_numbers() -> None:
    structure = Structure(sites=12, rewritten=10, softmaxes=2, graphs=1, recompiles=0, breaks=0)
    structure.expect(sites=12, graphs=1, breaks=0)
    with pytest.raises(CheckFailed, match="rewritten is 10, expected 12; softmaxes is 2, expec"):
        structure.expect(rewritten=12, softmaxes=0, graphs=1)
    assert str(structure) == (
        "structure: 10 of 12 sites rewritten, 1 graph, 0 graph breaks, 0 recompiles, "
        "2 softmax nodes left"
    )


def test_expecting_nothing_or_what_is_not_counted_is_refused() -> None:
    structure = Structure(1, 1, 0, 1, 0, 0)
    with pytest.raises(InputError, match="there is no count 'kernels'; the counts are sites, rew"):
        structure.expect(kernels=1)
    with pytest.raises(InputError, match="no count is given"):
        structure.expect()


def test_a_model_that_captured_nothing_has_no_structure() -> None:
    model = Tower(Shape(layers=1))
    with pytest.raises(InputError, match=r"Tower has no captured graph: call rewriter\.opt"):
        structure_of(model)


def test_a_graph_that_breaks_is_counted() -> None:
    torch.manual_seed(0)
    model = rewriter.optimize(Looped().eval(), FUSE)
    with torch.no_grad():
        model(**batch(0))
    structure_of(model).expect(sites=1, rewritten=1, softmaxes=0, graphs=1, breaks=1, recompiles=0)


class Chooses(nn.Module):
    """A softmax that is no attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1).sum(-1)


def test_softmaxes_that_stay_are_counted_whatever_they_are_for() -> None:
    model = rewriter.optimize(Chooses(), FUSE)
    model(torch.randn(2, 4))
    structure_of(model).expect(sites=0, rewritten=0, softmaxes=1, graphs=1, recompiles=0)


def test_another_mode_is_a_recompilation() -> None:
    model = rewriter.optimize(Chooses(), FUSE)
    model(torch.randn(2, 4))
    with torch.no_grad():
        model(torch.randn(2, 4))
    structure_of(model).expect(softmaxes=2, graphs=2, recompiles=1, breaks=0)
