"""An optimized model that is copied, pickled, optimized again, deleted, or not captured."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import rewriter
from rewriter.additions import given_to
from rewriter.errors import CaptureError, InputError, LoweringError, NotAppliedWarning, PassError


class Attention(nn.Module):
    """Two causal heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
GATE = "rewriter.layers.0.gate.bias"


def gated() -> tuple[nn.Module, Tensor]:
    """A model with a gate that lets nothing through, and what it gives."""
    model = rewriter.optimize(Model(), "heads.gate", inputs=X)
    with torch.no_grad():
        model.get_parameter(GATE).fill_(-100.0)
        return model, model(X)


def test_a_copy_is_optimized_too_and_has_parameters_of_its_own() -> None:
    model, out = gated()
    twin = copy.deepcopy(nn.Sequential(model))[0]
    with torch.no_grad():
        assert torch.equal(twin(X), out)
        twin.get_parameter(GATE).fill_(0.0)
        assert not torch.allclose(twin(X), out)
        assert torch.equal(model(X), out)


def test_pickling_is_refused_with_what_to_do_instead() -> None:
    model, _ = gated()
    with pytest.raises(InputError, match=r"use rewriter\.save"):
        pickle.dumps(model)
    pickle.dumps(rewriter.restore(model))


def test_the_same_passes_again_keep_what_was_trained_and_others_do_not() -> None:
    model, out = gated()
    rewriter.optimize(model, "heads.gate", target="reference")
    with torch.no_grad():
        torch.testing.assert_close(model(X), out)
    rewriter.optimize(model, "heads.gate", "sparse.window(window=9)")
    with torch.no_grad():
        torch.testing.assert_close(model(X), out)
    rewriter.optimize(model, "fuse")
    assert GATE not in dict(model.named_parameters())


def test_what_new_passes_do_not_ask_for_goes_with_their_first_call() -> None:
    model = rewriter.optimize(Model(), "heads.gate", "sinks.learned", inputs=X)
    with torch.no_grad():
        model.get_parameter(GATE).fill_(-100.0)
        rewriter.optimize(model, "heads.gate")(X)
    assert [n for n, _ in model.named_parameters() if n.startswith("rewriter.")] == [
        "rewriter.layers.0.gate.weight",
        GATE,
    ]
    assert bool((model.get_parameter(GATE) == -100.0).all())


def test_a_call_that_fails_takes_only_what_it_made() -> None:
    model, out = gated()
    rewriter.optimize(model, "heads.gate", target="triton")
    with torch.no_grad(), pytest.raises(LoweringError, match="need a GPU"):
        model(X)
    rewriter.optimize(model, "heads.gate")
    with torch.no_grad():
        torch.testing.assert_close(model(X), out)
    fresh = rewriter.optimize(Model(), "heads.gate", target="triton")
    with pytest.raises(LoweringError, match="need a GPU"):
        fresh(X)
    assert [n for n, _ in fresh.named_parameters() if n.startswith("rewriter.")] == []


def test_restore_forgets_what_was_given_and_lost() -> None:
    model = rewriter.optimize(Model(), "heads.moh(active=0.5)").train()
    rewriter.give(model, labels=torch.ones(1, 5, dtype=torch.int64))
    model(X)
    assert rewriter.auxiliary_loss(model).requires_grad
    rewriter.restore(model)
    assert float(rewriter.auxiliary_loss(model)) == 0.0
    assert given_to(model).labels is None


def test_what_a_user_compiled_comes_back() -> None:
    model = Model()
    model.compile(backend="eager")
    own = model._compiled_call_impl
    rewriter.inspect(model, X)
    assert model._compiled_call_impl is own
    rewriter.optimize(model, inputs=X)
    rewriter.optimize(model, "heads.gate", inputs=X)
    rewriter.inspect(model, X, "fuse")
    assert model._compiled_call_impl not in (own, None)
    assert rewriter.restore(model)._compiled_call_impl is own


def test_a_model_that_was_only_inspected_is_copied_as_it_is() -> None:
    model = Model()
    model.compile(backend="eager")
    rewriter.inspect(model, X)
    twin = copy.deepcopy(model)
    assert rewriter.report_of(twin).graphs == 0
    with torch.no_grad():
        assert torch.equal(twin(X), model(X))


def test_a_run_that_only_looks_leaves_the_statistics_of_a_norm() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), Model()).train()
    rewriter.inspect(model, X)
    rewriter.optimize(model, inputs=X)
    rewriter.inspect(model, X)
    assert int(model[0].num_batches_tracked) == 0
    model(X)
    assert int(model[0].num_batches_tracked) == 1


def test_an_optimized_model_is_inspected_with_other_passes() -> None:
    model, out = gated()
    report = rewriter.inspect(model, X, "sparse.window(window=2)")
    assert [s.passes for s in report.sites] == [("sparse.window(window=2)",)]
    assert [s.passes for s in rewriter.inspect(model).sites] == [("heads.gate",)]
    with torch.no_grad():
        assert torch.equal(model(X), out)


@dataclass
class Plain:
    loss: Tensor
    out: Tensor


class Named(NamedTuple):
    loss: Tensor
    out: Tensor


@pytest.mark.parametrize("kind", [dict, Plain, Named])
def test_a_loss_is_added_to_in_any_kind_of_output(kind: Any) -> None:
    class Trained(Model):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return kind(loss=out.square().mean(), out=out)

    model = rewriter.optimize(Trained(), "heads.moh(active=0.5)").train()
    found = model(X)
    loss = found["loss"] if kind is dict else found.loss
    out = found["out"] if kind is dict else found.out
    extra = rewriter.auxiliary_loss(model)
    assert float(extra.detach()) > 0
    torch.testing.assert_close(loss, out.square().mean() + extra)


def test_inspect_of_a_plain_model_leaves_what_its_name_holds() -> None:
    model, out = gated()
    twin = Model()
    twin.add_module("rewriter", model.get_submodule("rewriter"))
    rewriter.inspect(twin, X)
    assert GATE in dict(twin.named_parameters())
    assert out.shape == X.shape


def test_a_model_with_a_program_is_freed() -> None:
    model, _ = gated()
    alive = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None


def test_a_graph_that_cannot_be_captured_is_refused_once_a_pass_changes_the_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = rewriter.optimize(Model().eval(), "heads.scale(heads=[0], by=0)")
    with torch.no_grad():
        model(X)

    def failing(*args: Any) -> Any:
        raise CaptureError("torch could not re-trace it")

    monkeypatch.setattr(import_module("rewriter.optimize"), "from_dynamo", failing)
    model.train()
    with pytest.raises(PassError, match="as it is, this graph would be the original"):
        model(X)
    rewriter.optimize(model)
    assert model(X).shape == X.shape
    assert any("runs as it was" in note for note in rewriter.report_of(model).notes)


def test_a_pass_that_every_site_declines_is_a_warning() -> None:
    model = rewriter.optimize(Model(), "heads.scale(heads=[7], by=0)")
    with pytest.warns(NotAppliedWarning, match="applied nowhere, and.*this site has 2 heads"):
        model(X)
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        model(X)
    assert again == []
    rewriter.optimize(model, "heads.scale(heads=[7], by=0)", "heads.scale(heads=[0], by=0)")
    with pytest.warns(NotAppliedWarning, match=r"applied nowhere: layers\.0.*has 2 heads"):
        model(X)
    with pytest.warns(NotAppliedWarning, match="no attention was found"):
        rewriter.optimize(nn.Linear(8, 8), "heads.gate")(X)
