"""One compared tensor: its errors, what is allowed, and where in it the errors are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DECADES",
    "Detail",
    "Element",
    "Errors",
    "Kind",
    "VerifyRow",
    "counted",
    "detail_of",
    "finite",
]

Kind = Literal["output", "site", "gradient"]

DECADES = (-18, 3)
"""Errors are counted by half powers of ten from the first to the second; what lies outside counts
at the ends, and an error of exactly zero at the first."""
_WORST = 5  # elements that a detail keeps


class Errors(NamedTuple):
    """Absolute errors of one tensor against the gold tensor."""

    mean: float
    max: float


class Element(NamedTuple):
    """One number of a tensor, in the three runs."""

    place: tuple[int, ...]
    """Its index."""
    gold: float
    ref: float
    new: float


@dataclass(frozen=True)
class Detail:
    """Where in a tensor the errors are."""

    worst: tuple[Element, ...]
    """Largest error of the model first; what is not finite counts as infinite."""
    errors_ref: tuple[int, ...]
    """How many values of the original have an error in each half decade of `DECADES`."""
    errors_new: tuple[int, ...]
    heads: tuple[float, ...] = ()
    """Of a site: the largest |model - original| of each head."""

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; what is not finite is None."""
        return {
            "worst": [
                {"index": list(e.place), **{n: finite(getattr(e, n)) for n in _RUNS}}
                for e in self.worst
            ],
            "errors_ref": list(self.errors_ref),
            "errors_new": list(self.errors_new),
            "heads": [finite(x) for x in self.heads],
        }


_RUNS = ("gold", "ref", "new")


@dataclass(frozen=True)
class VerifyRow:
    """One tensor of the outputs, one computation of a site, or one gradient."""

    name: str
    """Path in the outputs (`logits`), or name of a site, of a parameter, or `inputs.<path>`."""
    kind: Kind
    dtype: str
    """Of the tensor in the original, or the type of a plain value."""
    ok: bool
    reason: str = ""
    """Why the row failed; empty if it did not."""
    err_ref: Errors | None = None
    """Error of the original against gold. None where there is no error to measure (integers,
    another shape)."""
    err_new: Errors | None = None
    allowed: Errors | None = None
    count: int = 0
    """Values that were compared."""
    detail: Detail | None = None
    """Of outputs and sites whose values float."""

    @property
    def ratio(self) -> float:
        """Error of the model over the error of the original, the larger of mean and max; 1 if both
        are exact."""
        if self.err_ref is None or self.err_new is None:
            return 1.0 if self.ok else math.inf
        return max(_quotient(n, r) for n, r in zip(self.err_new, self.err_ref, strict=True))

    @property
    def used(self) -> float:
        """Share of the allowance that the error takes: above 1 it fails."""
        if self.allowed is None or self.err_new is None:
            return 0.0 if self.ok else math.inf
        share = max(_quotient(n, a, 0.0) for n, a in zip(self.err_new, self.allowed, strict=True))
        return share if self.ok or share > 1 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; what is not finite is None."""
        row: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "ok": self.ok,
            "count": self.count,
            "reason": self.reason,
        }
        for name in ("err_ref", "err_new", "allowed"):
            errors: Errors | None = getattr(self, name)
            row[name] = (
                None if errors is None else {k: finite(v) for k, v in errors._asdict().items()}
            )
        row |= {"ratio": finite(self.ratio), "used": finite(self.used)}
        return row | {"detail": None if self.detail is None else self.detail.to_dict()}


def detail_of(gold: Tensor, ref: Tensor, new: Tensor, *, heads: bool = False) -> Detail:
    """Where the errors of a model and of its original are.

    Args:
        gold: the same shape as the other two, real.
        ref: of the original.
        new: of the model.
        heads: the tensors are `[B, H, L, D]`, and the difference of each head is wanted.
    """
    wide = gold.double()
    err_ref, err_new = _distance(ref, wide), _distance(new, wide)
    worst = []
    for place in err_new.flatten().topk(min(_WORST, err_new.numel())).indices.tolist():
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), wide.shape))
        worst.append(Element(index, *(float(x.flatten()[place]) for x in (wide, ref, new))))
    apart: Sequence[float] = ()
    if heads and new.numel():
        apart = _distance(new, ref.double()).amax((0, 2, 3)).tolist()
    return Detail(tuple(worst), _counts(err_ref), _counts(err_new), tuple(apart))


def counted(n: int, word: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def finite(x: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return x if math.isfinite(x) else None


def _distance(x: Tensor, other: Tensor) -> Tensor:
    """|x - other|: zero where both are the same infinity or no number, infinite where one is."""
    apart = (x.double() - other).abs()
    same = (x.double() == other) | (x.isnan() & other.isnan())
    return torch.where(same, 0.0, apart.nan_to_num(nan=math.inf, posinf=math.inf))


def _counts(errors: Tensor) -> tuple[int, ...]:
    first, last = DECADES
    bins = 2 * (last - first)
    place = ((errors.log10() - first) * 2).floor().clamp(0, bins - 1).nan_to_num(nan=0.0)
    return tuple(torch.bincount(place.flatten().long(), minlength=bins).tolist())


def _quotient(x: float, y: float, both_zero: float = 1.0) -> float:
    if y == 0:
        return both_zero if x == 0 else math.inf
    return x / y
