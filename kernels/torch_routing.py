"""The selector of routed attention: from means of blocks to lists of blocks.

`by="query"`: mixture of block attention (arXiv 2502.13189). `by="region"`: bi-level routing (arXiv
2303.08810). Means and products are in float32 and have no gradient; the largest tensor is rows
times blocks, of a part of the rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rewriter.beside import Beside
from rewriter.evaluate import evaluate, tensor_of
from rewriter.kernels.block_lists import BlockList
from rewriter.kernels.torch_tiles import Operands
from rewriter.reference_routes import chosen
from rewriter.stages import Route

__all__ = ["Layout", "block_means", "chosen_blocks", "chosen_regions", "layout_of", "there_of"]


@dataclass(frozen=True)
class Layout:
    """Which keys each block has, and where queries stand among the keys that are there."""

    keys: Tensor
    """Places on the key axis, `[Y, C, block]`."""
    filled: Tensor
    """False behind the last key, `[Y, C, block]`."""
    shared: int
    """Entry y is for the units `y · shared` and on: all, those of a batch, or one."""
    there: Tensor | None
    """The keys that are counted, `[Y, M]`; None: all, and block c begins at key `c · block`."""
    position: Tensor
    """Where each query stands on the key axis, `[U, G, L]`."""
    last: Tensor
    """The number of the last key up to there, -1 if there is none, `[U, G, L]`."""

    @property
    def count(self) -> int:
        return self.keys.shape[1]

    @property
    def block(self) -> int:
        return self.keys.shape[2]

    @property
    def complete(self) -> int:
        """So many blocks at the front are full for every batch: no later key changes them."""
        return int(self.filled.all(-1).all(0).sum())


def there_of(ops: Operands) -> Tensor | None:
    """The keys that are counted, `[B, Hkv, M]`, or `[B, 1, M]` if heads agree; None: all."""
    found = tensor_of(
        evaluate(ops.plan.keys, ops.grid, ops.named, ops.dtype), ops.q, ops.dtype
    ).bool()
    if bool(found.all()):
        return None
    heads = ops.kv_heads if ops.plan.keys_of_heads else 1
    return found.expand(ops.batch, heads, 1, ops.kv_len).squeeze(2)


def layout_of(ops: Operands, route: Route) -> Layout:
    """The blocks of the keys of a call."""
    there = there_of(ops)
    position = ops.of_rows(route.position).long().clamp(0, ops.kv_len - 1)
    shape = (ops.units, ops.group, ops.q_len)
    if there is None:
        count = -(-ops.kv_len // route.block)
        keys = torch.arange(count * route.block, device=ops.device).view(1, count, route.block)
        filled = keys < ops.kv_len
        position = position.reshape(shape)
        return Layout(keys.clamp_max(ops.kv_len - 1), filled, ops.units, None, position, position)
    number = there.cumsum(-1) - 1  # [B, 1 or H, M]
    last = number.expand(ops.batch, ops.heads, ops.kv_len).gather(2, position)
    there = there.flatten(0, 1)
    lengths = there.sum(-1, keepdim=True)
    count = max(1, -(-int(lengths.max()) // route.block))
    order = (~there).byte().argsort(dim=-1, stable=True)  # the keys that are there come first
    order = pad(order, (0, max(0, count * route.block - ops.kv_len)))[:, : count * route.block]
    filled = torch.arange(count * route.block, device=ops.device) < lengths
    table = (len(there), count, route.block)
    return Layout(
        order.reshape(table),
        filled.view(table),
        ops.units // len(there),
        there,
        position.reshape(shape),
        last.reshape(shape),
    )


# --- means ----------------------------------------------------------------------------------------


def block_means(ops: Operands, layout: Layout, beside: Beside | None) -> Tensor:
    """The mean key of each block, `[U, C, D]` in float32.

    The sums of blocks that can no longer change are kept beside the cache, so that a step of
    generation reads the keys of the last blocks only.
    """
    kept = None if beside is None else _recalled(beside.recall(), layout)
    known = 0 if kept is None else kept.shape[1]
    sums = _sums(ops, layout, known)
    if kept is not None:
        sums = torch.cat([kept, sums], dim=1)
    if beside is not None:
        beside.keep((layout.block, layout.there, sums[:, : layout.complete].clone()))
    counts = layout.filled.sum(-1).clamp_min(1)[..., None]
    return sums / counts.repeat_interleave(layout.shared, dim=0)


def _recalled(value: object, layout: Layout) -> Tensor | None:
    """The sums that were kept, if the same earlier keys are counted still."""
    if value is None:
        return None
    assert isinstance(value, tuple)
    block, there, sums = value
    if block != layout.block or (there is None) != (layout.there is None):
        return None
    if there is not None and layout.there is not None:
        same = len(there) == len(layout.there)
        if not same or not torch.equal(layout.there[:, : there.shape[1]], there):
            return None
    assert isinstance(sums, Tensor)
    return sums


def _sums(ops: Operands, layout: Layout, first: int) -> Tensor:
    """The sums of the keys of the blocks from `first` on, `[U, C - first, D]`."""
    dim, block = ops.k.shape[3], layout.block
    if layout.there is None:
        k = ops.k[:, :, first * block :]
        whole = k.shape[2] // block
        full = torch.unflatten(k[:, :, : whole * block], 2, (whole, block)).sum(
            3, dtype=torch.float32
        )
        rest = k[:, :, whole * block :]
        if rest.shape[2]:
            full = torch.cat([full, rest.sum(2, keepdim=True, dtype=torch.float32)], dim=2)
        return full.reshape(ops.units, -1, dim)
    sums = []
    for unit in range(ops.units):  # one at a time: the keys are copied
        entry = unit // layout.shared
        keys, filled = layout.keys[entry, first:], layout.filled[entry, first:]
        found = ops.flat_k.index_select(0, unit * ops.kv_len + keys.reshape(-1)).float()
        found = found.masked_fill(~filled.reshape(-1, 1), 0.0)
        sums.append(found.view(-1, block, dim).sum(1))
    return torch.stack(sums)


# --- the choice -----------------------------------------------------------------------------------


def chosen_blocks(
    ops: Operands, route: Route, layout: Layout, means: Tensor, units: slice, queries: slice
) -> BlockList:
    """The list of some units and queries; row `(u · G + g) · n + q`, counted from their first."""
    q = ops.flat_q.view(ops.units, ops.group, ops.q_len, -1)[units, :, queries]
    q = q.reshape(q.shape[0], -1, q.shape[3]).float()
    last = layout.last[units, :, queries].reshape(*q.shape[:2], 1)
    own = last.clamp_min(0) // route.block
    block = torch.arange(layout.count, device=ops.device)
    earlier = block < own
    seen = block == own
    if route.topk > 1:
        affinity = torch.bmm(q, means[units].mT).masked_fill_(~earlier, -torch.inf)
        seen |= _largest(affinity, route.topk - 1)
    if route.dense_below:
        dense = last < route.dense_below
        seen |= dense & (block <= own) if ops.plan.is_causal else dense
    full = earlier if ops.plan.is_causal else torch.zeros_like(earlier)
    return BlockList.from_chosen(seen.flatten(0, 1), full.flatten(0, 1))


def _largest(affinity: Tensor, count: int) -> Tensor:
    """`chosen`, of the reference: faster, where nothing is equal."""
    if count >= affinity.shape[-1]:
        return affinity > -torch.inf
    top = affinity.topk(count + 1).values
    least = top[..., count - 1 : count].clamp_min(torch.finfo(affinity.dtype).min)
    found = affinity >= least
    tied = top[..., count] == least[..., 0]
    if bool(tied.any()):
        found[tied] = chosen(affinity[tied], count)
    return found


def chosen_regions(ops: Operands, route: Route, tokens: Tensor, filled: Tensor) -> BlockList:
    """The list of every region; row `b · R + r`, and blocks are the regions of that batch.

    Args:
        tokens: places on the grid of the tokens of each region, `[R, w]`.
        filled: where there is such a token, `[R, w]`.
    """
    there = there_of(ops)
    heads = (ops.batch, ops.kv_heads, len(tokens))
    real = filled[..., None]
    q = torch.unflatten(ops.q, 1, (ops.kv_heads, ops.group)).sum(2, dtype=torch.float32)
    mean_q = _of_regions(q, route, tokens, real) / real.sum(1)
    if there is None:
        mean_k = _of_regions(ops.k.float(), route, tokens, real) / real.sum(1)
        empty = None
    else:
        here = there[..., route.extra :][..., tokens] & filled  # [B, 1 or H, R, w]
        counts = here.sum(-1, keepdim=True)
        mean_k = _of_regions(ops.k.float(), route, tokens, here[..., None]) / counts.clamp_min(1)
        empty = (counts.squeeze(-1) == 0).all(1)  # [B, R]
    mean_q, mean_k = (
        x.expand(*heads, x.shape[3]).transpose(1, 2).flatten(2) for x in (mean_q, mean_k)
    )
    affinity = mean_q @ mean_k.mT  # [B, R, R]: summed over the heads
    if empty is not None:
        affinity = affinity.masked_fill(empty[:, None], -torch.inf)
    best = _largest(affinity, route.topk).flatten(0, 1)
    return BlockList.from_chosen(best, torch.zeros_like(best[:1]))


def _of_regions(x: Tensor, route: Route, tokens: Tensor, real: Tensor) -> Tensor:
    """Sums over the real tokens of each region, `[B, H, R, D]`."""
    found = torch.unflatten(
        x[:, :, route.extra :].index_select(2, tokens.view(-1)), 2, tokens.shape
    )
    return found.masked_fill(~real, 0.0).sum(3)
