"""Values of formulas over index grids: the slow, dense way, in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import add, mul
from typing import Any, TypeAlias, cast

import sympy
import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import ShapeError
from rewriter.spec import Spec
from rewriter.symbols import Formula

__all__ = ["Value", "evaluate", "index_values", "tensor_of"]

Value: TypeAlias = Tensor | int | float | bool


def evaluate(
    formula: Formula, values: Mapping[str, Value], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Value:
    """The value of a formula, broadcast over the indices that it uses.

    Args:
        formula: a sympy expression as `rewriter.symbols` describes.
        values: what each symbol stands for, by name: `{"q": arange tensor, "L": 16, ...}`.
        tensors: the tensors that `Read` reads, by name.
        dtype: floating tensors that are read are cast to it.
    """

    def real(x: Formula) -> Value:
        return evaluate(x, values, tensors, dtype)

    def fold(function: Callable[[Any, Any], Value]) -> Value:
        result = real(formula.args[0])
        for arg in formula.args[1:]:
            result = function(result, real(arg))
        return result

    if formula in (sympy.true, sympy.false):
        return bool(formula)
    if isinstance(formula, sympy.Symbol):
        return values[str(formula)]
    if formula.is_Integer:
        return int(formula)
    if formula.is_number and not formula.args:
        return float(formula)
    match formula.func.__name__:
        case "Read":
            return _read(cast(sym.Read, formula), values, tensors, dtype)
        case "Add":
            return fold(lambda x, y: add(*_wide(x, y, dtype)))
        case "Mul":
            return fold(lambda x, y: mul(*_wide(x, y, dtype)))
        case "And":
            return fold(lambda x, y: x & y)
        case "Or":
            return fold(lambda x, y: x | y)
        case "Not":
            x = real(formula.args[0])
            return ~x if isinstance(x, Tensor) else not x
        case "Pow":
            return fold(lambda x, y: x**y)
        case "Where":
            condition, x, y = (real(a) for a in formula.args)
            if not isinstance(condition, Tensor):
                return x if condition else y
            return torch.where(
                condition, tensor_of(x, condition, dtype), tensor_of(y, condition, dtype)
            )
        case "Minimum" | "Maximum":
            x, y = (real(a) for a in formula.args)
            if not isinstance(x, Tensor) and not isinstance(y, Tensor):
                return min(x, y) if formula.func is sym.Minimum else max(x, y)
            like = x if isinstance(x, Tensor) else cast(Tensor, y)
            pick = torch.minimum if formula.func is sym.Minimum else torch.maximum
            return pick(*_promoted(x, y, like))
        case "IDiv":
            return fold(lambda x, y: x // y)
        case "IMod":
            return fold(lambda x, y: x % y)
        case "Trunc":
            x = real(formula.args[0])
            return x.to(torch.int64) if isinstance(x, Tensor) else int(x)
        case "Fadd":
            return fold(lambda x, y: _float32(x) + _float32(y))
        case "Fmul":
            return fold(lambda x, y: _float32(x) * _float32(y))
        case "Fdiv":
            return fold(lambda x, y: _float32(x) / _float32(y))
        case "Abs" | "exp" | "log" | "tanh" | "cos" | "sin" | "sign" | "floor" | "ceiling" as name:
            function = {"Abs": torch.abs, "ceiling": torch.ceil}.get(name) or getattr(torch, name)
            x = real(formula.args[0])
            return cast(Tensor, function(x if isinstance(x, Tensor) else torch.tensor(x)))
        case name if formula.is_Relational:
            x, y = real(formula.lhs), real(formula.rhs)
            compare = {
                "<": "__lt__",
                "<=": "__le__",
                ">": "__gt__",
                ">=": "__ge__",
                "==": "__eq__",
                "!=": "__ne__",
            }
            if not isinstance(x, Tensor) and isinstance(y, Tensor):
                x = torch.tensor(x, device=y.device)
            return cast(Value, getattr(x, compare[formula.rel_op])(y))
        case name if formula.is_number:
            return float(formula)
    raise ShapeError(f"the reference has no rule for {name} in {formula}")


def _read(
    read: sym.Read, values: Mapping[str, Value], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    source = tensors[read.tensor]
    source = source.to(dtype) if source.is_floating_point() else source.to(torch.int64)
    if not read.index:
        return source
    index = (evaluate(i, values, tensors, dtype) for i in read.index)
    return source[
        tuple(i if isinstance(i, Tensor) else torch.tensor(i, device=source.device) for i in index)
    ]


def _wide(x: Value, y: Value, dtype: torch.dtype) -> tuple[Value, Value]:
    """Whole numbers of a tensor meet a fraction in the dtype that is asked for: torch would take
    its default."""
    for a, c in ((x, y), (y, x)):
        if isinstance(a, float) and isinstance(c, Tensor) and not c.is_floating_point():
            return (x.to(dtype), y) if c is x else (x, cast(Tensor, y).to(dtype))
    return x, y


def _float32(x: Value) -> Value:
    return x.to(torch.float32) if isinstance(x, Tensor) else x


def tensor_of(x: Value, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(x, Tensor):
        return x
    kind = torch.bool if isinstance(x, bool) else torch.int64 if isinstance(x, int) else dtype
    return torch.tensor(x, dtype=kind, device=like.device)


def _promoted(x: Value, y: Value, like: Tensor) -> tuple[Tensor, Tensor]:
    a, c = (v if isinstance(v, Tensor) else torch.tensor(v, device=like.device) for v in (x, y))
    kind = torch.result_type(a, c)
    return a.to(kind), c.to(kind)


def index_values(
    spec: Spec,
    b: int,
    heads: int,
    q_len: int,
    kv_len: int,
    sizes: Sequence[int],
    device: torch.device,
) -> dict[str, Value]:
    """The index symbols as tensors that broadcast to `[B, H, L, M]`, and the sizes as integers."""
    grid = [torch.arange(n, device=device) for n in (b, heads, q_len, kv_len)]
    shapes = [(-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,)]
    values: dict[str, Value] = {
        name: x.view(shape) for name, x, shape in zip("bhqk", grid, shapes, strict=True)
    }
    values |= {"B": b, "H": heads, "L": q_len, "M": kv_len}
    return values | dict(zip(spec.sizes, sizes, strict=True))
