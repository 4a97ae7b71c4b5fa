"""A model's own autograd functions keep their own backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rewriter


class DoubledGradient(torch.autograd.Function):
    """x forward, twice the gradient backward: a backward that is not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2.0 * grads[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = DoubledGradient.apply(self.qkv(x)).chunk(3, -1)
        return torch.softmax(q @ k.transpose(-1, -2) * 0.35, -1) @ v


def test_the_backward_of_an_autograd_function_before_attention_is_the_models_own() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 5, 8)
    expected = torch.autograd.grad(model(x).square().sum(), model.qkv.weight)[0]
    rewriter.optimize(model, "fuse(from_scores=0)")
    found = torch.autograd.grad(model(x).square().sum(), model.qkv.weight)[0]
    report = rewriter.report_of(model)
    assert [s.decision for s in report.sites] == ["rewritten"]
    torch.testing.assert_close(found, expected)
