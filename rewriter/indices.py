"""Arithmetic on indices: sizes of torch as sympy, mixed radix, and comparisons in one spelling.

A view turns `(b, h)` into `b·H + h` and back into `⌊(b·H + h)/H⌋`; with `0 <= h < H` known these
are b and h again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Float, Integer, Symbol
from sympy.logic.boolalg import Boolean

from rewriter import symbols as sym
from rewriter.symbols import Formula, IDiv, IMod, Maximum, Minimum

__all__ = ["Bounds", "as_size", "compare", "concrete", "literal"]


def as_size(value: Any) -> Expr:
    """A size of a graph (an int or a `SymInt`) as a sympy expression."""
    if isinstance(value, torch.SymInt):
        return _plain(value.node.expr)
    return Integer(int(value))


def concrete(value: Any, shape_symbols: Mapping[Symbol, int]) -> int:
    """The size with every symbol replaced by a number."""
    if isinstance(value, torch.SymInt):
        return int(
            value.node.expr.xreplace({k: Integer(v) for k, v in shape_symbols.items()}).doit()
        )
    return int(value)


def _plain(expr: Any) -> Expr:
    """torch's own integer functions as ours."""
    if not expr.args:
        return cast(Expr, expr)
    args = [_plain(a) for a in expr.args]
    match expr.func.__name__:
        case "FloorDiv" | "CleanDiv":
            return _quotient(*args)
        case "Mod" | "PythonMod":
            return cast(Expr, IMod(*args))
        case "Max":
            return cast(Expr, _fold(Maximum, args))
        case "Min":
            return cast(Expr, _fold(Minimum, args))
    return cast(Expr, expr.func(*args))


@lru_cache(maxsize=4096)
def _quotient(x: Expr, y: Expr) -> Expr:
    """`⌊x/y⌋`, where torch has left a division without remainder, such as `n²/n`."""
    whole = sympy.cancel(x / y)
    return whole if whole.is_integer else cast(Expr, IDiv(x, y))


def _fold(function: Any, args: Sequence[Expr]) -> Expr:
    result = args[0]
    for arg in args[1:]:
        result = function(result, arg)
    return result


