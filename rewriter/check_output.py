"""Checking a lifted site end to end, once, at capture: its region and its spec on the same samples.

`rewriter.check` compares scores and masks. What it cannot see is how the operands lie: which axis
is a head, which keys a query head reads, how the result is put together, what a sink takes. Here
queries, keys, values and the tensors that the formulas read are random and small; the region of the
graph is run on them node by node, and `reference` computes the spec from them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from sympy import Expr
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import ShapeError
from rewriter.frame import GraphFacts, Lifted
from rewriter.indices import Bounds
from rewriter.operands import Operand
from rewriter.reference import reference
from rewriter.sample import MAX_ELEMENTS, Sample, Skip, concrete_expr
from rewriter.spec import SoftmaxSpec

__all__ = ["output_disagreement"]

_ROUNDINGS = {torch.float64: 2.0**20, torch.float32: 1024.0}
"""Roundings by which the two may differ, at the size of the largest value; scores are a few units,
so a wrong head, key or factor differs by far more."""
_ROUNDINGS_HALF = 32.0
_SPREAD = 2.0
"""Standard deviation of the scores: weights are neither even nor all on one key."""


def output_disagreement(lifted: Lifted, facts: GraphFacts) -> str:
    """Where the region and the spec differ, in words; `""` if they agree.

    Raises:
        Skip: if the region cannot be run on samples; the text says why.
    """
    if lifted.site.spec is None:
        return ""
    problem: Exception | None = None
    for small in (True, False):
        try:
            return _compare(lifted, facts, small=small)
        except ShapeError as error:
            return f"its operands do not fit the formula: {error}"
        except Exception as error:
            problem = error
    if isinstance(problem, Skip):
        raise problem
    raise Skip(f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}") from problem


def _compare(lifted: Lifted, facts: GraphFacts, *, small: bool) -> str:
    spec = replace(cast(SoftmaxSpec, lifted.site.spec), dropout=0.0)  # samples drop nothing
    bounds = cast(Bounds, lifted.bounds)
    found = lifted.found
    end = found.product if found.product is not None else found.anchor
    operands = [cast(Operand, x) for x in (lifted.q, lifted.k, lifted.v)]
    leaves = [*(x.node for x in operands), *lifted.tensors]
    sample = Sample(lifted, facts, [end], leaves, small=small)
    B, H, L, M = (
        concrete_expr(bounds.sizes[i], sample.shape) for i in (sym.b, sym.h, sym.q, sym.k)
    )
    if B * H * L * max(M, concrete_expr(operands[2].dim, sample.shape)) > MAX_ELEMENTS:
        raise Skip("too large to be checked on samples")

    sample.draw_truths(lifted)
    start = sample.run(operands[0].node)
    sample.values[operands[0].node] = start * _factor(spec, operands[0], sample)
    q, k, v = (_laid_out(x, sample) for x in operands)
    if any(x.has_batch and t.shape[0] != B for x, t in zip(operands, (q, k, v), strict=True)):
        raise Skip("the model ties sizes that differ in the sample")
    tensors = [sample.run(node) for node in lifted.tensors]
    sizes = [sample.shape[x] for x in lifted.sizes]
    real = sample.run(end)

    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    mine = reference(spec, q.double(), k.double(), v.double(), wide, sizes)
    order = lifted.out_order or tuple(range(real.dim()))
    plain = real.permute([order.index(n) for n in range(real.dim())])
    if plain.numel() != mine.numel():
        return f"the output has {plain.numel()} elements where the formula gives {mine.numel()}"
    return _difference(plain.reshape(mine.shape).double(), mine, v, sample)


def _difference(real: Tensor, mine: Tensor, v: Tensor, sample: Sample) -> str:
    dtype = max((x.dtype for x in sample.computed()), key=lambda d: torch.finfo(d).eps)
    roundings = _ROUNDINGS.get(dtype, _ROUNDINGS_HALF) * torch.finfo(dtype).eps
    size = max(float(x[x.isfinite()].abs().max()) for x in (v, mine) if x.isfinite().any())
    wrong = ~torch.isclose(real, mine, rtol=0.0, atol=roundings * size, equal_nan=True)
    if not bool(wrong.any()):
        return ""
    place = tuple(int(i) for i in wrong.nonzero()[0])
    said = f"where the formula gives {float(mine[place]):.6g}, at {place} (b, h, q, d)"
    return f"the output is {float(real[place]):.6g} {said}"


def _factor(spec: SoftmaxSpec, q: Operand, sample: Sample) -> float:
    """What makes scores of random queries and keys a few units large."""
    dim = concrete_expr(q.dim, sample.shape)
    scale = abs(float(spec.scale)) if spec.scale.is_number and spec.scale != 0 else dim**-0.5
    return _SPREAD / (scale * math.sqrt(dim))


def _laid_out(operand: Operand, sample: Sample) -> Tensor:
    """The operand as the op takes it: `[B, heads, rows, columns]`."""
    value: Any = sample.run(operand.node)

    def number(x: Any) -> Any:
        return concrete_expr(x, sample.shape) if isinstance(x, Expr) else x

    for target, args in operand.steps:
        plain = [[number(x) for x in a] if isinstance(a, list) else number(a) for a in args]
        value = target(value, *plain)
    return cast(Tensor, value)
