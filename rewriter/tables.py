"""Buffers that are a formula: a triangle, a band, or their negation, kept by a model as a tensor.

Much code makes its causal mask once, with `torch.tril`, and reads a corner of it in each call. Read
as a tensor such a mask hides what it means; this module reads its values.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from sympy import Expr
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from rewriter.indices import as_number, compare, literal
from rewriter.symbols import Formula, Where

__all__ = ["Band", "TakenForGranted", "band_of"]

LARGEST = 2**28
"""Elements of a tensor that is looked at."""


@dataclass(frozen=True)
class Band:
    """A matrix whose element depends on column minus row alone, in two or three pieces.

    Attributes:
        row: the dimension of rows; all but two dimensions have size 1.
        column: the dimension of columns.
        values: the value of each piece, from the lower left corner to the upper right one.
        starts: the difference `column - row` at which each piece but the first starts.
    """

    row: int
    column: int
    values: tuple[bool | int | float, ...]
    starts: tuple[int, ...]

    def at(self, index: Sequence[Expr]) -> Formula:
        """The element at the index: a truth value if the matrix holds such, else a number."""
        difference = index[self.column], index[self.row]
        if isinstance(self.values[0], bool):
            return self._where(difference, True)
        first, *others = dict.fromkeys(self.values)
        result = as_number(literal(first))
        for value in others:
            result = cast(
                Expr, Where(self._where(difference, value), as_number(literal(value)), result)
            )
        return result

    def _where(self, difference: tuple[Expr, Expr], value: Any) -> Boolean:
        """Whether the element has this value."""
        column, row = difference
        ends = (None, *self.starts, None)
        pieces = []
        for has, start, end in zip(self.values, ends, ends[1:], strict=False):
            if has != value:
                continue
            above = sympy.true if start is None else compare(">=", column, row + start)
            below = sympy.true if end is None else compare("<", column, row + end)
            pieces.append(sympy.And(above, below))
        return cast(Boolean, sympy.Or(*pieces))


_looked_at: Any = WeakIdKeyDictionary()


def band_of(tensor: Tensor) -> Band | None:
    """What the values of a tensor are, if they are a band."""
    if tensor.is_inference():  # its values may change and nobody can tell
        return None
    known = _looked_at.get(tensor)
    if known is None or known[0] != tensor._version:
        with torch.no_grad(), _disable_current_modes():
            known = tensor._version, _band(tensor.detach())
        _looked_at[tensor] = known
    return cast("Band | None", known[1])


def _band(tensor: Tensor) -> Band | None:
    dims = [n for n, size in enumerate(tensor.shape) if size > 1]
    if len(dims) != 2 or tensor.numel() > LARGEST or tensor.device.type == "meta":
        return None
    if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
        return None
    matrix = tensor.reshape(tensor.shape[dims[0]], tensor.shape[dims[1]])
    edge = torch.cat([matrix[1:, 0].flip(0), matrix[0]])  # by column - row, from -(rows - 1) on
    first = 1 - matrix.shape[0]
    changes = (edge[1:] != edge[:-1]).nonzero().flatten() + 1
    if not 0 < len(changes) <= 2 or not torch.equal(matrix[1:, 1:], matrix[:-1, :-1]):
        return None
    starts = [int(n) for n in changes]
    values = [edge[n].item() for n in (0, *starts)]
    if any(v != v for v in values):
        return None
    return Band(dims[0], dims[1], tuple(values), tuple(n + first for n in starts))


class TakenForGranted:
    """The values of some inputs of a graph, which were read when it was captured.

    A tensor is looked at again when it is another one or has been written to, which torch counts;
    a write through `.data` is one that nobody sees.
    """

    def __init__(self, inputs: Mapping[int, Tensor]) -> None:
        """
        Args:
            inputs: the tensors, each of which is a band, by position.
        """
        self.bands = {n: band_of(x) for n, x in inputs.items()}
        self.seen = {n: (weakref.ref(x), x._version) for n, x in inputs.items()}

    def changed(self, args: Sequence[Any]) -> int | None:
        """The position of an input that has other values now; None if all are what they were."""
        for n, (tensor, version) in self.seen.items():
            now = args[n]
            is_same = tensor() is now
            if is_same and now._version == version:
                continue
            if band_of(now) != self.bands[n]:
                return n
            self.seen[n] = weakref.ref(now), now._version
        return None
