"""The rules for operations that move elements or make tensors: views, slices, gathers, `arange`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Integer
from sympy.logic.boolalg import Boolean
from torch import fx

from rewriter.indices import Bounds, as_number, as_size, as_truth, compare, remap_view
from rewriter.reading import (
    Index,
    Reader,
    Rule,
    argument,
    choose,
    dim_of,
    either,
    is_float,
    op_name,
    shape_of,
    source_of,
    value_of,
    where,
)
from rewriter.symbols import Formula, IMod, Maximum, Minimum, Where

__all__ = [
    "LAYOUT",
    "getitem",
    "has_float_input",
    "permute_index",
    "slice_index",
    "view_index",
]


# --- layout ---------------------------------------------------------------------------------------


def _same_element(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    return r.at(source_of(node), index)


def _detached(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    """Looked through only where no gradient could flow: what reads the tensor behind it would let
    it through."""
    return None if has_float_input(node) else r.at(source_of(node), index)


def has_float_input(node: fx.Node) -> bool:
    """The node is computed from an input of the graph that may ask for a gradient; its sizes carry
    none."""
    seen, open_nodes = {node}, [node]
    while open_nodes:
        x = open_nodes.pop()
        if x.op == "placeholder" and is_float(x):
            return True
        for source in x.all_input_nodes:
            is_size = isinstance(value_of(source), int | torch.SymInt)
            if source not in seen and not is_size:
                seen.add(source)
                open_nodes.append(source)
    return False


def _dropout(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    return None if node.args[2] and node.args[1] else r.at(source_of(node), index)


def _view(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    return r.at(source_of(node), view_index(r.bounds, node, index))


def view_index(bounds: Bounds, node: fx.Node, index: Index) -> Index:
    """Indices into the input of a view, reshape, flatten or squeeze."""
    return tuple(remap_view(index, shape_of(node), shape_of(source_of(node)), bounds))


def _expand(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    return r.broadcast(source_of(node), index, node)


def _permute(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    return r.at(source_of(node), permute_index(node, index))


def permute_index(node: fx.Node, index: Index) -> Index:
    """Indices into the input of a permute, transpose or movedim."""
    rank = len(index)
    order = list(range(rank))
    match op_name(node):
        case "aten.permute":
            order = [int(d) % rank for d in cast("Sequence[int]", node.args[1])]
        case "aten.movedim" | "aten.moveaxis":
            moved, places = (
                [int(cast(int, d)) % rank for d in _several(a)] for a in node.args[1:3]
            )
            kept = iter(d for d in range(rank) if d not in moved)
            order = [moved[places.index(d)] if d in places else next(kept) for d in range(rank)]
        case "aten.transpose" | "aten.swapaxes" | "aten.swapdims":
            x, y = (int(cast(int, d)) % rank for d in node.args[1:3])
            order[x], order[y] = order[y], order[x]
        case "aten.numpy_T":
            order.reverse()
        case "aten.mT" | "aten.mH" | "aten.adjoint" | "aten.t":
            if rank >= 2:
                order[-2], order[-1] = order[-1], order[-2]
    result: list[Expr] = [Integer(0)] * rank
    for position, dim in enumerate(order):
        result[dim] = index[position]
    return tuple(result)


def _several(dims: Any) -> Sequence[Any]:
    return dims if isinstance(dims, list | tuple) else (dims,)


def _einsum(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    """An einsum of one tensor, where it only names its axes in another order."""
    sources = cast("Sequence[fx.Node]", node.args[1])
    axes, _, result = cast(str, node.args[0]).replace(" ", "").partition("->")
    if len(sources) != 1 or not result.isalpha() or sorted(axes) != sorted(set(result)):
        return None
    return r.at(sources[0], tuple(index[result.index(x)] for x in axes))


def _unsqueeze(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    dim = dim_of(node, node.args[1], len(index))
    return r.at(source_of(node), index[:dim] + index[dim + 1 :])


def _slice(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    return r.at(source_of(node), slice_index(r, node, index))


def slice_index(r: Reader, node: fx.Node, index: Index) -> Index:
    """Indices into the input of a slice."""
    dim = dim_of(node, argument(node, 1, "dim", 0))
    first = _first(r, argument(node, 2, "start"), shape_of(source_of(node))[dim])
    step = r.size(argument(node, 4, "step", 1))
    return (*index[:dim], first + index[dim] * step, *index[dim + 1 :])


def _first(r: Reader, start: Any, size: Expr) -> Expr:
    """Where a slice of a dimension begins."""
    first = Integer(0) if start is None else r.size(start)
    if first.is_negative or (first.is_Integer and first < 0):
        return Maximum(size + first, 0) if (size + first).is_Integer else size + first
    if not first.is_Integer and size.is_Integer and not _at_most(first, size):
        return cast(Expr, Minimum(first, size))
    return first


def _at_most(start: Expr, size: Expr) -> bool:
    """The start is `max(0, size - something)`."""
    return (
        isinstance(start, Maximum)
        and 0 in start.args
        and any((size - a).is_positive for a in start.args)
    )


def _select(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    dim = dim_of(node, node.args[1])
    position = r.size(node.args[2])
    if position.is_negative:
        position = shape_of(source_of(node))[dim] + position
    return r.at(source_of(node), (*index[:dim], position, *index[dim:]))


def getitem(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    source, item = source_of(node), cast(int, node.args[1])
    tensor = source_of(source) if source.args and isinstance(source.args[0], fx.Node) else None
    match op_name(source):
        case "aten.unbind":
            dim = dim_of(source, argument(source, 1, "dim", 0))
            return r.at(cast(fx.Node, tensor), (*index[:dim], Integer(item), *index[dim:]))
        case "aten.split" | "aten.chunk" | "aten.split_with_sizes" | "aten.tensor_split":
            dim = dim_of(source, argument(source, 2, "dim", 0))
            parts = cast("list[torch.Tensor]", value_of(source))
            offset = sum((as_size(p.shape[dim]) for p in parts[:item]), start=Integer(0))
            return r.at(
                cast(fx.Node, tensor), (*index[:dim], index[dim] + offset, *index[dim + 1 :])
            )
    return None


def _index(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    source = source_of(node)
    chosen = list(cast("Sequence[fx.Node | None]", node.args[1]))
    chosen += [None] * (len(value_of(source).shape) - len(chosen))
    where = [d for d, x in enumerate(chosen) if x is not None]
    tensors = [cast(fx.Node, chosen[d]) for d in where]
    if not where or any(value_of(t).dtype == torch.bool for t in tensors):
        return None
    rank = max(len(value_of(t).shape) for t in tensors)
    together = where == list(range(where[0], where[-1] + 1))
    first = where[0] if together else 0
    picked = index[first : first + rank]
    rest = list(index[:first] + index[first + rank :])
    positions = [
        _wrapped(r.number(chosen[d], picked), shape_of(source)[d])
        if chosen[d] is not None
        else rest.pop(0)
        for d in range(len(chosen))
    ]
    return r.at(source, tuple(positions))


def _wrapped(position: Expr, size: Expr) -> Expr:
    """A negative constant position counts from the end."""
    return size + position if position.is_Integer and position < 0 else position


def _index_select(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    dim = dim_of(node, node.args[1])
    chosen = r.number(
        node.args[2], (index[dim],) if value_of(cast(fx.Node, node.args[2])).dim() else ()
    )
    return r.at(source_of(node), (*index[:dim], chosen, *index[dim + 1 :]))


def _gather(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    dim = dim_of(node, node.args[1])
    chosen = r.number(node.args[2], index)
    return r.at(source_of(node), (*index[:dim], chosen, *index[dim + 1 :]))


def _embedding(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    return r.at(source_of(node), (r.number(node.args[1], index[:-1]), index[-1]))


def _cat(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    parts = cast("Sequence[fx.Node]", node.args[0])
    parts = [p for p in parts if shape_of(p) != (Integer(0),) or len(index) == 1]
    dim = dim_of(node, argument(node, 1, "dim", 0), len(index))
    start = Integer(0)
    pieces: list[tuple[Expr, Formula]] = []
    for part in parts:
        size = shape_of(part)[dim]
        if size == 0:
            continue
        position = index[dim] - start
        if pieces and r.bounds.below(index[dim], start):
            break
        read = r.part(part, (*index[:dim], position, *index[dim + 1 :]))
        pieces.append((start + size, read))
        start += size
    return _chain(index[dim], pieces)


def _stack(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    parts = cast("Sequence[fx.Node]", node.args[0])
    dim = dim_of(node, argument(node, 1, "dim", 0), len(index))
    rest = (*index[:dim], *index[dim + 1 :])
    return _chain(index[dim], [(Integer(n + 1), r.at(part, rest)) for n, part in enumerate(parts)])


def _chain(position: Expr, pieces: list[tuple[Expr, Formula]]) -> Formula:
    """The piece whose end is the first beyond the position."""
    truth = all(isinstance(p, Boolean) for _, p in pieces)
    result = pieces[-1][1]
    for end, piece in reversed(pieces[:-1]):
        inside = compare("<", position, end)
        result = (
            choose(inside, piece, result)
            if truth
            else Where(inside, as_number(piece), as_number(result))
        )
    return result


def _repeat(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    shape = shape_of(source_of(node))
    tail = index[len(index) - len(shape) :]
    return r.at(
        source_of(node), tuple(r.bounds.split(i, n)[1] for i, n in zip(tail, shape, strict=True))
    )


def _repeat_interleave(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    times, dim = node.args[1], argument(node, 2, "dim")
    if isinstance(times, fx.Node) or dim is None:
        return None
    dim = dim_of(node, dim)
    whole = r.bounds.split(index[dim], r.size(times))[0]
    return r.at(source_of(node), (*index[:dim], whole, *index[dim + 1 :]))


def _roll(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    shifts, dims = (
        cast("Sequence[int]", node.args[1]),
        cast("Sequence[int]", argument(node, 2, "dims", [])),
    )
    if len(shifts) != len(dims):
        return None
    result = list(index)
    for shift, dim in zip(shifts, dims, strict=True):
        result[dim] = cast(Expr, IMod(index[dim] - r.size(shift), shape_of(node)[dim]))
    return r.at(source_of(node), tuple(result))


def _flip(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    dims = {dim_of(node, d) for d in cast("Sequence[int]", node.args[1])}
    shape = shape_of(node)
    return r.at(
        source_of(node), tuple(shape[d] - 1 - i if d in dims else i for d, i in enumerate(index))
    )


def _pad(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    widths = [r.size(w) for w in cast("Sequence[Any]", node.args[1])]
    position = 2
    if op_name(node) == "aten.pad":
        if argument(node, 2, "mode", "constant") != "constant":
            return None
        position = 3
    fill = as_number(r.scalar(argument(node, position, "value") or 0))
    shape, result, inside = shape_of(source_of(node)), list(index), []
    for n in range(len(widths) // 2):
        dim = len(index) - 1 - n
        left, right = widths[2 * n], widths[2 * n + 1]
        result[dim] = index[dim] - left
        if left != 0:
            inside.append(compare(">=", result[dim], Integer(0)))
        if right != 0:
            inside.append(compare("<", result[dim], shape[dim]))
    value = r.part(source_of(node), tuple(result))
    if isinstance(value, Boolean) and fill in (0, 1):
        return choose(cast(Boolean, sympy.And(*inside)), value, sympy.true if fill else sympy.false)
    return cast(Expr, Where(sympy.And(*inside), as_number(value), fill))


def _scatter(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    """A tensor of which a part is another: a part of a part is one condition on all its indices."""
    inside: list[Boolean] = []
    value, at = node, list(index)
    while True:
        step = _into_part(r, value, at)
        if step is None:
            return None
        conditions, place = step
        inside += conditions
        before, value, at = value, source_of(value, 1), place
        if not (_puts_back(value) and _is_part_of(source_of(value), before)):
            break
    element, other = r.part(value, at), r.at(source_of(node), index)
    within = sympy.And(*inside)
    if isinstance(other, Where) and other.args[1] == element and other.args[2].is_number:
        within, other = sympy.Or(other.args[0], within), other.args[2]  # several parts, one number
    return either(node, cast(Boolean, within), element, other)


def _puts_back(node: fx.Node) -> bool:
    return op_name(node) in ("aten.slice_scatter", "aten.select_scatter")


def _is_part_of(part: fx.Node, scatter: fx.Node) -> bool:
    """The part of a tensor that a scatter replaces."""
    same = op_name(part) == op_name(scatter).removesuffix("_scatter")
    return same and part.args == (scatter.args[0], *scatter.args[2:])


def _into_part(
    r: Reader, node: fx.Node, index: Sequence[Expr]
) -> tuple[list[Boolean], list[Expr]] | None:
    """When the element of a scatter is one of the part, and where it is there."""
    dim, size = dim_of(node, argument(node, 2, "dim", 0)), shape_of(node)
    if op_name(node) == "aten.select_scatter":
        position = _wrapped(r.size(node.args[3]), size[dim])
        return [compare("==", index[dim], position)], [*index[:dim], *index[dim + 1 :]]
    if argument(node, 5, "step", 1) != 1:
        return None
    first = _first(r, argument(node, 3, "start"), size[dim])
    end = sympy.expand(first + shape_of(source_of(node, 1))[dim])
    inside = [] if first == 0 else [compare(">=", index[dim], first)]
    inside += [] if end == size[dim] else [compare("<", index[dim], end)]
    return inside, [*index[:dim], index[dim] - first, *index[dim + 1 :]]


def _triangle(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    diagonal = r.size(argument(node, 1, "diagonal", 0))
    row, column = index[-2], index[-1]
    keep = compare("<=" if op_name(node) == "aten.tril" else ">=", column, row + diagonal)
    value = r.at(source_of(node), index)
    if isinstance(value, Boolean):
        return cast(Boolean, sympy.And(keep, value))
    return where(keep, as_number(value), Integer(0))


# --- creation -------------------------------------------------------------------------------------


def _arange(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    args = [cast(Expr, r.scalar(a)) for a in node.args]
    start = Integer(0) if len(args) == 1 else args[0]
    step = args[2] if len(args) > 2 else Integer(1)
    return start + index[0] * step


def _filled(value: int) -> Rule:
    def rule(r: Reader, node: fx.Node, index: Index) -> Formula | None:
        if value_of(node).dtype == torch.bool:
            return cast(Boolean, sympy.true if value else sympy.false)
        return Integer(value)

    return rule


def _full(position: int) -> Rule:
    def rule(r: Reader, node: fx.Node, index: Index) -> Formula | None:
        value = r.scalar(
            argument(
                node,
                position,
                "fill_value",
                argument(node, position, "value", argument(node, position, "s")),
            )
        )
        return as_truth(value) if value_of(node).dtype == torch.bool else as_number(value)

    return rule


def _written(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    """What `fill` and `copy` give has the shape and dtype of their first argument."""
    source = node.args[1]
    value = r.broadcast(source, index, node)
    if value_of(node).dtype == torch.bool:
        return as_truth(value)
    whole = not value_of(node).is_floating_point
    if whole and isinstance(source, fx.Node) and is_float(source):
        return None
    return as_number(value)


def _eye(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    return as_number(compare("==", index[0], index[1]))


LAYOUT: dict[str, Rule] = {
    "clone contiguous alias lift_fresh_copy lift_fresh expand_copy positive": _same_element,
    "detach detach_": _detached,
    "dropout": _dropout,
    "view reshape _unsafe_view flatten unflatten view_as reshape_as squeeze ravel": _view,
    "expand expand_as broadcast_to": _expand,
    "permute transpose t mT mH adjoint numpy_T swapaxes swapdims movedim moveaxis": _permute,
    "einsum": _einsum,
    "unsqueeze": _unsqueeze,
    "slice narrow": _slice,
    "select": _select,
    "index _unsafe_index": _index,
    "index_select": _index_select,
    "gather": _gather,
    "embedding": _embedding,
    "cat concat concatenate": _cat,
    "stack": _stack,
    "repeat tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "roll": _roll,
    "flip": _flip,
    "constant_pad_nd pad": _pad,
    "slice_scatter select_scatter": _scatter,
    "tril triu": _triangle,
    "arange": _arange,
    "zeros zeros_like new_zeros": _filled(0),
    "ones ones_like new_ones": _filled(1),
    "full full_like": _full(1),
    "new_full": _full(2),
    "scalar_tensor": _full(0),
    "fill copy": _written,
    "eye": _eye,
}
