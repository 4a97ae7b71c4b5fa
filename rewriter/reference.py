"""The meaning of the IR: a dense, slow interpreter of specs in plain PyTorch, in any dtype up to
float64.

Every other lowering is tested against this file, and nothing else is trusted. It allocates B x H x
L x M tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import sympy
import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import ShapeError
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import Formula

__all__ = ["evaluate", "mask_of", "reference", "reference_weights"]

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
            return fold(lambda x, y: x + y)
        case "Mul":
            return fold(lambda x, y: x * y)
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
                condition, _tensor(x, condition, dtype), _tensor(y, condition, dtype)
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


def _float32(x: Value) -> Value:
    return x.to(torch.float32) if isinstance(x, Tensor) else x


def _tensor(x: Value, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(x, Tensor):
        return x
    kind = torch.bool if isinstance(x, bool) else torch.int64 if isinstance(x, int) else dtype
    return torch.tensor(x, dtype=kind, device=like.device)


def _promoted(x: Value, y: Value, like: Tensor) -> tuple[Tensor, Tensor]:
    a, c = (v if isinstance(v, Tensor) else torch.tensor(v, device=like.device) for v in (x, y))
    kind = torch.result_type(a, c)
    return a.to(kind), c.to(kind)


def index_values(
    spec: SoftmaxSpec,
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


def mask_of(
    spec: SoftmaxSpec,
    *,
    q_len: int,
    kv_len: int,
    batch: int = 1,
    heads: int = 1,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Tensor:
    """The mask as a boolean tensor `[L, M]` for one batch and head, else `[B, H, L, M]`; True where
    the key is seen."""
    named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
    values = index_values(spec, batch, heads, q_len, kv_len, sizes, torch.device("cpu"))
    mask = _tensor(
        evaluate(spec.mask, values, named, torch.float32), torch.empty(()), torch.float32
    )
    mask = mask.expand(batch, heads, q_len, kv_len)
    return mask[0, 0] if batch == heads == 1 else mask


def reference_weights(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Tensor:
    """The attention weights `[B, H, L, M]` before dropout. A row may sum to less than 1: a sink
    takes the rest."""
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    if heads % k.shape[1]:
        raise ShapeError(f"{heads} query heads are not a multiple of {k.shape[1]} key heads")
    named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
    values = index_values(spec, batch, heads, q_len, kv_len, sizes, q.device)
    dtype = q.dtype

    product = q @ k.repeat_interleave(heads // k.shape[1], dim=1).mT  # [B, H, L, M]
    values["s"] = product * evaluate(spec.scale, values, named, dtype)
    score = (
        _tensor(evaluate(spec.score, values, named, dtype), q, dtype).to(dtype).expand_as(product)
    )
    seen = _tensor(evaluate(spec.mask, values, named, dtype), q, dtype).expand_as(product)

    if spec.masked == "add":
        score = score + torch.zeros_like(score).masked_fill(~seen, torch.finfo(dtype).min)
    elif spec.masked == "mean":
        score = score.masked_fill(~seen, torch.finfo(dtype).min)
    else:
        score = score.masked_fill(~seen, -torch.inf)
    if spec.sink is not None:
        sink = _tensor(evaluate(spec.sink, values, named, dtype), q, dtype)
        column = sink.expand(batch, heads, q_len, 1).to(dtype)
        weights = torch.cat([score, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = score.softmax(-1)
    if spec.masked == "zero":
        weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return weights


def reference(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The attention that the spec describes, computed densely in the dtype of q.

    Args:
        q: queries `[B, Hq, L, D]`.
        k: keys `[B, Hkv, M, D]`; `Hq` is a multiple of `Hkv`.
        v: values `[B, Hkv, M, Dv]`.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
        generator: draws the dropout, if the spec has any.

    Returns:
        `[B, Hq, L, Dv]` in the dtype of v.
    """
    weights = reference_weights(spec, q, k, tensors, sizes)
    if spec.dropout:
        keep = torch.rand(weights.shape, generator=generator, device=weights.device) >= spec.dropout
        weights = weights * keep / (1.0 - spec.dropout)
    batch, heads, q_len, kv_len = weights.shape
    out = weights.to(v.dtype) @ v.repeat_interleave(heads // v.shape[1], dim=1)
    named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
    values = index_values(spec, batch, heads, q_len, kv_len, sizes, q.device)
    return out * evaluate(spec.heads, values, named, out.dtype)
