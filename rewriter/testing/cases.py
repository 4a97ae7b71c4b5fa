"""Cases of the conformance suite: specs at shapes, dtypes and memory layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import sympy
import torch
from sympy import Float

from rewriter import symbols as sym
from rewriter.families import from_dict
from rewriter.linear import LinearSpec
from rewriter.lowering import Shapes
from rewriter.spec import SoftmaxSpec, Spec, TensorArg
from rewriter.symbols import Maximum, Minimum, Trunc, Where, b, h, k, q, s
from rewriter.testing.families import CAUSAL, FAMILIES, PAD, POSITION, SEEN, read

__all__ = ["BASES", "LAYOUTS", "POSITION", "Case", "Dims", "Hidden", "Layout", "base", "named"]

Layout = Literal["contiguous", "BLHD", "BHDL", "gaps", "expanded"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "BLHD", "BHDL", "gaps", "expanded")
"""How q, k and v `[B, H, L, D]` lie in memory: in that order; with heads inside of positions; with
positions innermost; with a NaN after every element; as one sequence that stands for the batch."""

Hidden = Literal["right", "left", "all"]


def _bucket(distance: sympy.Expr) -> sympy.Expr:
    """Relative buckets: exact up to 8, then logarithmic; 16 for each direction."""
    size = sympy.Abs(distance)
    far = Trunc(sym.Fmul(sym.Fdiv(sympy.log(sym.Fdiv(size, 8.0)), 2.772588722239781), 8.0)) + 8
    return Where(distance > 0, 16, 0) + Where(size < 8, size, Minimum(far, 15))


_CLIPPED = Minimum(Maximum(k - POSITION, -15), 15) + 15

BASES: dict[str, Spec] = {
    "plain": SoftmaxSpec(),
    "causal": SoftmaxSpec(mask=CAUSAL),
    "causal from the start": SoftmaxSpec(mask=k <= q),
    "window": SoftmaxSpec(mask=CAUSAL & ((POSITION - k < 24) | (k < 4))),
    "two-sided window": SoftmaxSpec(mask=sympy.Abs(k - POSITION) <= 9),
    "padding": SoftmaxSpec(mask=SEEN, tensors=PAD),
    "causal padding": SoftmaxSpec(mask=CAUSAL & SEEN, tensors=PAD),
    "documents": SoftmaxSpec(
        mask=CAUSAL & sympy.Eq(read("document", b, POSITION), read("document", b, k)),
        tensors=(TensorArg("document", "int64", 2),),
    ),
    "soft cap": SoftmaxSpec(score=5 * sympy.tanh(s / 5), mask=CAUSAL),
    "alibi": SoftmaxSpec(
        score=s + read("slope", h) * (k - POSITION),
        mask=CAUSAL,
        tensors=(TensorArg("slope", "float32", 1),),
    ),
    "cap, then bias": SoftmaxSpec(
        score=5 * sympy.tanh(s / 5) + read("table", _CLIPPED, h),
        mask=CAUSAL,
        tensors=(TensorArg("table", "float32", 2),),
    ),
    "relative bias": SoftmaxSpec(
        score=s + read("table", _CLIPPED, h), tensors=(TensorArg("table", "float32", 2),)
    ),
    "buckets": SoftmaxSpec(
        score=s + read("table", _bucket(k - POSITION), h),
        mask=SEEN,
        masked="mean",
        tensors=(TensorArg("table", "float32", 2), *PAD),
    ),
    "key bias": SoftmaxSpec(
        score=s + read("keys", b, k), tensors=(TensorArg("keys", "float32", 2),)
    ),
    "whole bias": SoftmaxSpec(
        score=s + read("bias", 0, h, q, k), mask=CAUSAL, tensors=(TensorArg("bias", "float32", 4),)
    ),
    "sink": SoftmaxSpec(
        mask=CAUSAL, sink=read("sink", h), tensors=(TensorArg("sink", "float32", 1),)
    ),
    "sink, padding": SoftmaxSpec(
        mask=CAUSAL & SEEN,
        sink=read("sink", h),
        tensors=(TensorArg("sink", "float32", 1), *PAD),
    ),
    "alibi, sink": SoftmaxSpec(
        score=s + read("slope", h) * (k - POSITION),
        mask=CAUSAL,
        sink=read("sink", h),
        tensors=(TensorArg("slope", "float32", 1), TensorArg("sink", "float32", 1)),
    ),
    "window of each head": SoftmaxSpec(
        mask=CAUSAL & (POSITION - k < read("reach", h)), tensors=(TensorArg("reach", "int64", 1),)
    ),
    "head scale": SoftmaxSpec(
        scale=read("temperature", h), tensors=(TensorArg("temperature", "float32", 1),)
    ),
    "gate": SoftmaxSpec(
        mask=CAUSAL, heads=read("gate", b, h, q), tensors=(TensorArg("gate", "float32", 3),)
    ),
    "size": SoftmaxSpec(mask=k <= q + sym.size_symbol("past"), sizes=("past",)),
    **FAMILIES,
}
"""Without the scale, which depends on the head dim: `base` sets it."""

_OWN_SCALE = ("relative bias", "buckets")  # models with such biases leave scores unscaled


def base(name: str, head_dim: int) -> Spec:
    """The spec of that name with the scale that goes with the head dim."""
    spec, scale = BASES[name], Float(head_dim**-0.5)
    if name in _OWN_SCALE:
        return spec
    if isinstance(spec, SoftmaxSpec):
        return replace(spec, scale=spec.scale * scale)
    if isinstance(spec, LinearSpec) and spec.near is not None:
        return replace(spec, near=replace(spec.near, scale=scale))
    return spec


@dataclass(frozen=True)
class Dims:
    """The shapes of q `[B, Hq, L, D]`, k `[B, Hkv, M, D]` and v `[B, Hkv, M, Dv]`."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 65
    kv_len: int = 65
    head_dim: int = 16
    value_dim: int = 16

    def __str__(self) -> str:
        dim = f"{self.head_dim}" + (f"/{self.value_dim}" if self.value_dim != self.head_dim else "")
        heads = f"{self.heads}/{self.kv_heads}"
        return f"B{self.batch} H{heads} L{self.q_len} M{self.kv_len} D{dim}"


