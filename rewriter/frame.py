"""What lifting knows of a graph, what it says of a site, and the index symbols in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import sympy
import torch
from sympy import Expr, Integer, Symbol
from torch import fx

from rewriter import symbols as sym
from rewriter.find import Found
from rewriter.indices import Bounds
from rewriter.operands import Operand
from rewriter.reading import Index, Reader, is_float, op_name
from rewriter.rules import RULES
from rewriter.rules_layout import has_float_input
from rewriter.sites import Site
from rewriter.symbols import Formula

__all__ = [
    "COLUMN",
    "PRODUCT",
    "WEIGHT",
    "Frame",
    "GraphFacts",
    "Lifted",
    "frame_of",
    "reader_of",
    "trained_by",
]

WEIGHT = Symbol("weight", real=True)
PRODUCT = Symbol("product", real=True)
COLUMN = Symbol("d", integer=True, nonnegative=True)


class GraphFacts(Protocol):
    """What is known of a graph besides its nodes."""

    written: frozenset[fx.Node]
    """Tensors that are written in place."""
    without_grad: frozenset[fx.Node]
    """Nodes in a region that records no gradient, in a graph that does."""

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a node that never changes."""

    def overwritten(self, node: fx.Node, end: fx.Node) -> bool:
        """The tensor changes between its first reader on the way to `end`, and `end`."""

    def origin(self, node: fx.Node) -> tuple[str, str]:
        """A short name for the tensor, and where it comes from in words."""

    def path(self, node: fx.Node) -> str:
        """The module that computes the node."""


@dataclass(frozen=True)
class Lifted:
    """A site, and for one that was understood the nodes that its op node will read."""

    site: Site
    found: Found
    q: Operand | None = None
    k: Operand | None = None
    v: Operand | None = None
    tensors: tuple[fx.Node, ...] = ()
    sizes: tuple[Symbol, ...] = ()
    """Shape symbols of the graph, in the order of `spec.sizes`."""
    lead: tuple[Expr, ...] = ()
    """Sizes of the leading dimensions of the result, those before rows and columns."""
    out_order: tuple[int, ...] = ()
    """The permutation from (leading..., row, column) to the axes of the node that is replaced."""
    score: fx.Node | None = None
    """The node whose formula was read (the softmax's input, or a mask), for the check."""
    product: fx.Node | None = None
    raw: tuple[Formula, Index] | None = None
    """The formula of `score` in the symbols of the graph, and the index at which it was read."""
    product_index: Index = ()
    """The index at which `product` was read."""
    factor: Expr = Integer(1)
    """What multiplied q and k before their product, and is part of the spec's scale."""
    bounds: Bounds | None = None
    names: tuple[tuple[Symbol, fx.Node], ...] = ()
    """Every tensor that was read, by the name that it has in `raw`."""

    def moved(self, mapping: Mapping[fx.Node, fx.Node]) -> Lifted:
        """The same for a copy of the graph."""
        found = replace(
            self.found,
            anchor=mapping[self.found.anchor],
            product=mapping[self.found.product] if self.found.product is not None else None,
        )
        q, k, v = (
            replace(x, node=mapping[x.node]) if x is not None else None
            for x in (self.q, self.k, self.v)
        )
        return replace(
            self, found=found, q=q, k=k, v=v, tensors=tuple(mapping[n] for n in self.tensors)
        )


@dataclass
class Frame:
    """The index symbols of one site: what stands for each axis."""

    lead: tuple[Expr, ...]
    """The index of each leading dimension, in b and h."""
    lead_sizes: tuple[Expr, ...]
    batch: Expr
    heads: Expr
    q_len: Expr
    kv_len: Expr

    @property
    def bounds(self) -> Bounds:
        return Bounds({sym.b: self.batch, sym.h: self.heads, sym.q: self.q_len, sym.k: self.kv_len})


def frame_of(
    lead_sizes: Sequence[Expr], q_len: Expr, kv_len: Expr, heads: Expr | None = None
) -> Frame:
    """The last leading dimension is heads and those before are batch; a single one is batch·heads
    if `heads` is given."""
    sizes = tuple(lead_sizes)
    if heads is not None:
        batch = sympy.cancel(sizes[0] / heads)
        return Frame((sym.b * heads + sym.h,), sizes, batch, heads, q_len, kv_len)
    if len(sizes) < 2:
        lead = (sym.b,) if sizes else ()
        return Frame(lead, sizes, sizes[0] if sizes else Integer(1), Integer(1), q_len, kv_len)
    batch = sympy.expand(sympy.Mul(*sizes[:-1]))
    bounds = Bounds({sym.b: batch})
    lead = (*bounds.unravel(sym.b, sizes[:-1]), sym.h) if len(sizes) > 2 else (sym.b, sym.h)
    return Frame(lead, sizes, batch, sizes[-1], q_len, kv_len)


def reader_of(
    facts: GraphFacts,
    bounds: Bounds,
    stop: Callable[[fx.Node, Index], Formula | None] = lambda node, index: None,
) -> Reader:
    """A reader that does not look through a tensor that is written in place, or through one to
    which no gradient flows although its sources may want one."""

    def guarded(node: fx.Node, index: Index) -> Formula | None:
        found = stop(node, index)
        if found is not None:
            return found
        ends = node in facts.written or (node in facts.without_grad and has_float_input(node))
        return reader.leaf(node, index) if ends else None

    reader = Reader(bounds, facts.constant, RULES, guarded)
    return reader


def trained_by(facts: GraphFacts, reader: Reader) -> Callable[[Expr], bool]:
    """Whether a formula reads a tensor that may want a gradient: one that is computed from a
    parameter or from a floating input."""

    def wants(node: fx.Node) -> bool:
        seen, open_nodes = {node}, [node]
        while open_nodes:
            x = open_nodes.pop()
            if op_name(x) == "aten.detach":
                continue
            is_given = x.op == "placeholder" and is_float(x) and facts.constant(x) is None
            if is_given and not facts.origin(x)[1].startswith("buffer"):
                return True
            new = [y for y in x.all_input_nodes if y not in seen]
            seen.update(new)
            open_nodes.extend(new)
        return False

    def trained(formula: Expr) -> bool:
        return any(wants(reader.leaves[cast(Symbol, r.args[0])]) for r in sym.reads(formula))

    return trained
