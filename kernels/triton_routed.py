"""Routed softmax attention by a generated Triton kernel: the guard, the lists, the call.

Torch selects (`torch_routing`, in float32, without a gradient), the kernel executes. Forward only:
gradients come from `torch_routed.backward`, which selects the same blocks again.

A tile of queries visits the blocks that some query of it sees, so that neighbours which choose
alike share the keys that they read. What each query chose itself is one byte a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewriter.beside import Beside
from rewriter.errors import LoweringError, ShapeError
from rewriter.kernels import torch_routed
from rewriter.kernels.torch_routed_work import regions_of, tokens_of, unfit
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
from rewriter.kernels.triton_routed_code import KERNEL, RoutedKernel, block_of, routed_source
from rewriter.kernels.triton_source import launch
from rewriter.kernels.triton_tables import filled, tabulate
from rewriter.kernels.triton_tiles import tile_for
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.stages import Route

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = ["forward", "supports"]

_PRODUCTS = 2**24
"""Products of queries and means that are held at a time, in float32."""


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
    width = max(16, 1 << (block_of(route) - 1).bit_length())
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
    elif "chosen" in lists:
        found["C"] = lists["chosen"].shape[-1]
    return found


def _listed(seen: Tensor) -> dict[str, Tensor]:
    """The lists of a map `[tiles, C]`, True where a tile visits a block."""
    tiles, blocks = seen.nonzero(as_tuple=True)
    first = torch.zeros(len(seen) + 1, dtype=torch.int32, device=seen.device)
    torch.cumsum(torch.bincount(tiles, minlength=len(seen)), 0, out=first[1:])
    if not len(blocks):
        blocks = torch.zeros(1, dtype=torch.int64, device=seen.device)
    return {"first": first, "block": blocks.int()}


# --- each query for itself ------------------------------------------------------------------------


def _of_queries(kernel: RoutedKernel, ops: Operands, beside: Beside | None) -> dict[str, Tensor]:
    """The lists of mixture of block attention."""
    route, tile = kernel.route, kernel.base.tile
    layout = layout_of(ops, route)
    means = block_means(ops, layout, beside)
    chosen = torch.zeros(
        ops.units, ops.group, ops.q_len, layout.count, dtype=torch.uint8, device=ops.device
    )
    units = slice(0, ops.units)
    step = max(1, _PRODUCTS // (ops.units * ops.group * layout.count))
    for start in range(0, ops.q_len, step):
        queries = slice(start, min(start + step, ops.q_len))
        found = chosen_blocks(ops, route, layout, means, units, queries)
        part = chosen.new_zeros(found.row_count, layout.count)
        part[found.rows, found.blocks] = 1
        chosen[:, :, queries] = part.view(ops.units, ops.group, -1, layout.count)
    rest = -ops.q_len % tile.queries
    padded = torch.nn.functional.pad(chosen, (0, 0, 0, rest))
    seen = padded.view(-1, tile.queries, layout.count).amax(1) != 0
    lists = _listed(seen) | {"chosen": chosen}
    if kernel.has_places:
        lists["place"] = layout.keys.masked_fill(~layout.filled, -1).int().contiguous()
    return lists


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
    lists = _listed(whole.expand(ops.batch, ops.heads, *shape[1:]).flatten(0, 2))
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
    there = there_of(ops)
    if there is None or not route.dense_below:
        return torch.zeros(1, 1, dtype=torch.bool, device=ops.device)
    few = there.sum(-1) <= route.dense_below  # [B, 1 or Hkv]
    return few.repeat_interleave(ops.group if few.shape[1] > 1 else 1, dim=1)
