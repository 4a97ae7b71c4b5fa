"""Every attention site is compared by itself, and what was not compared is never green."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import lowering
from rewriter.errors import InputError, NotEquivalent
from rewriter.optimize import report_of, requests_of
from rewriter.verify import VerifyReport, verify
from rewriter.verify.sites import Sites
from rewriter.verify.structure import structure_of
from rewriter.watch import Watched
from verify.faults import FUSE, Lie, Looped, Restless, implemented, pair
from verify.small_models import Shape, Tower, batch


def sites(report: VerifyReport) -> dict[str, bool]:
    return {row.name: row.ok for row in report.rows if row.kind == "site"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_site_is_compared_in_one_capture(dtype: torch.dtype) -> None:
    count = 2 if dtype == torch.float32 else 1
    original, model = pair(dtype=dtype, shape=Shape(layers=count))
    report = verify(original, model, batch(0, dtype=dtype), gradients=False, sites=True)
    assert sites(report) == {f"blocks.{i}.attention": True for i in range(count)}
    assert report.structure is not None
    report.structure.expect(sites=count, rewritten=count, softmaxes=0)
    report.structure.expect(graphs=1, breaks=0, recompiles=0)
    assert [row.kind for row in report.rows] == ["output", *["site"] * count]
    for row in report.rows:
        assert row.count == 2 * 11 * 32
        assert row.detail is not None
        assert row.err_ref is not None
        assert row.err_ref.max > 0
    assert not report.notes
    assert report.environment["dtype"] == str(dtype).removeprefix("torch.")


def test_the_first_site_that_fails_is_the_one_that_is_wrong() -> None:
    original, model = pair(FUSE, Lie(layer=1))
    report = verify(original, model, batch(0), gradients=False, raises=False)
    assert sites(report) == {"blocks.0.attention": True, "blocks.1.attention": False}
    with pytest.raises(NotEquivalent, match=r"is `blocks\.1\.attention`.*`rewriter\.bisect"):
        report.raise_if_failed()
    first, second = (row.detail for row in report.rows if row.kind == "site")
    assert first is not None
    assert second is not None
    assert max(first.heads) < 1e-5 < min(second.heads)
    worst = second.worst[0]
    assert abs(worst.new - worst.gold) > 100 * abs(worst.ref - worst.gold)
    assert len(worst.place) == 4


def test_the_model_is_afterwards_as_it_was_optimized() -> None:
    original, model = pair(FUSE, Lie(layer=7), shape=Shape(layers=1))
    inputs = batch(0)
    with torch.no_grad():
        before = model(**inputs)["hidden"]
        graphs = report_of(model).graphs
        verify(original, model, inputs, gradients=False)
        assert torch.equal(model(**inputs)["hidden"], before)
    assert report_of(model).graphs == graphs
    assert [r.action.name for r in requests_of(model)] == ["fuse", "test.lie"]


# --- functions that are changed on purpose --------------------------------------------------------

WINDOW = "sparse.window(window=3)"


def test_a_pass_that_changes_the_function_is_held_to_its_own_formula() -> None:
    original, model = pair(WINDOW, shape=Shape(layers=1))
    report = verify(original, model, batch(0), gradients=False, raises=False)
    assert sites(report) == {"blocks.0.attention": True}
    assert [row.name for row in report.failures] == ["hidden"]
    report = verify(original, model, batch(0), against="reference")
    assert report.gold == "the original with the same passes in float64"
    assert sum(row.kind == "gradient" for row in report.rows) == 17
    assert not requests_of(original)


def test_against_the_reference_a_wrong_implementation_is_caught() -> None:
    def wrong(*args: Any) -> Tensor:
        return lowering.BLOCKED.forward(*args) * 1.01

    torch.manual_seed(0)
    original = Tower(Shape(layers=1)).eval()
    model = rewriter.optimize(copy.deepcopy(original), WINDOW, target="torch.blocked")
    arguments: dict[str, Any] = {"against": "reference", "gradients": False, "raises": False}
    with implemented(wrong):
        report = verify(original, model, batch(0), **arguments)
    assert [row.name for row in report.failures] == ["hidden", "blocks.0.attention"]


def test_no_number_where_the_original_has_one_fails() -> None:
    def wrong(*args: Any) -> Tensor:
        out = lowering.BLOCKED.forward(*args)
        out[0, 1, 2, 3] = float("nan")
        return out

    torch.manual_seed(0)
    original = Tower(Shape(layers=1)).eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE, target="torch.blocked")
    with implemented(wrong):
        report = verify(original, model, batch(0), gradients=False, raises=False)
    (row,) = (row for row in report.rows if row.kind == "site")
    assert row.reason == "1 of 704 values are like nan where the original is finite"
    assert row.detail is not None
    assert row.detail.worst[0].place == (0, 1, 2, 3)
    assert row.detail.heads[1] == float("inf")


# --- nothing compared is never green --------------------------------------------------------------


def test_sites_of_a_model_that_we_did_not_optimize_are_refused_or_noted() -> None:
    model = Tower(Shape(layers=1))
    original, ours = pair()
    for asked in ({"sites": True}, {"memory": True}, {"against": "reference"}):
        with pytest.raises(InputError, match=r"was not optimized by rewriter.*call rewriter.opti"):
            verify(model, copy.deepcopy(model), batch(0), **asked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match='against is "original" or "reference", got \'other\''):
        verify(model, copy.deepcopy(model), batch(0), against="other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="generate compares with the text of the original"):
        verify(original, ours, batch(0), against="reference", generate=4)
    notes = verify(model, copy.deepcopy(model), batch(0)).notes
    assert notes == ("sites were not compared: `rewriter.optimize` did not return this model",)
    assert verify(model, copy.deepcopy(model), batch(0), sites=False).notes == ()


def test_a_model_without_attention_fails_where_sites_are_asked_for_and_is_noted_elsewhere() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = rewriter.optimize(copy.deepcopy(original))
    x = torch.randn(3, 4)
    report = verify(original, model, x, sites=True, raises=False)
    assert [row.name for row in report.failures] == ["(sites)"]
    with pytest.raises(NotEquivalent, match="no attention site was compared"):
        report.raise_if_failed()
    report = verify(original, model, x)
    assert any(note.startswith("no attention site was compared") for note in report.notes)


def test_sites_that_run_their_own_code_are_told() -> None:
    original, model = pair("fuse", shape=Shape(layers=1))
    report = verify(original, model, batch(0), gradients=False)
    assert len(sites(report)) == 1
    (note,) = report.notes
    assert note.startswith("1 of 1 sites run their own code: not rewritten, so nothing is shown")
    assert "11 x" in note or "fewer than" in note or "the original code below" in note
    assert report.structure is not None
    report.structure.expect(sites=1, rewritten=0, softmaxes=1)
    report = verify(original, model, batch(0), gradients=False, sites=True, raises=False)
    (row,) = report.failures
    assert row.name == "(sites)"
    assert row.reason.startswith("no rewritten attention site was compared: 1 of 1 sites run")


def test_a_watched_call_that_fails_is_a_failure_where_sites_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, model = pair(shape=Shape(layers=1))
    right = Sites.watch

    def broken(sites: Sites, w: Watched, args: Any) -> Any:
        right(sites, w, args)
        raise ValueError("no more")

    monkeypatch.setattr(Sites, "watch", broken)
    report = verify(original, model, batch(0), gradients=False, sites=True, raises=False)
    assert [row.name for row in report.failures] == ["(sites)"]
    failed = "the call whose sites are compared failed: ValueError: no more"
    assert report.failures[0].reason == failed
    assert "bisect" not in report._failure()  # which does not look at sites by themselves
    report = verify(original, model, batch(0), gradients=False)
    assert failed in report.notes


class Unread(nn.Module):
    """An attention that is understood, and one whose weights are summed up along the keys first."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower(Shape(layers=1))

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        x = self.tower(x, pad)["hidden"]
        weights = (x @ x.mT).softmax(-1)
        return weights.cumsum(-1) @ x


