"""Positions in words: what a score adds for where a query and a key stand.

Rotary and learned embeddings act before the product of q and k; a formula does not show them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import sympy
from sympy import Expr, Symbol
from sympy.core.relational import Relational

from rewriter import symbols as sym
from rewriter.linear import LinearSpec
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.symbols import Formula, Read, h, k, q, reads, s

__all__ = ["bias_terms", "by_distance", "position_words"]

_DISTANCE = Symbol("d", integer=True)


def position_words(spec: Spec) -> tuple[str, ...]:
    """`("relative bias table weight, by distance",)`; empty where the formula has no positions."""
    if isinstance(spec, LinearSpec):
        if spec.decay == 0:
            return ()
        each = ", a rate for each head" if _by_head(spec.decay) else ""
        return (f"decay by distance{each}",)
    counts = frozenset(t.name for t in spec.tensors if t.dtype.startswith("int"))
    words = [_of_term(x, counts) for x in bias_terms(cast(SoftmaxSpec, spec).score)]
    return tuple(dict.fromkeys(w for w in words if w))


def bias_terms(score: Expr) -> list[Expr]:
    """What is added to the score, inside of a cap or outside, and differs between keys or
    queries."""
    found = [
        term
        for node in sympy.preorder_traversal(score)
        if isinstance(node, sympy.Add) and node.has(s)
        for term in node.args
        if not term.has(s) and term.has(q, k)
    ]
    return sorted(found, key=str)


def by_distance(formula: Formula) -> bool:
    """The formula has q and k only as `q - k`."""
    return not _from_key(formula).has(k)


def _from_key(x: Formula) -> Formula:
    """The formula with k and a distance d in the place of q; comparisons against 0, so that k
    cancels in them."""
    if x == q:
        return cast(Formula, k + _DISTANCE)
    if not x.has(q):
        return x
    args = [_from_key(a) for a in x.args]
    if isinstance(x, Relational):
        return cast(Formula, x.func(args[0] - args[1], 0))
    return cast(Formula, x.func(*args))


def _of_term(term: Expr, counts: frozenset[str]) -> str:
    """`counts`: names of the tensors of integers."""
    inner = {r for outer in reads(term) for i in outer.index for r in i.atoms(Read)}
    outer = sorted(reads(term) - inner, key=str)
    both = [w for r in outer if r.has(q) and r.has(k) for w in _of_table(r)]
    if both:
        return ", ".join(both)
    if _is_slope(term, counts):
        of = "distance" if term.has(q) else "position of the key"
        if _by_head(term):
            return f"ALiBi-like: a slope for each head times the {of}"
        return f"a slope times the {of}"
    if term.has(q) and term.has(k) and by_distance(term):
        return "a bias by distance" + (", for each head" if _by_head(term) else "")
    what = " and ".join(n for n, x in (("the query", q), ("the key", k)) if term.has(x))
    names = "".join(f" ({r.tensor})" for r in outer if r.has(q, k))
    return f"a bias of {what}{names}"


def _of_table(read: Read) -> Iterator[str]:
    """A read that q and k decide together."""
    name, index = read.tensor, read.index
    if q in index and k in index:
        yield f"a tensor of queries × keys ({name})"
    elif any(i.has(Read) for i in index):
        yield f"bias table {name}, by an index of query and key"
    else:
        moving = [i for i in index if i.has(q, k)]
        rest = [i for i in moving if i not in (q, k)]
        if not all(by_distance(i) for i in rest):
            yield f"bias table {name}, by query and key"
        elif len(rest) == len(moving):
            yield f"relative bias table {name}, by distance"
        else:
            of = "query" if q in moving else "key"
            yield f"a term of the {of} and the distance ({name})"


def _is_slope(term: Expr, counts: frozenset[str]) -> bool:
    """Linear in the positions of keys, which are k itself or read from a tensor of integers."""
    slope = term.diff(k)
    if slope != 0:
        return not slope.has(q, k) and not _read_at(term, q) and not _read_at(term, k)
    counted = {r.tensor for r in reads(term) if r.has(k)}
    return bool(counted) and counted <= counts and _by_head(term) and not term.has(q)


def _read_at(term: Expr, x: Symbol) -> bool:
    return any(r.has(x) for r in reads(term))


def _by_head(formula: Expr) -> bool:
    return bool(formula.has(h)) or any(sym.h in r.free_symbols for r in reads(formula))
