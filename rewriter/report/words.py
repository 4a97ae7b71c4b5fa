"""A mask in words: which keys a query sees, one phrase a condition.

The reader knows bounds on `k - q`, bounds on k, blocks, and reads of tensors. A condition that it
does not know is given as it is written. Windows count the query's own key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import sympy
from sympy import Expr, Integer
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from rewriter import symbols as sym
from rewriter.linear import LinearSpec
from rewriter.report.bounds import Bound, bound_of, by_blocks
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.symbols import Read, formula_text, k, q

__all__ = ["mask_of", "mask_words"]

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
    if bound.is_window:
        back, where = _offset(-limit)
        if back is not None and back <= 0:
            return (
                f"keys at most {-back:,} back{where}" if back else f"keys from the query on{where}"
            )
    if bound.of_q == 0 and limit.is_Integer:
        return _count(-int(limit), "not the first key", "not the first {} keys")
    return _written(whole, truths)


def _causal(limit: Expr, truths: Sequence[str]) -> str:
    ahead, where = _offset(limit)
    if ahead is None:
        return f"causal, query 0 at key {formula_text(limit, truths)}"
    if ahead == 0:
        return f"causal{where}"
    what = f"keys up to {ahead:,} ahead" if ahead > 0 else f"keys at least {-ahead:,} back"
    return what + where


def _offset(limit: Expr) -> tuple[int | None, str]:
    """The number in `limit`, counted from the query where it stands on the axis of the keys: at its
    own number, or such that the last query is at the last key."""
    for start, where in ((Integer(0), ""), (sym.M - sym.L, ", aligned at the last key")):
        if (limit - start).is_Integer:
            return int(limit - start), where
    return None, ""


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
    """`|q - k| < n`, the query's own key counted."""
    if not isinstance(part, sympy.Lt | sympy.Le) or not isinstance(part.lhs, sympy.Abs):
        return None
    inside = part.lhs.args[0]
    distance = inside if inside.coeff(q) == 1 else -inside
    shift, where = _offset(distance - q + k)
    if shift != 0 or not part.rhs.is_Integer:
        return None
    n = int(part.rhs) + isinstance(part, sympy.Le)
    return f"window of {n:,} on both sides{where}"


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
    found = by_blocks(part)
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
    if len(text) <= _LONG:
        return text
    used = ", ".join(str(x) for x in (sym.b, sym.h, q, k) if condition.has(x))
    return f"a condition on {used}, as written"
