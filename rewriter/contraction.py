"""Products of two activations, whatever operation spells them: matmul, bmm, mm, baddbmm, einsum.

A contraction names every axis of its operands and of its result, as einsum does, so that finding
and lifting need not know which operation it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from sympy import Expr, Integer
from torch import fx

from rewriter.indices import as_number
from rewriter.reading import Index, Reader, broadcast_index, op_name, shape_of, value_of
from rewriter.rules_layout import permute_index, slice_index, view_index
from rewriter.symbols import Formula

__all__ = ["Contraction", "Step", "contraction_of", "outer", "step_up"]

OPERATIONS = ("aten.matmul", "aten.bmm", "aten.mm", "aten.baddbmm", "aten.einsum")


@dataclass(frozen=True)
class Contraction:
    """`alpha · sum over the axes that the result lacks of a · b, plus beta · added`."""

    node: fx.Node
    a: fx.Node
    b: fx.Node
    a_axes: tuple[str, ...]
    b_axes: tuple[str, ...]
    axes: tuple[str, ...]
    """The axes of the result."""
    alpha: Any = 1
    added: fx.Node | None = None
    beta: Any = 1

    @property
    def summed(self) -> str:
        """The one axis that is summed over."""
        return next(x for x in self.a_axes if x not in self.axes)

    @property
    def summed_size(self) -> Expr:
        """How many products each sum has."""
        return shape_of(self.a)[self.a_axes.index(self.summed)]

    def operand_index(
        self, operand: fx.Node, axes: tuple[str, ...], index: dict[str, Expr]
    ) -> Index:
        """Indices of an operand, from the index of each axis; one that is broadcast is read at
        0."""
        sizes = dict(zip(self.axes, shape_of(self.node), strict=True))
        shape = shape_of(operand)
        return tuple(
            Integer(0) if n == 1 and sizes.get(x, n) != 1 else index[x]
            for n, x in zip(shape, axes, strict=True)
        )


def contraction_of(node: fx.Node) -> Contraction | None:
    """The contraction that the node computes, if it is one of two activations over one axis."""
    name = op_name(node)
    if name not in OPERATIONS or not isinstance(value_of(node), torch.Tensor):
        return None
    if name == "aten.einsum":
        return _einsum(node)
    added = cast(fx.Node, node.args[0]) if name == "aten.baddbmm" else None
    a, b = (cast(fx.Node, x) for x in node.args[int(added is not None) :][:2])
    ranks = [value_of(x).dim() for x in (a, b)]
    if min(ranks) < 2:
        return None
    batch = tuple(f"*{n}" for n in range(max(ranks) - 2))

    def leading(rank: int) -> tuple[str, ...]:
        return batch[len(batch) - (rank - 2) :]

    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    return Contraction(
        node,
        a,
        b,
        (*leading(ranks[0]), "m", "c"),
        (*leading(ranks[1]), "c", "n"),
        (*batch, "m", "n"),
        alpha=alpha,
        added=None if beta == 0 else added,
        beta=beta,
    )


def outer(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    """The rule of a product that sums nothing: of a column with a row, such as who is padding of
    queries and of keys."""
    c = contraction_of(node)
    if c is None or c.summed_size != 1 or c.added is not None or c.alpha != 1:
        return None
    where = dict(zip(c.axes, index, strict=True)) | {c.summed: cast(Expr, Integer(0))}
    a = r.at(c.a, c.operand_index(c.a, c.a_axes, where))
    return as_number(a) * as_number(r.at(c.b, c.operand_index(c.b, c.b_axes, where)))


def _einsum(node: fx.Node) -> Contraction | None:
    equation, operands = (
        cast(str, node.args[0]).replace(" ", ""),
        cast("list[fx.Node]", node.args[1]),
    )
    if len(operands) != 2 or "->" not in equation:
        return None
    left, result = equation.split("->")
    sides = left.split(",")
    first, second = (_axes(x, value_of(n).dim()) for x, n in zip(sides, operands, strict=True))
    out = _axes(result, value_of(node).dim())
    if any(len(set(x)) != len(x) for x in (first, second, out)):
        return None
    summed = [x for x in first if x not in out]
    if (
        len(summed) != 1
        or summed[0] not in second
        or any(x not in (*out, summed[0]) for x in second)
    ):
        return None
    return Contraction(node, operands[0], operands[1], first, second, out)


def _axes(letters: str, rank: int) -> tuple[str, ...]:
    """One name an axis; the axes of an ellipsis are numbered from the right, as they broadcast."""
    before, dots, after = letters.partition("...")
    if not dots:
        return tuple(letters)
    hidden = rank - len(before) - len(after)
    return (*before, *(f"*{n}" for n in reversed(range(hidden))), *after)


@dataclass(frozen=True)
class Step:
    """One operation further up that only moves or scales elements."""

    node: fx.Node
    index: Index
    factor: Any = 1
    """What the element there is multiplied with: a number, or a node with a 0-dimensional
    tensor."""
    divides: bool = False


def step_up(r: Reader, node: fx.Node, index: Index) -> Step | None:
    """Where the element at the index comes from, if the node only moves elements or scales all of
    them alike."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, name = node.args[0], op_name(node)
    if not isinstance(value_of(source), torch.Tensor):
        return None
    if name in ("aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.expand_copy"):
        return None if name == "aten.detach" else Step(source, index)
    if name in ("aten.to", "aten._to_copy", "aten.type_as"):
        return Step(source, index) if value_of(source).dtype == value_of(node).dtype else None
    if name == "aten.dropout":
        return None if node.args[2] and node.args[1] else Step(source, index)
    if name in _VIEWS:
        return Step(source, view_index(r.bounds, node, index))
    if name in _PERMUTES:
        return Step(source, permute_index(node, index))
    handler = _OTHERS.get(name)
    return handler(r, node, source, index) if handler is not None else None


