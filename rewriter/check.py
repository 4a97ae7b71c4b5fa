"""Checking a lifted formula once, at capture: real tensors of a small size through the real
subgraph and the formula.

Everything between the tensors that the formula reads and the score is run node by node on random
values; then score and mask are evaluated from the spec at every index, and the two have to agree.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from sympy import Expr
from torch import fx

from rewriter import symbols as sym
from rewriter.frame import GraphFacts, Lifted
from rewriter.reference import evaluate
from rewriter.sample import MAX_ELEMENTS, Sample, Skip, concrete_expr

__all__ = ["disagreement"]


def disagreement(lifted: Lifted, facts: GraphFacts) -> str:
    """Where the formula and the subgraph differ, in words; `""` if they agree."""
    if lifted.score is None or lifted.site.spec is None:
        return ""
    reason = ""
    for small in (True, False):
        try:
            return next((x for seed in range(2) if (x := _compare(lifted, facts, seed, small))), "")
        except Exception as error:
            reason = (
                str(error)
                if isinstance(error, Skip)
                else f"not checked: {type(error).__name__}: {error}"
            )
    return reason


def _compare(lifted: Lifted, facts: GraphFacts, seed: int, small: bool) -> str:
    """One round on random values, at small sizes or, where the graph does not allow these, at those
    of the capture."""
    spec, score = lifted.site.spec, cast(fx.Node, lifted.score)
    assert spec is not None
    assert lifted.raw is not None
    assert lifted.bounds is not None
    leaves = [n for _, n in lifted.names]
    sample = Sample(lifted, facts, [score], leaves, product=lifted.product, seed=seed, small=small)
    real = sample.run(score)
    dtype = torch.float64 if real.dtype == torch.float64 else torch.float32

    sizes = {name: concrete_expr(lifted.bounds.sizes[i], sample.shape) for name, i in _AXES.items()}
    if sizes["B"] * sizes["H"] * sizes["L"] * sizes["M"] > MAX_ELEMENTS:
        raise Skip("too large to be checked on samples")
    values: dict[str, Any] = dict(sizes)
    shapes = [(-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,)]
    for name, size, shape in zip("bhqk", "BHLM", shapes, strict=True):
        values[name] = torch.arange(sizes[size]).view(shape)
    values |= {str(k): n for k, n in sample.shape.items()}
    values |= {f"n{i}": sample.shape[x] for i, x in enumerate(lifted.sizes)}
    full = tuple(sizes[n] for n in "BHLM")

    index = [evaluate(i, values, {}, dtype) for i in lifted.raw[1]]
    grid = [torch.as_tensor(i).expand(full) for i in index]
    real = real[tuple(grid)]
    tensors = {
        str(t.name): sample.run(n) for t, n in zip(spec.tensors, lifted.tensors, strict=True)
    }
    seen = torch.as_tensor(evaluate(spec.mask, values, tensors, dtype)).expand(full)
    if real.dtype == torch.bool:
        return (
            ""
            if bool((real == seen).all())
            else f"the mask differs at {_first(real != seen)} (b, h, q, k)"
        )

    if lifted.product is not None:
        where = [evaluate(i, values, {}, dtype) for i in lifted.product_index]
        sample.run(lifted.product)
        product = cast(torch.Tensor, sample.raw_product).to(dtype)
        product = product[tuple(torch.as_tensor(i).expand(full) for i in where)]
        values["s"] = product * cast(Any, evaluate(_inner_scale(lifted), values, tensors, dtype))
    else:
        values["s"] = torch.zeros(())
    mine = torch.as_tensor(evaluate(spec.score, values, tensors, dtype)).to(dtype).expand(full)
    hidden = ~seen
    real = real.to(dtype)
    if bool((real[hidden] > -6.0e4).any()):
        place = _first(hidden & (real > -6.0e4))
        return f"a key that the formula hides is seen at {place} (b, h, q, k)"
    eps = max(torch.finfo(x.dtype).eps for x in sample.computed())
    wrong = seen & ~torch.isclose(
        mine,
        real,
        rtol=64 * eps,
        atol=64 * eps * float(real[seen].abs().max() if seen.any() else 1),
    )
    if bool(wrong.any()):
        place = _first(wrong)
        said = f"where the formula says {float(mine[place]):.6g}, at {place} (b, h, q, k)"
        return f"the score is {float(real[place]):.6g} {said}"
    return ""


_AXES = {"B": sym.b, "H": sym.h, "L": sym.q, "M": sym.k}


def _first(wrong: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in wrong.nonzero()[0])


def _inner_scale(lifted: Lifted) -> Expr:
    """What makes s from the product as the graph has it: the scale less the factors that stand on q
    and k."""
    assert lifted.site.spec is not None
    return lifted.site.spec.scale / lifted.factor
