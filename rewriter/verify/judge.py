"""From runs to rows: which leaf is compared with which, at what size, and what is worth a note."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewriter.verify.call import Run
from rewriter.verify.compare import (
    WITHOUT_GOLD,
    Baseline,
    baseline_of,
    compare,
    dtype_of,
    shape_of,
)
from rewriter.verify.rows import Errors, Kind, VerifyRow, counted, detail_of

__all__ = ["Judge", "judged", "same_structure", "weak_spots"]

_LOOSE = 0.25
"""An original that is off by this share of its largest value somewhere bounds little there: worth a
note."""
_MOOT = 0.5
"""An original whose mean error is this share of its mean value cannot be compared with anything:
the row fails."""
_AROUND = 1 / 16
"""See `_sized`."""
_ZERO_ROUNDINGS = 1024
"""A gradient is zero in exact arithmetic if gold leaves no more than this many roundings of its
neighbours."""


@dataclass(frozen=True)
class Judge:
    """What gold and the original gave, in the form in which a new run is compared with it."""

    outputs: Mapping[str, Baseline]
    gradients: Mapping[str, Baseline]
    independent: frozenset[str]
    """Parameters and inputs that the outputs of the original do not depend on."""
    dtype: torch.dtype
    """The coarsest dtype that the original computes in."""
    wider: float
    """Factor on the floor."""

    @classmethod
    def of(cls, ref: Run, gold: Run | None, gold_dtype: torch.dtype, dtype: torch.dtype) -> Judge:
        """Without a gold run the original stands in for it."""
        best = gold or ref
        outputs = {
            n: replace(baseline_of(x, best.outputs.values[n]), ref=_tensor(x))
            for n, x in ref.outputs.values.items()
        }
        gradients: dict[str, Baseline] = {}
        for name, x in ref.gradients.items():
            y = best.gradients.get(name)
            if x is not None:
                gradients[name] = baseline_of(x, torch.zeros_like(x) if y is None else y)
        independent = frozenset(ref.gradients) - frozenset(gradients)
        wider = 1.0 if gold is not None else WITHOUT_GOLD
        eps = torch.finfo(gold_dtype if gold is not None else dtype).eps
        return cls(outputs, _sized(gradients, eps), independent, dtype, wider)

    def rows(self, new: Run) -> list[VerifyRow]:
        """One row for every leaf of the original, and for every leaf that only the model has."""
        return [*self._outputs(new.outputs.values), *self._gradients(new.gradients)]

    def _outputs(self, values: Mapping[str, Any]) -> Iterator[VerifyRow]:
        for name, base in self.outputs.items():
            if name not in values:
                yield VerifyRow(name, "output", base.dtype, False, "the model does not return it")
                continue
            yield judged(name, "output", base, values[name], self.dtype, self.wider)
        for name in values.keys() - self.outputs.keys():
            yield VerifyRow(
                name, "output", dtype_of(values[name]), False, "the original does not return it"
            )

    def _gradients(self, values: Mapping[str, Tensor | None]) -> Iterator[VerifyRow]:
        for name, base in self.gradients.items():
            if name in values:
                value = values[name]
                zero = torch.zeros(base.shape, dtype=base.tensor_dtype, device=base.gold.device)
                value = zero if value is None else value
                yield compare(name, "gradient", base, value, self.dtype, wider=self.wider)
        for name in self.independent & values.keys():
            value = values[name]
            if value is not None and bool(value.any()):
                reason = "the outputs of the original do not depend on it, those of the model do"
                yield VerifyRow(name, "gradient", dtype_of(value), False, reason)

    def notes(self, new: Run | None) -> Iterator[str]:
        """What weakens the result, without being a difference."""
        for name, base in self.outputs.items():
            yield from weak_spots(name, base)
        loose = [n for n, base in self.gradients.items() if _is_loose(base)]
        if loose:
            most = max(loose, key=lambda n: _share(self.gradients[n]))
            off = f"{self.gradients[most].err_ref.max:.1e}"
            where = f"{len(loose)} of {counted(len(self.gradients), 'gradient')}"
            yield (
                f"{where}: the original is off by so much that the bound is wide there, most at "
                f"`{most}`: by up to {off}"
            )
        if new is None:
            return
        absent = [name for name in self.gradients if name not in new.gradients]
        if absent:
            count = f"{len(absent)} gradients were not compared"
            yield f"{count}: the model has no trainable `{absent[0]}`"
        if new.outputs.unread:
            yield f"not compared, no tensor was found in it: {', '.join(new.outputs.unread)}"


def judged(
    name: str, kind: Kind, base: Baseline, value: Any, dtype: torch.dtype, wider: float
) -> VerifyRow:
    """`compare`, with the places of the errors; fails where the original itself bounds nothing."""
    row = compare(name, kind, base, value, dtype, wider=wider)
    if row.ok and base.err_ref.mean > _MOOT * base.size.mean:
        off = f"{base.err_ref.mean:.1e} on values of {base.size.mean:.1e}"
        reason = f"the original itself is off by {off}, so nothing can be said: "
        reason += "compare in a wider dtype, or make the model deterministic"
        row = replace(row, ok=False, reason=reason)
    new = _tensor(value)
    if new is None or base.ref is None or new.shape != base.ref.shape or not new.numel():
        return row
    detail = detail_of(base.gold, base.ref, new, heads=kind == "site")
    return replace(row, detail=detail)


def weak_spots(name: str, base: Baseline) -> Iterator[str]:
    """What makes an agreement worth less than it looks."""
    if not isinstance(base.gold, Tensor) or base.gold.numel() < 2:
        return
    if _is_loose(base):
        off = f"{base.err_ref.max:.1e}"
        yield f"`{name}`: the original is off by up to {off}, so the bound is wide there"
    if base.exact is None and _is_constant(base):
        yield f"`{name}` is one number everywhere: that the models agree on it shows little"


def _is_loose(base: Baseline) -> bool:
    """The original's own error bounds little; of a gradient that is zero in exact arithmetic, the
    size is that of its neighbours."""
    moot = base.err_ref.mean > _MOOT * base.size.mean
    return moot or base.err_ref.max > _LOOSE * base.size.max


def _share(base: Baseline) -> float:
    return base.err_ref.max / base.size.max if base.size.max else float("inf")


def _is_constant(base: Baseline) -> bool:
    """Gold is one number everywhere, up to what the dtype can tell apart."""
    least, most = base.gold.aminmax()
    eps = torch.finfo(base.tensor_dtype).eps if base.tensor_dtype is not None else 0.0
    return bool(most - least <= eps * base.size.max) or bool(most == least)


def _tensor(value: Any) -> Tensor | None:
    """The value, if it is a plain tensor of real numbers that float."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return value.detach() if plain and value.is_floating_point() else None


