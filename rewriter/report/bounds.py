"""Conditions on positions that are bounds: what a mask says in words is mostly these."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr, Integer
from sympy.logic.boolalg import Boolean

from rewriter.symbols import IDiv, k, q

__all__ = ["Bound", "bound_of", "by_blocks"]


@dataclass(frozen=True)
class Bound:
    """`of_q · q + of_k · k <= limit`, where the factors are -1, 0 or 1, not both 0."""

    of_q: int
    of_k: int
    limit: Expr

    @property
    def is_causal(self) -> bool:
        """`k - q <= limit`"""
        return (self.of_q, self.of_k) == (-1, 1)

    @property
    def is_top(self) -> bool:
        """`k <= limit`"""
        return (self.of_q, self.of_k) == (0, 1)

    @property
    def is_window(self) -> bool:
        """`q - k <= limit`"""
        return (self.of_q, self.of_k) == (1, -1)


def bound_of(condition: Boolean) -> Bound | None:
    """The condition as a bound, if it is one."""
    if not isinstance(condition, sympy.Lt | sympy.Le | sympy.Gt | sympy.Ge):
        return None
    left, right = condition.lhs, condition.rhs
    if isinstance(condition, sympy.Gt | sympy.Ge):
        left, right = right, left
    strict = isinstance(condition, sympy.Lt | sympy.Gt)
    rest = left - right
    factors = rest.coeff(q), rest.coeff(k)
    rest = rest - factors[0] * q - factors[1] * k
    if rest.has(q, k) or not {*factors} <= {-1, 0, 1} or factors == (0, 0):
        return None
    return Bound(int(factors[0]), int(factors[1]), -rest - int(strict))


def by_blocks(condition: Boolean) -> tuple[Boolean, int] | None:
    """A condition on the blocks of q and k as one on q and k, and the size of a block."""
    blocks = [x for x in condition.atoms(IDiv) if x.has(q, k)]
    sizes = {x.args[1] for x in blocks}
    if len(sizes) != 1 or not all(x.is_Integer for x in sizes):
        return None
    plain = {x: q if x.has(q) else k for x in blocks if x.has(q) != x.has(k)}
    inner = condition.xreplace(plain)
    left = condition.xreplace({x: Integer(0) for x in blocks})
    if len(plain) != len(blocks) or left.has(q, k) or not inner.has(q) or not inner.has(k):
        return None
    return inner, int(sizes.pop())