@dataclass(frozen=True)
class Case:
    """One call of an attention."""

    name: str
    spec: Spec
    dims: Dims = Dims()
    dtype: torch.dtype = torch.float32
    layout: Layout = "contiguous"
    hidden: Hidden = "right"
    """Which keys of the last sequence are padding, where the spec reads `pad`: a third of them on
    that side, or all."""
    logits: float = 1.0
    """The size of the scores."""
    seed: int = 0
    device: str = "cpu"
    untrained: bool = False
    """New parameters of a pass have their initial values, at which it may be the identity."""

    @staticmethod
    def of(name: str, dims: Dims = Dims(), *, masked: str = "", **more: Any) -> Case:
        """The case of a base spec."""
        spec = base(name, dims.head_dim)
        if masked:
            assert isinstance(spec, SoftmaxSpec)
            spec = replace(spec, masked=cast(Any, masked))
        return Case(f"{name}, {masked}" if masked else name, spec, dims, **more)

    @property
    def text(self) -> str:
        """The name of a row: `causal, B2 H4/2 L65 M65 D16, float32`."""
        parts = [self.name, str(self.dims), str(self.dtype).removeprefix("torch.")]
        parts += [self.layout] if self.layout != "contiguous" else []
        reads_pad = any(t.name == "pad" for t in self.spec.tensors)
        parts += [f"{self.hidden} keys hidden"] if reads_pad else []
        parts += [f"scores of ±{self.logits:g}"] if self.logits != 1 else []
        parts += [self.device] if self.device != "cpu" else []
        return ", ".join(parts)

    def shapes(self, *, grad: bool) -> Shapes:
        """What a lowering is asked about."""
        d = self.dims
        dims = (d.batch, d.heads, d.kv_heads, d.q_len, d.kv_len, d.head_dim, d.value_dim)
        return Shapes(self.device, self.dtype, *dims, grad, self.sizes)

    @property
    def softmax(self) -> SoftmaxSpec:
        """The spec, where only softmax attention makes sense."""
        assert isinstance(self.spec, SoftmaxSpec)
        return self.spec

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.dims.kv_len - self.dims.q_len for _ in self.spec.sizes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        more = {"spec": self.spec.to_dict(), "dims": vars(self.dims)}
        return {**vars(self), **more, "dtype": str(self.dtype).removeprefix("torch.")}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Case:
        """The case that `to_dict` wrote."""
        spec, dims = from_dict(data["spec"]), Dims(**data["dims"])
        return Case(**{**data, "spec": spec, "dims": dims, "dtype": getattr(torch, data["dtype"])})


def named(cases: Sequence[Case]) -> dict[str, Case]:
    """Cases by their text; each text once."""
    return {case.text: case for case in cases}
