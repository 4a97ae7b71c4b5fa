"""Lists of blocks: drawn as maps, turned round, and packed in tiles."""

from __future__ import annotations

import torch

from rewriter.kernels.block_lists import BlockList

MAP = [[1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]]


def drawn(chosen: list[list[int]]) -> BlockList:
    return BlockList.from_chosen(
        torch.tensor(chosen).bool(), torch.tensor([True, True, True, False])
    )


def test_blocks_of_a_row_ascend() -> None:
    found = drawn(MAP)
    assert found.blocks.tolist() == [0, 2, 2, 3, 0, 2, 3]
    assert found.offsets.tolist() == [0, 2, 4, 4, 7]
    assert found.counts.tolist() == [2, 2, 0, 3]
    assert found.is_full.tolist() == [True, True, True, False, True, True, False]


def test_transposed_list_has_the_rows_of_each_block() -> None:
    found = drawn(MAP).transposed
    assert found.offsets.tolist() == [0, 2, 2, 5, 7]
    assert found.blocks.tolist() == [0, 3, 0, 1, 3, 1, 3]
    assert found.is_full.tolist() == [True] * 5 + [False] * 2
    assert found.transposed.blocks.tolist() == drawn(MAP).blocks.tolist()


def test_slots_are_filled_from_the_front() -> None:
    table, filled = drawn(MAP).slots()
    assert table.tolist() == [[0, 2, 0], [2, 3, 0], [0, 0, 0], [0, 2, 3]]
    assert filled.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]


def test_a_tile_has_rows_of_one_block_and_every_pair_its_place() -> None:
    found = drawn(MAP)
    packing = found.packed(torch.arange(7), found.blocks, 4, width=2)
    assert packing.blocks.tolist() == [0, 2, 2, 3]
    assert packing.rows.tolist() == [[0, 3], [0, 1], [3, -1], [1, 3]]
    assert packing.rows.flatten()[packing.places].tolist() == found.rows.tolist()
    assert packing.blocks[packing.places // 2].tolist() == found.blocks.tolist()


def test_some_pairs_are_packed_alone() -> None:
    found = drawn(MAP)
    pairs = (~found.is_full).nonzero()[:, 0]
    packing = found.packed(pairs, found.blocks[pairs], 4, width=4)
    assert packing.rows.tolist() == [[1, 3, -1, -1]]
    assert packing.places.tolist() == [0, 1]


def test_a_list_without_pairs_is_empty_everywhere() -> None:
    found = drawn([[0, 0, 0, 0]])
    assert found.transposed.counts.tolist() == [0, 0, 0, 0]
    assert found.slots()[0].shape == (1, 0)
