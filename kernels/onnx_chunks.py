"""Causal linear attention by chunks, in primitive ATen ops: no tensor of L x M.

Chunk i gives `φ(q) · Σ_{c < i} decay S_c` and, within itself, weights of CHUNK x CHUNK. `S_c` is
the state that chunk c adds; a matrix of chunks x chunks joins them, so there is no loop, and
lengths may vary.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from rewriter.kernels.onnx_formulas import Value
from rewriter.kernels.onnx_site import SiteWriter

__all__ = ["CHUNK", "by_chunks"]

aten = torch.ops.aten

CHUNK = 64


class _Chunks:
    """Tensors of keys cut into chunks, the last one filled with zeros."""

    def __init__(self, site: SiteWriter, length: Value) -> None:
        self.site = site
        self.length = length
        whole = site.formula.divide("IDiv", site.add(length, CHUNK - 1), CHUNK)
        # never 1: that size, in an example, torch would take for one that always broadcasts
        self.count: Value = site.formula.extreme("maximum", whole, 2)
        self.missing: Value = site.add(site.mul(self.count, CHUNK), site.mul(length, -1))

    def filled(self, x: Node) -> Node:
        """x `[B, H, M, F]` with rows of zeros behind, so that the chunks are whole."""
        return self.site.write(aten.constant_pad_nd.default, x, [0, 0, 0, self.missing], 0)

    def folded(self, x: Node) -> Node:
        """`[B, H, n, CHUNK, F]` of filled rows."""
        write = self.site.write
        batch, heads, _, width = (write.size(x, i) for i in range(4))
        return write(aten.reshape.default, x, [batch, heads, self.count, CHUNK, width])

    def joined(self, x: Node) -> Node:
        """The inverse of both."""
        write = self.site.write
        batch, heads, width = (write.size(x, i) for i in (0, 1, 4))
        rows = self.site.mul(self.count, CHUNK)
        x = write(aten.reshape.default, x, [batch, heads, rows, width])
        return write(aten.slice.Tensor, x, 2, 0, self.length)


def by_chunks(
    site: SiteWriter,
    queries: Node,
    keys: Node,
    values: Node,
    seen: Node | None,
    decay: Node | None,
) -> Node:
    """The sums over the keys up to each query, `[B, H, M, Dv]`.

    Args:
        site: where this is written.
        queries: `[B, H, M, P]`.
        keys: `[B, H, M, P]`, 0 where a key does not take part.
        values: `[B, H, M, Dv]`.
        seen: which keys take part and so make the state decay, `[., ., 1, M]`; None: all do.
        decay: logarithm of the factor of each key, `[H, 1, 1]` or one number; None: 1.
    """
    write = site.write
    chunks = _Chunks(site, site.extent["k"])
    queries, keys, values = (chunks.folded(chunks.filled(x)) for x in (queries, keys, values))
    inside = site.count(CHUNK)
    order = write(aten.ge.Tensor, write(aten.reshape.default, inside, [-1, 1]), inside)
    index = site.count(chunks.count)
    earlier = write(aten.gt.Tensor, write(aten.reshape.default, index, [-1, 1]), index)
    weights = write(aten.matmul.default, queries, site.turned(keys))  # [B, H, n, CHUNK, CHUNK]
    join: Node
    if decay is None:
        weights = site.where(order, weights, 0.0)
        join = earlier  # [n, n]
    else:
        # Every exponent is decay times a number of keys that is not negative: nothing overflows.
        times = _Times(site, chunks, seen, decay)
        weights = site.where(order, site.mul(weights, times.within), 0.0)
        join = site.where(earlier, times.between, 0.0)  # [., ., n, n]
        queries, keys = site.mul(queries, times.since_start), site.mul(keys, times.to_end)
    local = write(aten.matmul.default, weights, values)
    states = write(aten.matmul.default, site.turned(keys), values)  # [B, H, n, P, Dv]
    batch, heads, count, size, width = (write.size(states, i) for i in range(5))
    flat = write(aten.reshape.default, states, [batch, heads, count, site.mul(size, width)])
    before = write(aten.matmul.default, write.to(join, write.value(flat).dtype), flat)
    before = write(aten.reshape.default, before, [batch, heads, count, size, width])
    far = write(aten.matmul.default, queries, before)
    return chunks.joined(write(aten.add.Tensor, local, far))


class _Times:
    """Factors of the decay between places of the chunks. Time is counted in keys that take part."""

    def __init__(self, site: SiteWriter, chunks: _Chunks, seen: Node | None, decay: Node) -> None:
        self.site = site
        self.decay = decay
        write = site.write
        if seen is None:
            step: Value = 1
            now = write(aten.add.Tensor, site.count(site.mul(chunks.count, CHUNK)), 1)
            now = chunks.folded(write(aten.reshape.default, now, [1, 1, -1, 1]))
        else:
            steps = chunks.filled(write.to(site.turned(seen), torch.int64))
            now = chunks.folded(write(aten.cumsum.default, steps, 2))
            step = write(aten.slice.Tensor, chunks.folded(steps), 3, 0, 1)
        self.now = now  # [., ., n, CHUNK, 1]
        self.start = write(aten.sub.Tensor, write(aten.slice.Tensor, now, 3, 0, 1), step)
        self.end = write(aten.slice.Tensor, now, 3, CHUNK - 1, CHUNK)

    def _factor(self, later: Node, earlier: Node) -> Node:
        write = self.site.write
        keys = write(aten.clamp_min.default, write(aten.sub.Tensor, later, earlier), 0)
        decay = self.decay
        if write.value(decay).ndim and write.value(keys).ndim == 5:
            decay = write(aten.unsqueeze.default, decay, -1)
        return write(aten.exp.default, self.site.mul(write.to(keys, torch.float32), decay))

    @property
    def within(self) -> Node:
        """From key to query of one chunk, `[., ., n, CHUNK, CHUNK]`."""
        return self._factor(self.now, self.site.turned(self.now))

    @property
    def to_end(self) -> Node:
        """From a key to the end of its chunk, `[., ., n, CHUNK, 1]`."""
        return self._factor(self.end, self.now)

    @property
    def since_start(self) -> Node:
        """From the start of its chunk to a query, `[., ., n, CHUNK, 1]`."""
        return self._factor(self.now, self.start)

    @property
    def between(self) -> Node:
        """From the end of a chunk to the start of a later one, `[., ., n, n]`: later, earlier."""
        start, end = (self.site.write(aten.squeeze.dim, x, -1) for x in (self.start, self.end))
        return self._factor(start, self.site.turned(end))
