"""Specs that the tests of generated kernels share, by name, and the tensors they read."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from sympy import Symbol
from torch import Tensor

from rewriter import symbols as sym
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit
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


M0, M1, M2, M3 = sym.masses
LABEL = _read("label", b, k)
LABELS = (TensorArg("label", "int64", 2),)
SHARE = TensorArg("share", "float32", 1)
FEW = sympy.Float(1e-12)
KEPT, IMAGE = sympy.Float(0.4), M2 + M3
SELECTED = (q + M - L >= 7) & (IMAGE >= 0.2) & (M3 >= 0.3 * IMAGE) & (M3 > FEW)
"""Rows of which the last groups have enough, with margins that no rounding closes."""
SEEN = sympy.Ne(_read("pad", b, k), 0)


def _over(mass: sympy.Expr) -> sympy.Expr:
    return 1 / Maximum(mass, FEW)


REMOVE = (Where(M0 > FEW, _over(M0), 1), Where(M0 > FEW, 0, 1))
REDIRECT = (sympy.Integer(1), sympy.Integer(0), 1 + M1 * _over(M2))
VAR = (
    sympy.Integer(1),
    Where(SELECTED, KEPT, 1),
    Where(SELECTED, KEPT, 1),
    Where(SELECTED, 1 + (1 - KEPT) * (M1 + M2) * _over(M3), 1),
)
GIFT = (
    _over(M0 + _read("share", h) * M1 + M2),
    _read("share", h) * _over(M0 + _read("share", h) * M1 + M2),
    _over(M0 + _read("share", h) * M1 + M2),
)

EDITS: dict[str, SoftmaxSpec] = {
    # the rows of the table in the card of sinks: what a group loses, another one gets
    "remove": SoftmaxSpec(scale=SCALE, mask=CAUSAL, edit=Edit(Where(k < 2, 1, 0), REMOVE)),
    "redirect": SoftmaxSpec(
        scale=SCALE, mask=CAUSAL & SEEN, masked="mean", edit=Edit(LABEL, REDIRECT),
        tensors=(*LABELS, TensorArg("pad", "bool", 2)),
    ),
    "redistribute": SoftmaxSpec(scale=SCALE, mask=CAUSAL, edit=Edit(LABEL, VAR), tensors=LABELS),
    "normalise": SoftmaxSpec(
        scale=SCALE, mask=CAUSAL, edit=Edit(LABEL, GIFT), tensors=(*LABELS, SHARE)
    ),
    "four-sums": SoftmaxSpec(
        scale=SCALE, score=5 * sympy.tanh(s / 5), mask=CAUSAL, masked="mean",
        edit=Edit(LABEL, (1 - M1, 1 + M0, 1 - M3, 1 + M2)), tensors=LABELS,
    ),
    "remove-heavy": SoftmaxSpec(
        scale=SCALE, score=s + Where(k < 1, 14, 0), mask=CAUSAL,
        edit=Edit(Where(k < 1, 1, 0), REMOVE),
    ),
    # factors that are known before the loop
    "shares": SoftmaxSpec(
        scale=SCALE, mask=CAUSAL, masked="mean",
        edit=Edit(LABEL, (sympy.Integer(1), sympy.Integer(0), _read("share", h), KEPT)),
        tensors=(*LABELS, SHARE),
    ),
    "rows-of-a-head": SoftmaxSpec(
        scale=SCALE, heads=_read("gate", b, h, q),
        edit=Edit(Where(h > 0, 1, 0), (_read("gate", b, h, q), 1 / (M1 + 1))),
        tensors=(TensorArg("gate", "float32", 3),),
    ),
    # all stages
    "edit-everything": SoftmaxSpec(
        scale=SCALE,
        score=5 * sympy.tanh(s / 5) + _read("slope", h) * (k - q - M + L),
        mask=CAUSAL & (q + M - L - k < 24) & SEEN,
        sink=_read("sink", h),
        edit=Edit(LABEL, VAR),
        tensors=(
            *LABELS, TensorArg("slope", "float32", 1), TensorArg("sink", "float32", 1),
            TensorArg("pad", "bool", 2),
        ),
    ),
}  # fmt: skip


SPECS: dict[str, SoftmaxSpec] = {
    "plain": SoftmaxSpec(scale=SCALE),
    "causal": SoftmaxSpec(scale=SCALE, mask=CAUSAL),
    "window-sinks": SoftmaxSpec(scale=SCALE, mask=CAUSAL & ((q + M - L - k < 24) | (k < 4))),
    "two-sided-window": SoftmaxSpec(scale=SCALE, mask=sympy.Abs(k - q) <= 9),
    "neighbours": SoftmaxSpec(scale=SCALE, mask=sympy.Abs(k - q) <= 1),
    "two-blocks": SoftmaxSpec(scale=SCALE, mask=((q < 40) & (k < 40)) | ((q >= 40) & (k >= 40))),
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
    **EDITS,
    "rounding": SoftmaxSpec(
        score=s + Fadd(Fmul(0.25, _read("slope", h)), Fdiv(k - q, 64.0)),
        tensors=(TensorArg("slope", "float32", 1),),
    ),
}


def _merged(*names: str) -> SoftmaxSpec:
    """All scores added up under all masks: one kernel that has the lines of several."""
    specs = [SPECS[name] for name in names]
    return SoftmaxSpec(
        scale=SCALE,
        score=s + sum((x.score - s for x in specs), sympy.Integer(0)),
        mask=sympy.And(*(x.mask for x in specs)),
        sink=next((x.sink for x in specs if x.sink is not None), None),
        tensors=tuple(dict.fromkeys(t for x in specs for t in x.tensors)),
        sizes=tuple(n for x in specs for n in x.sizes),
    )


MERGED = {
    "all-scores": _merged(
        "relative-bias", "counted-from-the-end", "buckets", "disentangled", "opaque-bias",
        "clamped-twice-masked", "rounding", "powers",
    ),
    "all-masks": _merged(
        "window-sinks", "two-sided-window", "padding", "documents", "chunks", "sizes",
        "one-head-sees-all", "row-sink",
    ),
    "dropped": replace(SPECS["alibi"], dropout=0.1),
}  # fmt: skip
"""What is compiled to find lines that only the interpreter takes."""


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
        # of each sequence another one; 4 is no group
        "label": (torch.arange(kv_len) + torch.arange(batch)[:, None]) % 5,
        "share": uniform(heads),
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
