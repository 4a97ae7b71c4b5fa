"""Which blocks of keys each row of queries sees, as a value: by rows, and transposed by blocks.

Rows and blocks carry flat numbers, so that one list holds every batch, head and query (or region of
queries). What executes a list goes through the rows (few queries: gather their keys) or through the
blocks (many queries: gather the queries of a block, so that a block is read once).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["BlockList", "Packing"]


@dataclass(frozen=True)
class Packing:
    """The pairs of some blocks, block by block, in tiles of `width` places; a tile has one block.

    A block whose number of rows is no multiple of the width leaves places free.
    """

    width: int
    blocks: Tensor
    """The block of each tile, `[n]`, ascending."""
    rows: Tensor
    """The row at each place, `[n, width]`; -1 where there is none."""
    places: Tensor
    """The place `tile · width + i` of each pair that was packed, in the order of the pairs."""


@dataclass(frozen=True)
class BlockList:
    """Pairs of a row and a block that it sees, row by row, blocks ascending."""

    offsets: Tensor
    """Where the pairs of each row begin, and where the last ones end, `[rows + 1]`, int64."""
    blocks: Tensor
    """The block of each pair, `[pairs]`, int64."""
    is_full: Tensor
    """Whether the row sees every key of the block, `[pairs]`; else a mask is needed."""
    block_count: int

    @staticmethod
    def from_chosen(chosen: Tensor, full: Tensor) -> BlockList:
        """The list of a boolean map.

        Args:
            chosen: `[rows, C]`, True where the row sees some key of the block.
            full: the same shape, or one that broadcasts to it: True where it would see every key.
        """
        rows, blocks = chosen.nonzero(as_tuple=True)
        offsets = torch.zeros(len(chosen) + 1, dtype=torch.int64, device=chosen.device)
        torch.cumsum(torch.bincount(rows, minlength=len(chosen)), 0, out=offsets[1:])
        return BlockList(offsets, blocks, full.expand_as(chosen)[rows, blocks], chosen.shape[1])

    @property
    def row_count(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def counts(self) -> Tensor:
        """How many blocks each row sees, `[rows]`."""
        return self.offsets.diff()

    @cached_property
    def rows(self) -> Tensor:
        """The row of each pair, `[pairs]`, ascending."""
        rows = torch.arange(self.row_count, device=self.offsets.device)
        return rows.repeat_interleave(self.counts, output_size=len(self.blocks))

    @cached_property
    def transposed(self) -> BlockList:
        """For each block the rows that see it, ascending: made by sorting."""
        blocks, order = _sorted(self.blocks)
        return BlockList(
            _starts(blocks, self.block_count), self.rows[order], self.is_full[order], self.row_count
        )

    def slots(self) -> tuple[Tensor, Tensor]:
        """The blocks as a table `[rows, most]`, and where it is filled; free slots have block 0."""
        most = int(self.counts.max()) if self.row_count else 0
        slot = torch.arange(most, device=self.offsets.device)
        filled = slot < self.counts[:, None]
        table = torch.zeros(filled.shape, dtype=torch.int64, device=filled.device)
        table[filled] = self.blocks
        return table, filled

    def packed(self, pairs: Tensor, keys: Tensor, key_count: int, width: int) -> Packing:
        """Some pairs in tiles, those of equal keys together.

        Args:
            pairs: numbers of the pairs, `[n]`.
            keys: what they are packed by, `[n]`, below `key_count`: their blocks, numbered so that
                blocks of different heads differ.
        """
        keys, order = _sorted(keys)
        starts = _starts(keys, key_count)
        tiles = -(-starts.diff() // width)
        first = tiles.cumsum(0) - tiles
        rank = torch.arange(len(keys), device=keys.device) - starts[keys]
        place = (first[keys] + rank // width) * width + rank % width
        total = int(tiles.sum())
        rows = torch.full((total * width,), -1, dtype=torch.int64, device=keys.device)
        rows[place] = self.rows[pairs[order]]
        places = torch.empty_like(place)
        places[order] = place
        blocks = torch.arange(key_count, device=keys.device)
        blocks = blocks.repeat_interleave(tiles, output_size=total)
        return Packing(width, blocks, rows.view(total, width), places)


def _sorted(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks in ascending order and where they stood; pairs of one block keep their order."""
    found = blocks.int().sort(stable=True)  # half the bytes of int64, and half the time
    return found.values.long(), found.indices


def _starts(ascending: Tensor, count: int) -> Tensor:
    """Where each number below `count` begins in an ascending list; then its length."""
    starts = torch.zeros(count + 1, dtype=torch.int64, device=ascending.device)
    torch.cumsum(torch.bincount(ascending, minlength=count), 0, out=starts[1:])
    return starts
