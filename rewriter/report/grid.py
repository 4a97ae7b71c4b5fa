"""Which keys which queries see, and how much a bias favours them, at sample positions: what a
picture of a formula shows.

The values of tensors are not part of a report. What they are taken to be is said beside the
picture; so are the batch row, the head, and the value of a size that only a running model knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Integer
from torch import Tensor

from rewriter.evaluate import evaluate, tensor_of
from rewriter.linear import LinearSpec
from rewriter.report.positions import bias_terms
from rewriter.report.stand_ins import StandIns
from rewriter.report.words import mask_of
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.symbols import Formula, IDiv, b, h, k, q, reads

__all__ = ["CELLS", "Grid", "grid_of"]

CELLS = 16
_BATCH = 16  # rows that are looked through for one where a formula of b shows something
_FAINTEST = 0.2


@dataclass(frozen=True)
class Grid:
    """A sample of queries by keys."""

    queries: tuple[int, ...]
    """The positions of the rows."""
    keys: tuple[int, ...]
    cells: tuple[tuple[float, ...], ...]
    """0 where the key is hidden; else up to 1, less where the bias is lower."""
    opaque: bool
    """A tensor of queries x keys takes part, whose values are not in the formula."""
    is_shaded: bool
    """The cells that are seen differ."""
    assumed: tuple[str, ...]
    """What was taken for granted: `"no padding (attention_mask)"`."""

    @property
    def seen(self) -> int:
        return sum(x > 0 for row in self.cells for x in row)


def grid_of(spec: Spec, origins: Mapping[str, str] | None = None) -> Grid | None:
    """The formula at sample positions; None if it cannot be evaluated there.

    Args:
        spec: what is drawn; of a route, all that it may choose at run time, fainter.
        origins: where its tensors come from, as `Site.origins` says.
    """
    mask, bias = mask_of(spec), _bias(spec)
    step = _step(spec, mask)
    length = CELLS * step
    stand_in = StandIns(spec, origins or {}, length)
    mask, bias = stand_in.mask(mask), stand_in.bias(bias)
    rows = 1 if spec.sizes and not any(x.has(q) for x in (mask, bias)) else CELLS
    sample = _Sample(spec, step, rows, length)
    try:
        found = sample.run(mask, bias)
    except Exception:  # a picture is an extra: a formula without one is still printed
        return None
    if found is None:
        return None
    seen, value, told = found
    may = _may_be_chosen(spec, sample)
    cells = _shades(seen, value) if may is None else torch.where(may, 0.35, 1.0) * seen
    levels = {round(float(x), 3) for x in cells.flatten() if x > 0}
    return Grid(
        queries=tuple(i * step for i in range(rows)),
        keys=tuple(i * step for i in range(CELLS)),
        cells=tuple(tuple(round(float(x), 3) for x in row) for row in cells),
        opaque=bool(spec.opaque_reads()),
        is_shaded=len(levels) > 1,
        assumed=(*stand_in.told, *told, *(() if may is None else ("faint: chosen at run time",))),
    )


def _bias(spec: Spec) -> Expr:
    """What makes one key weigh more than another, without the product of q and k."""
    if isinstance(spec, LinearSpec):
        return Integer(0) if spec.position is None else spec.decay * (spec.position - k)
    return sympy.Add(*bias_terms(cast(SoftmaxSpec, spec).score))


# --- positions ------------------------------------------------------------------------------------


def _step(spec: Spec, mask: Formula) -> int:
    """The distance of sample positions: what the mask counts to takes about half of them."""
    counts = [abs(int(x)) for x in mask.atoms(sympy.Integer)]
    route, near = getattr(spec, "route", None), getattr(spec, "near", None)
    counts += [route.block] if route is not None else []
    counts += [near.window] if near is not None else []
    largest = max(counts, default=0)
    if largest <= CELLS // 2:
        return 1
    # `q - k < n` and `q - k <= n - 1` are one window: take the rounder number
    size = max(largest, largest + 1, key=lambda n: n & -n)
    for parts in range(CELLS // 2, CELLS // 4 - 1, -1):
        if size % parts == 0:
            return size // parts
    return -(-size // 6)


class _Sample:
    """A formula at the sample positions, a row of the batch and a head."""

    def __init__(self, spec: Spec, step: int, rows: int, length: int) -> None:
        self.spec, self.length = spec, length
        queries = torch.arange(rows).view(1, -1, 1) * step
        keys = torch.arange(CELLS).view(1, 1, -1) * step
        self.shape = (_BATCH, rows, CELLS)
        self.values: dict[str, Any] = {
            "b": torch.arange(_BATCH).view(-1, 1, 1),
            "h": torch.zeros(1, 1, 1, dtype=torch.int64),
            "q": queries,
            "k": keys,
            "B": _BATCH,
            "H": 8,
            "L": 1 if rows == 1 else length,
            "M": length,
        }

    def run(self, mask: Formula, bias: Formula) -> tuple[Tensor, Tensor, list[str]] | None:
        """The mask, the bias and what was assumed."""
        for sizes in self._sizes():
            values = self.values | sizes
            seen = self.value(mask, values, torch.bool)
            if not sizes or bool(seen.any(-1).all()):
                break
        else:
            return None
        told = [f"{name} = {n:,}" for name, n in sizes.items()]
        value = self.value(bias, values, torch.float64)
        row = max(range(_BATCH), key=lambda i: _variety(seen[i], value[i]))
        told += [f"batch row {row}"] if any(x.has(b) for x in (mask, bias)) else []
        told += ["head 0"] if any(x.has(h) for x in (mask, bias)) else []
        return seen[row], value[row], told

    def value(self, formula: Formula, values: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
        found = evaluate(formula, values, {}, torch.float64)
        return tensor_of(found, torch.empty(()), torch.float64).to(dtype).expand(self.shape)

    def _sizes(self) -> Iterator[dict[str, int]]:
        """Values of the sizes that the spec names, the likeliest first: queries at the end of the
        keys, a query at the last key."""
        queries, keys = self.values["L"], self.length
        likely = dict.fromkeys((keys - queries, keys - 1, keys, queries, 1, 0))
        names = [n for n in self.spec.sizes if len(self.spec.sizes) < 4]
        for values in product(likely, repeat=len(names)):
            yield dict(zip(names, values, strict=True))


def _variety(seen: Tensor, value: Tensor) -> int:
    """How much a row of the batch has to show; of rows that show as much, `max` takes the first."""
    return len(
        {
            (bool(x), round(float(y), 6))
            for x, y in zip(seen.flatten(), value.flatten(), strict=True)
        }
    )


def _shades(seen: Tensor, value: Tensor) -> Tensor:
    """0 to 1: the bias between its smallest and its largest value where a key is seen."""
    here = value[seen & value.isfinite()]
    if here.numel() == 0 or float(here.max() - here.min()) < 1e-9:
        return seen.to(torch.float64)
    scaled = ((value - here.min()) / (here.max() - here.min())).nan_to_num(0.0).clamp(0.0, 1.0)
    return torch.where(seen, _FAINTEST + (1 - _FAINTEST) * scaled, 0.0)


def _may_be_chosen(spec: Spec, sample: _Sample) -> Tensor | None:
    """Keys that a route may leave out."""
    route = spec.route if isinstance(spec, SoftmaxSpec) else None
    if route is None:
        return None
    if route.by == "region":
        always = (k < route.extra) | (q < route.extra)
    else:
        position = route.position.xreplace(dict.fromkeys(reads(route.position), Integer(0)))
        always = sympy.Eq(IDiv(position, Integer(route.block)), IDiv(k, Integer(route.block)))
    values = sample.values | dict.fromkeys(spec.sizes, 0)
    return ~sample.value(always, values, torch.bool)[0]