class Bounds:
    """What is known of index symbols: `0 <= symbol < size`."""

    def __init__(self, sizes: Mapping[Symbol, Expr]) -> None:
        self.sizes = dict(sizes)

    def below(self, index: Expr, size: Expr) -> bool:
        """`0 <= index < size` is certain."""
        if index == 0:
            return True
        if index.is_Integer and size.is_Integer:
            return bool(0 <= index < size)
        if isinstance(index, Symbol) and index in self.sizes:
            return bool(self.sizes[index] == size) or _fits(self.sizes[index], size)
        if isinstance(index, IMod):
            return bool(index.args[1] == size) or _fits(index.args[1], size)
        ends = self._ends(index)
        return ends is not None and bool(ends[0].is_nonnegative) and _fits(ends[1] + 1, size)

    def clamped(self, index: Expr, size: Expr) -> Expr:
        """The index, kept from 0 to below the size where it may lie outside."""
        if index == 0 or not index.free_symbols or self.below(index, size):
            return index
        ends = self._ends(index)
        if ends is None or not ends[0].is_nonnegative:
            index = cast(Expr, Maximum(index, 0))
        if ends is None or not _fits(ends[1] + 1, size):
            index = cast(Expr, Minimum(index, size - 1))
        return index

    def _ends(self, index: Expr) -> tuple[Expr, Expr] | None:
        """The smallest and the largest value, or what they lie between, if that can be said."""
        if index.is_Integer:
            return index, index
        if isinstance(index, Symbol):
            if index in self.sizes:
                return Integer(0), self.sizes[index] - 1
            return (index, index) if index.is_positive else None
        if isinstance(index, IMod):
            return Integer(0), index.args[1] - 1
        if isinstance(index, sympy.Add):
            parts = [self._ends(a) for a in index.args]
            if None in parts:
                return None
            low, high = zip(*cast("list[tuple[Expr, Expr]]", parts), strict=True)
            return sympy.expand(sympy.Add(*low)), sympy.expand(sympy.Add(*high))
        if isinstance(index, sympy.Mul):
            return self._ends_of_product(index)
        if isinstance(index, IDiv):
            inner = self._ends(index.args[0])
            if inner is not None and inner[0].is_nonnegative:
                size = sympy.expand(inner[1] + 1)
                quotient = sympy.cancel(size / index.args[1]) if not size.is_Integer else None
                if (
                    quotient is not None
                    and quotient.is_polynomial(*quotient.free_symbols)
                    and quotient.is_integer
                ):
                    return Integer(0), quotient - 1
                return Integer(0), cast(Expr, IDiv(inner[1], index.args[1]))
        return None

    def _ends_of_product(self, index: Expr) -> tuple[Expr, Expr] | None:
        coefficient, rest = index.as_coeff_Mul()
        if coefficient != 1:
            ends = self._ends(rest)
            if ends is None:
                return None
            low, high = (sympy.expand(coefficient * end) for end in ends)
            return (low, high) if coefficient > 0 else (high, low)
        factors = [
            a for a in index.args if a.is_positive and not (a.free_symbols & self.sizes.keys())
        ]
        others = [a for a in index.args if a not in factors]
        if not others:
            return index, index
        ends = self._ends(others[0]) if len(others) == 1 else None
        if ends is None:
            return None
        low, high = (sympy.expand(sympy.Mul(*factors) * end) for end in ends)
        return low, high

    def split(self, index: Expr, size: Expr) -> tuple[Expr, Expr]:
        """`(⌊index / size⌋, index mod size)`, simplified where the bounds allow it."""
        if size == 1:
            return index, Integer(0)
        if self.below(index, size):
            return Integer(0), index
        quotient, remainder = Integer(0), Integer(0)
        for term in sympy.Add.make_args(sympy.expand(index)):
            whole = sympy.cancel(term / size) if size.free_symbols else term / size
            if (term.is_Integer and size.is_Integer and term % size == 0) or (
                not term.is_Integer and whole.is_integer and not whole.is_Rational
            ):
                quotient += whole
            else:
                remainder += term
        if remainder == 0:
            return quotient, Integer(0)
        if self.below(remainder, size):
            return quotient, remainder
        coarse = self._coarse(remainder, size)
        if coarse is not None:
            step, steps, rest = coarse
            upper, lower = self.split(steps, sympy.cancel(size / step))
            return quotient + upper, sympy.expand(lower * step) + rest
        known = isinstance(remainder, IMod) and remainder.args[1].is_Integer and size.is_Integer
        if known and remainder.args[1] % size == 0:
            inner_quotient, inner = self.split(remainder.args[0], size)
            factor = remainder.args[1] / size
            return quotient + self.split(inner_quotient, factor)[1], inner
        if isinstance(remainder, IDiv) and remainder.args[1].is_Integer and size.is_Integer:
            upper = self.split(remainder.args[0], remainder.args[1] * size)[0]
            return quotient + upper, cast(Expr, IMod(remainder, size))
        return quotient + cast(Expr, IDiv(remainder, size)), cast(Expr, IMod(remainder, size))

    def _coarse(self, index: Expr, size: Expr) -> tuple[Expr, Expr, Expr] | None:
        """`(c, x, y)` with `index = c·x + y`, `0 <= y < c` and c a divisor of the size, if there is
        such a c."""
        terms = sympy.Add.make_args(index)
        for term in terms:
            step = term.as_independent(*self.sizes)[0]
            if step == 1 or not step.is_positive or not _divides(step, size):
                continue
            parts = [sympy.cancel(t / step) if _divides(step, t) else None for t in terms]
            rest = sympy.Add(*(t for t, part in zip(terms, parts, strict=True) if part is None))
            if self.below(rest, step):
                return step, sympy.Add(*(part for part in parts if part is not None)), rest
        return None

    def unravel(self, index: Expr, shape: Sequence[Expr]) -> list[Expr]:
        """The indices of an element of a contiguous tensor from its position in it."""
        result: list[Expr] = []
        for size in reversed(shape[1:]):
            index, remainder = self.split(index, size)
            result.insert(0, remainder)
        return [index, *result] if shape else []


def _divides(step: Expr, x: Expr) -> bool:
    """x is an integer times the step."""
    if step.is_Integer and x.is_Integer:
        return bool(x % step == 0)
    return bool(sympy.cancel(x / step).is_integer)


def joined(index: Expr) -> Expr:
    """`n·⌊x/n⌋ + x mod n` is x again, in a sum with more terms too."""
    for remainder in index.atoms(IMod):
        x, n = remainder.args
        for term in sympy.Add.make_args(index):
            factor = sympy.cancel(term / remainder)
            if factor.has(IMod) or not term.has(remainder):
                continue
            whole = sympy.expand(factor * n * cast(Expr, IDiv(x, n)))
            if whole in sympy.Add.make_args(index):
                return joined(sympy.expand(index - term - whole + factor * x))
    return index


def _fits(size: Expr, other: Expr) -> bool:
    difference = other - size
    return bool(difference.is_nonnegative)


