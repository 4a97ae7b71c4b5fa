"""Cutting packed rows into chunks, and which chunks are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rewriter.kernels.block_bounds import Segments
from rewriter.kernels.torch_compact_rows import Packed

__all__ = ["Chunk", "groups", "hull", "places_of"]

ROWS = 128
"""Rows of a chunk: more waste a triangle of a causal mask, fewer make small products."""
SCORES = 2**20
"""Scores of the chunks that are computed together: several lanes keep all cores busy, and what is
written has to be found in a cache again."""
SLACK = 1.125
"""Chunks go together if the longest range of keys is at most this much longer than the shortest."""


@dataclass(frozen=True)
class Chunk:
    """Packed rows `[start, stop)` of one lane, and the keys that they may see."""

    lane: int
    start: int
    stop: int
    keys: Segments

    @property
    def width(self) -> int:
        return sum(stop - start for start, stop in self.keys)


def groups(call: Packed, *, whole: bool = False) -> Iterator[list[Chunk]]:
    """Chunks of lanes side by side that see about the same keys, to be computed together.

    Args:
        call: the packed rows.
        whole: a lane is one chunk, however many rows it has.
    """
    lanes = _chunks(call, whole)
    for i in range(max(map(len, lanes), default=0)):
        group: list[Chunk] = []
        for lane in lanes:
            chunk = lane[i] if i < len(lane) else None
            if group and (chunk is None or not _fits(group, chunk)):
                yield group
                group = []
            if chunk is not None:
                group.append(chunk)
        if group:
            yield group


def _chunks(call: Packed, whole: bool) -> list[list[Chunk]]:
    """The chunks of each lane, all of about the same number of rows."""
    size = max(16, min(ROWS, SCORES // max(1, call.kv_len)))
    size = call.q_len * call.group if whole else size
    cuts, lanes, first = [], [], 0
    for lane, count in enumerate(call.counts):
        parts = -(-count // size)
        edges = [first + count * i // parts for i in range(parts + 1)] if parts else []
        cuts += [(lane, a, z) for a, z in pairwise(edges)]
        lanes.append(parts)
        first += count
    ends = call.position[[x for _, a, z in cuts for x in (a, z - 1)]].tolist() if cuts else []
    found = iter(
        Chunk(lane, a, z, _visible(call, lane, (low, high)))
        for (lane, a, z), low, high in zip(cuts, ends[::2], ends[1::2], strict=True)
    )
    return [[next(found) for _ in range(parts)] for parts in lanes]


def _visible(call: Packed, lane: int, q: tuple[int, int]) -> Segments:
    if call.plan.visible is None:
        return ((0, call.kv_len),)
    return call.plan.visible(call.queries(lane, lane, q))


def places_of(group: list[Chunk], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Which packed row stands where in `[n, R]`, and where there is one; None: everywhere."""
    starts = torch.tensor([c.start for c in group], device=device)[:, None]
    counts = [c.stop - c.start for c in group]
    places = torch.arange(max(counts), device=device)
    if min(counts) == max(counts):
        return starts + places, None
    last = torch.tensor(counts, device=device)[:, None] - 1
    return starts + torch.minimum(places, last), places <= last


def _fits(group: list[Chunk], chunk: Chunk) -> bool:
    """The chunk is that of the next lane and sees about the same keys."""
    if chunk.lane != group[-1].lane + 1 or bool(chunk.keys) != bool(group[0].keys):
        return False
    widths = [c.width for c in (*group, chunk)]
    union = sum(z - a for a, z in hull([*(c.keys for c in group), chunk.keys]))
    rows = max(c.stop - c.start for c in (*group, chunk))
    return union <= SLACK * min(widths) + 32 and (len(group) + 1) * rows * union <= SCORES


def hull(ranges: Sequence[Segments]) -> Segments:
    """The ranges of keys that hold all of them."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted({x for segments in ranges for x in segments}):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return tuple(found)
