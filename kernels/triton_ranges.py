"""Which keys a tile of queries can see at most, read from the mask: no others are visited.

Only bounds of the form `k <= something without k` are used, where the something is affine in q, and
bounds of q alone, which a whole tile may fail. Whatever else the mask says narrows nothing, so that
an allowed pair is never left out; the mask itself is still applied to every tile.

The same for the queries that see a tile of keys, with the two exchanged (`query_ranges`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, cast

import sympy
from sympy import Expr, Symbol
from sympy.logic.boolalg import Boolean, BooleanFalse

from rewriter import symbols as sym
from rewriter.symbols import Maximum, Minimum, Read, Where

__all__ = ["BEHIND", "FIRST", "KeyRange", "key_ranges", "query_ranges"]

FIRST, BEHIND = Symbol("q_first", integer=True), Symbol("q_behind", integer=True)
"""The first query of a tile, and the one behind its last."""


@dataclass(frozen=True)
class KeyRange:
    """Keys from the largest of `low` up to the smallest of `high`, itself left out.

    No bound means 0 or M.
    """

    low: tuple[Expr, ...] = ()
    high: tuple[Expr, ...] = ()

    def __and__(self, other: KeyRange) -> KeyRange:
        return KeyRange(_joined(self.low, other.low), _joined(self.high, other.high))


def key_ranges(mask: Boolean, size: Expr = sym.M) -> tuple[KeyRange, ...]:
    """One or two ranges that together hold every key which some query of the tile sees.

    Of two, the first begins at key 0: a loop visits it, then the part of the second behind it.

    Args:
        size: the number of keys.
    """
    ranges = _ranges(mask, size)
    if len(ranges) == 1:
        return ranges
    first = [r for r in ranges if not r.low]
    if len(ranges) == 2 and len(first) == 1:
        return (first[0], ranges[1 - ranges.index(first[0])])
    return (_hull(ranges),)


def query_ranges(mask: Boolean) -> tuple[KeyRange, ...]:
    """`key_ranges` of the queries that see some key of a tile, which `FIRST` and `BEHIND` bound."""
    exchanged = mask.xreplace({sym.q: sym.k, sym.k: sym.q})
    return key_ranges(cast(Boolean, exchanged), sym.L)


def _hull(ranges: Sequence[KeyRange]) -> KeyRange:
    """From the first key of any range to the last of any."""

    def ends(side: Literal["low", "high"], inner: Any, outer: Any) -> tuple[Expr, ...]:
        bounds = [getattr(r, side) for r in ranges]
        if not all(bounds):
            return ()
        shared = frozenset.intersection(*map(frozenset, bounds))
        rest = [sorted(set(b) - shared, key=str) for b in bounds]
        if all(rest):
            shared |= {reduce(outer, [reduce(inner, one) for one in rest])}
        return _joined(shared, ())

    return KeyRange(ends("low", Maximum, Minimum), ends("high", Minimum, Maximum))


def _ranges(mask: Any, size: Expr) -> tuple[KeyRange, ...]:
    """The ranges of a mask, one or more for each alternative."""
    if isinstance(mask, sympy.And):
        result: tuple[KeyRange, ...] = (KeyRange(),)
        for clause in sorted(mask.args, key=str):
            result = tuple(dict.fromkeys(a & b for a in result for b in _ranges(clause, size)))
        return _without_contained(result)
    if isinstance(mask, sympy.Or):
        return _without_contained(
            dict.fromkeys(r for a in sorted(mask.args, key=str) for r in _ranges(a, size))
        )
    if isinstance(mask, BooleanFalse):
        return (KeyRange(high=(sympy.Integer(0),)),)
    if isinstance(mask, sympy.Not) and mask.args[0].is_Relational:
        return _ranges(mask.args[0].negated, size)
    return (_clause(mask, size),) if mask.is_Relational else (KeyRange(),)


def _without_contained(ranges: Iterable[KeyRange]) -> tuple[KeyRange, ...]:
    """Only the ranges that no other one holds: fewer bounds make a larger range."""
    unique = list(ranges)

    def holds(a: KeyRange, b: KeyRange) -> bool:
        return a != b and set(a.low) <= set(b.low) and set(a.high) <= set(b.high)

    return tuple(r for r in unique if not any(holds(other, r) for other in unique))


def _clause(relation: Any, size: Expr) -> KeyRange:
    """The range of one comparison."""
    op, difference = relation.rel_op, relation.lhs - relation.rhs
    if op in (">", ">="):
        op, difference = {">": "<", ">=": "<="}[op], -difference
    if not difference.has(sym.k):
        return _of_the_tile(difference, op, size)
    distances = [x for x in difference.atoms(sympy.Abs) if x.has(sym.k)]
    if len(distances) == 1 and op in ("<", "<="):
        distance = distances[0]
        if difference.coeff(distance) != 1:
            return KeyRange()
        inner, rest = distance.args[0], difference - distance
        return _bounds(inner + rest, op) & _bounds(-inner + rest, op)
    if op == "==":
        return _bounds(difference, "<=") & _bounds(-difference, "<=")
    return _bounds(difference, op) if op in ("<", "<=") else KeyRange()


def _of_the_tile(difference: Expr, op: str, size: Expr) -> KeyRange:
    """Every key, or none for a tile whose queries all fail the comparison."""
    difference = sympy.expand(difference)
    slope = difference.coeff(sym.q)
    rest = difference - slope * sym.q
    is_affine = slope.is_Integer and slope != 0 and not rest.has(sym.q) and _is_whole(rest)
    if op not in ("<", "<=") or not is_affine:
        return KeyRange()
    least = sympy.expand(rest + slope * (FIRST if slope > 0 else BEHIND - 1))
    some = least < 0 if op == "<" else least <= 0
    zero = sympy.Integer(0)
    return KeyRange((cast(Expr, Where(some, zero, size)),), (cast(Expr, Where(some, size, zero)),))


def _bounds(difference: Expr, op: str) -> KeyRange:
    """The range that `difference < 0` or `difference <= 0` allows to k."""
    difference = sympy.expand(difference)
    factor = difference.coeff(sym.k)
    rest = difference - factor * sym.k
    if factor not in (1, -1) or rest.has(sym.k) or not _is_whole(rest):
        return KeyRange()
    slope = rest.coeff(sym.q)
    rest_without_q = rest - slope * sym.q
    if rest_without_q.has(sym.q) or not slope.is_Integer:
        return KeyRange()
    strict = int(op == "<")
    if factor == 1:  # k <= -rest
        worst = rest_without_q + slope * (BEHIND - 1 if slope < 0 else FIRST)
        return KeyRange(high=(sympy.expand(-worst - strict + 1),))
    worst = rest_without_q + slope * (FIRST if slope > 0 else BEHIND - 1)  # k >= rest
    return KeyRange(low=(sympy.expand(worst + strict),))


def _is_whole(expr: Expr) -> bool:
    """A sum of whole multiples of q and of sizes, which every kernel knows as integers."""
    return (
        not expr.has(Read, sym.s)
        and all(
            term.is_Integer
            or (term.as_coeff_Mul()[0].is_Integer and term.as_coeff_Mul()[1].is_Symbol)
            for term in sympy.Add.make_args(expr)
        )
        and not expr.has(sym.b, sym.h)
    )


def _joined(a: Iterable[Expr], b: Iterable[Expr]) -> tuple[Expr, ...]:
    return tuple(sorted({*a, *b}, key=str))
