"""Reading a tensor of a graph as a function of its own indices.

`Reader.at(node, index)` answers: what is the element of this tensor at these index expressions? It
walks up the graph: layout operations remap the indices, arithmetic builds sympy, `arange` is an
index, and what has no rule becomes a read of that tensor at the indices it really varies with.
Reading degrades; it never fails for want of a rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Integer, Symbol
from sympy.logic.boolalg import Boolean
from torch import fx

from rewriter.indices import Bounds, as_number, as_size, as_truth, literal
from rewriter.symbols import Formula, Read, Where
from rewriter.tables import band_of

__all__ = ["Index", "Reader", "Rule", "op_name", "shape_of", "value_of"]


Index = tuple[Expr, ...]


Rule = Callable[["Reader", fx.Node, Index], Formula | None]
"""The element of the node at the index, or None if the rule does not cover this use of the
operation."""


def op_name(node: fx.Node) -> str:
    """`"aten.add"` for every overload of add; `""` for what is not an operation of torch."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return ""


def value_of(node: fx.Node) -> Any:
    """The fake tensor, symbolic integer or other value that the node has at capture."""
    return node.meta.get("val")


def shape_of(node: fx.Node) -> tuple[Expr, ...]:
    """The shape of the tensor as sympy expressions."""
    return tuple(as_size(n) for n in value_of(node).shape)


def is_float(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor) and value_of(node).is_floating_point()


class Reader:
    """Reads the tensors of one graph.

    Args:
        bounds: the sizes of the index symbols in use.
        constant: gives the value of a `get_attr` node or of an input that is a known constant, or
            None.
        rules: the rule for each name that `op_name` gives, and for `"getitem"`.
        stop: what may not be read through; called with a node and an index, it answers with what
            stands there (the score's product, a tensor that is to stay opaque) or None.
    """

    def __init__(
        self,
        bounds: Bounds,
        constant: Callable[[fx.Node], torch.Tensor | None],
        rules: Mapping[str, Rule],
        stop: Callable[[fx.Node, Index], Formula | None] = lambda node, index: None,
    ) -> None:
        self.bounds = bounds
        self.constant = constant
        self.rules = rules
        self.stop = stop
        self.leaves: dict[Symbol, fx.Node] = {}
        self.exact = 0
        self.guarded = 0
        """Above 0 while a part of a tensor is read under a condition on the indices: outside of the
        part its elements are not used, and their indices may not exist."""
        self._memo: dict[tuple[fx.Node, Index, bool, bool], Formula] = {}
        self._names: dict[fx.Node, Symbol] = {}

    def at(self, node: fx.Node, index: Sequence[Expr]) -> Formula:
        """The element of `node` at `index`, one expression a dimension."""
        key = (node, tuple(index), bool(self.exact), bool(self.guarded))
        if key not in self._memo:
            self._memo[key] = self._read(node, key[1])
        return self._memo[key]

    def _read(self, node: fx.Node, index: Index) -> Formula:
        found = self.stop(node, index)
        if found is not None:
            return found
        value = value_of(node)
        if isinstance(value, int | torch.SymInt | float | bool):
            return self.scalar(node)
        known = self.constant(node)
        if known is not None and known.numel() == 1:
            return literal(known.item())
        band = band_of(known) if known is not None else None
        if band is not None:
            return band.at(index)
        if node.op == "call_function":
            name = "getitem" if node.target is operator.getitem else op_name(node)
            rule = self.rules.get(name)
            result = rule(self, node, index) if rule is not None else None
            if result is not None:
                return result
        return self.leaf(node, index)

    def part(self, node: fx.Node, index: Sequence[Expr]) -> Formula:
        """The element of a part of a tensor, to be used only where the index is one of the part."""
        self.guarded += 1
        try:
            return self.at(node, index)
        finally:
            self.guarded -= 1

    def leaf(self, node: fx.Node, index: Index) -> Formula:
        """A read of the tensor itself, where nothing more is known of it."""
        if node not in self._names:
            self._names[node] = Symbol(node.name)
            self.leaves[self._names[node]] = node
        shape = shape_of(node)
        if self.guarded:
            index = tuple(self.bounds.clamped(i, n) for i, n in zip(index, shape, strict=True))
        read = Read(
            self._names[node],
            *(Integer(0) if n == 1 else i for i, n in zip(index, shape, strict=True)),
        )
        return (
            cast(Boolean, sympy.Ne(read, 0))
            if value_of(node).dtype == torch.bool
            else cast(Expr, read)
        )

    def broadcast(self, arg: Any, index: Index, to: fx.Node | None = None) -> Formula:
        """The element of an operand that broadcasts to the index; operands may be plain numbers.

        Args:
            to: the result of the broadcast; where that has size 1 too, the index is kept.
        """
        if not isinstance(arg, fx.Node) or not isinstance(value_of(arg), torch.Tensor):
            return self.scalar(arg)
        return self.at(arg, broadcast_index(arg, to, index))

    def scalar(self, arg: Any) -> Formula:
        """A number given to an operation: a literal, a symbolic integer, or a node that carries
        one."""
        if isinstance(arg, fx.Node):
            arg = value_of(arg)
        if isinstance(arg, torch.SymInt):
            return as_size(arg)
        if isinstance(arg, torch.SymFloat):
            return cast(Expr, arg.node.expr)
        return literal(arg)

    def number(self, arg: Any, index: Index, to: fx.Node | None = None) -> Expr:
        return as_number(self.broadcast(arg, index, to))

    def truth(self, arg: Any, index: Index, to: fx.Node | None = None) -> Boolean:
        return as_truth(self.broadcast(arg, index, to))

    def size(self, arg: Any) -> Expr:
        """A size or position given as an int, a `SymInt`, or a node."""
        return cast(Expr, self.scalar(arg))