def same_structure(a: Run, b: Run) -> bool:
    """True if both runs gave the same paths and shapes."""
    x, y = a.outputs.values, b.outputs.values
    return x.keys() == y.keys() and all(shape_of(x[n]) == shape_of(y[n]) for n in x)


def _sized(gradients: Mapping[str, Baseline], eps: float) -> dict[str, Baseline]:
    """Give each gradient the size against which its rounding has to be seen, where that is not its
    own.

    Softmax subtracts: a bias on the keys hardly changes it, and with few keys, or even weights, the
    gradients of queries and keys are small differences of terms of the size of the values'
    gradients. Every dtype shows the rounding of those terms. So a gradient counts as at least as
    large as the largest one of its module, and as a sixteenth of the largest one of the module
    around. Where a module's gradients all vanish in exact arithmetic (queries and keys, with a
    single key), the next module outwards that has some sets the size.
    """
    sizes: dict[str, Errors] = {}
    for name, base in gradients.items():
        for prefix in _prefixes(name):
            old = sizes.get(prefix, Errors(0.0, 0.0))
            sizes[prefix] = Errors(max(old.mean, base.size.mean), max(old.max, base.size.max))
    noise = min(_ZERO_ROUNDINGS * eps, 1e-3) * sizes.get("", Errors(0.0, 0.0)).max
    sized = {}
    for name, base in gradients.items():
        inner, *outer = [sizes[p] for p in _prefixes(name) if sizes[p].max > noise] or [base.size]
        around = outer[0] if outer else inner
        size = Errors(*(max(x, y * _AROUND) for x, y in zip(inner, around, strict=True)))
        sized[name] = replace(base, size=size)
    return sized


def _prefixes(name: str) -> list[str]:
    """`a.b.weight` -> `a.b`, `a`, and the empty prefix of the whole model."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]
