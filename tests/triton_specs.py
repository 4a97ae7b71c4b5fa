"""Specs that the tests of generated kernels share, by name, and the tensors they read."""

from __future__ import annotations

import sympy
import torch
from sympy import Symbol
from torch import Tensor

from rewriter import symbols as sym
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.symbols import (
    Fadd,
    Fdiv,
    Fmul,
    H,
    IDiv,
    IMod,
    L,
    M,
    Maximum,
    Minimum,
    Read,
    Trunc,
    Where,
    b,
    h,
    k,
    q,
    s,
)

SCALE = sympy.Float(0.125)
CAUSAL = k <= q + M - L
"""The last query sees the last key, so that L = 1 is a step of decoding."""


def _read(name: str, *index: sympy.Expr | int) -> Read:
    return Read(Symbol(name), *index)


def _bucket(distance: sympy.Expr) -> sympy.Expr:
    """Relative buckets: exact up to 8, then logarithmic, 16 for each direction."""
    size = sympy.Abs(distance)
    far = Trunc(Fmul(Fdiv(sympy.log(Fdiv(size, 8.0)), 2.772588722239781), 8.0)) + 8
    return Where(distance > 0, 16, 0) + Where(size < 8, size, Minimum(far, 15))


SPECS: dict[str, SoftmaxSpec] = {
    "plain": SoftmaxSpec(scale=SCALE),
    "causal": SoftmaxSpec(scale=SCALE, mask=CAUSAL),
    "window-sinks": SoftmaxSpec(scale=SCALE, mask=CAUSAL & ((q + M - L - k < 24) | (k < 4))),
    "two-sided-window": SoftmaxSpec(scale=SCALE, mask=sympy.Abs(k - q) <= 9),
    "neighbours": SoftmaxSpec(scale=SCALE, mask=sympy.Abs(k - q) <= 1),
    "soft-cap": SoftmaxSpec(scale=SCALE, score=5 * sympy.tanh(s / 5), mask=CAUSAL),
    "alibi": SoftmaxSpec(
        scale=SCALE,
        score=s + _read("slope", h) * (k - q - M + L),
        mask=CAUSAL,
        tensors=(TensorArg("slope", "float32", 1),),
    ),
    "relative-bias": SoftmaxSpec(
        score=s + _read("table", Minimum(Maximum(k - q, -15), 15) + 15, h),
        tensors=(TensorArg("table", "float32", 2),),
    ),
    "buckets": SoftmaxSpec(
        score=s + _read("table", _bucket(k - q), h),
        mask=sympy.Ne(_read("pad", b, k), 0),
        masked="mean",
        tensors=(TensorArg("table", "float32", 2), TensorArg("pad", "bool", 2)),
    ),
    "padding": SoftmaxSpec(
        scale=SCALE,
        mask=sympy.Ne(_read("pad", b, k), 0),
        masked="mean",
        tensors=(TensorArg("pad", "bool", 2),),
    ),
    "causal-padding": SoftmaxSpec(
        scale=SCALE,
        mask=CAUSAL & sympy.Ne(_read("pad", b, k), 0),
        masked="mean",
        tensors=(TensorArg("pad", "bool", 2),),
    ),
    "learned-sink": SoftmaxSpec(
        scale=SCALE,
        mask=CAUSAL,
        sink=_read("sink", h),
        tensors=(TensorArg("sink", "float32", 1),),
    ),
    "row-sink": SoftmaxSpec(
        scale=SCALE,
        sink=_read("row_sink", b, h, q),
        tensors=(TensorArg("row_sink", "float32", 3),),
    ),
    "grid-bias": SoftmaxSpec(
        scale=SCALE,
        score=s + _read("rows", b, h, q, IDiv(k, 8)) + _read("columns", b, h, q, IMod(k, 8)),
        tensors=(TensorArg("rows", "float32", 4), TensorArg("columns", "float32", 4)),
    ),
    "disentangled": SoftmaxSpec(
        scale=SCALE,
        score=s + _read("products", H * b + h, q, Minimum(Maximum(k - q, -15), 15) + 15),
        mask=sympy.Ne(_read("pad", b, k) * _read("pad", b, q), 0),
        masked="add",
        tensors=(TensorArg("products", "float32", 3), TensorArg("pad", "bool", 2)),
    ),
    "opaque-bias": SoftmaxSpec(
        scale=SCALE,
        score=s + _read("bias", 0, h, q, k),
        mask=CAUSAL,
        tensors=(TensorArg("bias", "float32", 4),),
    ),
    "documents": SoftmaxSpec(
        scale=SCALE,
        mask=CAUSAL & sympy.Eq(_read("document", b, q), _read("document", b, k)),
        tensors=(TensorArg("document", "int64", 2),),
    ),
    "chunks": SoftmaxSpec(
        scale=SCALE,
        mask=CAUSAL & sympy.Eq(IDiv(k - _read("start", b), 16), IDiv(q - _read("start", b), 16)),
        tensors=(TensorArg("start", "int64", 1),),
    ),
    "sizes": SoftmaxSpec(
        scale=SCALE,
        mask=(k <= q + sym.size_symbol("past")) & (k >= sym.size_symbol("first")),
        sizes=("past", "first"),
    ),
    "head-scales": SoftmaxSpec(
        scale=_read("temperature", h),
        mask=CAUSAL,
        heads=_read("gate", b, h, q),
        tensors=(TensorArg("temperature", "float32", 1), TensorArg("gate", "float32", 3)),
    ),
    "clamped-twice-masked": SoftmaxSpec(
        scale=SCALE,
        score=Maximum(
            s + Where(sympy.Ne(_read("pad", b, k), 0), 0.0, float(torch.finfo(torch.float32).min)),
            float(torch.finfo(torch.float32).min),
        ),
        tensors=(TensorArg("pad", "bool", 2),),
    ),
    "one-head-sees-all": SoftmaxSpec(scale=SCALE, mask=(k <= q) | (h >= H - 1)),
    "counted-from-the-end": SoftmaxSpec(
        score=s + _read("table", k - q, h), tensors=(TensorArg("table", "float32", 2),)
    ),
    "powers": SoftmaxSpec(
        score=s + sympy.Float(0.25) ** (h + 1) * _read("document", b, k),
        tensors=(TensorArg("document", "int64", 2),),
    ),
    "rounding": SoftmaxSpec(
        score=s + Fadd(Fmul(0.25, _read("slope", h)), Fdiv(k - q, 64.0)),
        tensors=(TensorArg("slope", "float32", 1),),
    ),
}


