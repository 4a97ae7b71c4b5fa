"""Checking a lifted formula once, at capture: real tensors of a small size through the real
subgraph and the formula.

Everything between the tensors that the formula reads and the score is run node by node on random
values; then score and mask are evaluated from the spec at every index, and the two have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Symbol
from torch import fx

from rewriter import symbols as sym
from rewriter.contraction import Contraction, contraction_of
from rewriter.frame import GraphFacts, Lifted
from rewriter.indices import as_size, concrete
from rewriter.reading import op_name, shape_of, value_of
from rewriter.reference import evaluate

__all__ = ["disagreement"]

MAX_NODES = 2000
MAX_ELEMENTS = 2**24


class _Skip(Exception):
    """The subgraph cannot be run on samples; the text says why."""


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
                if isinstance(error, _Skip)
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
    generator = torch.Generator().manual_seed(seed)
    sample = _Sample(lifted, facts, generator, small)
    real = sample.run(score)
    dtype = torch.float64 if real.dtype == torch.float64 else torch.float32

    sizes = {name: concrete_expr(lifted.bounds.sizes[i], sample.shape) for name, i in _AXES.items()}
    if sizes["B"] * sizes["H"] * sizes["L"] * sizes["M"] > MAX_ELEMENTS:
        raise _Skip("too large to be checked on samples")
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
        where = [evaluate(i, values, {}, dtype) for i in sample.product_index]
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


def concrete_expr(size: Expr, shape: Mapping[Symbol, int]) -> int:
    value = size.xreplace({k: sympy.Integer(v) for k, v in shape.items()})
    return int(value)


class _Sample:
    """Random values for the tensors that a formula reads, and the nodes below them run on these
    values."""

    def __init__(
        self, lifted: Lifted, facts: GraphFacts, generator: torch.Generator, small: bool
    ) -> None:
        self.lifted = lifted
        self.facts = facts
        self.generator = generator
        self.leaves = {n for _, n in lifted.names} | (
            {lifted.product} if lifted.product is not None else set()
        )
        self.shape: dict[Symbol, int] = {}
        self.values: dict[fx.Node, Any] = {}
        self.product_index = lifted.product_index
        self.contraction = contraction_of(lifted.product) if lifted.product is not None else None
        self.raw_product: torch.Tensor | None = None
        self.added = self.contraction.added if self.contraction is not None else None
        nodes = self._needed([cast(fx.Node, lifted.score), *self.leaves])
        symbols = {x for n in nodes for x in _symbols(n)}
        symbols |= (
            {x for size in lifted.bounds.sizes.values() for x in size.free_symbols}
            if lifted.bounds
            else set()
        )
        for n, symbol in enumerate(sorted(symbols, key=str)):
            self.shape[symbol] = (5, 3, 7, 4, 6)[n % 5] + n // 5
        if not small:
            inputs = [n for n in cast(fx.Node, lifted.score).graph.nodes if n.op == "placeholder"]
            self.shape |= {x: n for node in (*inputs, *nodes) for x, n in hints(node).items()}

    def _needed(self, ends: list[fx.Node]) -> list[fx.Node]:
        seen, open_nodes = set(ends), list(ends)
        while open_nodes:
            node = open_nodes.pop()
            if node in self.leaves and (node is not self.lifted.product or self.added is None):
                continue
            sources = [self.added] if node is self.lifted.product else node.all_input_nodes
            for source in cast("list[fx.Node]", sources):
                if source not in seen:
                    seen.add(source)
                    open_nodes.append(source)
            if len(seen) > MAX_NODES:
                raise _Skip("the score is made of too many nodes to be checked on samples")
        return sorted(seen)

    def run(self, node: fx.Node) -> Any:
        """The value of a node."""
        for needed in self._needed([node]):
            if needed not in self.values:
                self.values[needed] = self._value(needed)
        return self.values[node]

    def _value(self, node: fx.Node) -> Any:
        value = value_of(node)
        if isinstance(value, int | float | bool | torch.SymInt):
            return concrete(value, self.shape) if isinstance(value, torch.SymInt) else value
        known = self.facts.constant(node)
        if known is not None:
            return known.cpu()
        if node is self.lifted.product:
            return self._product(value)
        if node in self.leaves or node.op in ("placeholder", "get_attr"):
            return self._random(value)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.values[n])
        kwargs = {
            k: ("cpu" if k == "device" else v) for k, v in cast("dict[str, Any]", kwargs).items()
        }
        args = tuple(
            "cpu" if isinstance(a, torch.device) else a for a in cast("tuple[Any, ...]", args)
        )
        try:
            return cast(Any, node.target)(*args, **kwargs)
        except Exception as error:
            name, why = op_name(node) or node.name, str(error).splitlines()[0][:120]
            raise _Skip(f"{name} does not run on samples: {why}") from error

    def computed(self) -> list[torch.Tensor]:
        """Every floating tensor of the subgraph: its coarsest dtype decides how near is near
        enough."""
        return [
            x for x in self.values.values() if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]

    def _product(self, like: torch.Tensor) -> torch.Tensor:
        """Queries times keys at random, with what the same operation adds to it."""
        contraction = cast(Contraction, self.contraction)
        self.raw_product = product = self._random(like)
        if isinstance(contraction.alpha, int | float):
            product = product * contraction.alpha
        if self.added is not None:
            product = product + self.values[self.added] * contraction.beta
        return product

    def _random(self, like: torch.Tensor) -> torch.Tensor:
        shape = [concrete(n, self.shape) for n in like.shape]
        if like.dtype == torch.bool:
            return torch.rand(shape, generator=self.generator) < 0.6
        if not like.is_floating_point():
            return torch.randint(0, 3, shape, generator=self.generator, dtype=like.dtype)
        return torch.randn(shape, generator=self.generator).to(like.dtype)


def hints(node: fx.Node) -> dict[Symbol, int]:
    """The sizes that shape symbols had when the graph was captured."""
    value = value_of(node)
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return {
        n.node.expr: int(n.node.hint)
        for n in sizes
        if isinstance(n, torch.SymInt)
        and isinstance(n.node.expr, Symbol)
        and n.node.hint is not None
    }


def _symbols(node: fx.Node) -> set[Symbol]:
    value = value_of(node)
    if isinstance(value, torch.SymInt):
        return cast("set[Symbol]", as_size(value).free_symbols)
    if isinstance(value, torch.Tensor):
        return {x for n in shape_of(node) for x in n.free_symbols}
    return set()
