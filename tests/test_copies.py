"""An optimized model that is copied, pickled, optimized again, deleted, or not captured."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import rewriter
from rewriter.errors import InputError, NotAppliedWarning, PassError


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
    def __init__(self, *, checkpoints: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention()])
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpoints and self.training:
                x = x + checkpoint(layer, x, use_reentrant=False)
            else:
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
    assert copy.deepcopy(rewriter.restore(model)) is not model


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
    rewriter.optimize(model, "fuse")
    assert GATE not in dict(model.named_parameters())


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


def test_a_graph_that_cannot_be_captured_is_refused_once_a_pass_changes_the_function() -> None:
    model: Any = rewriter.optimize(Model(checkpoints=True).eval(), "heads.scale(heads=[0], by=0)")
    with torch.no_grad():
        model(X)
    model.train()
    with pytest.raises(PassError, match="Gradient checkpointing has to be off"):
        model(X)
    rewriter.optimize(model)
    assert model(X).shape == X.shape
    assert any("runs as it was" in note for note in rewriter.report_of(model).notes)


def test_a_pass_that_every_site_declines_is_a_warning() -> None:
    model = rewriter.optimize(Model(), "heads.scale(heads=[7], by=0)")
    with pytest.warns(NotAppliedWarning, match="applied nowhere.*this site has 2 heads"):
        model(X)
    model(X)
