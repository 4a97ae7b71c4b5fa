"""The operands of an attention, q `[B, H, L, D]` and k, v `[B, Hkv, M, D]`, found above a product
or made from its inputs.

Repeated key heads are looked through, so that grouped-query attention is seen as such; so are
scalar factors on q or k.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Integer, Symbol
from torch import fx

from rewriter import symbols as sym
from rewriter.contraction import step_up
from rewriter.reading import Index, Reader, shape_of
from rewriter.symbols import IDiv, IMod

__all__ = ["Operand", "Unreadable", "operand", "split_of_heads"]

aten = torch.ops.aten


class Unreadable(Exception):
    """A region that is not understood; the text is the reason that the report shows.

    Attributes:
        loose: sizes that would have to be constants of the graph.
    """

    def __init__(self, reason: str, loose: Collection[Symbol] = ()) -> None:
        super().__init__(reason)
        self.loose = frozenset(loose)


@dataclass(frozen=True)
class Operand:
    """A node of the graph and the layout operations that make it `[B, heads, rows, columns]`."""

    node: fx.Node
    heads: Expr
    dim: Expr
    steps: tuple[tuple[Any, tuple[Any, ...]], ...] = ()
    factors: tuple[tuple[Any, bool], ...] = ()
    """Scalars that multiplied the operand further down, each with whether it divides."""
    has_batch: bool = True
    """Its rows differ between batches; else it has one batch, which all share."""

    def expanded(self, batch: Expr, heads: Expr) -> Operand:
        """The operand with as many batches and heads as asked for, where it has one that all
        share."""
        more_batch, more_heads = not self.has_batch and batch != 1, self.heads == 1 and heads != 1
        if not more_batch and not more_heads:
            return self
        shape = [batch if more_batch else -1, heads if more_heads else -1, -1, -1]
        step = (aten.expand.default, (shape,))
        return replace(
            self,
            heads=heads if more_heads else self.heads,
            steps=(*self.steps, step),
            has_batch=True,
        )


def operand(
    reader: Reader,
    node: fx.Node,
    index: Index,
    row: Symbol,
    lead_sizes: Sequence[Expr],
    scaling: bool = True,
) -> Operand:
    """The operand that a product reads at `index`, whose row is the symbol `row`.

    Args:
        scaling: take scalar factors on the way as part of the attention's scale.

    Raises:
        Unreadable: if no view of a tensor above has batch, heads, rows and columns as its
            dimensions.
    """
    _know_columns(reader, node, index)
    # what a product joins has one size, which torch may know under two names that it cannot compare
    read = {i: n for i, n in zip(index, shape_of(node), strict=True) if i.is_Symbol}
    sizes: dict[Expr, Expr] = {**reader.bounds.sizes, **read}
    sizes |= {x: reader.bounds.sizes[x] for x in (sym.b, sym.h) if x in reader.bounds.sizes}
    best: Operand | None = None
    factors: tuple[tuple[Any, bool], ...] = ()
    while True:
        is_whole = _is_whole(node, index, sizes) or _is_whole(node, index, sizes | read)
        here = _canonical(node, index, row, factors) if is_whole else None
        if here is not None and _better(here, best):
            best = here
        step = step_up(reader, node, index)
        if step is None or (step.factor != 1 and not scaling):
            break
        if step.factor != 1:
            factors = (*factors, (step.factor, step.divides))
        node, index = step.node, step.index
    if best is None:
        raise Unreadable(
            f"an operand of the product is read at {index}, not as [batch, heads, rows, columns]"
        )
    return best


def _is_whole(node: fx.Node, index: Index, sizes: Mapping[Expr, Expr]) -> bool:
    """The index visits every element of the tensor: it is no larger than what the product reads."""
    for size, i in zip(shape_of(node), index, strict=True):
        count = _count(i, sizes)
        if count is not None and sympy.expand(count - size) != 0:
            return False
    return True


def _count(index: Expr, sizes: Mapping[Expr, Expr]) -> Expr | None:
    """How many positions an index visits, counted from 0; None if that is not known."""
    if index in sizes:
        return sizes[index]
    if index.is_Integer:
        return Integer(1) if index == 0 else None
    if isinstance(index, IMod):
        return cast(Expr, index.args[1])
    if isinstance(index, IDiv):
        count = _count(index.args[0], sizes)
        return None if count is None else cast(Expr, sympy.cancel(count / index.args[1]))
    slope = index.coeff(sym.b)
    if slope != 0 and _count(sympy.expand(index - slope * sym.b), sizes) == slope:
        return slope * sizes[sym.b]
    return None


def _know_columns(reader: Reader, node: fx.Node, index: Index) -> None:
    """The size of the axis that the product sums over or keeps, which is another one for each
    operand."""
    for size, i in zip(shape_of(node), index, strict=True):
        if i.is_Symbol and i.name == "d":
            reader.bounds.sizes[i] = size


def _better(here: Operand, best: Operand | None) -> bool:
    """Fewer heads and more factors taken in are worth a step further up; more layout operations are
    not."""
    if best is None:
        return True
    if here.heads != best.heads:
        return len(here.steps) <= len(best.steps) + 1 and bool(
            (best.heads - here.heads).is_positive
        )
    return len(here.factors) > len(best.factors) and len(here.steps) <= len(best.steps)


def _canonical(
    node: fx.Node, index: Index, row: Symbol, factors: tuple[tuple[Any, bool], ...]
) -> Operand | None:
    """The tensor as an operand, if its indices are batch, head, row and column in some order or
    grouping."""
    shape = shape_of(node)
    rows = [n for n, i in enumerate(index) if i == row]
    columns = [n for n, i in enumerate(index) if i.is_Symbol and i.name == "d"]
    if len(rows) != 1 or len(columns) != 1:
        return None
    rest = [n for n in range(len(index)) if n not in (rows[0], columns[0])]
    if any(index[n].has(row) for n in rest):
        return None
    order = (*rest, rows[0], columns[0])
    steps: list[tuple[Any, tuple[Any, ...]]] = []
    if order != tuple(range(len(index))):
        steps.append((aten.permute.default, (list(order),)))
    lead, sizes = [index[n] for n in rest], [shape[n] for n in rest]
    dim = shape[columns[0]]
    grouped = _group_steps(lead, sizes)
    if grouped is None:
        return None
    heads, more = grouped
    return Operand(node, heads, dim, (*steps, *more), factors, any(i.has(sym.b) for i in lead))


def _group_steps(
    lead: list[Expr], sizes: list[Expr]
) -> tuple[Expr, list[tuple[Any, tuple[Any, ...]]]] | None:
    """The layout operations that make the leading dimensions `[batch, heads]`, and the number of
    heads."""
    steps: list[tuple[Any, tuple[Any, ...]]] = []
    if not lead:
        return Integer(1), [(aten.unsqueeze.default, (0,)), (aten.unsqueeze.default, (0,))]
    if len(lead) == 1:
        index, size = lead[0], sizes[0]
        if index in (sym.b, 0):
            return Integer(1), [(aten.unsqueeze.default, (1,))]
        heads = index.coeff(sym.b)
        if heads.is_Integer and heads > 1 and sympy.expand(index - heads * sym.b) == sym.h:
            return heads, [(aten.unflatten.int, (0, [-1, int(heads)]))]
        if _is_head(index):
            return size, [(aten.unsqueeze.default, (0,))]
        return None
    if _is_head(lead[-1]) or lead[-1] == 0:
        heads, batch = sizes[-1], lead[:-1]
        if len(batch) > 1:
            steps.append((aten.flatten.using_ints, (0, len(batch) - 1)))
            return (heads, steps) if _is_batch(batch, sizes[:-1]) else None
        return (heads, steps) if batch[0] in (sym.b, 0) else None
    if len(lead) == 2 and lead[0].has(sym.h) and lead[1] == sym.b and _is_head(lead[0]):
        return sizes[0], [(aten.permute.default, ([1, 0, 2, 3],))]
    if all(not i.has(sym.h) for i in lead) and _is_batch(lead, sizes):
        return Integer(1), [
            (aten.flatten.using_ints, (0, len(lead) - 1)),
            (aten.unsqueeze.default, (1,)),
        ]
    return None


def _is_head(index: Expr) -> bool:
    """A head, or the group of a head."""
    return bool(index == sym.h) or (isinstance(index, IDiv) and index.args[0] == sym.h)


def _is_batch(lead: list[Expr], sizes: list[Expr]) -> bool:
    """The dimensions together count the batch: `(⌊b/n⌋, b mod n)` and longer, ones left out."""
    kept = [n for n, (i, size) in enumerate(zip(lead, sizes, strict=True)) if i != 0 or size != 1]
    lead, sizes = [lead[n] for n in kept], [sizes[n] for n in kept]
    if lead in ([], [sym.b]):
        return True
    last, size = lead[-1], sizes[-1]
    if not (isinstance(last, IMod) and last.args == (sym.b, size)):
        return False
    rest = [i.xreplace({IDiv(sym.b, size): sym.b}) for i in lead[:-1]]
    return rest == [sym.b] or _is_batch(rest, sizes[:-1])


def split_of_heads(at: Index, reader: Reader, node: fx.Node, index: Index) -> Expr | None:
    """The number of heads that a batch·heads dimension holds, if a view nearby takes the two
    apart."""
    found = _split(at)
    _know_columns(reader, node, index)
    while found is None:
        found = _split(index)
        step = step_up(reader, node, index)
        if step is None:
            break
        node, index = step.node, step.index
    return found


def _split(index: Index) -> Expr | None:
    for x in {x for i in index for x in i.atoms(IMod)}:
        if x.args[0] != sym.b or not x.args[1].is_Integer:
            continue
        if any(IDiv(*x.args) in i.atoms(IDiv) for i in index):
            return cast(Expr, x.args[1])
    return None
