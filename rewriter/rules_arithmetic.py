"""The rules for operations that compute with elements: casts, arithmetic, logic."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Float, Integer, Symbol
from sympy.logic.boolalg import Boolean
from torch import fx

from rewriter.indices import as_number, as_truth, compare
from rewriter.reading import (
    Index,
    Reader,
    Rule,
    argument,
    choose,
    either,
    is_float,
    op_name,
    source_of,
    value_of,
    where,
)
from rewriter.symbols import Fadd, Fdiv, Fmul, Formula, IDiv, IMod, Maximum, Minimum, Trunc, Where

__all__ = ["ARITHMETIC"]


# --- casts ----------------------------------------------------------------------------------------


def _cast(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    source, after = source_of(node), value_of(node).dtype
    before = value_of(source).dtype
    if after == torch.bool:
        return as_truth(r.at(source, index))
    if before.is_floating_point and not after.is_floating_point:
        r.exact += 1
        try:
            return cast(Expr, Trunc(as_number(r.at(source, index))))
        finally:
            r.exact -= 1
    value = r.at(source, index)
    return value if before == torch.bool and isinstance(value, Boolean) else as_number(value)


# --- arithmetic -----------------------------------------------------------------------------------


def _binary(function: Callable[[Reader, fx.Node, Expr, Expr], Formula | None]) -> Rule:
    def rule(r: Reader, node: fx.Node, index: Index) -> Formula | None:
        return function(
            r, node, r.number(node.args[0], index, node), r.number(node.args[1], index, node)
        )

    return rule


def _lifted(function: Callable[[Expr, Expr], Expr], x: Expr, y: Expr) -> Expr:
    """Arithmetic on `where(c, number, number)` and a number stays such a `where`."""
    if isinstance(x, Where) and y.is_number and x.args[1].is_number and x.args[2].is_number:
        return where(x.args[0], _finite(function(x.args[1], y)), _finite(function(x.args[2], y)))
    if isinstance(y, Where) and x.is_number and y.args[1].is_number and y.args[2].is_number:
        return where(y.args[0], _finite(function(x, y.args[1])), _finite(function(x, y.args[2])))
    return function(x, y)


def _finite(x: Expr) -> Expr:
    return Integer(0) if x.is_zero else x


def _is_float32(node: fx.Node) -> bool:
    """The rounding that `Fadd` and its relatives have is that of the node."""
    return bool(value_of(node).dtype == torch.float32)


def _add(r: Reader, node: fx.Node, x: Expr, y: Expr) -> Formula | None:
    if value_of(node).dtype == torch.bool:
        return cast(Boolean, sympy.Or(as_truth(x), as_truth(y)))
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        y = y * cast(Expr, r.scalar(alpha))
    if r.exact and is_float(node):
        return cast(Expr, Fadd(x, y)) if _is_float32(node) else None
    return _lifted(operator.add, x, y)


def _sub(r: Reader, node: fx.Node, x: Expr, y: Expr) -> Formula | None:
    if op_name(node) == "aten.rsub":
        x, y = y, x
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        y = y * cast(Expr, r.scalar(alpha))
    if r.exact and is_float(node):
        return cast(Expr, Fadd(x, Fmul(-1, y))) if _is_float32(node) else None
    if isinstance(y, Where) and y.args[1].is_number and y.args[2].is_number and not x.is_number:
        return x + _lifted(operator.mul, y, Integer(-1))
    return _lifted(operator.sub, x, y)


def _mul(r: Reader, node: fx.Node, x: Expr, y: Expr) -> Formula | None:
    if value_of(node).dtype == torch.bool:
        return cast(Boolean, sympy.And(as_truth(x), as_truth(y)))
    if r.exact and is_float(node):
        return cast(Expr, Fmul(x, y)) if _is_float32(node) else None
    return _lifted(operator.mul, x, y)


def _div(r: Reader, node: fx.Node, x: Expr, y: Expr) -> Formula | None:
    rounding = node.kwargs.get("rounding_mode")
    if op_name(node) == "aten.floor_divide" or rounding == "floor":
        return None if is_float(node) else cast(Expr, IDiv(x, y))
    if rounding is not None:
        return None
    if r.exact:
        return cast(Expr, Fdiv(x, y)) if _is_float32(node) else None
    if y.is_number and y != 0:
        return _lifted(operator.mul, x, _inverse(y))
    return x / y


def _inverse(y: Expr) -> Expr:
    return cast(Expr, 1 / y if y.is_Float else Float(1.0 / float(y)) if y not in (1, -1) else y)


def _remainder(r: Reader, node: fx.Node, x: Expr, y: Expr) -> Formula | None:
    return (
        None
        if is_float(node)
        else r.bounds.split(x, y)[1]
        if y.is_positive
        else cast(Expr, IMod(x, y))
    )


def _pow(r: Reader, node: fx.Node, x: Expr, y: Expr) -> Formula | None:
    if is_float(node) and x.is_Integer and not y.is_number:
        x = Float(float(x))  # an integer to a negative power is 0 in torch
    return None if r.exact else cast(Expr, x**y)


def _minmax(function: Any) -> Rule:
    def rule(r: Reader, node: fx.Node, index: Index) -> Formula | None:
        if len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
            return None  # a reduction
        return cast(
            Expr, function(r.number(node.args[0], index, node), r.number(node.args[1], index, node))
        )

    return rule


def _clamp(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    value, name = r.number(node.args[0], index, node), op_name(node)
    low = argument(node, 1, "min") if name != "aten.clamp_max" else None
    high = (
        argument(node, 2, "max")
        if name == "aten.clamp"
        else argument(node, 1, "max")
        if name == "aten.clamp_max"
        else None
    )
    if low is not None:
        value = cast(Expr, Maximum(value, r.number(low, index, node)))
    if high is not None:
        value = cast(Expr, Minimum(value, r.number(high, index, node)))
    return value


def _unary(function: Callable[[Expr], Expr]) -> Rule:
    return lambda r, node, index: function(r.number(node.args[0], index, node))


def _rounded(function: Callable[[Expr], Expr]) -> Rule:
    def rule(r: Reader, node: fx.Node, index: Index) -> Formula | None:
        r.exact += 1
        try:
            value = r.number(node.args[0], index, node)
        finally:
            r.exact -= 1
        return value if value.is_integer and not value.has(Fadd, Fmul, Fdiv) else function(value)

    return rule


def _sigmoid(x: Expr) -> Expr:
    return 1 / (1 + sympy.exp(-x))


# --- logic ----------------------------------------------------------------------------------------


def _compare(op: str) -> Rule:
    def rule(r: Reader, node: fx.Node, index: Index) -> Formula | None:
        x, y = r.broadcast(node.args[0], index, node), r.broadcast(node.args[1], index, node)
        if op in ("==", "!="):
            if isinstance(x, Boolean) and isinstance(y, Boolean) and not isinstance(x, Symbol):
                if y in (sympy.true, sympy.false):
                    return x if (y == sympy.true) == (op == "==") else cast(Boolean, sympy.Not(x))
                other = cast(Boolean, sympy.Not(y))
                return choose(x, y, other) if op == "==" else choose(x, other, y)
            plain = _truth_test(op, x, y)
            if plain is not None:
                return plain
        x, y = as_number(x), as_number(y)
        cases = _by_cases(op, x, y)
        return compare(op, x, y) if cases is None else cases

    return rule


def _by_cases(op: str, x: Expr, y: Expr) -> Boolean | None:
    """A comparison of a sum of choices between numbers with a number, as logic: of truth values
    that a model adds."""
    terms = sympy.Add.make_args(x)
    choices = [t for t in terms if isinstance(t, Where)]
    rest = sympy.Add(*(t for t in terms if not isinstance(t, Where)))
    plain = all(a.is_number for t in choices for a in t.args[1:]) and rest.is_number
    if not plain or not y.is_number or not 0 < len(choices) <= 3:
        return None
    names = sympy.symbols(f"c:{len(choices)}")
    cases = []
    for taken in itertools.product((True, False), repeat=len(choices)):
        total = rest + sum(t.args[1 if yes else 2] for t, yes in zip(choices, taken, strict=True))
        if compare(op, total, y) == sympy.true:
            signed = zip(names, taken, strict=True)
            cases.append(sympy.And(*(name if yes else ~name for name, yes in signed)))
    # conditions as plain symbols: sympy spends minutes on the comparisons inside them
    logic = sympy.simplify_logic(sympy.Or(*cases))
    return cast(
        Boolean, logic.xreplace({n: t.args[0] for n, t in zip(names, choices, strict=True)})
    )


def _truth_test(op: str, x: Formula, y: Formula) -> Boolean | None:
    """`where(c, 1, 0) == 0` and its relatives are c or not c."""
    if isinstance(x, Boolean) and not isinstance(x, Symbol):
        x = as_number(x)
    if (
        isinstance(x, Where)
        and cast(Expr, y).is_number
        and x.args[1].is_number
        and x.args[2].is_number
    ):
        first, second = bool(x.args[1] == y) == (op == "=="), bool(x.args[2] == y) == (op == "==")
        if first == second:
            return cast(Boolean, sympy.true if first else sympy.false)
        return cast(Boolean, x.args[0] if first else sympy.Not(x.args[0]))
    return None


def _logic(function: Callable[..., Any]) -> Rule:
    def rule(r: Reader, node: fx.Node, index: Index) -> Formula | None:
        if value_of(node).dtype != torch.bool:
            return None
        return cast(Boolean, function(*(r.truth(a, index, node) for a in node.args[:2])))

    return rule


def _select_where(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    if len(node.args) < 3:
        return None
    condition = r.truth(node.args[0], index, node)
    x, y = r.broadcast(node.args[1], index, node), r.broadcast(node.args[2], index, node)
    return either(node, condition, x, y)


def _masked_fill(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    condition = r.truth(node.args[1], index, node)
    x, y = r.broadcast(node.args[2], index, node), r.broadcast(node.args[0], index, node)
    return either(node, condition, x, y)


def _index_put(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    """`x[condition] = number`, as a choice between the two."""
    chosen, value = cast("Sequence[fx.Node]", node.args[1]), cast(fx.Node, node.args[2])
    if len(chosen) != 1 or argument(node, 3, "accumulate", False) or value_of(value).numel() != 1:
        return None
    condition = value_of(chosen[0])
    if condition.dtype != torch.bool or condition.dim() != len(index):
        return None
    return either(
        node,
        r.truth(chosen[0], index),
        r.broadcast(value, index, node),
        r.at(source_of(node), index),
    )


def _addcmul(r: Reader, node: fx.Node, index: Index) -> Formula | None:
    if r.exact:
        return None
    x, y, z = (r.number(a, index, node) for a in node.args[:3])
    return x + y * z * as_number(r.scalar(node.kwargs.get("value", 1)))


ARITHMETIC: dict[str, Rule] = {
    "to _to_copy type_as float double half bool long int": _cast,
    "add": _binary(_add),
    "sub subtract rsub": _binary(_sub),
    "mul multiply": _binary(_mul),
    "div divide true_divide floor_divide": _binary(_div),
    "remainder": _binary(_remainder),
    "pow": _binary(_pow),
    "minimum fmin min": _minmax(Minimum),
    "maximum fmax max": _minmax(Maximum),
    "clamp clamp_min clamp_max clip": _clamp,
    "neg negative": _unary(lambda x: _lifted(operator.mul, x, Integer(-1))),
    "abs absolute": _unary(sympy.Abs),
    "exp": _unary(sympy.exp),
    "log": _unary(sympy.log),
    "tanh": _unary(sympy.tanh),
    "cos": _unary(sympy.cos),
    "sin": _unary(sympy.sin),
    "sign sgn": _unary(sympy.sign),
    "sqrt": _unary(
        lambda x: x ** sympy.Rational(1, 2) if not x.is_number else Float(float(x) ** 0.5)
    ),
    "sigmoid": _unary(_sigmoid),
    "floor": _rounded(sympy.floor),
    "ceil": _rounded(sympy.ceiling),
    "trunc fix": _rounded(Trunc),
    "eq": _compare("=="),
    "ne not_equal": _compare("!="),
    "lt less": _compare("<"),
    "le less_equal": _compare("<="),
    "gt greater": _compare(">"),
    "ge greater_equal": _compare(">="),
    "logical_and bitwise_and __and__": _logic(sympy.And),
    "logical_or bitwise_or __or__": _logic(sympy.Or),
    "logical_xor bitwise_xor __xor__": _logic(lambda x, y: (x & ~y) | (~x & y)),
    "logical_not bitwise_not": _logic(sympy.Not),
    "where": _select_where,
    "index_put": _index_put,
    "addcmul": _addcmul,
    "masked_fill": _masked_fill,
}
