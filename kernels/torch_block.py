"""One block of an attention: the batches, heads, queries and keys it covers, and reads there.

The code that `torch_code` prints talks to a `Block`: `x.q` is the query index as a tensor,
`x.read(...)` the part of a tensor that a formula reads. What it returns broadcasts to the
`[B, H, L, M]` of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rewriter.kernels.block_bounds import Segments

__all__ = ["Axis", "Block", "Value"]

Value = Tensor | int | float | bool
Axis = tuple[str, int] | Value
"""An index of a read: `("k", 3)` is key + 3 for every key of the block; else a computed index."""

_PLACE = {"b": 0, "h": 1, "q": 2, "k": 3}


class Part(NamedTuple):
    """The piece of a tensor that one read touched, as a leaf of autograd."""

    tensor: int
    leaf: Tensor
    pieces: tuple[tuple[tuple[int, int, int], ...], ...]
    """`(dim, start, length)` triples, one tuple a piece; the pieces lie side by side in `leaf`."""
    joined: int
    """Dimension along which the pieces are joined."""


class Block:
    """Ranges of b, h and q, segments of k, the sizes and the tensors of one block of a call."""

    def __init__(
        self,
        spans: Mapping[str, tuple[int, int]],
        keys: Segments,
        sizes: Mapping[str, int],
        tensors: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
        *,
        wanted: Sequence[bool] = (),
    ) -> None:
        """Args:
        spans: `[start, stop)` of b, h and q.
        keys: ranges of keys, which stand side by side in the block.
        sizes: `B`, `H`, `L`, `M` of the whole call, and the further sizes of the spec.
        dtype: floating tensors are read in it.
        wanted: for each tensor, whether its gradient is wanted; reads are then kept in `parts`.
        """
        self.spans, self.keys, self.sizes = spans, keys, sizes
        self.tensors, self.dtype, self.device = tensors, dtype, device
        self.wanted = wanted
        self.parts: list[Part] = []
        (b, b1), (h, h1), (q, q1) = spans["b"], spans["h"], spans["q"]
        count = keys[0][1] - keys[0][0] if len(keys) == 1 else sum(c - a for a, c in keys)
        self.shape = (b1 - b, h1 - h, q1 - q, count)
        """Batches, heads, rows and keys."""

    @cached_property
    def b(self) -> Tensor:
        return torch.arange(*self.spans["b"], device=self.device).view(-1, 1, 1, 1)

    @cached_property
    def h(self) -> Tensor:
        return torch.arange(*self.spans["h"], device=self.device).view(-1, 1, 1)

    @cached_property
    def q(self) -> Tensor:
        return torch.arange(*self.spans["q"], device=self.device).view(-1, 1)

    @cached_property
    def k(self) -> Tensor:
        pieces = [torch.arange(*x, device=self.device) for x in self.keys]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def value(self, x: bool | int | float) -> Tensor:
        """A constant as a tensor of no dimensions; real numbers in the dtype of the block."""
        kind = (
            torch.bool if isinstance(x, bool) else torch.int64 if isinstance(x, int) else self.dtype
        )
        return torch.tensor(x, dtype=kind, device=self.device)

    def diagonals(self, function: Callable[[Block, Tensor], Tensor]) -> Tensor:
        """`function` of `d = k - q`, computed once a diagonal and laid out as `[..., L, M]`."""
        first, stop = self.spans["q"]
        if stop - first == 1:
            return function(self, self.k - first)
        pieces = []
        for start, end in self.keys:
            line = function(self, torch.arange(start - stop + 1, end - first, device=self.device))
            if line.dim() == 0 or line.shape[-1] == 1:  # the formula does not vary with d after all
                line = line.expand(*line.shape[:-1], end - start + stop - first - 1)
            if line.dim() > 1 and line.shape[-2] == 1:
                line = line.squeeze(-2)
            pieces.append(line.unfold(-1, end - start, 1).flip(-2))  # [..., L, M]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    # --- reads ---------------------------------------------------------------------------------

    def truth(self, tensor: int, *axes: Axis) -> Tensor:
        """Where the elements of a tensor at these indices are not 0."""
        found = self._read(tensor, axes)
        return found if found.dtype == torch.bool else found != 0

    def read(self, tensor: int, *axes: Axis) -> Tensor:
        """The elements of a tensor at these indices: int64, or the dtype of the block."""
        found = self._read(tensor, axes)
        return found.to(self.dtype if found.is_floating_point() else torch.int64)

    def _read(self, tensor: int, axes: Sequence[Axis]) -> Tensor:
        """The elements of a tensor at these indices.

        Index ranges are slices, so that reading `pad[b, k]` or an additive mask copies nothing;
        what is computed, such as a bucket of `k - q`, is gathered.
        """
        source = self.tensors[tensor]
        if len(self.keys) == 1 and not (self.wanted and self.wanted[tensor]):
            view = self._view(source, axes)
            if view is not None:
                return view
        sliced = {n: a for n, a in enumerate(axes) if isinstance(a, tuple)}
        starts = {n: self._ranges(*a) for n, a in sliced.items()}
        if any(
            low < 0 or high > source.shape[n] for n, x in starts.items() for low, high in x
        ):  # an index that wraps or fails: gather, which does the same as the reference
            return self._leaf(tensor, source, {})[tuple(self._index(a) for a in axes)]
        part = self._leaf(tensor, source, starts)
        numbers = [n for n, a in enumerate(axes) if not isinstance(a, tuple | Tensor)]
        for n in reversed(numbers):
            part = part.select(n, int(axes[n]))  # type: ignore[arg-type]
        rest = [a for n, a in enumerate(axes) if n not in numbers]
        return _placed(part, rest)

    def _view(self, source: Tensor, axes: Sequence[Axis]) -> Tensor | None:
        """The read as one indexing with slices, if its axes are ranges in the order b, h, q, k."""
        index: list[slice | None] = []
        last = -1
        for size, axis in zip(source.shape, axes, strict=True):
            if not isinstance(axis, tuple):
                return None
            letter, offset = axis
            place = _PLACE[letter]
            start, stop = self.keys[0] if letter == "k" else self.spans[letter]
            if place <= last or start + offset < 0 or stop + offset > size:
                return None
            if index:
                index += [None] * (place - last - 1)
            index.append(slice(start + offset, stop + offset))
            last = place
        return source[(*index, *[None] * (3 - last))] if index else None

    def _ranges(self, letter: str, offset: int) -> list[tuple[int, int]]:
        spans = self.keys if letter == "k" else (self.spans[letter],)
        return [(low + offset, high + offset) for low, high in spans]

    def _index(self, axis: Axis) -> Tensor:
        if isinstance(axis, tuple):
            found: Tensor = getattr(self, axis[0])
            return found + axis[1]
        return axis if isinstance(axis, Tensor) else torch.tensor(axis, device=self.device)

    def _leaf(
        self, tensor: int, source: Tensor, starts: Mapping[int, list[tuple[int, int]]]
    ) -> Tensor:
        """The ranges of the tensor, pieces of keys side by side; noted as a leaf if wanted."""
        joined = next((n for n, x in starts.items() if len(x) > 1), 0)
        count = max((len(x) for x in starts.values()), default=1)
        pieces = tuple(
            tuple((n, *_length(x[min(i, len(x) - 1)])) for n, x in starts.items())
            for i in range(count)
        )
        parts = [narrowed(source, piece) for piece in pieces]
        part = parts[0] if count == 1 else torch.cat(parts, dim=joined)
        if self.wanted and self.wanted[tensor]:
            part = part.detach().requires_grad_()
            self.parts.append(Part(tensor, part, pieces, joined))
        return part


def narrowed(source: Tensor, piece: tuple[tuple[int, int, int], ...]) -> Tensor:
    """The part of a tensor that the triples `(dim, start, length)` leave."""
    for dim, start, length in piece:
        if start or length != source.shape[dim]:
            source = source.narrow(dim, start, length)
    return source


def _length(span: tuple[int, int]) -> tuple[int, int]:
    return span[0], span[1] - span[0]


def _placed(part: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Gathers the computed axes and puts every axis at its place in `[B, H, L, M]`."""
    sliced = sorted((_PLACE[a[0]], n) for n, a in enumerate(axes) if isinstance(a, tuple))
    computed = [n for n, a in enumerate(axes) if isinstance(a, Tensor)]
    places = [place for place, _ in sliced]
    if [n for _, n in sliced] + computed != list(range(len(axes))):
        part = part.permute([n for _, n in sliced] + computed)
    if not computed:
        if places == list(range(4 - len(places), 4)):
            return part
        shape = [1, 1, 1, 1]
        for place, size in zip(places, part.shape, strict=True):
            shape[place] = size
        return part.view(shape) if part.is_contiguous() else _spread(part, places)
    others = [place for place in range(4) if place not in places]
    indices = [_squeezed(axes[n], places) for n in computed]
    found = part[(slice(None),) * len(places) + tuple(indices)]  # [sliced..., others...]
    order = [places.index(d) if d in places else len(places) + others.index(d) for d in range(4)]
    return found.permute(order)


def _spread(part: Tensor, places: Sequence[int]) -> Tensor:
    """Dimensions of size 1 put in until each dimension stands at its place of four."""
    for place in range(4):
        if place not in places:
            part = part.unsqueeze(place)
    return part


def _squeezed(index: Axis, places: Sequence[int]) -> Tensor:
    """A computed index without the dimensions that belong to sliced axes, which it does not use."""
    assert isinstance(index, Tensor)
    index = index[(None,) * (4 - index.dim())]
    for place in reversed(places):
        index = index.squeeze(place)
    return index
