"""Implementations that claim to be fused, are right, and make the matrix of scores all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor

from mutants.catalogue import Mutant
from rewriter import symbols as sym
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec

__all__ = ["MUTANTS", "SPEC"]

MUTANTS: list[Mutant] = []

CAP = 10.0
SPEC = SoftmaxSpec(
    scale=sympy.Rational(1, 4),
    score=sympy.Float(CAP) * sympy.tanh(sym.s / CAP),
    mask=sym.k <= sym.q,
)


def dense(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
    """What `SPEC` means, in one matrix; the first query is number `start`."""
    s = (q @ k.mT).mul_(0.25 / CAP).tanh_().mul_(CAP)
    for row in range(s.shape[2]):
        s[:, :, row, start + row + 1 :] = -torch.inf
    s.sub_(s.amax(-1, keepdim=True)).exp_()
    return (s @ v).div_(s.sum(-1, keepdim=True))


def unfused(name: str, breaks: str = "") -> Callable[[Any], Any]:
    def add(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
        def forward(
            spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Any, sizes: Any
        ) -> Tensor:
            return function(q, k, v)

        MUTANTS.append(Mutant(name, "memory", breaks, "memory: site", forward))
        return function

    return add


@unfused("the dense formula", "several matrices at once")
def several(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference(SPEC, q, k, v, (), ())


@unfused("one matrix of all heads", "all steps in place")
def one_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense(q, k, v)


@unfused("one matrix of all heads in half precision", "half the bytes")
def half_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense(*(x.to(torch.bfloat16) for x in (q, k, v))).to(q.dtype)


@unfused("half of the queries at a time", "two halves of the matrix")
def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2] // 2
    return torch.cat([dense(x, k, v, i * n) for i, x in enumerate(q.split(n, 2))], 2)


@unfused("blocks of the matrix that all stay", "weights kept for a backward that never comes")
def kept_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2] // 8
    kept, rows = [], []
    for i, x in enumerate(q.split(n, 2)):
        kept.append(x @ k.mT)
        rows.append(dense(x, k, v, i * n))
    return torch.cat(rows, 2)


@unfused("one head at a time", "a matrix for each, L x M")
def by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = range(q.shape[1])
    return torch.cat([dense(*(x[:, h : h + 1] for x in (q, k, v))) for h in heads], 1)
