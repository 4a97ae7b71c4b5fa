"""Taps: further tensors of a site that passes may read, found in the graph around it.

The input is what feeds the projection of the queries. The residual is the hidden state that enters
the layer: the nearest tensor at or above the input that is added to what the attention gives. The
link is the pair of tensors between which a KV cache grows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import sympy
import torch
from sympy import Expr
from torch import fx

from rewriter import symbols as sym
from rewriter.capture import Captured
from rewriter.frame import Lifted
from rewriter.indices import Bounds, as_size
from rewriter.operands import Operand
from rewriter.reading import is_float, op_name, value_of

__all__ = ["Link", "Tapped", "input_of", "link_of", "residual_of"]

_PRODUCTS = {"aten.linear": 0, "aten.addmm": 1, "aten.mm": 0, "aten.matmul": 0, "aten.bmm": 0}
"""Operations that project with a parameter, and the argument that is projected."""

_FAR = 400
"""Nodes that a search looks at before it gives up."""


@dataclass(frozen=True)
class Tapped:
    """A tensor of the graph that holds `[B, L, C]`."""

    node: fx.Node
    dim: int
    """C."""
    is_transposed: bool
    """It is `[L, B, C]`."""


@dataclass(frozen=True)
class Link:
    """Where a KV cache grows: `full` is `past` with new keys behind it."""

    full: fx.Node
    past: fx.Node


def input_of(lifted: Lifted, captured: Captured) -> Tapped | None:
    """What feeds the projection of the queries."""
    assert lifted.q is not None
    open_nodes, seen = [lifted.q.node], {lifted.q.node}
    while open_nodes and len(seen) < _FAR:
        node = open_nodes.pop(0)
        projected = _projected(node, captured)
        if projected is not None:
            found = _tapped(projected, lifted)
            if found is not None:
                return found
            continue
        for parent in _main_inputs(node):
            if parent not in seen:
                seen.add(parent)
                open_nodes.append(parent)
    return None


def _projected(node: fx.Node, captured: Captured) -> fx.Node | None:
    place = _PRODUCTS.get(op_name(node))
    if place is None:
        return None
    x, weight = cast("tuple[fx.Node, fx.Node]", node.args[place : place + 2])
    return x if _is_parameter(weight, captured) else None


def _is_parameter(node: fx.Node, captured: Captured) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.op == "get_attr":
        return True
    return node.op == "placeholder" and captured.origin(node)[1].startswith("parameter")


def _main_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """Inputs as large as the largest one: from a rotation on with what is rotated."""
    if node.target is operator.getitem:
        return iter(node.all_input_nodes)
    tensors = (x for x in node.all_input_nodes if isinstance(value_of(x), torch.Tensor))
    given = [x for x in tensors if is_float(x)]
    sizes = [_count(x) for x in given]
    most = max(sizes, default=0)
    return (x for x, n in zip(given, sizes, strict=True) if n == most)


def _count(node: fx.Node) -> int:
    """How many elements the example has."""
    total = 1
    for n in value_of(node).shape:
        hint = n.node.hint if isinstance(n, torch.SymInt) else n
        total *= int(hint or 1)
    return total


def _tapped(node: fx.Node, lifted: Lifted) -> Tapped | None:
    """The node as `[B, L, C]`, if its dimensions say that it is."""
    sizes = cast(Bounds, lifted.bounds).sizes
    batch, length = sizes[sym.b], sizes[sym.q]
    shape = [as_size(n) for n in value_of(node).shape]
    if not is_float(node) or len(shape) < 2 or not shape[-1].is_Integer:
        return None
    dim, lead = int(shape[-1]), shape[:-1]
    if _product(lead) != sympy.expand(batch * length):
        return None
    is_transposed = len(lead) == 2 and lead[0] == length != batch and lead[1] == batch
    if not is_transposed and len(lead) > 1 and lead[0] != batch:
        return None
    return Tapped(node, dim, is_transposed)


def _product(sizes: list[Expr]) -> Expr:
    return cast(Expr, sympy.expand(sympy.Mul(*sizes)))


def residual_of(lifted: Lifted, captured: Captured) -> Tapped | None:
    """The hidden state that enters the layer, before its norm."""
    tapped = input_of(lifted, captured)
    if tapped is None:
        return None
    added = _added_to(lifted)
    open_nodes, seen = [tapped.node], {tapped.node}
    while open_nodes and len(seen) < _FAR:
        node = open_nodes.pop(0)
        if node in added:
            return _tapped(node, lifted)
        if op_name(node) in _PRODUCTS:
            continue
        for parent in _main_inputs(node):
            if parent not in seen:
                seen.add(parent)
                open_nodes.append(parent)
    return None


def _added_to(lifted: Lifted) -> set[fx.Node]:
    """Everything that is added to what follows from the site's output, and layouts of it."""
    found: set[fx.Node] = set()
    start = lifted.found.product if lifted.found.product is not None else lifted.found.anchor
    open_nodes, below = [start], {start}
    while open_nodes and len(below) < _FAR:
        node = open_nodes.pop(0)
        for user in node.users:
            if op_name(user) in ("aten.add", "aten.add_"):
                others = [x for x in user.all_input_nodes if x not in below]
                streams = [x for x in others if _count(x) == _count(user)]
                if streams:
                    found.update(y for x in streams for y in _layouts(x))
                    continue
            if user not in below:
                below.add(user)
                open_nodes.append(user)
    return found


def _layouts(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and what it is a view or a cast of."""
    yield node
    while len(node.all_input_nodes) == 1 and _count(node.all_input_nodes[0]) == _count(node):
        if op_name(node) not in ("aten.view", "aten.reshape", "aten.to", "aten._to_copy"):
            return
        node = node.all_input_nodes[0]
        yield node


def link_of(lifted: Lifted, operand: Literal["k", "v"] = "k") -> Link | None:
    """Where the keys or values of the site come out of a KV cache with new ones behind them."""
    node = cast(Operand, getattr(lifted, operand)).node
    keys = cast(Bounds, lifted.bounds).sizes[sym.k]
    for _ in range(12):
        if op_name(node) == "aten.cat":
            parts = cast("list[fx.Node]", node.args[0])
            dim = cast(int, node.args[1]) if len(node.args) > 1 else 0
            grows = as_size(value_of(node).shape[dim]) == keys  # not rotated and plain channels
            return Link(node, parts[0]) if len(parts) == 2 and grows else None
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None
