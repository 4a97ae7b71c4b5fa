"""Routed softmax attention by a generated Triton kernel: the guard, the lists, the call.

Torch selects (`torch_routing`, in float32, without a gradient), the kernel executes. Forward only:
gradients come from `torch_routed.backward`, which selects the same blocks again.

A tile of queries visits the blocks that some query of it sees, so that neighbours which choose
alike share the keys that they read. Which queries of the tile see a block is one bit each, beside
the block in the list: memory follows the pairs that are visited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewriter.beside import Beside
from rewriter.errors import LoweringError, ShapeError
from rewriter.kernels import torch_routed
from rewriter.kernels.block_lists import BlockList
from rewriter.kernels.torch_routed_work import LEAST, regions_of, tokens_of, unfit
from rewriter.kernels.torch_routing import (
    block_means,
    chosen_blocks,
    chosen_regions,
    layout_of,
    there_of,
)
from rewriter.kernels.torch_tiles import Operands
from rewriter.kernels.triton_codegen import KernelSpec, Tile
from rewriter.kernels.triton_launch import (
    DTYPES,
    MIN_CAPABILITY,
    READABLE,
    capability_of,
    check_call,
    check_reads,
    device_reason,
    shape_reason,
)
from rewriter.kernels.triton_lines import padded
from rewriter.kernels.triton_routed_code import KERNEL, RoutedKernel, block_of, routed_source
from rewriter.kernels.triton_source import Source, launch
from rewriter.kernels.triton_tables import filled, tabulate
from rewriter.kernels.triton_tiles import tile_for
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.stages import Route

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = ["forward", "supports"]

_PRODUCTS = 2**22
"""Products of queries and means that are held at a time, in float32; more where there are so many
blocks that this would be few queries. No more than the torch kernel holds."""


# --- the guard ------------------------------------------------------------------------------------


def supports(spec: Spec, shapes: Shapes) -> str | None:
    """None if a kernel can be generated for the spec and run on such tensors, else the reason."""
    assert isinstance(spec, SoftmaxSpec)
    return (
        device_reason(shapes.device)
        or shape_reason(shapes)
        or torch_routed.supports(spec, shapes)
        or _spec_reason(spec, shapes.head_dim, shapes.value_dim, shapes.dtype)
    )


@lru_cache(maxsize=4096)
def _spec_reason(
    spec: SoftmaxSpec, head_dim: int, value_dim: int, dtype: torch.dtype
) -> str | None:
    for tensor in spec.tensors:
        if tensor.dtype not in READABLE:
            return f"{tensor.name} is {tensor.dtype}, which the kernels do not read"
    try:
        routed_source(_kernel(spec, head_dim, value_dim, dtype, 1, MIN_CAPABILITY))
    except LoweringError as reason:
        return str(reason)
    return None


def source_of(
    spec: SoftmaxSpec, head_dim: int, value_dim: int, dtype: torch.dtype, capability: int
) -> Source:
    """The file that a long call runs."""
    return routed_source(_kernel(spec, head_dim, value_dim, dtype, 1024, capability))


@lru_cache(maxsize=4096)
def _kernel(
    spec: SoftmaxSpec,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    q_len: int,
    capability: int,
) -> RoutedKernel:
    assert spec.route is not None
    name, lowered = DTYPES[dtype], tabulate(spec)[0]
    tile = tile_for(lowered, head_dim, value_dim, name, q_len, capability)
    return RoutedKernel(KernelSpec(spec, head_dim, value_dim, name, _fitted(tile, spec.route)))


def _fitted(tile: Tile, route: Route) -> Tile:
    """The tile with no more keys than a block has, and few queries: those of a tile visit the
    blocks that any of them chose."""
    width = padded(block_of(route))
    queries = min(tile.queries, 64)
    if route.by == "region":
        queries = min(queries, width)
    return replace(tile, queries=queries, keys=min(tile.keys, width))


# --- the call -------------------------------------------------------------------------------------


@torch.no_grad()
def forward(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    beside: Beside | None = None,
) -> Tensor:
    """The routed attention that the spec describes, `[B, Hq, L, Dv]` in the dtype of q.

    Args:
        q: queries `[B, Hq, L, D]`; k: `[B, Hkv, M, D]`; v: `[B, Hkv, M, Dv]`; any strides.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
        beside: keeps the sums of the blocks of the keys from one step of generation to the next.

    Raises:
        ShapeError: if the tensors do not fit the spec or each other.
    """
    assert isinstance(spec, SoftmaxSpec)
    assert spec.route is not None
    check_call(q, k, v)
    (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, value_dim) = q.shape, v.shape
    numbers = dict(zip(spec.sizes, (int(n) for n in sizes), strict=True))
    numbers |= {"B": batch, "H": heads, "L": q_len, "M": kv_len}
    out = torch.empty((*q.shape[:3], value_dim), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    check_reads(spec, tensors, numbers, q.device)
    capability = capability_of(str(q.device))
    kernel = _kernel(spec, head_dim, value_dim, q.dtype, q_len, capability)
    named = {"q": q, "k": k, "v": v, "o": out}
    named |= {f"t:{t.name}": x for t, x in zip(spec.tensors, tensors, strict=True)}
    used = tuple((n, x) for n, x in numbers.items() if n not in "LM")
    for table in kernel.base.lowered[1]:
        named[f"t:{table.name}"] = filled(table, q_len, kv_len, used, q.device)
    ops = Operands(spec, q, k, v, tensors, sizes)
    by_query = spec.route.by == "query"
    lists = _of_queries(kernel, ops, beside) if by_query else _of_regions(kernel, ops)
    numbers |= {"G": heads // kv_heads, **_numbers(ops, lists)}
    launch(routed_source(kernel), KERNEL, batch * heads * numbers["T"], named | lists, numbers)
    return out


def _numbers(ops: Operands, lists: Mapping[str, Tensor]) -> dict[str, int]:
    """Tiles of queries a head, blocks, and heads that have the same places of keys."""
    found = {"T": (len(lists["first"]) - 1) // (ops.batch * ops.heads)}
    if "place" in lists:
        entries, found["C"], _ = lists["place"].shape
        found["S"] = ops.batch * ops.heads // entries
    return found


def _listed(tiles: Tensor, entries: Tensor, count: int) -> dict[str, Tensor]:
    """The lists of `count` tiles of queries.

    Args:
        tiles: the tile of each pair, ascending.
        entries: its block, and for each query of the tile a bit if queries choose for themselves.
    """
    first = torch.zeros(count + 1, dtype=torch.int32, device=tiles.device)
    torch.cumsum(torch.bincount(tiles, minlength=count), 0, out=first[1:])
    return {"first": first, "block": entries if len(entries) else entries.new_zeros(1)}


# --- each query for itself ------------------------------------------------------------------------


def _of_queries(kernel: RoutedKernel, ops: Operands, beside: Beside | None) -> dict[str, Tensor]:
    """The lists of mixture of block attention."""
    route, width = kernel.route, kernel.base.tile.queries
    layout = layout_of(ops, route)
    means = block_means(ops, layout, beside)
    tiles, entries = [], []
    for units, queries in _parts(ops, layout.count, width):
        found = chosen_blocks(ops, route, layout, means, units, queries)
        tile, entry = _pairs(found, queries.stop - queries.start, width)
        head, at = units.start * ops.group + tile[0], queries.start // width + tile[1]
        tiles.append(head * -(-ops.q_len // width) + at)
        entries.append(entry)
    joined, order = torch.cat(tiles).sort(stable=True)
    count = ops.batch * ops.heads * -(-ops.q_len // width)
    lists = _listed(joined, torch.cat(entries)[order], count)
    if kernel.has_places:
        lists["place"] = layout.keys.masked_fill(~layout.filled, -1).int().contiguous()
    return lists


def _parts(ops: Operands, count: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Parts of the units and of the queries, whole tiles of these, for a selection of `count`
    blocks."""
    long = _PRODUCTS * max(1, count * ops.v.shape[3] // 2**14)
    rows = min(long, max(LEAST, ops.q_len * ops.kv_len // 4)) // count
    length = max(1, min(-(-ops.q_len // width), rows // (ops.group * width))) * width
    units = max(1, rows // (ops.group * length))
    for u in range(0, ops.units, units):
        for start in range(0, ops.q_len, length):
            yield (
                slice(u, min(u + units, ops.units)),
                slice(start, min(start + length, ops.q_len)),
            )


def _pairs(found: BlockList, length: int, width: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The pairs of a tile and a block that some query of it sees, by tiles; of `length` queries of
    each head, from the first of a tile on.

    Returns:
        The head and the tile of each pair, counted in the part; and its entries of the list, int32
        `[pairs, 1 + words]`: the block, and the queries that see it as bits, 32 a word.
    """
    head, query = found.rows // length, found.rows % length
    tile, row = query // width, query % width
    count, words = -(-length // width), -(-width // 32)
    place = (head * count + tile) * found.block_count + found.blocks
    place = place * words + row // 32
    bits = torch.bitwise_left_shift(1, (row % 32).int())
    shape = (found.row_count // length, count, found.block_count, words)
    seen = torch.zeros(shape, dtype=torch.int32, device=place.device)
    seen.view(-1).index_add_(0, place, bits)  # different bits: their sum has all of them
    heads, tiles, blocks = seen.any(-1).nonzero(as_tuple=True)
    entries = torch.cat([blocks.int()[:, None], seen[heads, tiles, blocks]], dim=1)
    return (heads, tiles), entries


# --- regions --------------------------------------------------------------------------------------


def _of_regions(kernel: RoutedKernel, ops: Operands) -> dict[str, Tensor]:
    """The lists of bi-level routing: regions, then blocks of the keys before the grid."""
    route = kernel.route
    if ops.q_len != ops.kv_len or ops.kv_len != tokens_of(route):
        raise ShapeError(unfit(route, ops.q_len, ops.kv_len))
    tokens, real = regions_of(route, ops.device)
    place = torch.where(real, tokens + route.extra, -1)
    early = _cut(torch.arange(route.extra, device=ops.device), place.shape[1])
    rows = _tiles_of(place, kernel.base.tile.queries)
    rows_early = _tiles_of(early, kernel.base.tile.queries)
    found = chosen_regions(ops, route, tokens, real)
    seen = torch.zeros(found.row_count, len(tokens), dtype=torch.bool, device=ops.device)
    seen[found.rows, found.blocks] = True
    seen = seen.view(ops.batch, len(tokens), -1).repeat_interleave(len(rows) // len(tokens), dim=1)
    shape = (ops.batch, len(rows) + len(rows_early), len(tokens) + len(early))
    whole = torch.ones(shape, dtype=torch.bool, device=ops.device)
    whole[:, : len(rows), : len(tokens)] = seen
    whole = whole[:, None] | _sees_all(ops, route)[..., None, None]
    whole = whole.expand(ops.batch, ops.heads, *shape[1:]).flatten(0, 2)
    tiles, blocks = whole.nonzero(as_tuple=True)
    lists = _listed(tiles, blocks.int(), len(whole))
    lists["place"] = torch.cat([place, early])[None].int().contiguous()
    return lists | {"row": torch.cat([rows, rows_early]).int().contiguous()}


def _cut(keys: Tensor, width: int) -> Tensor:
    """Places `[n]` in blocks of `width`, filled up with -1."""
    return torch.nn.functional.pad(keys, (0, -len(keys) % width), value=-1).view(-1, width)


def _tiles_of(place: Tensor, width: int) -> Tensor:
    """Queries at places `[n, w]` in tiles of `width`, each row in tiles of its own."""
    rest = -place.shape[1] % width
    return torch.nn.functional.pad(place, (0, rest), value=-1).view(-1, width)


def _sees_all(ops: Operands, route: Route) -> Tensor:
    """True where a sequence, or a head of it, has so few keys that they are all seen, `[B, H]`."""
    there = there_of(ops) if route.dense_below else None
    if there is None:
        return torch.tensor([[ops.kv_len <= route.dense_below]], device=ops.device)
    few = there.sum(-1) <= route.dense_below  # [B, 1 or Hkv]
    return few.repeat_interleave(ops.group if few.shape[1] > 1 else 1, dim=1)
