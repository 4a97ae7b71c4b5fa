"""Reading the scores of a softmax down to the product of queries and keys, and what is beside and
around it: a shift of the rows, a column that is no key."""

from __future__ import annotations

from typing import cast

import sympy
import torch
from sympy import Expr, Integer
from torch import fx

from rewriter import symbols as sym
from rewriter.contraction import Contraction, contraction_of
from rewriter.find import PROJECTIONS
from rewriter.frame import COLUMN, PRODUCT, Frame, GraphFacts, reader_of
from rewriter.indices import as_number
from rewriter.operands import Operand, Unreadable, operand
from rewriter.reading import Index, Reader, op_name, shape_of, value_of
from rewriter.symbols import Formula

__all__ = [
    "ScoreReader",
    "first_product",
    "leads_to_product",
    "query_and_key",
    "sides",
    "sink_of",
    "without_shift",
]


CASTS = ("aten.to", "aten._to_copy", "aten.float", "aten.double", "aten.type_as")


def without_shift(anchor: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    """The scores of a softmax before the maximum along its axis is taken off them, which does not
    change it."""
    node, axis = cast(fx.Node, anchor.args[0]), cast(int, anchor.args[1]) % len(index)
    while True:
        if op_name(node) in CASTS and value_of(node).is_floating_point():
            source = cast(fx.Node, node.args[0])
            if value_of(source).shape == value_of(node).shape and op_name(source) == "aten.sub":
                node = source
                continue
        if op_name(node) != "aten.sub" or not isinstance(node.args[1], fx.Node):
            return node, index
        source, shift = cast(fx.Node, node.args[0]), node.args[1]
        while op_name(shift) in ("aten.detach", "aten.to"):
            shift = cast(fx.Node, shift.args[0])
        largest = (
            cast(fx.Node, shift.args[0]) if shift.op == "call_function" and shift.args else shift
        )
        if op_name(shift) == "aten.amax":
            largest = shift
        if op_name(largest) not in ("aten.amax", "aten.max") or largest.args[0] is not source:
            return node, index
        dims = largest.args[1] if len(largest.args) > 1 else None
        dim = dims[0] if isinstance(dims, list | tuple) and len(dims) == 1 else dims
        if (
            not isinstance(dim, int)
            or dim % len(index) != axis
            or len(shape_of(shift)) != len(index)
            or shape_of(shift)[axis] != 1
        ):
            return node, index
        node = source


class ScoreReader:
    """Reads a score; the first product of queries and keys that it meets becomes the symbol
    `product`."""

    def __init__(self, facts: GraphFacts, frame: Frame, opaque: bool) -> None:
        self.product: Contraction | None = None
        self.index: Index = ()
        self.opaque = opaque
        self.facts = facts
        self.reader = reader_of(facts, frame.bounds, self.stop)

    def stop(self, node: fx.Node, index: Index) -> Formula | None:
        contraction = contraction_of(node)
        if contraction is not None and is_score(contraction, index):
            if node in self.facts.written:
                raise Unreadable("the product of queries and keys is written in place")
            if self.product is None:
                self.product, self.index = contraction, index
            if self.product.node is node and self.index == index:
                value: Expr = PRODUCT
                if contraction.alpha != 1:
                    value = value * as_number(self.reader.scalar(contraction.alpha))
                if contraction.added is not None:
                    added = self.reader.broadcast(contraction.added, index, node)
                    value = value + as_number(added) * as_number(
                        self.reader.scalar(contraction.beta)
                    )
                return value
            return None if contraction.summed_size == 1 else self.reader.leaf(node, index)
        if self.opaque and isinstance(value_of(node), torch.Tensor) and not leads_to_product(node):
            return self.reader.leaf(node, index)
        return None


def leads_to_product(node: fx.Node) -> bool:
    """A contraction that may be the score is among the nodes that elementwise operations reach from
    here."""
    seen, open_nodes = {node}, [node]
    while open_nodes:
        x = open_nodes.pop()
        if contraction_of(x) is not None:
            return True
        if op_name(x) in (
            *PROJECTIONS,
            "aten.embedding",
            "aten.index",
            "aten.gather",
            "aten.layer_norm",
        ):
            continue
        for source in x.all_input_nodes:
            if source not in seen:
                seen.add(source)
                open_nodes.append(source)
    return False


def is_score(c: Contraction, index: Index) -> bool:
    """The element is a product of one query row with one key row: one axis is q, another is k, in
    different operands."""
    where = dict(zip(c.axes, index, strict=True))
    rows = [x for x, i in where.items() if i == sym.q]
    columns = [x for x, i in where.items() if i == sym.k]
    if len(rows) != 1 or len(columns) != 1:
        return False
    if any(i.has(sym.q, sym.k) for x, i in where.items() if x not in (rows[0], columns[0])):
        return False
    return (rows[0] in c.a_axes) != (rows[0] in c.b_axes) and (columns[0] in c.a_axes) != (
        rows[0] in c.a_axes
    )


def first_product(
    anchor: fx.Node, at: Index, frame: Frame, facts: GraphFacts
) -> list[tuple[fx.Node, Index]]:
    """The operands of the score's product with their indices, from a first reading."""
    scores = ScoreReader(facts, frame, opaque=False)
    source, index = without_shift(anchor, at)
    scores.reader.at(source, index)
    if scores.product is None:
        return []
    return list(sides(scores.product, scores.index))


def sides(c: Contraction, index: Index) -> tuple[tuple[fx.Node, Index], tuple[fx.Node, Index]]:
    """The query and the key operand with their indices."""
    where = dict(zip(c.axes, index, strict=True)) | {c.summed: COLUMN}
    row = next(x for x, i in where.items() if i == sym.q)
    sides = [(c.a, c.a_axes), (c.b, c.b_axes)]
    if row not in c.a_axes:
        sides.reverse()
    (q, q_axes), (k, k_axes) = sides
    return (q, c.operand_index(q, q_axes, where)), (k, c.operand_index(k, k_axes, where))


def query_and_key(
    reader: Reader, c: Contraction, index: Index, frame: Frame
) -> tuple[Operand, Operand]:
    (query, q_index), (key, k_index) = sides(c, index)
    q = operand(reader, query, q_index, sym.q, frame.lead_sizes)
    k = operand(reader, key, k_index, sym.k, frame.lead_sizes)
    return q, k


def sink_of(reader: Reader, source: fx.Node, index: Index, dim: int, frame: Frame) -> Expr | None:
    """What a column beside the keys holds, if the softmax has one more column than there are
    keys."""
    dim %= len(index)
    extra = sympy.expand(shape_of(source)[dim] - frame.kv_len)
    first = index[dim] == sym.k + 1
    if extra == 0 and not first:
        return None
    if extra != 1:
        raise Unreadable(f"the softmax has {extra} more columns than there are keys")
    while op_name(source) in CASTS and value_of(source).is_floating_point():
        source = cast(fx.Node, source.args[0])
    if op_name(source) != "aten.cat":
        raise Unreadable("the softmax has a column that is not concatenated to the scores")
    parts = cast("list[fx.Node]", source.args[0])
    part = parts[0 if first else -1]
    if len(parts) != 2 or shape_of(part)[dim] != 1:
        raise Unreadable("what is concatenated to the scores is not one column")
    column = as_number(reader.at(part, (*index[:dim], Integer(0), *index[dim + 1 :])))
    if column.has(PRODUCT, sym.k):
        raise Unreadable(f"the column beside the keys depends on the keys: {column}")
    return column