def test_sites_that_were_not_understood_are_listed() -> None:
    torch.manual_seed(0)
    original = Unread().eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    report = verify(original, model, batch(0), gradients=False)
    assert list(sites(report)) == ["tower.blocks.0.attention"]
    assert any("1 of 2 sites were not understood and not compared" in n for n in report.notes)


def test_a_site_whose_result_is_one_number_is_noted() -> None:
    original, model = pair(shape=Shape(layers=1))
    for module in (original, model):
        with torch.no_grad():
            module.blocks[0].attention.value.weight.zero_()
            module.blocks[0].attention.value.bias.fill_(1.0)
    report = verify(original, model, batch(0), gradients=False)
    assert any("`blocks.0.attention` is one number everywhere" in note for note in report.notes)


# --- graphs that are hard to watch ----------------------------------------------------------------


def test_a_site_that_is_computed_again_has_a_row_for_each_call() -> None:
    torch.manual_seed(0)
    original = Looped().eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    report = verify(original, model, batch(0), gradients=False)
    assert list(sites(report)) == ["tower.blocks.0.attention", "tower.blocks.0.attention#call2"]
    assert report.structure is not None
    assert report.structure.breaks >= 1


def test_what_a_graph_draws_and_writes_is_the_same_in_all_runs() -> None:
    torch.manual_seed(0)
    original = Restless().eval()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    report = verify(original, model, batch(0), gradients=False, sites=True)
    row = next(row for row in report.rows if row.kind == "site")
    assert row.err_ref is not None
    assert row.err_ref.max < 1e-5
    assert row.ratio < 2
    assert float(model.steps) == 1.0  # of the run whose outputs are compared


def test_the_reference_of_a_broken_graph_that_keeps_a_count_is_the_same_function() -> None:
    options: dict[str, Any] = {"against": "reference", "gradients": False, "sites": False}
    torch.manual_seed(0)
    original = Looped().eval()
    model = rewriter.optimize(copy.deepcopy(original), WINDOW)
    report = verify(original, model, batch(0), **options)
    assert "gold is float64 inside each graph, and rounded between graphs" in report.notes
    original = Restless().eval()
    model = rewriter.optimize(copy.deepcopy(original), WINDOW)
    report = verify(original, model, batch(0), **options)
    assert report.rows[0].err_ref is not None
    assert report.rows[0].err_ref.max < 1e-5
    assert float(original.steps) == 0.0


def test_structure_counts_what_was_captured_and_says_both_numbers() -> None:
    _, model = pair(shape=Shape(layers=1))
    with pytest.raises(InputError, match="has no captured graph"):
        structure_of(model)
    with torch.no_grad():
        model(**batch(0))
    structure_of(model).expect(rewritten=1, graphs=1, softmaxes=0)
