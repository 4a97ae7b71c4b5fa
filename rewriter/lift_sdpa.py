"""Lifting a call of `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Float, Integer, Symbol
from sympy.logic.boolalg import Boolean
from torch import fx

from rewriter import symbols as sym
from rewriter.find import Found
from rewriter.finish import finish
from rewriter.formulas import split_mask
from rewriter.frame import COLUMN, PRODUCT, GraphFacts, Lifted, frame_of, reader_of, trained_by
from rewriter.indices import as_number, as_truth, compare
from rewriter.operands import operand
from rewriter.reading import Index, shape_of, value_of
from rewriter.sites import Site
from rewriter.symbols import Formula

__all__ = ["lift_sdpa"]


def lift_sdpa(found: Found, facts: GraphFacts, site: Site, opaque: bool) -> Lifted:
    node = found.anchor
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = (cast(fx.Node, given[n]) for n in names[:3])
    q_shape, k_shape = shape_of(query), shape_of(key)
    grouped = (
        bool(given.get("enable_gqa", False)) and len(q_shape) > 2 and k_shape[-3] != q_shape[-3]
    )
    lead_sizes = _broadcast(
        q_shape[:-2], *(() if grouped else (k_shape[:-2], shape_of(value)[:-2]))
    )
    frame = frame_of(lead_sizes, q_shape[-2], k_shape[-2])
    bounds = frame.bounds
    group = q_shape[-3] / k_shape[-3] if grouped else Integer(1)
    kv_lead = (*frame.lead[:-1], bounds.split(sym.h, group)[0]) if grouped else frame.lead

    reader = reader_of(facts, bounds)
    mask: Boolean = sympy.true
    bias: Expr = Integer(0)
    masked = "zero"
    attn_mask = given.get("attn_mask")
    raw: Formula = sympy.true
    index: Index = (*frame.lead, sym.q, sym.k)
    if isinstance(attn_mask, fx.Node):
        rank = len(shape_of(attn_mask))
        index = index[len(index) - rank :]
        shape = shape_of(attn_mask)
        full = (*lead_sizes, q_shape[-2], k_shape[-2])[len(lead_sizes) + 2 - rank :]
        index = tuple(
            Integer(0) if n == 1 and m != 1 else i
            for i, n, m in zip(index, shape, full, strict=True)
        )
        raw = reader.leaf(attn_mask, index) if opaque else reader.at(attn_mask, index)
        if value_of(attn_mask).dtype == torch.bool:
            mask = as_truth(raw)
        else:
            bias, mask, how = split_mask(
                as_number(raw) + PRODUCT, PRODUCT, trained_by(facts, reader)
            )
            bias = bias - PRODUCT
            masked = "zero" if how == "nan" else how
    if given.get("is_causal"):
        mask = cast(Boolean, sympy.And(mask, compare("<=", sym.k, sym.q)))
    scale = given.get("scale")
    if isinstance(scale, fx.Node):
        scale = value_of(scale)
    head_dim = value_of(query).shape[-1]
    if scale is None:
        scale = float(int(head_dim)) ** -0.5

    def at(node: fx.Node, lead: Index, row: Symbol) -> Index:
        shape = shape_of(node)[:-2]
        pairs = zip(
            lead[len(lead) - len(shape) :], lead_sizes[len(lead) - len(shape) :], shape, strict=True
        )
        return (*(Integer(0) if n == 1 and m != 1 else i for i, m, n in pairs), row, COLUMN)

    q = operand(reader, query, at(query, frame.lead, sym.q), sym.q, frame.lead_sizes)
    k = operand(reader, key, at(key, kv_lead, sym.k), sym.k, frame.lead_sizes)
    v = operand(reader, value, at(value, kv_lead, sym.k), sym.k, frame.lead_sizes, scaling=False)
    return finish(
        found,
        facts,
        site,
        frame,
        reader,
        q,
        k,
        v,
        score=bias + PRODUCT,
        mask=mask,
        masked=masked,
        sink=None,
        scale=cast(Expr, Float(float(cast(Any, scale)))),
        dropout=float(cast(Any, given.get("dropout_p", 0.0) or 0.0)),
        out_order=tuple(range(len(lead_sizes) + 2)),
        score_node=attn_mask if isinstance(attn_mask, fx.Node) else None,
        product=None,
        product_index=(),
        raw=(raw, index),
    )


def _broadcast(*shapes: Sequence[Expr]) -> tuple[Expr, ...]:
    """The shape that the shapes broadcast to."""
    rank = max(len(x) for x in shapes)
    padded = [(Integer(1),) * (rank - len(x)) + tuple(x) for x in shapes]
    return tuple(
        next((n for n in sizes if n != 1), Integer(1)) for sizes in zip(*padded, strict=True)
    )
