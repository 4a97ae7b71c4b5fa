"""Packed rows under a causal mask alone, by the fused kernel: no scores in memory.

The key axis is cut into blocks. A row sees all keys of the blocks before its own, and of its own
block the keys up to its end. Rows are sorted, so those that see one block at least are neighbours:
with blocks numbered from 0, the rows that end in block 1 see block 0, those of 2 and 3 see 0 and 1
together, those of 4 to 7 see 0 to 3, and so on for every power of two. Each of these is a rectangle
without a mask, and rectangles are large where most of the work is; only a row's own block has a
mask. The parts are joined by their logsumexp.

Heads that are on for every row are left to one causal call each.

Tried and slower (2048 tokens, 4 of 8 heads on, one core, dense 1.0): chunks of 128 rows through
`baddbmm`, softmax and `bmm` 0.9 to 1.2; one fused call a chunk with a mask over all its keys 0.9 to
1.1; chunks of all heads at once, padded to the same number of rows, 0.75 to 0.8. This: 0.6 to 0.7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from rewriter.kernels.torch_compact_rows import Packed
from rewriter.kernels.torch_flash import dense, flash, join
from rewriter.kernels.torch_plan import Plan

__all__ = ["causal", "causal_offset_of", "is_causal"]

BLOCK = 256
"""Keys of a block, while heads are on for half of the tokens or so."""
SCORES = 2**19
"""Scores in own blocks that are computed together."""
FEWEST_ROWS = 48
"""Rows of a block, on average, below which blocks are made longer: the kernel needs rows."""


def is_causal(plan: Plan) -> bool:
    """The weights are the softmax of the scaled product, and the mask is a causal one alone."""
    has_more = plan.code.bias is not None or plan.spec.sink is not None or len(plan.terms) != 1
    return plan.code.is_linear and not has_more and plan.terms[0].causal is not None


def causal_offset_of(call: Packed) -> int | None:
    """c, if key k is seen by query q where `k <= q + c`, every query sees a key, and the fused
    kernel takes the dims; else None."""
    term = call.plan.terms[0] if is_causal(call.plan) else None
    if term is None or term.causal is None or call.value_dim != call.q.shape[-1]:
        return None
    offset = term.causal(call.queries(0, len(call.counts) - 1, (0, call.q_len - 1)))
    return int(offset) if 0 <= offset < math.inf and call.kv_len else None


def causal(call: Packed, offset: int) -> Tensor:
    """The output `[B, Hq, L, Dv]`.

    Args:
        call: the packed rows.
        offset: as `causal_offset_of` found it.
    """
    out = call.empty_output()
    if offset == 0:
        full = (call.factor != 0).all(-1)
        for b, h in full.nonzero().tolist():
            _full_head(call, b, h, out)
        call.pack((call.factor != 0) & ~full[..., None])
    if call.row.numel():
        o = _Cut(call, offset).run()
        o *= call.factor.view(-1).index_select(0, call.row)[:, None]
        out.index_copy_(0, call.row, o.to(out.dtype))
    return call.unpacked(out)


def _full_head(call: Packed, b: int, h: int, out: Tensor) -> None:
    """A head that is on for every query."""
    lane, first = b * call.kv_heads + h // call.group, (b * call.heads + h) * call.q_len
    rows = slice(first, first + call.q_len)
    q, k, v = call.q[rows].to(call.dtype), call.k[lane], call.v[lane]
    o, _ = flash(*(x[None, None] for x in (q, k, v)), scale=call.plan.code.scale, is_causal=True)
    out[rows] = o[0, 0] * call.factor[b, h][:, None]


# --- packed rows ----------------------------------------------------------------------------------


class _Cut:
    """The packed rows, cut by the blocks of keys in which they end."""

    def __init__(self, call: Packed, offset: int) -> None:
        self.call = call
        self.block = _block_of(call)
        """Keys of a block."""
        self.blocks = -(-call.kv_len // self.block)
        ends = (call.position + offset).clamp_max(call.kv_len - 1)
        own = ends // self.block
        self.own = call.lane * self.blocks + own
        """The block of each row, counted through all lanes."""
        self.ends = ends - own * self.block
        """The last key that each row sees, within its block."""
        counts = torch.bincount(self.own, minlength=len(call.counts) * self.blocks)
        self.edges: list[int] = [0, *counts.cumsum(0).tolist()]
        """Packed rows `edges[n]` to `edges[n + 1] - 1` end in block n."""
        self.q = call.q.index_select(0, call.row).to(call.dtype)

    def run(self) -> Tensor:
        """The output of the packed rows, `[R, D]`."""
        parts = [self._own_blocks(a, z) for a, z in self._lanes_together()]
        o, lse = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
        scale = self.call.plan.code.scale
        for lane in range(len(self.call.counts)):
            edges = self.edges[lane * self.blocks : (lane + 1) * self.blocks + 1]
            if edges[0] == edges[-1]:
                continue
            k, v = (dense(x[lane])[None, None] for x in (self.call.k, self.call.v))
            for rows, keys in _rectangles(edges, self.block):
                q = self.q[None, None, rows]
                more, more_lse = flash(q, k[:, :, keys], v[:, :, keys], scale=scale)
                join(o[rows], lse[rows], more[0, 0], more_lse[0, 0])
        return o

    def _lanes_together(self) -> Iterator[tuple[int, int]]:
        """Lanes `[first, last)` whose own blocks are computed together."""
        first, count, most = 0, len(self.call.counts), 0
        rows = [z - a for a, z in pairwise(self.edges)]
        for lane in range(count):
            most = max(most, *rows[lane * self.blocks : (lane + 1) * self.blocks])
            if (lane + 1 - first) * self.blocks * most * self.block > SCORES and lane > first:
                yield first, lane
                first, most = lane, max(rows[lane * self.blocks : (lane + 1) * self.blocks])
        yield first, count

    def _own_blocks(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """What the rows of some lanes see of the blocks in which they end: `[R, D]` and `[R]`.

        Blocks are padded to the same number of rows, with rows that are computed for nothing, and
        the last one of a lane to the same number of keys, which no row sees.
        """
        call, block = self.call, self.block
        edges = self.edges[first * self.blocks : last * self.blocks + 1]
        rows = slice(edges[0], edges[-1])
        count, most = len(edges) - 1, max(z - a for a, z in pairwise(edges))
        if not most:
            return self.q[rows], self.q.new_zeros(0)
        starts = torch.tensor(edges[:-1], device=call.device)
        places = torch.arange(most, device=call.device)
        index = (starts[:, None] + places).clamp_max_(len(self.q) - 1).flatten()
        later = torch.full((block, block), -math.inf, dtype=call.dtype, device=call.device).triu_(1)
        mask = later.index_select(0, self.ends[index]).view(1, count, most, block)
        q = self.q.index_select(0, index).view(1, count, most, -1)
        more = self.blocks * block - call.kv_len
        k, v = (_padded(x[first:last], more).view(1, count, block, -1) for x in (call.k, call.v))
        o, lse = flash(q, k, v, mask=mask, scale=call.plan.code.scale)
        own = self.own[rows] - first * self.blocks
        at = torch.arange(*rows.indices(len(self.q)), device=call.device) - starts[own]
        o = o.transpose(1, 2).reshape(count * most, -1)  # as it lies in memory: rows, then blocks
        return o.index_select(0, at * count + own), lse[0][own, at]


def _block_of(call: Packed) -> int:
    """Keys of a block, so that enough rows end in one."""
    lanes = [n for n in call.counts if n]
    density = sum(lanes) / (len(lanes) * max(call.q_len, 1))
    block = BLOCK
    while block < call.kv_len and block * density < FEWEST_ROWS:
        block *= 2
    return block


def _rectangles(edges: list[int], block: int) -> Iterator[tuple[slice, slice]]:
    """Packed rows of a lane, and keys of whole blocks that all of these rows see."""
    blocks, size = len(edges) - 1, 1
    while size < blocks:
        for j in range(size, blocks, 2 * size):
            start, stop = edges[j], edges[min(j + size, blocks)]
            if start < stop:
                yield slice(start, stop), slice((j - size) * block, j * block)
        size *= 2


def _padded(x: Tensor, more: int) -> Tensor:
    """Keys or values `[n, M, D]` with so many rows of zeros behind them."""
    return torch.nn.functional.pad(x, (0, 0, 0, more)) if more else x.contiguous()