def tensors_for(
    spec: SoftmaxSpec, batch: int, heads: int, q_len: int, kv_len: int, generator: torch.Generator
) -> list[Tensor]:
    """Values for every tensor of a named spec."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    made = {
        "slope": -uniform(heads),
        "temperature": uniform(heads) * 0.3,
        "table": normal(32, heads),
        "sink": normal(heads),
        "row_sink": normal(batch, heads, q_len),
        "gate": uniform(batch, heads, q_len),
        "rows": normal(batch, heads, q_len, kv_len // 8 + 1),
        "columns": normal(batch, heads, q_len, 8),
        "products": normal(batch * heads, q_len, 31),
        "bias": normal(1, heads, q_len, kv_len),
        "document": (torch.arange(max(q_len, kv_len)) // 20).expand(batch, -1),
        "start": torch.arange(batch) * 5,
        "pad": padding(batch, kv_len, "right"),
    }
    return [made[t.name] for t in spec.tensors]


def padding(batch: int, kv_len: int, side: str) -> Tensor:
    """Which keys are seen: the last sequence hides a third on one side, or `"all"`."""
    seen = torch.ones(batch, kv_len, dtype=torch.bool)
    hidden = max(1, kv_len // 3)
    if side == "all":
        seen[-1] = False
    else:
        seen[-1, slice(0, hidden) if side == "left" else slice(kv_len - hidden, None)] = False
    return seen