def remap_view(
    index: Sequence[Expr], shape: Sequence[Expr], source: Sequence[Expr], bounds: Bounds
) -> list[Expr]:
    """Indices into `source` of the element that a view of shape `shape` has at `index`.

    Dimensions are taken in the smallest groups whose sizes multiply to the same number, so that a
    dimension that the view leaves alone keeps its index.
    """
    result: list[Expr] = []
    i = j = 0
    while i < len(shape) or j < len(source):
        if i < len(shape) and j < len(source) and shape[i] == source[j]:
            result.append(index[i])
            i, j = i + 1, j + 1
            continue
        if i < len(shape) and shape[i] == 1:
            i += 1
            continue
        if j < len(source) and source[j] == 1:
            result.append(Integer(0))
            j += 1
            continue
        i_end, j_end = _group(shape, source, i, j)
        linear: Expr = Integer(0)
        for size, position in zip(shape[i:i_end], index[i:i_end], strict=True):
            linear = linear * size + position
        result.extend(bounds.unravel(joined(sympy.expand(linear)), source[j:j_end]))
        i, j = i_end, j_end
    return result


def _group(shape: Sequence[Expr], source: Sequence[Expr], i: int, j: int) -> tuple[int, int]:
    """The ends of the smallest groups from i and j on whose sizes have the same product."""
    for total in range(2, len(shape) - i + len(source) - j + 1):
        for take in range(1, total):
            i_end, j_end = i + take, j + total - take
            if i_end > len(shape) or j_end > len(source):
                continue
            if _same(sympy.Mul(*shape[i:i_end]), sympy.Mul(*source[j:j_end])):
                return i_end, j_end
    return len(shape), len(source)


def _same(a: Expr, b: Expr) -> bool:
    return bool(a == b) or bool(sympy.expand(a - b) == 0)


_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_RELATION = {
    "<": sympy.Lt,
    "<=": sympy.Le,
    ">": sympy.Gt,
    ">=": sympy.Ge,
    "==": sympy.Eq,
    "!=": sympy.Ne,
}


def compare(op: str, x: Expr, y: Expr) -> Boolean:
    """`x op y`; a comparison of the positions q and k comes out in one spelling, `k ≤ q + c` or `q
    - k < c`."""
    integers = x.is_integer and y.is_integer
    if (
        integers
        and op in ("<", "<=", ">", ">=")
        and (x.has(sym.k) or y.has(sym.k))
        and (x.has(sym.q) or y.has(sym.q))
    ):
        difference = sympy.expand(x - y)
        slope_k, slope_q = difference.coeff(sym.k), difference.coeff(sym.q)
        rest = sympy.expand(difference - slope_k * sym.k - slope_q * sym.q)
        if (slope_k, slope_q) in ((1, -1), (-1, 1)) and not rest.has(sym.k, sym.q):
            if slope_k == -1:
                op, rest = _FLIPPED[op], -rest
            # now: k - q + rest  op  0
            if op == "<":
                op, rest = "<=", rest + 1
            if op == ">=":
                op, rest = ">", rest + 1
            if op == "<=":
                return cast(Boolean, sympy.Le(sym.k, sym.q - rest))
            width, offset = rest.as_independent(*rest.free_symbols, as_Add=True)
            return cast(Boolean, sympy.Lt(sym.q - sym.k - offset, width))
    return cast(Boolean, _RELATION[op](x, y))


def literal(value: bool | int | float) -> Formula:
    """A number or truth value of Python or torch."""
    if isinstance(value, bool):
        return cast(Boolean, sympy.true if value else sympy.false)
    if isinstance(value, int):
        return Integer(value)
    if value in (float("inf"), -float("inf")):
        return cast(Expr, sympy.oo if value > 0 else -sympy.oo)
    whole = value == int(value) and abs(value) < 2**24
    return Integer(int(value)) if whole else cast(Expr, Float(value))


def as_number(x: Formula) -> Expr:
    """A truth value as 0 or 1; numbers as they are."""
    return (
        cast(Expr, sym.Where(x, 1, 0))
        if isinstance(x, Boolean) and not isinstance(x, Symbol)
        else cast(Expr, x)
    )


def as_truth(x: Formula) -> Boolean:
    """A number as the truth value `x ≠ 0`; truth values as they are."""
    if isinstance(x, Boolean) and not isinstance(x, Symbol):
        return x
    if isinstance(x, sym.Where) and x.args[1].is_number and x.args[2].is_number:
        first, second = x.args[1] != 0, x.args[2] != 0
        if first == second:
            return cast(Boolean, sympy.true if first else sympy.false)
        return cast(Boolean, x.args[0] if first else sympy.Not(x.args[0]))
    return cast(Boolean, sympy.Ne(x, 0))
