"""What there is to do for a routed attention: every row once, in tiles of its own or in a list.

Many queries are listed by the blocks that they chose, so that a block is read once. Few queries,
regions of queries, and those that see all their keys, have tiles of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from rewriter.beside import Beside
from rewriter.errors import ShapeError
from rewriter.kernels.block_lists import BlockList, Packing
from rewriter.kernels.torch_routing import (
    Layout,
    block_means,
    chosen_blocks,
    chosen_regions,
    layout_of,
    there_of,
)
from rewriter.kernels.torch_tiles import AT_ONCE, Operands, Tiles
from rewriter.stages import Route

__all__ = ["Listed", "Work", "regions_of", "tokens_of", "unfit"]

LEAST = 2**19
"""Numbers that a part of the rows may have in any case, in its output or its products."""
FEW = 16
"""Up to so many queries of a key head gather their keys: their blocks are hardly shared."""


@dataclass(frozen=True)
class Listed:
    """Rows that are executed block by block."""

    tiles: tuple[Tiles, ...]
    """In one of them every row sees every key, in the other not."""
    places: Tensor
    """Where in the tiles each pair of the list is, counted through; behind `own`."""
    list: BlockList
    units: slice
    queries: slice
    has_own: bool
    """The blocks of the queries' own positions are not in the tiles: there the queries and keys of
    a block are neighbours, and nothing is gathered. They come first, in the order of the rows."""


class Work:
    """The parts of one call."""

    def __init__(self, ops: Operands, beside: Beside | None = None) -> None:
        assert ops.spec.route is not None
        self.ops, self.route = ops, ops.spec.route
        self.layout: Layout | None = None
        self.is_empty = not (ops.q.numel() and ops.k.numel())
        if not self.is_empty and self.route.by == "query":
            self.layout = layout_of(ops, self.route)
            self.means = block_means(ops, self.layout, beside)

    def items(self, *, for_gradients: bool = False) -> Iterator[Tiles | Listed]:
        """Every row once: in tiles of its own, or in a list."""
        if self.is_empty:
            return
        if self.layout is None:
            yield from self._regions()
            return
        first = self._leading_dense(self.layout)
        yield from self._dense(torch.arange(self.ops.units, device=self.ops.device), 0, first)
        for units, queries in self._parts(first):
            found = chosen_blocks(self.ops, self.route, self.layout, self.means, units, queries)
            if self.ops.group * self.ops.q_len <= FEW:
                yield self._gathering(found, self.layout, units, queries)
            else:
                yield self._listed(found, self.layout, units, queries, for_gradients=for_gradients)

    def _leading_dense(self, layout: Layout) -> int:
        """So many queries at the front see all their keys, whatever the batch and head."""
        if not self.route.dense_below or self.ops.group * self.ops.q_len <= FEW:
            return 0
        dense = (layout.last < self.route.dense_below).flatten(0, 1).all(0)
        return int(dense.long().cumprod(0).sum())

    def _dense(self, units: Tensor, first: int, stop: int) -> Iterator[Tiles]:
        """Some queries of some units with all keys that they may see."""
        ops, layout = self.ops, self.layout
        position = None
        if layout is not None and ops.plan.is_causal:
            position = layout.position[units]
        start = first if len(units) else stop
        while start < stop:
            reach = ops.kv_len if position is None else int(position[..., start].max()) + 128
            step = max(1, min(128, AT_ONCE // (ops.group * reach)))
            keys = ops.kv_len
            if position is not None:
                keys = int(position[..., start : min(start + step, stop)].max()) + 1
            end = min(start + step, stop)
            rows = self._rows(units, torch.arange(start, end, device=ops.device))
            key = torch.arange(keys, device=ops.device).expand(len(units), keys)
            yield Tiles(units, rows, key)
            start = end

    def _rows(self, units: Tensor, queries: Tensor) -> Tensor:
        """Flat rows of queries `[w]`, or `[n, w]`, for all heads of n units: `[n, G · w]`."""
        ops = self.ops
        heads = units[:, None] * ops.group + torch.arange(ops.group, device=ops.device)
        queries = queries.expand(len(units), queries.shape[-1])
        return (heads[..., None] * ops.q_len + queries[:, None]).flatten(1)

    def _parts(self, first: int) -> Iterator[tuple[slice, slice]]:
        """Parts of the units and of the queries from `first` on, so that neither the products with
        the means nor the parts of the output are larger than a quarter of the scores of a head."""
        ops, layout = self.ops, self.layout
        assert layout is not None
        long = max(2**22, 256 * layout.count * ops.v.shape[3])  # some 256 queries a block
        most = max(LEAST, min(long, ops.q_len * ops.kv_len // 4))
        slots = min(layout.count, max(self.route.topk, -(-self.route.dense_below // layout.block)))
        rows = max(1, most // max(layout.count, slots * ops.v.shape[3]))
        length = max(1, min(ops.q_len, rows // ops.group))
        if length > layout.block:
            length -= length % layout.block
        units = max(1, rows // max(1, ops.group * length))
        stops = [first, *range(-(-(first + 1) // length) * length, ops.q_len, length), ops.q_len]
        for u in range(0, ops.units, units):
            for start, stop in pairwise(stops):
                if start < stop:
                    yield slice(u, min(u + units, ops.units)), slice(start, stop)

    def _gathering(self, found: BlockList, layout: Layout, units: slice, queries: slice) -> Tiles:
        """One tile a row, with the keys of its blocks."""
        table, filled = found.slots()
        rows = self._global(torch.arange(found.row_count, device=table.device), units, queries)
        unit = rows // (self.ops.group * self.ops.q_len)
        entry = (unit // layout.shared)[:, None]
        there = layout.filled[entry, table] & filled[..., None]
        return Tiles(unit, rows[:, None], layout.keys[entry, table].flatten(1), there.flatten(1))

    def _global(self, rows: Tensor, units: slice, queries: slice) -> Tensor:
        """Flat rows of rows that are counted from the first of a part; -1 becomes the row that
        stands for none."""
        ops = self.ops
        length = queries.stop - queries.start
        heads = rows // length + units.start * ops.group
        found = heads * ops.q_len + rows % length + queries.start
        return torch.where(rows < 0, ops.rows, found)

    @cached_property
    def _is_diagonal(self) -> bool:
        """Query q stands at key q and sees the keys up to there, for every batch and head."""
        ops, layout = self.ops, self.layout
        if layout is None or layout.there is not None or not ops.plan.is_causal:
            return False
        here = torch.arange(ops.q_len, device=ops.device)
        return ops.has_flash and ops.q_len == ops.kv_len and bool((layout.last == here).all())

    def own(self, item: Listed) -> Iterator[tuple[Tensor, Tensor]]:
        """The attention of rows to the keys of their own blocks, where `has_own`."""
        assert self.layout is not None
        ops, block, scale = self.ops, self.layout.block, self.ops.plan.scale
        assert scale is not None
        for unit in range(item.units.start, item.units.stop):
            keys = (ops.flat_k, ops.flat_v)
            k, v = (x[unit * ops.kv_len :][item.queries].to(ops.dtype) for x in keys)
            for head in range(unit * ops.group, (unit + 1) * ops.group):
                q = ops.flat_q[head * ops.q_len :][item.queries].to(ops.dtype) * scale
                whole = len(q) // block * block
                for start, stop, length in ((0, whole, block), (whole, len(q), len(q) - whole)):
                    if start < stop:
                        a, b, c = (x[start:stop].view(-1, length, x.shape[1]) for x in (q, k, v))
                        o, lse = ops.flash(a, b, c, None, is_causal=True)
                        yield o.flatten(0, 1), lse.flatten()

    def _listed(
        self,
        found: BlockList,
        layout: Layout,
        units: slice,
        queries: slice,
        *,
        for_gradients: bool,
    ) -> Listed:
        count = layout.count
        per_unit = self.ops.group * (queries.stop - queries.start)
        blocks = found.rows // per_unit * count + found.blocks
        has_own = not for_gradients and self._is_diagonal and queries.start % layout.block == 0
        places = found.rows.clone()
        tiles, done = [], found.row_count if has_own else 0
        for is_full in (True, False):
            (pairs,) = (found.is_full == is_full).nonzero(as_tuple=True)
            if not len(pairs) or (has_own and not is_full):
                continue
            key_count = (units.stop - units.start) * count
            width = _width(len(pairs) / key_count)
            packing = found.packed(pairs, blocks[pairs], key_count, width)
            places[pairs] = packing.places + done
            done += packing.rows.numel()
            tiles.append(self._tiles(packing, layout, units, queries, is_full=is_full))
        return Listed(tuple(tiles), places, found, units, queries, has_own)

    def _tiles(
        self, packing: Packing, layout: Layout, units: slice, queries: slice, *, is_full: bool
    ) -> Tiles:
        unit = packing.blocks // layout.count + units.start
        entry, block = unit // layout.shared, packing.blocks % layout.count
        filled = None if is_full else layout.filled[entry, block]
        rows = self._global(packing.rows, units, queries)
        return Tiles(unit, rows, layout.keys[entry, block], filled, is_full=is_full)

    # --- regions ------------------------------------------------------------------------------

    def _regions(self) -> Iterator[Tiles]:
        """One tile a region of queries and key head, with the keys of its regions; then the
        queries that see every key."""
        ops, route = self.ops, self.route
        if ops.q_len != ops.kv_len or ops.kv_len != tokens_of(route):
            raise ShapeError(unfit(route, ops.q_len, ops.kv_len))
        units = torch.arange(ops.units, device=ops.device)
        is_dense = self._dense_units()
        routed = units if is_dense is None else units[~is_dense]
        yield from self._dense(routed, 0, route.extra)
        if is_dense is not None:
            yield from self._dense(units[is_dense], 0, ops.q_len)
        tokens, real = regions_of(route, ops.device)
        table, filled = chosen_regions(ops, route, tokens, real).slots()
        for some in torch.split(routed, max(1, 2**20 // (table.shape[1] * tokens.numel()))):
            yield self._region_tiles(some, tokens, real, table, filled)

    def _region_tiles(
        self, units: Tensor, tokens: Tensor, real: Tensor, table: Tensor, filled: Tensor
    ) -> Tiles:
        ops, extra, count = self.ops, self.route.extra, len(tokens)
        unit = units.repeat_interleave(count)
        region = torch.arange(count, device=ops.device).repeat(len(units))
        picked = table[unit // ops.kv_heads * count + region]  # [n, topk]
        there = real[picked] & filled[unit // ops.kv_heads * count + region][..., None]
        first = torch.arange(extra, device=ops.device).expand(len(unit), extra)
        keys = torch.cat([first, tokens[picked].flatten(1) + extra], dim=1)
        there = torch.cat([torch.ones_like(first, dtype=torch.bool), there.flatten(1)], dim=1)
        rows = self._rows(unit, tokens[region] + extra)
        rows = torch.where(real[region].repeat(1, ops.group), rows, ops.rows)
        return Tiles(unit, rows, keys, None if bool(there.all()) else there)

    def _dense_units(self) -> Tensor | None:
        """Units with so few keys that every query sees them all, `[U]`; None: there are none."""
        ops, most = self.ops, self.route.dense_below
        there = there_of(ops) if most else None
        if there is None:
            is_few = 0 < ops.kv_len <= most
            return torch.ones(ops.units, dtype=torch.bool, device=ops.device) if is_few else None
        few = there.sum(-1) <= most
        return few.expand(ops.batch, ops.kv_heads).flatten() if bool(few.any()) else None


def _width(rows: float) -> int:
    """Rows of a tile, for blocks of so many rows on average: a quarter, so that little is free."""
    return max(16, min(128, int(rows) // 64 * 16))


def regions_of(route: Route, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places on the grid of the tokens of each region `[R, w]`, and where there is one."""
    (rows, columns), (high, wide), (down, across) = route.grid, route.region, route.region_counts
    row = torch.arange(down * high, device=device).view(down, 1, high, 1)
    column = torch.arange(across * wide, device=device).view(1, across, 1, wide)
    real = ((row < rows) & (column < columns)).reshape(down * across, -1)
    place = row.clamp_max(rows - 1) * columns + column.clamp_max(columns - 1)
    return place.reshape(down * across, -1), real


def tokens_of(route: Route) -> int:
    return route.extra + route.grid[0] * route.grid[1]


def unfit(route: Route, q_len: int, kv_len: int) -> str:
    rows, columns = route.grid
    return (
        f"{q_len} queries and {kv_len} keys are not {route.extra} and a grid of {rows} x {columns}"
    )