def _expand(r: Reader, node: fx.Node, source: fx.Node, index: Index) -> Step | None:
    return Step(source, broadcast_index(source, node, index))


def _unsqueeze(r: Reader, node: fx.Node, source: fx.Node, index: Index) -> Step | None:
    dim = cast(int, node.args[1]) % len(index)
    return Step(source, index[:dim] + index[dim + 1 :])


def _slice(r: Reader, node: fx.Node, source: fx.Node, index: Index) -> Step | None:
    return Step(source, slice_index(r, node, index))


def _repeat_interleave(r: Reader, node: fx.Node, source: fx.Node, index: Index) -> Step | None:
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if isinstance(node.args[1], fx.Node) or dim is None:
        return None
    dim = cast(int, dim) % len(index)
    whole = r.bounds.split(index[dim], r.size(node.args[1]))[0]
    return Step(source, (*index[:dim], whole, *index[dim + 1 :]))


def _scaled(r: Reader, node: fx.Node, source: fx.Node, index: Index) -> Step | None:
    factor = node.args[1]
    if isinstance(factor, fx.Node) and (
        not isinstance(value_of(factor), torch.Tensor) or value_of(factor).dim()
    ):
        return None
    if (
        value_of(source).shape != value_of(node).shape
        or value_of(source).dtype != value_of(node).dtype
    ):
        return None
    return Step(source, index, factor, op_name(node) == "aten.div")


_VIEWS = {
    f"aten.{x}"
    for x in [
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "view_as",
        "reshape_as",
        "squeeze",
    ]
}
_PERMUTES = {
    f"aten.{x}"
    for x in [
        "permute",
        "transpose",
        "t",
        "mT",
        "mH",
        "adjoint",
        "numpy_T",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
    ]
}
_OTHERS: dict[str, Callable[[Reader, fx.Node, fx.Node, Index], Step | None]] = {
    "aten.expand": _expand,
    "aten.expand_as": _expand,
    "aten.broadcast_to": _expand,
    "aten.unsqueeze": _unsqueeze,
    "aten.slice": _slice,
    "aten.repeat_interleave": _repeat_interleave,
    "aten.mul": _scaled,
    "aten.div": _scaled,
}
