"""Which keys a block of queries can see, read off the mask formula, not a materialised mask.

`key_ranges(mask)` turns a mask into a function from a block of queries to a few ranges of keys. The
ranges are a superset of what the block sees, never less: a term that is not understood (a read of a
tensor, a float) bounds nothing. The same question asked of `Not(mask)` tells where a mask still has
to be applied: causal masks need it on the diagonal only.

Understood: comparisons of integer expressions in which the key stands once, below sums, integer
factors, `IDiv` by a positive number, `Abs`, `Minimum` and `Maximum`; conjunctions, disjunctions and
negations of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import sympy
from sympy import Expr, Integer
from sympy.logic.boolalg import Boolean

from rewriter import symbols as sym

__all__ = ["KeyRanges", "Queries", "Segments", "causal_offset", "key_ranges"]

Bound = int | float  # a float only as an infinity
Interval = tuple[Bound, Bound]
"""Smallest and largest value, both included."""
Segments = tuple[tuple[int, int], ...]
"""Ranges of keys `[start, stop)`: sorted, not empty, not touching."""


class Queries(NamedTuple):
    """A block of queries: first and last index of each axis, both included, and all sizes."""

    b: tuple[int, int]
    h: tuple[int, int]
    q: tuple[int, int]
    sizes: Mapping[str, int]
    """`B`, `H`, `L`, `M` and the further sizes of the spec."""


KeyRanges = Callable[[Queries], Segments]
_Ranges = Callable[[Queries], tuple[Interval, ...]]
_Solver = Callable[[Bound, Bound, Queries], tuple[Interval, ...]]
_Values = Callable[[Queries], Interval]

_EVERYTHING: tuple[Interval, ...] = ((-math.inf, math.inf),)
_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def key_ranges(mask: Boolean) -> KeyRanges | None:
    """A function from a block of queries to the keys that some query of it may see.

    None if the mask bounds nothing.
    """
    ranges = _of(mask, True)
    if ranges is None:
        return None

    def clipped(block: Queries) -> Segments:
        top = block.sizes["M"]
        found: list[list[int]] = []
        for low, high in sorted(ranges(block)):
            start, stop = int(max(low, 0)), int(min(high, top - 1)) + 1
            if start >= stop:
                continue
            if found and start <= found[-1][1]:
                found[-1][1] = max(found[-1][1], stop)
            else:
                found.append([start, stop])
        return tuple((start, stop) for start, stop in found)

    return clipped


def causal_offset(mask: Boolean) -> Callable[[Queries], Bound] | None:
    """c, as a function of the sizes, if the mask says `k <= q + c`; else None."""
    if not isinstance(mask, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        return None
    small, large = (mask.lhs, mask.rhs) if mask.rel_op in ("<", "<=") else (mask.rhs, mask.lhs)
    rest = large - small + sym.k - sym.q
    if rest.has(sym.k, sym.q, sym.h, sym.b) or (values := _values(_exact(rest))) is None:
        return None
    strict = int(mask.rel_op in ("<", ">"))
    return lambda block: values(block)[0] - strict


# --- logic ----------------------------------------------------------------------------------------


def _of(mask: Boolean, wanted: bool) -> _Ranges | None:
    """Keys at which the mask can take the wanted value; None for all keys."""
    if mask in (sympy.true, sympy.false):
        return None if bool(mask) is wanted else lambda block: ()
    if isinstance(mask, sympy.Not):
        return _of(mask.args[0], not wanted)
    if isinstance(mask, sympy.And | sympy.Or):
        parts = [_of(a, wanted) for a in mask.args]
        return _both(parts) if isinstance(mask, sympy.And) is wanted else _either(parts)
    if not mask.is_Relational or not all(isinstance(a, Expr) for a in mask.args):
        return None
    difference = _exact(mask.lhs - mask.rhs)
    kind = mask.rel_op if wanted else _OPPOSITE[mask.rel_op]
    return _compared(difference, kind)


def _both(parts: Sequence[_Ranges | None]) -> _Ranges | None:
    known = [p for p in parts if p is not None]
    if len(known) < 2:
        return known[0] if known else None

    def ranges(block: Queries) -> tuple[Interval, ...]:
        found = known[0](block)
        for part in known[1:]:
            found = _intersection(found, part(block))
        return found

    return ranges


def _either(parts: Sequence[_Ranges | None]) -> _Ranges | None:
    if any(p is None for p in parts):
        return None
    known = cast("list[_Ranges]", parts)
    return lambda block: tuple(interval for part in known for interval in part(block))


def _intersection(a: tuple[Interval, ...], c: tuple[Interval, ...]) -> tuple[Interval, ...]:
    pairs = ((max(x[0], y[0]), min(x[1], y[1])) for x in a for y in c)
    return tuple((low, high) for low, high in pairs if low <= high)


def _meets(values: Interval, wanted: tuple[Interval, ...]) -> bool:
    return any(values[0] <= high and low <= values[1] for low, high in wanted)


def _compared(difference: Expr, kind: str) -> _Ranges | None:
    """Keys at which the difference can compare to 0 in this way. It is whole: `< 0` is `<= -1`."""
    inf = math.inf
    wanted: tuple[Interval, ...] = {
        "<": ((-inf, -1),),
        "<=": ((-inf, 0),),
        ">": ((1, inf),),
        ">=": ((0, inf),),
        "==": ((0, 0),),
        "!=": ((-inf, -1), (1, inf)),
    }[kind]
    if not difference.has(sym.k):
        values = _values(difference)
        if values is None:
            return None
        return lambda block: _EVERYTHING if _meets(values(block), wanted) else ()
    solver = _solver(difference)
    if solver is None:
        return None
    return lambda block: tuple(x for low, high in wanted for x in solver(low, high, block))


# --- integers -------------------------------------------------------------------------------------


def _exact(formula: Expr) -> Expr:
    """Floats that are small whole numbers become integers, which compare to indices equally."""
    numbers = {f: float(f) for f in formula.atoms(sympy.Float)}
    whole = {f: Integer(int(x)) for f, x in numbers.items() if x.is_integer() and abs(x) < 2**24}
    return cast(Expr, formula.xreplace(whole) if whole else formula)


def _values(formula: Expr) -> _Values | None:
    """The values that an expression without k takes over a block; None if it may not be whole."""
    if formula.is_Integer:
        number = int(formula)
        return lambda block: (number, number)
    if isinstance(formula, sympy.Symbol):
        name = str(formula)
        if formula in (sym.b, sym.h, sym.q):
            axis = Queries._fields.index(name)
            return lambda block: cast(Interval, block[axis])
        return None if formula in (sym.k, sym.s) else lambda block: (block.sizes[name],) * 2
    if isinstance(formula, sympy.Symbol | sym.Read) or not formula.args:
        return None
    parts = [_values(a) for a in formula.args] if not isinstance(formula, sym.Where) else []
    combine = _COMBINE.get(formula.func)
    if combine is None or any(p is None for p in parts):
        return None
    known = cast("list[_Values]", parts)
    return lambda block: combine([p(block) for p in known])


def _product(x: Interval, y: Interval) -> Interval:
    corners = [0 if 0 in (a, c) else a * c for a in x for c in y]  # 0 times infinity is 0 here
    return min(corners), max(corners)


def _multiplied(parts: list[Interval]) -> Interval:
    result = parts[0]
    for part in parts[1:]:
        result = _product(result, part)
    return result


def _divided(parts: list[Interval]) -> Interval:
    (low, high), (n, other) = parts
    if n != other or n <= 0 or math.isinf(n):
        return -math.inf, math.inf
    return _floor(low, n), _floor(high, n)


def _remainder(parts: list[Interval]) -> Interval:
    (low, high), (n, other) = parts
    if n != other or n <= 0 or math.isinf(n):
        return -math.inf, math.inf
    if not math.isinf(low) and not math.isinf(high) and low // n == high // n:
        return low % n, high % n
    return 0, n - 1


def _absolute(parts: list[Interval]) -> Interval:
    ((low, high),) = parts
    return max(low, -high, 0), max(-low, high)


def _floor(x: Bound, n: Bound) -> Bound:
    return x if math.isinf(x) else x // n


_COMBINE: dict[type, Callable[[list[Interval]], Interval]] = {
    sympy.Add: lambda parts: (sum(p[0] for p in parts), sum(p[1] for p in parts)),
    sympy.Mul: _multiplied,
    sympy.Abs: _absolute,
    sym.Minimum: lambda parts: (min(p[0] for p in parts), min(p[1] for p in parts)),
    sym.Maximum: lambda parts: (max(p[0] for p in parts), max(p[1] for p in parts)),
    sym.IDiv: _divided,
    sym.IMod: _remainder,
}


# --- the key --------------------------------------------------------------------------------------


def _solver(formula: Expr) -> _Solver | None:
    """A function that gives the keys at which the expression can lie between two bounds.

    None if that is not known.
    """
    if formula == sym.k:
        return lambda low, high, block: ((low, high),)
    with_key = [a for a in formula.args if a.has(sym.k)]
    if isinstance(formula, sym.Minimum | sym.Maximum):
        return _solve_extremum(formula)
    if len(with_key) != 1 or (inner := _solver(with_key[0])) is None:
        return None
    if isinstance(formula, sympy.Abs):
        return lambda low, high, block: _solve_absolute(inner, low, high, block)
    rest = [a for a in formula.args if a is not with_key[0]]
    others = _values(formula.func(*rest) if len(rest) != 1 else rest[0])
    if others is None:
        return None
    if isinstance(formula, sympy.Add):

        def solve_sum(low: Bound, high: Bound, block: Queries) -> tuple[Interval, ...]:
            least, most = others(block)
            return inner(low - most, high - least, block)

        return solve_sum
    if isinstance(formula, sympy.Mul) and formula.args[0].is_Integer and len(formula.args) == 2:
        n = int(formula.args[0])
        return lambda low, high, block: inner(*_unscaled(low, high, n), block)
    if isinstance(formula, sym.IDiv) and formula.args[0] is with_key[0]:

        def solve_quotient(low: Bound, high: Bound, block: Queries) -> tuple[Interval, ...]:
            n, other = others(block)
            return inner(low * n, high * n + n - 1, block) if n == other and n > 0 else _EVERYTHING

        return solve_quotient
    return None


def _unscaled(low: Bound, high: Bound, n: int) -> Interval:
    if n < 0:
        low, high, n = -high, -low, -n
    return -_floor(-low, n), _floor(high, n)


def _solve_absolute(
    inner: _Solver, low: Bound, high: Bound, block: Queries
) -> tuple[Interval, ...]:
    if high < 0:
        return ()
    if low <= 0:
        return inner(-high, high, block)
    return (*inner(-high, -low, block), *inner(low, high, block))


def _solve_extremum(formula: Expr) -> _Solver | None:
    """The minimum lies above a bound where both arguments do, and below one where either does."""
    small = isinstance(formula, sym.Minimum)

    def side(argument: Expr) -> _Solver | None:
        if argument.has(sym.k):
            return _solver(argument)
        values = _values(argument)
        if values is None:
            return None
        return lambda low, high, block: _EVERYTHING if _meets(values(block), ((low, high),)) else ()

    sides = [side(a) for a in formula.args]
    if any(x is None for x in sides):
        return None
    first, second = cast("list[_Solver]", sides)

    def solve(low: Bound, high: Bound, block: Queries) -> tuple[Interval, ...]:
        all_of: Interval = (low, math.inf) if small else (-math.inf, high)
        any_of: Interval = (-math.inf, high) if small else (low, math.inf)
        both = _intersection(first(*all_of, block), second(*all_of, block))
        return _intersection(both, (*first(*any_of, block), *second(*any_of, block)))

    return solve
