"""The error-ratio rule: when do two computations of one function agree.

Three runs are compared: `gold`, the original in float64; `ref`, the original in its own dtype;
`new`, the model under test. A bare tolerance would have to be wide enough for the worst model. Here
the original says how much rounding its own function shows, and the new model may show

    err(new, gold) <= RATIO * err(ref, gold) + floor

for the mean and for the largest absolute error of every tensor.

The floor is what arithmetic alone explains when err(ref, gold) is zero, by luck in a small tensor
or by design: `STORED` roundings of the dtype plus `SUMMED` roundings of float32, at the size of the
gold values (their mean for the mean error, their largest for the largest error). Half types store
in 16 bits and sum in float32: the first part is about what is written between two kernels, the
second about sums, whose error grows as the root of their length. So the first part rules for half
types, the second for float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewriter.verify.rows import Errors, Kind, VerifyRow

__all__ = [
    "RATIO",
    "STORED",
    "SUMMED",
    "WITHOUT_GOLD",
    "Baseline",
    "baseline_of",
    "compare",
    "dtype_of",
    "floats",
    "floor_of",
    "shape_of",
]

RATIO = 2.0
"""An honest rewrite rounds about as often as the original, only elsewhere, and two such errors
differ by less than this in mean and in maximum. A rewrite that needs more has a worse algorithm."""
STORED: dict[Kind, float] = {"output": 2.0, "site": 2.0, "gradient": 8.0}
"""Roundings of a 16-bit type. An output is written by one kernel from operands that are rounded
once. A site is one such kernel: what its operands have lost on the way to it, the original shows
as well, and RATIO covers it. A gradient has the roundings of a forward and a backward, and in
between the backward of softmax takes a difference that fused kernels form from rounded outputs, and
eager ones do not."""
SUMMED: dict[Kind, float] = {"output": 16.0, "site": 16.0, "gradient": 32.0}
"""Roundings of float32: the root of 256, for the sums of a small model, over a head dimension and
over keys at a site; twice for a gradient. In a large model sums are longer, but tensors are large
as well, and the error of the original itself says what sums cost."""
WITHOUT_GOLD = 8.0
"""The floor is this many times higher where the original has to serve as its own gold. There
err(ref, gold) is zero, and the floor has to cover the rounding of two whole models."""


def floor_of(kind: Kind, dtype: torch.dtype, size: Errors) -> Errors:
    """The error that arithmetic in `dtype` explains at values of this size."""
    roundings = (
        STORED[kind] * torch.finfo(dtype).eps + SUMMED[kind] * torch.finfo(torch.float32).eps
    )
    return Errors(roundings * size.mean, roundings * size.max)


@dataclass(frozen=True)
class Baseline:
    """What is kept of gold and ref for one leaf, so that the tensors of ref can be freed."""

    gold: Any
    """float64 tensor; what gold gave, where nothing floats."""
    exact: Any
    """What ref gave, where nothing floats."""
    dtype: str
    shape: tuple[int, ...]
    size: Errors
    """Mean and largest |gold|."""
    err_ref: Errors
    tensor_dtype: torch.dtype | None
    """The torch dtype of a tensor, None of a plain value."""
    special: Tensor | None
    """Where ref is no usable number: NaN, infinite, or the extreme of its dtype, as masks use it.
    None: nowhere."""
    ref: Tensor | None = None
    """What ref gave, where it is kept to show single values."""
    kinds: Tensor | None = None
    """Of what kind ref is where it is special: 2 for NaN, else 1 or -1, its sign; elsewhere 0."""


def floats(value: Any) -> bool:
    """True for what is compared by the size of its error, False for what has to be equal."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, (float, complex))


def baseline_of(ref: Any, gold: Any) -> Baseline:
    """Compare the original with its gold run.

    Where gold is no usable number but ref is, the value of ref takes its place: the new model is
    held to that.
    """
    if not floats(ref):
        return Baseline(
            gold,
            ref,
            dtype_of(ref),
            shape_of(ref),
            Errors(0, 0),
            Errors(0, 0),
            _torch_dtype(ref),
            None,
        )
    real, limit = _real(ref), _limit(ref)
    kinds = _kinds(real, limit)
    special = kinds != 0
    wide = _real(gold).double()
    lost = ~(wide.abs() < limit) & ~special
    if bool(lost.any()):
        wide = torch.where(lost, real.double(), wide)
    skip = special if bool(special.any()) else None
    err_ref = _mean_max(real.double() - wide, skip)
    size = _mean_max(wide, skip)
    found = Baseline(
        wide, None, dtype_of(ref), shape_of(ref), size, err_ref, _torch_dtype(ref), skip
    )
    return found if skip is None else replace(found, kinds=kinds)


