"""Checking a lifted formula once, at capture: real tensors of a small size through the real
subgraph and the formula.

Everything between the tensors that the formula reads and the score is run node by node on random
values; then score and mask are evaluated from the spec at every index, and the two have to agree.
A formula that treats far keys in another way, such as a window, is checked at a length that has
some.
"""

from __future__ import annotations

from typing import Any, cast

import sympy
import torch
from sympy import Expr
from torch import fx

from rewriter import symbols as sym
from rewriter.evaluate import evaluate
from rewriter.frame import GraphFacts, Lifted
from rewriter.operands import Operand
from rewriter.reading import value_of
from rewriter.sample import LONGEST_SMALL, MAX_ELEMENTS, Sample, Skip, concrete_expr
from rewriter.spec import SoftmaxSpec

__all__ = ["disagreement", "fingerprint"]

_FAR, _FARTHEST = 160, 600
"""Lengths for formulas with logarithmic buckets (those of T5 end at 128), and the most."""


def disagreement(lifted: Lifted, facts: GraphFacts) -> str:
    """Where the formula and the subgraph differ, in words; `""` if they agree."""
    if lifted.score is None or lifted.site.spec is None:
        return ""
    reason = ""
    for small in (True, False):
        try:
            found = (_compare(lifted, facts, seed, small) for seed in range(2))
            return next((x for x in found if x), "") or _far_disagreement(lifted, facts)
        except Exception as error:
            reason = (
                str(error)
                if isinstance(error, Skip)
                else f"not checked: {type(error).__name__}: {error}"
            )
    return reason


def _far_disagreement(lifted: Lifted, facts: GraphFacts) -> str:
    """The same at a length beyond the distances of which the formula speaks, if samples of that
    length can be run."""
    reach = _reach(cast(SoftmaxSpec, lifted.site.spec))
    if reach <= LONGEST_SMALL:
        return ""
    try:
        return _compare(lifted, facts, 0, True, length=reach)
    except Exception:
        return ""  # such as a table of positions that ends before


def _reach(spec: SoftmaxSpec) -> int:
    """A length at which every distance that the score and the mask name lies between two tokens."""
    formulas = (spec.score, spec.mask)
    numbers = [abs(float(x)) for f in formulas for x in f.atoms(sympy.Number) if x.is_finite]
    far = [int(x) + 2 for x in numbers if x <= _FARTHEST - 2]
    far += [_FAR] if any(f.has(sympy.log) for f in formulas) else []
    varies = any(f.has(sym.q, sym.k) for f in formulas)
    return max(far, default=0) if varies else 0


def fingerprint(lifted: Lifted, facts: GraphFacts) -> str:
    """Equal for two sites if their checks run the same operations on the same kinds of tensors."""
    found = lifted.found
    end = found.product if found.product is not None else found.anchor
    operands = [cast(Operand, x).node for x in (lifted.q, lifted.k, lifted.v)]
    leaves = [*operands, *(n for _, n in lifted.names)]
    places: dict[fx.Node, int] = {}
    lines = []
    for node in Sample(lifted, facts, [end], leaves).nodes:
        value = value_of(node)
        kind = f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else value
        what: Any = (node.op, node.target) if node.op in ("placeholder", "get_attr") else ""
        if node in leaves:
            what = [n for n, x in enumerate(leaves) if x is node]
        elif not what:
            what = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Place(places[n]))
            what = (str(node.target), what)
        places[node] = len(places)
        lines.append(f"{kind} {what}")
    return "\n".join(lines)


class _Place(int):
    """A node, by its number."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _compare(lifted: Lifted, facts: GraphFacts, seed: int, small: bool, *, length: int = 0) -> str:
    """One round on random values, at small sizes or, where the graph does not allow these, at those
    of the capture; with as many queries and keys as `length`, if it is given."""
    spec, score = lifted.site.spec, cast(fx.Node, lifted.score)
    assert spec is not None
    assert lifted.raw is not None
    assert lifted.bounds is not None
    leaves = [n for _, n in lifted.names]
    sample = Sample(
        lifted,
        facts,
        [score],
        leaves,
        product=lifted.product,
        seed=seed,
        small=small,
        length=length,
    )
    sample.draw_truths(lifted)
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