def broadcast_index(source: fx.Node, result: fx.Node | None, index: Index) -> Index:
    """Indices into a tensor that is broadcast to `result`: 0 where a dimension of size 1 is
    repeated."""
    shape = shape_of(source)
    tail = index[len(index) - len(shape) :]
    sizes = (
        shape_of(result)[-len(shape) :]
        if result is not None and shape
        else [Integer(0)] * len(shape)
    )
    return tuple(
        Integer(0) if n == 1 and m != 1 else i for i, n, m in zip(tail, shape, sizes, strict=True)
    )


def source_of(node: fx.Node, position: int = 0) -> fx.Node:
    """The tensor that the node is computed from, or another of its arguments."""
    return cast(fx.Node, node.args[position])


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def dim_of(node: fx.Node, dim: Any, rank: int | None = None) -> int:
    """A dimension counted from the front."""
    rank = len(value_of(source_of(node)).shape) if rank is None else rank
    return int(dim) % rank if rank else 0


def where(condition: Boolean, x: Expr, y: Expr) -> Expr:
    """A choice between two numbers."""
    return cast(Expr, Where(condition, x, y))


def choose(condition: Boolean, x: Formula, y: Formula) -> Formula:
    """`x if condition else y` of truth values, as logic."""
    if sympy.true in (x, y):
        condition, other = (condition, y) if x == sympy.true else (sympy.Not(condition), x)
        return cast(Boolean, sympy.Or(condition, other))
    return cast(Boolean, sympy.Or(sympy.And(condition, x), sympy.And(sympy.Not(condition), y)))


def either(node: fx.Node, condition: Boolean, x: Formula, y: Formula) -> Formula:
    """`x if condition else y` as the dtype of the node has it: logic, or a number."""
    if value_of(node).dtype == torch.bool:
        x, y = as_truth(x), as_truth(y)
        if condition == sympy.true or x == y:
            return x
        return choose(condition, x, y)
    x, y = as_number(x), as_number(y)
    if isinstance(condition, sympy.Not):
        return where(cast(Boolean, condition.args[0]), y, x)
    return where(condition, x, y)
