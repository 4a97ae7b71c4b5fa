"""What a raw formula says: which keys it hides and how, its scale, and the same in canonical
symbols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import sympy
from sympy import Expr, Integer, Symbol
from sympy.logic.boolalg import Boolean

from rewriter import symbols as sym
from rewriter.indices import Bounds, compare
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import Formula, IDiv, Maximum, Where

__all__ = ["canonical", "scaled", "split_mask"]

HIDDEN = (-65504.0, -1e30)
"""A number that hides a key: the most negative finite float16, or anything below the second."""


def _hides(value: Expr) -> bool:
    if value == -sympy.oo:
        return True
    return bool(value.is_number and (float(value) == HIDDEN[0] or float(value) <= HIDDEN[1]))


def split_mask(
    score: Expr, product: Symbol, trained: Callable[[Expr], bool] = lambda _: False
) -> tuple[Expr, Boolean, str]:
    """Takes out of a score what hides keys.

    Args:
        score: as read from the graph.
        product: what stands for the product of queries and keys.
        trained: a formula reads a tensor that may want a gradient.

    Returns:
        The score where keys are seen, the condition under which they are, and how the others are
        hidden: one of `rewriter.spec.MASKED`. Where keys are hidden by finite numbers in two ways,
        all stay in the score: which keys a row averages that sees none depends on both. So they do
        where the number replaces one part of the score and another part wants a gradient: in a row
        that sees no key, only the other part gets one.
    """
    whole = score
    mask: list[Boolean] = []
    way = ""
    changed = True
    while changed:
        changed = False
        if (
            isinstance(score, Maximum)
            and _hides(score.args[1])
            and (not way or way in ("mean", "add", "nan"))
        ):
            score, way, changed = score.args[0], "mean", True
            continue
        if isinstance(score, Where) and (hit := _hidden_branch(score)) is not None:
            condition, rest, value = hit
            found = "nan" if value == -sympy.oo else "mean"
            if not rest.is_number and way in ("", found):
                mask.append(condition)
                score, way, changed = rest, found, True
                continue
        for term in sympy.Add.make_args(score):
            if not isinstance(term, Where) or (hit := _hidden_branch(term)) is None:
                continue
            condition, rest, value = hit
            found = "nan" if value == -sympy.oo else "mean" if rest.has(product) else "add"
            apart = score - term if found == "mean" else rest
            if found != "nan" and trained(apart) and not _every_row_sees(condition):
                return whole, sympy.true, "zero"
            if not way or way == found == "nan":  # twice the most negative number is minus infinity
                mask.append(condition)
                score, way, changed = score - term + rest, found, True
                break
    if way in ("add", "mean") and any(_hidden_branch(term) for term in score.atoms(Where)):
        return whole, sympy.true, "zero"
    return score, cast(Boolean, sympy.And(*mask)), way or "zero"


def _every_row_sees(condition: Boolean) -> bool:
    """Every row sees a key: the first one."""
    return bool(condition.xreplace({sym.k: Integer(0)}) == sympy.true)


def _hidden_branch(term: Where) -> tuple[Boolean, Expr, Expr] | None:
    """The condition under which a key is seen, what stands there then, and the number that hides it
    otherwise."""
    condition, x, y = term.args
    if _hides(y):
        return condition, x, y
    if _hides(x):
        return cast(Boolean, sympy.Not(condition)), y, x
    return None


def scaled(score: Expr, product: Symbol, factor: Expr) -> tuple[Expr, Expr]:
    """The score in `s`, and the scale that makes s from the product of q and k.

    A factor that stands on the product everywhere becomes the scale; of a soft cap `c · tanh(x /
    c)` the inside is s.
    """
    # sympy joins numbers that stand together; with the factor of the operands made explicit there
    # is one coefficient
    coefficients = {
        m.as_independent(product)[0] for m in score.atoms(sympy.Mul) if product in m.args
    }
    bare = score.xreplace({m: Integer(0) for m in score.atoms(sympy.Mul) if product in m.args}).has(
        product
    )
    scale: Expr = Integer(1)
    if len(coefficients) == 1 and not bare:
        scale = next(iter(coefficients))
        if scale.has(sym.q, sym.k):
            scale = Integer(1)
    for m in score.atoms(sympy.Mul):
        caps = [a for a in m.args if isinstance(a, sympy.tanh) and a.has(product)]
        rest = [a for a in m.args if a not in caps]
        if len(caps) == 1 and all(a.is_number for a in rest):
            cap = sympy.Mul(*rest)
            total = cap * scale
            score = score.xreplace({scale * product if scale != 1 else product: sym.s / cap})
            return score, tidy(total * factor)
    if scale != 1:
        score = score.xreplace(
            {m: _without(m, product) for m in score.atoms(sympy.Mul) if product in m.args}
        )
    return score.xreplace({product: sym.s}), tidy(scale * factor)


def _without(term: Expr, product: Symbol) -> Expr:
    """The term with its coefficient, which became the scale, and the product read as s."""
    rest = term.as_independent(product)[1]
    return cast(Expr, sympy.Mul(*(sym.s if a == product else a for a in sympy.Mul.make_args(rest))))


def tidy(x: Expr) -> Expr:
    """A float that is an integer as that integer."""
    return Integer(int(x)) if x.is_Float and float(x).is_integer() else x


def canonical(
    formulas: Sequence[Formula], sizes: tuple[Expr, Expr, Expr, Expr], bounds: Bounds
) -> tuple[list[Formula], tuple[Symbol, ...]]:
    """The formulas with the shape symbols of one graph replaced by B, H, L, M and `n0, n1, ...`.

    Args:
        sizes: batch, heads, query length and key length as the graph's shape symbols give them.

    Returns:
        The formulas, and the graph's symbols that became `n0, n1, ...`, in that order.
    """
    names: dict[Symbol, Expr] = {}
    for size, name in zip((sizes[2], sizes[3], sizes[0]), (sym.L, sym.M, sym.B), strict=True):
        rest = size.xreplace(names)
        free = sorted((x for x in rest.free_symbols if x not in (sym.L, sym.M, sym.B)), key=str)
        if len(free) != 1:
            free = [x for x in free if rest.is_polynomial(x) and rest.coeff(x) == 1][:1]
        if not free:
            continue
        x = free[0]
        slope = rest.coeff(x) if rest.is_polynomial(x) else Integer(0)
        if sympy.expand(rest - slope * x).has(x) or not slope.is_Integer or slope == 0:
            continue
        solved = sympy.expand(name - (rest - slope * x))
        names[x] = solved if slope == 1 else cast(Expr, IDiv(solved, slope))
    index = {sym.b, sym.h, sym.q, sym.k, sym.s}
    tensor_names = {r.args[0] for f in formulas for r in sym.reads(f)}
    formulas = [f.xreplace(names) for f in formulas]
    index |= {sym.B, sym.H, sym.L, sym.M}
    left = {x for f in formulas for x in f.free_symbols} - index - tensor_names
    free_symbols = tuple(sorted(left, key=str))
    more = {x: cast(Expr, sym.size_symbol(f"n{i}")) for i, x in enumerate(free_symbols)}
    if sizes[2] == 1:
        more[sym.q] = Integer(0)
    return [respelled(f.xreplace(more)) for f in formulas], free_symbols


def respelled(formula: Formula) -> Formula:
    """Comparisons of positions in one spelling, after a substitution; those that always hold are
    gone."""
    relations = {r: _simplest(r) for r in formula.atoms(sympy.core.relational.Relational)}
    changed = {a: c for a, c in relations.items() if a != c}
    return cast("Formula", formula.xreplace(changed)) if changed else formula


def on_one_axis(spec: SoftmaxSpec) -> SoftmaxSpec:
    """The spec for a site that always has as many queries as keys: `q + M - L` is q."""
    one = {sym.M: sym.L}
    return replace(
        spec,
        score=cast(Expr, respelled(spec.score.xreplace(one))),
        mask=cast(Boolean, respelled(spec.mask.xreplace(one))),
    )


def _simplest(relation: sympy.core.relational.Relational) -> Boolean:
    simple = compare(relation.rel_op, relation.lhs, relation.rhs)
    if isinstance(simple, sympy.Le | sympy.Lt) and simple.lhs == sym.k:
        room = sympy.expand(simple.rhs - (sym.M - 1) - int(isinstance(simple, sympy.Lt)))
        if room.is_nonnegative:
            return cast(Boolean, sympy.true)
    return simple
