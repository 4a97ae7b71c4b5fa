"""The end of lifting: a spec in canonical symbols, and the site that has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import sympy
from sympy import Expr, Symbol
from sympy.logic.boolalg import Boolean
from torch import fx

from rewriter import symbols as sym
from rewriter.find import Found, comes_from_one_sequence
from rewriter.formulas import canonical, scaled
from rewriter.frame import PRODUCT, Frame, GraphFacts, Lifted
from rewriter.indices import as_number
from rewriter.operands import Operand, Unreadable
from rewriter.reading import Index, Reader, op_name, value_of
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.symbols import Formula

__all__ = ["finish"]


def finish(
    found: Found,
    facts: GraphFacts,
    site: Site,
    frame: Frame,
    reader: Reader,
    q: Operand,
    k: Operand,
    v: Operand,
    *,
    score: Expr,
    mask: Boolean,
    masked: str,
    sink: Expr | None,
    scale: Expr,
    dropout: float,
    out_order: tuple[int, ...],
    score_node: fx.Node | None,
    product: fx.Node | None,
    product_index: Index,
    raw: tuple[Formula, Index],
) -> Lifted:
    """The spec in canonical symbols, and the site that describes it."""
    if mask.has(PRODUCT):
        raise Unreadable("which keys are seen depends on the scores")
    q, k, v = _fitted(q, k, v, frame)
    factor = as_number(reader.scalar(1))
    for side in (q, k):
        for number, divides in side.factors:
            value = as_number(reader.broadcast(number, ()))
            factor = factor / value if divides else factor * value
    score, scale = scaled(score, PRODUCT, scale * factor)
    formulas: list[Formula] = [scale, score, mask] + ([sink] if sink is not None else [])
    sizes = (frame.batch, frame.heads, frame.q_len, frame.kv_len)
    formulas, free = canonical(formulas, sizes, frame.bounds)
    names, tensors, origins = _named(formulas, reader, facts)
    _refuse_scores(tensors, product, found)
    formulas = [f.xreplace(names) for f in formulas]
    spec = SoftmaxSpec(
        scale=cast(Expr, formulas[0]),
        score=cast(Expr, formulas[1]),
        mask=cast(Boolean, formulas[2]),
        masked=cast(Any, masked),
        sink=cast(Expr, formulas[3]) if sink is not None else None,
        dropout=dropout,
        tensors=tuple(
            TensorArg(
                str(names[symbol]),
                str(value_of(node).dtype).removeprefix("torch."),
                value_of(node).dim(),
            )
            for symbol, node in tensors
        ),
        sizes=tuple(f"n{i}" for i in range(len(free))),
    )
    heads, kv_heads = frame.heads, k.heads
    notes = tuple(
        f"{sym.formula_text(r)} is opaque: an L x M tensor stays alive" for r in spec.opaque_reads()
    )
    if len(frame.lead_sizes) > 2 and kv_heads == 1:
        # `[B, Hkv, G, L, D]` looks like this, and its heads are not the last dimension alone.
        heads = kv_heads = sympy.nan
    site = replace(
        site,
        spec=spec,
        heads=int(heads) if heads.is_Integer else 0,
        kv_heads=int(kv_heads) if kv_heads.is_Integer else 0,
        head_dim=int(q.dim) if q.dim.is_Integer else 0,
        value_dim=int(v.dim) if v.dim.is_Integer else 0,
        is_cross=_is_cross(frame, q, k),
        origins=tuple(origins),
        notes=notes,
    )
    return Lifted(
        site,
        found,
        q,
        k,
        v,
        tensors=tuple(node for _, node in tensors),
        sizes=free,
        lead=frame.lead_sizes,
        out_order=out_order,
        score=score_node,
        product=product,
        product_index=product_index,
        factor=cast(Expr, factor.xreplace(names)),
        raw=raw,
        bounds=frame.bounds,
        names=tuple(reader.leaves.items()),
    )


def _refuse_scores(
    tensors: Sequence[tuple[Symbol, fx.Node]], product: fx.Node | None, found: Found
) -> None:
    """Refuses a formula that reads what was computed from the scores, such as their k-th largest.

    New code rounds the scores in another way, so a comparison with such a value could turn over.
    """
    if product is None:
        return
    end = cast(fx.Node, found.product)
    below, open_nodes = {product}, [product]
    while open_nodes:
        for user in open_nodes.pop().users:
            if user not in below and user < end:
                below.add(user)
                open_nodes.append(user)
    for _, node in tensors:
        if node in below:
            name = op_name(node) or node.name
            raise Unreadable(f"the scores are changed by what is computed from them ({name})")


def _fitted(q: Operand, k: Operand, v: Operand, frame: Frame) -> tuple[Operand, Operand, Operand]:
    """The operands with batches and heads that fit each other, as the op wants them."""
    kv_heads = k.heads if k.heads != 1 else v.heads
    q = q.expanded(frame.batch, frame.heads)
    k, v = k.expanded(frame.batch, kv_heads), v.expanded(frame.batch, kv_heads)
    loose = {x for n in (q.heads, k.heads, v.heads, frame.heads) for x in n.free_symbols}
    if q.heads != frame.heads or k.heads != v.heads:
        heads = f"{q.heads} for q, {k.heads} for k and {v.heads} for v"
        raise Unreadable(f"the product has {frame.heads} heads, of {heads}", loose)
    if k.heads not in (1, q.heads) and not (q.heads / k.heads).is_integer:
        raise Unreadable(f"{q.heads} query heads are not a multiple of {k.heads} key heads", loose)
    return q, k, v


def _named(
    formulas: Sequence[Formula], reader: Reader, facts: GraphFacts
) -> tuple[dict[Symbol, Symbol], list[tuple[Symbol, fx.Node]], list[tuple[str, str]]]:
    """Short names for the tensors that the formulas read, in the order of their nodes in the
    graph."""
    used = {r.args[0] for f in formulas for r in sym.reads(f)}
    taken = {"b", "h", "q", "k", "s", "B", "H", "L", "M"}
    names: dict[Symbol, Symbol] = {}
    tensors: list[tuple[Symbol, fx.Node]] = []
    origins: list[tuple[str, str]] = []
    for symbol, node in reader.leaves.items():
        if symbol not in used:
            continue
        short, origin = facts.origin(node)
        name, n = short, 0
        while name in taken:
            n += 1
            name = f"{short}_{n}"
        taken.add(name)
        names[symbol] = Symbol(name)
        tensors.append((symbol, node))
        origins.append((name, origin))
    return names, tensors, origins


def _is_cross(frame: Frame, q: Operand, k: Operand) -> bool:
    """Keys come from another sequence than queries."""
    difference = sympy.expand(frame.kv_len - frame.q_len)
    if frame.q_len.free_symbols and frame.q_len.free_symbols <= frame.kv_len.free_symbols:
        return False
    if difference == 0 and frame.q_len.free_symbols:
        return False
    return not comes_from_one_sequence(q.node, k.node)
