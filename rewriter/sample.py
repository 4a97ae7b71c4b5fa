"""Running a part of a captured graph on random values of a small size."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from rewriter.spec import SoftmaxSpec

__all__ = ["LONGEST_SMALL", "MAX_ELEMENTS", "Sample", "Skip", "concrete_expr"]

MAX_NODES = 2000
MAX_ELEMENTS = 2**24
_HUGE = 1e30
_SMALL = (5, 3, 7, 4, 6)
LONGEST_SMALL = min(_SMALL)
"""Distances between positions are smaller than this at every small size."""


class Skip(Exception):
    """The subgraph cannot be run on samples; the text says why."""


def concrete_expr(size: Expr, shape: Mapping[Symbol, int]) -> int:
    """A size as a number."""
    value = size.xreplace({k: sympy.Integer(v) for k, v in shape.items()})
    return int(value)


class Sample:
    """Random values for chosen nodes of a graph, and the nodes below them run on these values."""

    def __init__(
        self,
        lifted: Lifted,
        facts: GraphFacts,
        ends: Sequence[fx.Node],
        leaves: Collection[fx.Node],
        *,
        product: fx.Node | None = None,
        seed: int = 0,
        small: bool = True,
        length: int = 0,
    ) -> None:
        """
        Args:
            lifted: the site that the nodes belong to.
            facts: what is known of the graph.
            ends: the nodes that `run` will be asked for.
            leaves: nodes that get random values, whatever is above them.
            product: a product of queries and keys that gets random values too; what the same
                operation adds to it is computed.
            seed: of the random values.
            small: every symbolic size is a small number; else what it was at the capture.
            length: what the symbolic numbers of queries and keys are instead, and other sizes 2.
        """
        self.facts = facts
        self.leaves = frozenset(leaves)
        self.product = product
        self.generator = torch.Generator().manual_seed(seed)
        self.shape: dict[Symbol, int] = {}
        self.values: dict[fx.Node, Any] = {}
        self.contraction = contraction_of(product) if product is not None else None
        self.raw_product: torch.Tensor | None = None
        self.added = self.contraction.added if self.contraction is not None else None
        nodes = self._needed([*ends, *leaves, *([product] if product is not None else [])])
        self.nodes = nodes
        symbols = {x for n in nodes for x in _symbols(n)}
        symbols |= (
            {x for size in lifted.bounds.sizes.values() for x in size.free_symbols}
            if lifted.bounds
            else set()
        )
        for n, symbol in enumerate(sorted(symbols, key=str)):
            self.shape[symbol] = _SMALL[n % 5] + n // 5
        if length and lifted.bounds is not None:
            long = {x for i in (sym.q, sym.k) for x in lifted.bounds.sizes[i].free_symbols}
            self.shape |= {x: length if x in long else 2 for x in symbols}
        if not small:
            inputs = [n for n in lifted.found.anchor.graph.nodes if n.op == "placeholder"]
            self.shape |= {x: n for node in (*inputs, *nodes) for x, n in hints(node).items()}

    def _needed(self, ends: Sequence[fx.Node]) -> list[fx.Node]:
        """The nodes above the ends, up to the leaves, in the order of the graph."""
        seen, open_nodes = set(ends), list(ends)
        while open_nodes:
            node = open_nodes.pop()
            if node in self.leaves:
                continue
            sources = node.all_input_nodes
            if node is self.product:
                sources = [] if self.added is None else [self.added]
            for source in sources:
                if source not in seen:
                    seen.add(source)
                    open_nodes.append(source)
            if len(seen) > MAX_NODES:
                raise Skip("it is made of too many nodes to be checked on samples")
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
        if node is self.product:
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
        args, kwargs = _without_dropout(op_name(node), args, kwargs)
        try:
            return cast(Any, node.target)(*args, **kwargs)
        except Exception as error:
            name, why = op_name(node) or node.name, str(error).splitlines()[0][:120]
            raise Skip(f"{name} does not run on samples: {why}") from error

    def draw_truths(self, lifted: Lifted) -> None:
        """Random 0 and 1 for tensors that the score multiplies with a huge number, to hide keys:
        other values would be beyond what a score can hold."""
        spec = cast(SoftmaxSpec, lifted.site.spec)
        masks = {
            str(read.args[0])
            for term in sympy.Add.make_args(spec.score)
            if abs(term.as_coeff_Mul()[0]) > _HUGE
            for read in sym.reads(term)
        }
        for tensor, node in zip(spec.tensors, lifted.tensors, strict=True):
            if tensor.name in masks:
                like = self.run(node)
                draw = torch.rand(like.shape, generator=self.generator) < 0.6
                self.values[node] = draw.to(like.dtype)

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


def _without_dropout(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with which an operation drops nothing: samples are compared number by number."""
    if name == "aten.dropout":
        return (args[0], 0.0, False), {}
    if name == "aten.scaled_dot_product_attention":
        return (*args[:4], *(0.0 for _ in args[4:5]), *args[5:]), kwargs | (
            {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        )
    return args, kwargs


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
