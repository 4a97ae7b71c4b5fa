"""Lifting a softmax between two products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import sympy
from sympy import Expr, Integer, Symbol
from sympy.logic.boolalg import Boolean
from torch import fx

from rewriter import symbols as sym
from rewriter.contraction import Contraction, contraction_of
from rewriter.find import PROJECTIONS, Found
from rewriter.finish import finish
from rewriter.formulas import split_mask
from rewriter.frame import (
    COLUMN,
    PRODUCT,
    WEIGHT,
    Frame,
    GraphFacts,
    Lifted,
    frame_of,
    reader_of,
    trained_by,
)
from rewriter.indices import as_number
from rewriter.operands import Unreadable, operand, split_of_heads
from rewriter.reading import Index, op_name, shape_of
from rewriter.scores import (
    ScoreReader,
    first_product,
    leads_to_product,
    query_and_key,
    sides,
    sink_of,
    without_shift,
)
from rewriter.sites import Site
from rewriter.symbols import Formula

__all__ = ["lift_softmax"]


def lift_softmax(found: Found, facts: GraphFacts, site: Site, opaque: bool) -> Lifted:
    if not leads_to_product(cast(fx.Node, found.anchor.args[0])):
        reason = "pooling or a feature map: its scores are not products of queries and keys"
        return Lifted(replace(site, kind="pooling", reason=reason), found)
    values = cast(Contraction, contraction_of(cast(fx.Node, found.product)))
    weights_first = _leads_to(values.a, found.anchor)
    if weights_first == _leads_to(values.b, found.anchor):
        raise Unreadable("its weights are on both sides of the product with the values")
    weights, value = (values.a, values.b) if weights_first else (values.b, values.a)
    weight_axes, value_axes = (
        (values.a_axes, values.b_axes) if weights_first else (values.b_axes, values.a_axes)
    )
    if values.added is not None or values.alpha != 1:
        raise Unreadable("something is added to the product with the values")
    sizes = _axis_sizes(values)
    lead = [x for x in weight_axes if x in value_axes and x != values.summed]
    row = [x for x in weight_axes if x in values.axes and x not in lead and x[0] != "*"][-1:]
    lead = [x for x in values.axes if x in weight_axes and x not in row]
    column = [x for x in value_axes if x not in lead and x != values.summed]
    if len(row) != 1 or len(column) != 1:
        raise Unreadable(
            f"the product with the values has axes {''.join(weight_axes)} x {''.join(value_axes)}"
        )
    q_len, kv_len = sizes[row[0]], sizes[values.summed]
    lead_sizes = [sizes[x] for x in lead]

    def reading(frame: Frame) -> tuple[dict[str, Expr], _Weights]:
        index = dict(zip(lead, frame.lead, strict=True))
        index |= {row[0]: sym.q, values.summed: sym.k, column[0]: COLUMN}
        where = values.operand_index(weights, weight_axes, index)
        return index, _weights_at(found.anchor, weights, where, frame, facts)

    frame = frame_of(lead_sizes, q_len, kv_len)
    index, read = reading(frame)
    if len(lead_sizes) == 1:
        heads = split_of_heads(
            read.index,
            reader_of(facts, frame.bounds),
            value,
            values.operand_index(value, value_axes, index),
        )
        if heads is None:
            for side, where in first_product(found.anchor, read.index, frame, facts):
                heads = heads or split_of_heads((), reader_of(facts, frame.bounds), side, where)
        if heads is not None:
            frame = frame_of(lead_sizes, q_len, kv_len, heads)
            index, read = reading(frame)
    _check_axis(found.anchor, read.index)

    scores = ScoreReader(facts, frame, opaque)
    source, source_index = without_shift(found.anchor, read.index)
    raw = scores.reader.at(source, source_index)
    if scores.product is None:
        if any(node in facts.written for node in scores.reader.leaves.values()):
            raise Unreadable("its scores are written in place, in a way that is not understood")
        raise Unreadable("no product of queries with keys was found in its scores")
    sink = sink_of(scores.reader, source, source_index, cast(int, found.anchor.args[1]), frame)
    score, mask, masked = split_mask(as_number(raw), PRODUCT, trained_by(facts, scores.reader))
    if read.kept != sympy.true:
        if read.kept != mask:
            raise Unreadable(f"its weights are changed before they meet the values: {read.text}")
        masked = "zero"
    if sink is not None and masked in ("add", "mean"):
        masked = "zero"
    product, product_index = scores.product, scores.index
    q, k = query_and_key(scores.reader, product, product_index, frame)
    v = operand(
        scores.reader,
        value,
        values.operand_index(value, value_axes, index),
        sym.k,
        frame.lead_sizes,
        scaling=False,
    )
    axes = [*lead, row[0], column[0]]
    lifted = finish(
        found,
        facts,
        site,
        frame,
        scores.reader,
        q,
        k,
        v,
        score=score,
        mask=mask,
        masked=masked,
        sink=sink,
        scale=Integer(1),
        dropout=read.dropout,
        out_order=tuple(axes.index(x) for x in values.axes),
        score_node=source,
        product=product.node,
        product_index=product_index,
        raw=(raw, source_index),
    )
    static = q_len.is_Integer and kv_len.is_Integer
    if static and (
        not sizes[column[0]].is_Integer or _rows_are_features(product, product_index, frame, facts)
    ):
        channel = replace(
            lifted.site,
            kind="channel",
            spec=None,
            reason="attention over channels, not over tokens",
        )
        return replace(lifted, site=channel, q=None)
    return lifted


def _rows_are_features(c: Contraction, index: Index, frame: Frame, facts: GraphFacts) -> bool:
    """Queries and keys are rows of features: what a projection makes of each token stands along q
    and k."""
    found: set[bool] = set()

    def stop(node: fx.Node, at: Index) -> Formula | None:
        if op_name(node) not in PROJECTIONS:
            return None
        features = at[1] if "conv" in op_name(node) else at[-1]
        found.add(features.has(sym.q, sym.k))
        return cast(Expr, WEIGHT)

    reader = reader_of(facts, frame.bounds, stop)
    for side, where in sides(c, index):
        reader.bounds.sizes[COLUMN] = shape_of(side)[where.index(COLUMN)]
        reader.at(side, where)
    return found == {True}


def _leads_to(node: fx.Node, anchor: fx.Node) -> bool:
    while node is not anchor:
        if not node.args or not isinstance(node.args[0], fx.Node) or node.op != "call_function":
            return False
        if contraction_of(node) is not None:
            return False
        node = node.args[0]
    return True


def _axis_sizes(c: Contraction) -> dict[str, Expr]:
    sizes: dict[str, Expr] = {}
    for operand_node, axes in ((c.a, c.a_axes), (c.b, c.b_axes)):
        for axis, size in zip(axes, shape_of(operand_node), strict=True):
            if sizes.get(axis, Integer(1)) == 1:
                sizes[axis] = size
    return sizes


@dataclass(frozen=True)
class _Weights:
    """How the product with the values reads the softmax."""

    index: Index
    dropout: float
    kept: Boolean
    """The condition under which a weight is not set to 0."""
    text: str
    """What the product reads, with the names of tensors."""


def _weights_at(
    anchor: fx.Node, weights: fx.Node, index: Index, frame: Frame, facts: GraphFacts
) -> _Weights:
    """What the product with the values reads at the index.

    Raises:
        Unreadable: if that is more than a weight of the softmax, dropped out or set to 0.
    """
    reached: list[Index] = []
    dropout = 0.0

    def stop(node: fx.Node, at: Index) -> Formula | None:
        nonlocal dropout
        if node is anchor:
            reached.append(at)
            return cast(Expr, WEIGHT)
        if op_name(node) == "aten.dropout" and node.args[2] and node.args[1]:
            if dropout:
                raise Unreadable("its weights are dropped out twice")
            dropout = float(cast(float, node.args[1]))
            return reader.at(cast(fx.Node, node.args[0]), at)
        return None

    reader = reader_of(facts, frame.bounds, stop)
    seen = reader.at(weights, index)
    names = {symbol: Symbol(facts.origin(node)[0]) for symbol, node in reader.leaves.items()}
    text = sym.formula_text(cast(Expr, seen.xreplace(names)))
    kept: Boolean = sympy.true
    if isinstance(seen, sym.Where) and set(seen.args[1:]) == {WEIGHT, Integer(0)}:
        kept = seen.args[0] if seen.args[1] == WEIGHT else cast(Boolean, sympy.Not(seen.args[0]))
        seen = cast(Expr, WEIGHT)
    if seen != WEIGHT or len(set(reached)) != 1:
        raise Unreadable(f"its weights are changed before they meet the values: {text}")
    return _Weights(reached[0], dropout, kept, text)


def _check_axis(anchor: fx.Node, at: Index) -> None:
    dim = cast(int, anchor.args[1])
    if at[dim % len(at)] not in (sym.k, sym.k + 1):
        raise Unreadable(
            "the softmax runs over another axis than the product with the values sums over"
        )