def compare(
    name: str, kind: Kind, base: Baseline, new: Any, dtype: torch.dtype, *, wider: float = 1.0
) -> VerifyRow:
    """Judge one leaf of the new model.

    Args:
        name: path of the leaf.
        kind: "output", "site" or "gradient".
        base: the same leaf of gold and of the original.
        new: the leaf of the model under test.
        dtype: the coarsest dtype that the original computes in; it sets the floor.
        wider: a factor on the floor, see `WITHOUT_GOLD`.
    """

    def failed(reason: str, **errors: Any) -> VerifyRow:
        return VerifyRow(name, kind, base.dtype, False, reason, **errors)

    if dtype_of(new) != base.dtype:
        return failed(f"it is {dtype_of(new)}, the original gives {base.dtype}")
    if shape_of(new) != base.shape:
        return failed(f"its shape is {list(shape_of(new))}, the original gives {list(base.shape)}")
    if not floats(new):
        count = new.numel() if isinstance(new, Tensor) else int(new is not None)
        reason = _unequal(new, base)
        return VerifyRow(name, kind, base.dtype, not reason, reason, count=count)
    value = _real(new)
    kinds = _kinds(value, _limit(new))
    special = kinds != 0
    own = base.kinds if base.kinds is not None else torch.zeros_like(kinds)
    unusable = special & (own == 0)
    if bool(unusable.any()):
        wrong, example = int(unusable.sum()), float(value[unusable][0])
        return failed(
            f"{wrong} of {value.numel()} values are like {example:g} where the original is finite"
        )
    # a kind that the original or gold has; or a number, where gold has one
    differ = (own != 0) & (kinds != own) & (kinds != _kinds(base.gold, _limit(new)))
    if bool(differ.any()):
        return failed(
            f"{int(differ.sum())} of {value.numel()} values are like {float(value[differ][0]):g} "
            f"where the original has {_KIND_WORDS[int(own[differ][0])]}"
        )
    err_new = _mean_max(value.double() - base.gold, special if bool(special.any()) else None)
    floor = floor_of(kind, dtype, base.size)
    allowed = Errors(*(RATIO * r + wider * f for r, f in zip(base.err_ref, floor, strict=True)))
    errors: dict[str, Any] = {"err_ref": base.err_ref, "err_new": err_new, "allowed": allowed}
    count = value.numel() - int(special.sum())
    if not count and value.numel():
        return failed(
            "no value is finite, in the original as well, so nothing could be compared", **errors
        )
    for what in ("max", "mean"):
        found, limit, usual = (getattr(e, what) for e in (err_new, allowed, base.err_ref))
        if not found <= limit:
            reason = f"{what} error {found:.2e} where {limit:.2e} is allowed "
            reason += f"(the original: {usual:.2e}, at values up to {base.size.max:.2e})"
            return failed(reason, **errors)
    return VerifyRow(name, kind, base.dtype, True, "", **errors, count=count)


def dtype_of(value: Any) -> str:
    """`float32` for a tensor, the type's name for a plain value."""
    return (
        str(value.dtype).removeprefix("torch.")
        if isinstance(value, Tensor)
        else type(value).__name__
    )


def shape_of(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _torch_dtype(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, Tensor) else None


def _real(value: Any) -> Tensor:
    """Floating values as a real, dense tensor without a graph."""
    tensor = (
        value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    )
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _limit(value: Any) -> float:
    return torch.finfo(value.dtype if isinstance(value, Tensor) else torch.float64).max


def _mean_max(x: Tensor, skip: Tensor | None) -> Errors:
    x = x.abs() if skip is None else x.abs().masked_fill(skip, 0.0)
    if not x.numel():
        return Errors(0.0, 0.0)
    count = x.numel() if skip is None else max(1, int((~skip).sum()))
    return Errors(float(x.sum()) / count, float(x.max()))


_KIND_WORDS = {2: "nan", 1: "inf", -1: "-inf"}


def _kinds(x: Tensor, limit: float) -> Tensor:
    """As in `Baseline.kinds`."""
    signs = x.sign().masked_fill(x.isnan(), 2.0).to(torch.int8)
    return signs.masked_fill(x.abs() < limit, 0)


def _unequal(new: Any, base: Baseline) -> str:
    """Why what has to be equal is not; where the original and gold differ, either is right (an
    argmax of a tie)."""
    if not isinstance(new, Tensor):
        return "" if new == base.exact else f"it is {new!r}, the original gives {base.exact!r}"
    wrong = new != base.exact
    if isinstance(base.gold, Tensor) and base.gold.shape == new.shape:
        wrong &= new != base.gold
    count = int(wrong.sum())
    return (
        f"{count} of {new.numel()} values differ, and they are not floating: they have to be equal"
        if count
        else ""
    )
