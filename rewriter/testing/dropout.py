"""Dropout: weights are dropped at the rate that the spec says, and the backward drops the same.

Which weights are dropped is read off the output for values that are the rows of an identity matrix;
then the gradients are those of the dense attention with just these weights.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.lowering import Lowering
from rewriter.op import attention
from rewriter.reference import reference_weights
from rewriter.testing.agreement import Row, judged
from rewriter.testing.cases import Case, Dims
from rewriter.testing.operands import operands
from rewriter.testing.outcome import Outcome
from rewriter.verify.compare import baseline_of

__all__ = ["dropout_row"]

_RATE = 0.3
_SEED = 5
_DEVIATIONS = 6.0
"""The share of dropped weights is this many standard deviations from the rate at most."""


def dropout_row(lowering: Lowering) -> Outcome:
    """Dropout by an implementation of the table, forward and backward."""
    length = 24
    dims = Dims(q_len=length, kv_len=length, head_dim=length, value_dim=length)
    plain = Case.of("causal", dims)
    case = replace(plain, name="dropout", spec=replace(plain.softmax, dropout=_RATE))
    refused = lowering.supports(case.spec, case.shapes(grad=True))
    if refused is not None:
        return Outcome("dropout", case.text, "skipped", refused)
    target = lowering.name
    x = operands(case)
    eye = torch.eye(length).expand(dims.batch, dims.kv_heads, -1, -1).contiguous()
    with torch.no_grad():
        weights = reference_weights(case.softmax, x.q, x.k)
        seen = weights > 1e-4
    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, eye)]
    torch.manual_seed(_SEED)
    q, k, v = leaves
    out = attention(q, k, v, (), (), case.spec, target)
    share = float(((out.detach() == 0) & seen).sum() / seen.sum())
    allowed = _DEVIATIONS * math.sqrt(_RATE * (1 - _RATE) / int(seen.sum()))
    if abs(share - _RATE) > allowed:
        reason = f"{share:.3f} of the weights are dropped, the spec says {_RATE}"
        return Outcome("dropout", case.text, "failed", reason)
    keep = out.detach() != 0
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    new = torch.autograd.grad(out, leaves, cotangent)
    ref, gold = (
        _dense(case, [y.detach().to(dtype) for y in leaves], keep, cotangent.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    names = ("the output", *(f"the gradient of {n}" for n in "qkv"))
    rows = [
        Row(name, "gradient" if i else "output", baseline_of(r, g), n, case.dtype)
        for i, (name, r, g, n) in enumerate(zip(names, ref, gold, (out, *new), strict=True))
    ]
    return judged("dropout", case.text, rows)


def _dense(case: Case, x: list[Tensor], keep: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients with these weights kept."""
    q, k, v = (y.requires_grad_() for y in x)
    weights = reference_weights(case.softmax, q, k) * keep / (1.0 - _RATE)
    out = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)]
