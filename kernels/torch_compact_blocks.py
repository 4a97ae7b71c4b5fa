"""Chunks of packed rows through a softmax in blocks: any score, mask and sink."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewriter import symbols as sym
from rewriter.kernels.block_bounds import Queries, Segments
from rewriter.kernels.torch_block import Value
from rewriter.kernels.torch_compact_chunks import Chunk, groups, hull, places_of
from rewriter.kernels.torch_compact_rows import Packed, Rows
from rewriter.kernels.torch_plan import Term, any_hidden

__all__ = ["Chunked"]


class Chunked:
    """The packed rows of a call, computed chunk by chunk."""

    def __init__(self, call: Packed, *, one_call: bool) -> None:
        """Args:
        call: the packed rows.
        one_call: the rows of a lane are one call of `scaled_dot_product_attention`: every row
            sees every key, and the score is the scaled product.
        """
        self.call, self.plan, self.one_call = call, call.plan, one_call
        self.dtype, self.value_dim = call.dtype, call.value_dim
        self.memory = torch.empty(0, dtype=call.dtype, device=call.device)

    def run(self) -> Tensor:
        """The output `[B, Hq, L, Dv]`."""
        out = self.call.empty_output(1)  # the last row takes what pads the chunks
        for group in groups(self.call, whole=self.one_call):
            self._compute(group, out)
        return self.call.unpacked(out)

    def _compute(self, group: list[Chunk], out: Tensor) -> None:
        call = self.call
        index, is_row = places_of(group, call.device)
        row = call.row[index]  # [n, R]
        lane = torch.arange(group[0].lane, group[-1].lane + 1, device=call.device)
        b = (lane // call.kv_heads).view(-1, 1, 1, 1)
        h, q = (x[index].view(len(group), 1, -1, 1) for x in (call.head, call.position))
        h = h[:, :, :1] if call.group == 1 else h
        x = Rows(call, b, h, q, hull([c.keys for c in group]))
        o = self._output(x, group, call.q[row].to(self.dtype))
        o *= call.factor.view(-1)[row][..., None]
        if is_row is not None:
            row = torch.where(is_row, row, out.shape[0] - 1)
        out.index_copy_(0, row.flatten(), o.flatten(0, 1).to(out.dtype))

    def _output(self, x: Rows, group: list[Chunk], q: Tensor) -> Tensor:
        """The output of packed rows `[n, R, Dv]`, before the factor of the heads."""
        lanes = slice(group[0].lane, group[-1].lane + 1)
        if not x.keys:
            return self._of_empty(x, lanes).expand(*q.shape[:2], self.value_dim).clone()
        k, v = (_columns(t[lanes], x.keys) for t in (self.call.k, self.call.v))
        if self.one_call:
            scale = self.plan.code.scale
            return scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
        s = self._buffer(q.shape[0], q.shape[1], k.shape[1])
        torch.baddbmm(s, q, k.mT, beta=0, alpha=self.plan.code.scale, out=s)
        s = self._score(x, s[:, None])
        may_be_empty = self._hide(x, s, self.call.queries(lanes.start, lanes.stop - 1, _span(x)))
        top = s.amax(-1, keepdim=True) if self.plan.code.sink is not None else None
        p = torch.softmax(s, -1, out=s)
        o = torch.bmm(p[:, 0], v)
        if top is not None:
            o *= self._share(x, top - p.amax(-1, keepdim=True).log())[:, 0]
        if may_be_empty and bool(o[..., 0].isnan().any()):
            empty = any_hidden(x, self.plan.terms).expand(s.shape).all(-1)[:, 0, :, None]
            o = torch.where(empty, self._of_empty(x, lanes), o)
        return o

    def _buffer(self, *shape: int) -> Tensor:
        """Memory for scores that every group reuses."""
        count = math.prod(shape)
        if self.memory.numel() < count:
            self.memory = torch.empty(count, dtype=self.dtype, device=self.call.device)
        return self.memory[:count].view(shape)

    def _score(self, x: Rows, s: Tensor) -> Tensor:
        """The score as a tensor that may be overwritten, `[n, 1, R, K]`."""
        code = self.plan.code
        if code.score is None:
            return s
        found: Value = (code.score_in_place or code.score)(x, s)
        score = found if isinstance(found, Tensor) else x.value(found)
        if score.shape == s.shape and score.is_contiguous() and score.dtype == s.dtype:
            return score if self.call.spec.score.has(sym.s) else score.clone()
        return score.to(s.dtype).expand(s.shape).clone(memory_format=torch.contiguous_format)

    def _hide(self, x: Rows, s: Tensor, queries: Queries) -> bool:
        """Hides the keys that are not seen; False if each row sees a key for certain."""
        first, last = x.keys[0][0], x.keys[-1][1]
        covered = 0
        for term in self.plan.terms:
            start, stop = _columns_hidden(x, term, queries)
            if start == stop:
                continue
            covered += stop - start
            if len(x.keys) == 1 and (start, stop) != (first, last):
                part = s[..., start - first : stop - first]
                part.masked_fill_(any_hidden(x.on((start, stop)), [term]), -math.inf)
            else:
                s.masked_fill_(any_hidden(x, [term]), -math.inf)
        return covered >= s.shape[3]

    def _share(self, x: Rows, logsumexp: Tensor) -> Tensor:
        """`sum exp(score) / (sum exp(score) + exp(sink))`."""
        assert self.plan.code.sink is not None
        found = self.plan.code.sink(x)
        sink = found if isinstance(found, Tensor) else x.value(found)
        return torch.sigmoid(logsumexp - sink.to(self.dtype))

    def _of_empty(self, x: Rows, lanes: slice) -> Tensor:
        """What a row gives that sees no key, `[n, 1, Dv]` or `[n, R, Dv]`: 0, or the mean of the
        values, of which a sink leaves nothing unless it is minus infinity."""
        mean = self.call.v[lanes].mean(1, keepdim=True)
        if self.plan.drops_empty:
            return torch.zeros_like(mean)
        if self.plan.code.sink is None:
            return mean
        lowest = torch.full((1, 1, 1, 1), torch.finfo(self.dtype).min, dtype=self.dtype)
        return mean * self._share(x, lowest.to(mean.device))[:, 0]


def _columns(x: Tensor, keys: Segments) -> Tensor:
    """The keys or values of a block `[n, K, D]`: a view where they are one range."""
    pieces = [x[:, start:stop] for start, stop in keys]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _span(x: Rows) -> tuple[int, int]:
    low, high = torch.stack(x.q.aminmax()).tolist()
    return low, high


def _columns_hidden(x: Rows, term: Term, queries: Queries) -> tuple[int, int]:
    """The range of keys in which a term of the mask may hide something from the rows."""
    first, last = x.keys[0][0], x.keys[-1][1]
    if term.where_hidden is None:
        return first, last
    found = term.where_hidden(queries)
    inside = [(max(a, first), min(z, last)) for a, z in found if a < last and z > first]
    if not inside:
        return first, first
    return (inside[0][0], inside[-1][1]) if len(x.keys) == 1 else (first, last)
