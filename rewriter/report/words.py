"""A mask in words: which keys a query sees, one phrase a condition.

The reader knows bounds on `k - q`, bounds on k, blocks, and reads of tensors. A condition that it
does not know is given as it is written. Windows count the query's own key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
from sympy import Expr, Integer, Symbol
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from rewriter import symbols as sym
from rewriter.linear import LinearSpec
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.symbols import IDiv, Read, formula_text, k, q

__all__ = ["Bound", "bound_of", "mask_of", "mask_words"]

_LONG = 72  # letters of a condition that are still read beside the formula


def mask_of(spec: Spec) -> Boolean:
    """What decides which keys a query sees, without a route."""
    if isinstance(spec, LinearSpec):
        if spec.position is None:
            return spec.seen
        return cast(Boolean, sympy.And(k <= spec.position, spec.seen))
    return cast(SoftmaxSpec, spec).mask


def mask_words(spec: Spec) -> tuple[str, ...]:
    """`("causal", "sliding window of 4,096", "padding (attention_mask)")`; empty where every query
    sees every key."""
    words = _all_of(mask_of(spec), spec.truths, None)
    route = getattr(spec, "route", None)
    return (*words, *(() if route is None else (f"{route}, chosen at run time",)))


# --- bounds ---------------------------------------------------------------------------------------


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


def _by_blocks(condition: Boolean) -> tuple[Boolean, int] | None:
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


# --- words ----------------------------------------------------------------------------------------


def _all_of(mask: Boolean, truths: Sequence[str], start: Expr | None) -> tuple[str, ...]:
    """The words of conditions that hold together. `start`: the limit of a causal bound that holds
    beside them."""
    if isinstance(mask, BooleanTrue):
        return ()
    if isinstance(mask, BooleanFalse):
        return ("no key",)
    parts = sorted(sympy.And.make_args(mask), key=lambda x: (len(x.atoms(Read)), str(x)))
    bounds = {x: bound for x in parts if (bound := bound_of(x)) is not None}
    causal = [x.limit for x in bounds.values() if x.is_causal]
    start = causal[0] if len(causal) == 1 else start
    top = [x.limit for x in bounds.values() if x.is_top]
    last = top[0] if len(top) == 1 else None
    first = [x for x in parts if x in bounds and bounds[x].of_k == 1]
    second = [x for x in parts if x in bounds and x not in first]
    ends = {x: start if bounds[x].is_window else last for x in bounds}
    words = [_of_bound(bounds[x], x, truths, ends[x]) for x in (*first, *second)]
    words += [_of_other(x, truths, start) for x in parts if x not in bounds]
    return tuple(dict.fromkeys(_joined_padding(words)))


def _of_bound(bound: Bound, whole: Boolean, truths: Sequence[str], end: Expr | None) -> str:
    """`end`: the limit of the bound on the other side, if there is one."""
    limit = bound.limit
    if bound.is_causal:
        return _causal(limit, truths)
    if bound.is_top:
        if limit.is_Integer:
            return _count(int(limit) + 1, "the first key", "the first {} keys")
        return f"keys up to {formula_text(limit, truths)}"
    if end is not None and (end == 0 or not end.is_Integer):
        width = limit + end + 1
        if width.is_Integer and width > 0:
            return f"sliding window of {int(width):,}"
    if bound.is_window and limit.is_Integer:
        return f"keys at most {int(limit):,} back"
    if bound.of_q == 0 and limit.is_Integer:
        return _count(-int(limit), "not the first key", "not the first {} keys")
    return _written(whole, truths)


def _causal(limit: Expr, truths: Sequence[str]) -> str:
    if limit == 0:
        return "causal"
    if limit == sym.M - sym.L:
        return "causal, aligned at the last key"
    if limit.is_Integer:
        n = int(limit)
        return f"keys up to {n:,} ahead" if n > 0 else f"keys at least {-n:,} back"
    return f"causal, query 0 at key {formula_text(limit, truths)}"


def _of_other(part: Boolean, truths: Sequence[str], start: Expr | None) -> str:
    """The words of one condition that is no bound."""
    if isinstance(part, sympy.Or):
        options = sorted(part.args, key=_option_key)
        return " or ".join(" and ".join(_all_of(x, truths, start)) for x in options)
    if isinstance(part, Relational):
        known = _both_sides(part) or _segments(part) or _reads(part) or _blocks(part, truths)
        if known:
            return known
    return _written(part, truths)


def _option_key(option: Boolean) -> tuple[int, str]:
    """A causal bound first, then bounds on k alone, then windows."""
    bound = bound_of(option)
    return 0 if bound is not None and bound.is_causal else 2 if option.has(q) else 1, str(option)


def _both_sides(part: Any) -> str | None:
    """`|q - k| < n`."""
    if not isinstance(part, sympy.Lt | sympy.Le) or not isinstance(part.lhs, sympy.Abs):
        return None
    if part.lhs.args[0] not in (q - k, k - q) or not part.rhs.is_Integer:
        return None
    n = int(part.rhs) + isinstance(part, sympy.Le)
    return f"window of {n:,} on both sides"


def _segments(part: Any) -> str | None:
    """`T[…, q] = T[…, k]`."""
    a, c = part.lhs, part.rhs
    if not isinstance(part, sympy.Eq) or not (isinstance(a, Read) and isinstance(c, Read)):
        return None
    if a.tensor != c.tensor or {a.has(q), c.has(q)} != {True, False} or a.has(q) == a.has(k):
        return None
    return f"same segment ({a.tensor})" if a.has(k) == c.has(q) else None


def _reads(part: Any) -> str | None:
    """`T[b, k] ≠ 0` and its relatives: products of reads, and bounds that 0 and 1 decide."""
    if part.rhs not in (0, 1):
        return None
    sign = (part.rel_op, int(part.rhs))
    wanted = {("!=", 0): "", (">", 0): "", ("==", 1): "", ("==", 0): "not "}.get(sign)
    factors = sympy.Mul.make_args(part.lhs)
    if wanted is None or not all(isinstance(x, Read) for x in factors):
        return None
    if wanted and len(factors) > 1:
        return None
    return _and(_of_read(cast(Read, x), bool(wanted)) for x in sorted(factors, key=str))


def _of_read(read: Read, negated: bool) -> str:
    if any(i.has(Read) for i in read.index):
        return f"{'not ' if negated else ''}where {formula_text(read)}"
    if read.has(q) and read.has(k):
        return f"{'all but ' if negated else ''}a tensor of queries × keys ({read.tensor})"
    on_k, on_q = read.has(k), read.has(q)
    if len(read.index) == 2 and read.index[0] == sym.b and (on_k or on_q):
        return f"padding {'' if on_k else 'of queries '}({read.tensor})"
    what = "keys" if on_k else "queries" if on_q else "rows"
    return f"{what} {'not ' if negated else ''}chosen by {formula_text(read)}"


def _blocks(part: Boolean, truths: Sequence[str]) -> str | None:
    """Conditions on `⌊q/n⌋` and `⌊k/n⌋`."""
    found = _by_blocks(part)
    if found is None:
        return None
    inner, size = found
    if isinstance(inner, sympy.Eq) and inner in (sympy.Eq(q, k), sympy.Eq(k, q)):
        return f"chunks of {size:,}"
    bound = bound_of(inner)
    if bound is not None and bound.is_causal and bound.limit == 0:
        return f"causal by blocks of {size:,}"
    if bound is not None and bound.is_window and bound.limit.is_Integer:
        return f"sliding window of {int(bound.limit) + 1:,} blocks of {size:,}"
    return None


def _joined_padding(words: Iterable[str]) -> list[str]:
    """`padding (m)` and `padding of queries (m)` as one phrase."""
    found = list(words)
    for word in [w for w in found if w.startswith("padding (")]:
        other = word.replace("padding (", "padding of queries (", 1)
        if other in found:
            both = word.replace("padding (", "padding of keys and queries (")
            found = [both if w == word else w for w in found if w != other]
    return found


def _and(words: Iterable[str]) -> str:
    parts = list(words)
    names = {w.partition(" (")[2] for w in parts}
    if len(parts) == 2 and len(names) == 1 and all(w.startswith("padding") for w in parts):
        return f"padding of keys and queries ({names.pop()}"
    return " and ".join(parts)


def _count(n: int, one: str, many: str) -> str:
    return one if n == 1 else many.format(f"{n:,}")


def _written(condition: Boolean, truths: Sequence[str]) -> str:
    text = formula_text(condition, truths)
    used = sorted(str(x) for x in condition.free_symbols & {*map(Symbol, "bhqk"), sym.b, q, k})
    if len(text) <= _LONG:
        return text
    return f"a condition on {', '.join(used)} as written" if used else "a condition as written"
