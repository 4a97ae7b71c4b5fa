"""Softmax attention that leaves out the rows of heads that are off (`torch.compact`).

Where the factor of the heads is often exactly 0 (mixture of heads, arXiv 2410.11842; ablated
heads), the factor is evaluated first. The rows (head, query) that are on are packed densely, one
lane for each batch and key head, sorted by position so that a causal range of keys stays short;
query heads that share a key head share its lane. Chunks of the lanes then go through the blocked
softmax, lanes that stand side by side in one product, and the results are put where they belong.
A tile of 64 rows that is skipped only if all are off would save nothing.

Formulas are evaluated at the packed rows, by the code of `torch_code`: `Rows` is a `Block` whose
b, h and q are lists instead of ranges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewriter import symbols as sym
from rewriter.kernels.block_bounds import Queries, Segments
from rewriter.kernels.torch_block import Axis, Block, Value
from rewriter.kernels.torch_plan import Plan, Term, any_hidden, plan_of
from rewriter.spec import SoftmaxSpec

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = ["compact_forward", "compact_supports"]

ROWS = 128
"""Rows of a chunk: more waste a triangle of a causal mask, fewer make small products."""
SCORES = 2**20
"""Scores of the chunks that are computed together: several lanes keep all cores busy, and what is
written has to be found in a cache again."""
SLACK = 1.125
"""Chunks go together if the longest range of keys is at most this much longer than the shortest."""

MOST_ACTIVE = 0.8
"""The largest share of heads that is on for which packing pays: gathering rows, and products that
are smaller than those of the dense form, cost some 10 % of the dense time. With 75 % of the heads
on, 2048 tokens take 0.82 to 0.87 of it; with 50 %, 0.52 to 0.67 (one core, float32)."""
FEWEST_SCORES = 2**21
"""Scores of the dense form below which the Python of packing takes longer than what it saves. With
8 heads of which 4 are on, 512 tokens take 0.9 of the dense time, and 256 tokens 1.4."""


# --- what it takes --------------------------------------------------------------------------------


def compact_supports(spec: SoftmaxSpec, shapes: Shapes) -> str | None:
    """None if leaving out heads that are off computes the spec, and pays; else the reason."""
    if spec.active is None:
        return "how many heads are off is not known"
    if shapes.device != "cpu":
        return f"it is measured on CPUs only, not on {shapes.device}"
    if not shapes.dtype.is_floating_point or shapes.dtype.itemsize < 2:
        return f"{str(shapes.dtype).removeprefix('torch.')} is not a floating dtype of attention"
    if shapes.heads % shapes.kv_heads:
        return f"{shapes.heads} query heads are not a multiple of {shapes.kv_heads} key heads"
    if spec.edit is not None:
        return "the weights are edited by groups of keys"
    if spec.dropout:
        return "its dropout would not be the one of the backward"
    if spec.masked == "nan" and spec.sink is None and not _always_sees(spec):
        return "rows without a key would be NaN in heads that are off, too"
    plan = plan_of(spec.to_json())
    if _is_causal(plan):
        return "one fused call for all heads is about as fast where the mask is causal alone"
    if shapes.grad and _is_bare(plan):
        return "the gradients of all heads are computed, and faster by what autograd records"
    if spec.active > MOST_ACTIVE * shapes.heads:
        return f"{spec.active} of {shapes.heads} heads may be on, too many for packing to pay"
    if shapes.batch * shapes.heads * shapes.q_len * shapes.kv_len < FEWEST_SCORES:
        return "there are too few scores for packing to pay"
    return None


def _is_bare(plan: Plan) -> bool:
    """The weights are the softmax of the scaled product over all keys."""
    return (
        plan.code.is_linear and plan.code.bias is None and not plan.terms and plan.code.sink is None
    )


def _is_causal(plan: Plan) -> bool:
    """The weights are the softmax of the scaled product, and the mask is a causal one alone."""
    has_more = plan.code.bias is not None or plan.spec.sink is not None or len(plan.terms) != 1
    return plan.code.is_linear and not has_more and plan.terms[0].causal is not None


def _always_sees(spec: SoftmaxSpec) -> bool:
    """The mask is `k <= q` or nothing, so that each query sees a key."""
    return spec.mask in (sympy.true, sym.k <= sym.q)


# --- packing --------------------------------------------------------------------------------------


class Rows(Block):
    """Chunks of packed rows that are computed together: b `[n, 1, 1, 1]`, h and q `[n, 1, R, 1]`.

    What the code of a formula gives broadcasts to `[n, 1, R, K]`.
    """

    def __init__(self, call: _Call, b: Tensor, h: Tensor, q: Tensor, keys: Segments) -> None:
        spans = {"b": (0, b.shape[0]), "h": (0, 1), "q": (0, q.shape[2])}
        super().__init__(spans, keys, call.sizes, call.tensors, call.dtype, q.device)
        self._call, self._b, self._h, self._q = call, b, h, q

    b = property(lambda self: self._b)
    h = property(lambda self: self._h)
    q = property(lambda self: self._q)

    def on(self, keys: tuple[int, int]) -> Rows:
        """The same rows and other keys."""
        return Rows(self._call, self._b, self._h, self._q, (keys,))

    def diagonals(self, function: Callable[[Block, Tensor], Tensor]) -> Tensor:
        """`function` of `d = k - q`, computed once a diagonal and gathered."""
        distance = self.k - self._q
        first, last = torch.stack(distance.aminmax()).tolist()
        line = function(self, torch.arange(first, last + 1, device=self.device))
        if line.dim() == 0 or line.shape[-1] == 1:  # it does not vary with d after all
            return line
        if line.dim() == 1:
            return line[distance - first]
        line = line.expand(*distance.shape[:-1], line.shape[-1])
        return line.gather(-1, distance - first)

    def _read(self, tensor: int, axes: Sequence[Axis]) -> Tensor:
        """The elements at these indices: rows of the tensor where its last index is the key."""
        source = self.tensors[tensor]
        index = [None if _is_key(a) else self._index(a) for a in axes]
        others = [i for i in index[:-1] if i is not None]
        if len(self.keys) == 1 and index and index[-1] is None and len(others) == len(index) - 1:
            start, stop = (x + axes[-1][1] for x in self.keys[0])  # type: ignore[index]
            free_of_keys = all(i.dim() == 0 or i.shape[-1] == 1 for i in others)
            if start >= 0 and stop <= source.shape[-1] and free_of_keys:
                rows = tuple(i.squeeze(-1) if i.dim() else i for i in others)
                return source[..., start:stop][rows] if rows else source[start:stop]
        return source[tuple(self._index(a) for a in axes)]


def _is_key(axis: Axis) -> bool:
    return isinstance(axis, tuple) and axis[0] == "k"


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


class _Call:
    """One call: its tensors, and the rows that are on, packed."""

    def __init__(
        self,
        spec: SoftmaxSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> None:
        self.plan: Plan = plan_of(spec.to_json())
        self.spec, self.tensors = spec, tensors
        self.batch, self.heads, self.q_len, _ = q.shape
        self.kv_heads, self.kv_len = k.shape[1], k.shape[2]
        self.group = self.heads // self.kv_heads
        self.dtype = torch.float64 if torch.float64 in (q.dtype, v.dtype) else torch.float32
        self.sizes = {"B": self.batch, "H": self.heads, "L": self.q_len, "M": self.kv_len}
        self.sizes |= dict(zip(spec.sizes, sizes, strict=True))
        self.q = q.reshape(-1, q.shape[-1])
        self.k, self.v = (_lanes(x.to(self.dtype)) for x in (k, v))
        self.value_dtype, self.value_dim = v.dtype, v.shape[-1]
        self.memory = torch.empty(0, dtype=self.dtype)
        self._pack(q.device)

    def _pack(self, device: torch.device) -> None:
        """Finds the rows that are on: `row` is their place in `[B, H, L]`, lane by lane."""
        full = (self.batch, self.heads, self.q_len)
        everything = {n: (0, size) for n, size in zip("bhq", full, strict=True)}
        whole = Block(everything, ((0, 1),), self.sizes, self.tensors, self.dtype, device)
        heads = self.plan.code.heads
        found = 1.0 if heads is None else heads(whole)
        factor = found if isinstance(found, Tensor) else whole.value(found)
        factor = factor.to(self.dtype).expand(*full, 1).reshape(full)
        lanes = (factor != 0).view(self.batch, self.kv_heads, self.group, self.q_len).mT
        self.counts: list[int] = lanes.sum((2, 3)).flatten().tolist()
        b, lane, self.position, within = lanes.nonzero().unbind(1)
        self.head = lane * self.group + within
        self.row = (b * self.heads + self.head) * self.q_len + self.position
        self.factor = factor.reshape(-1)

    # --- cutting -------------------------------------------------------------------------------

    def _chunks(self) -> list[list[Chunk]]:
        """The chunks of each lane, all of about the same number of rows."""
        size = max(16, min(ROWS, SCORES // max(1, self.kv_len)))
        size = self.q_len * self.group if self.is_one_call else size
        cuts, lanes, first = [], [], 0
        for lane, count in enumerate(self.counts):
            parts = -(-count // size)
            edges = [first + count * i // parts for i in range(parts + 1)] if parts else []
            cuts += [(lane, a, z) for a, z in pairwise(edges)]
            lanes.append(parts)
            first += count
        ends = self.position[[x for _, a, z in cuts for x in (a, z - 1)]].tolist() if cuts else []
        found = iter(
            Chunk(lane, a, z, self._visible(lane, (low, high)))
            for (lane, a, z), low, high in zip(cuts, ends[::2], ends[1::2], strict=True)
        )
        return [[next(found) for _ in range(parts)] for parts in lanes]

    def _visible(self, lane: int, q: tuple[int, int]) -> Segments:
        if self.plan.visible is None:
            return ((0, self.kv_len),)
        return self.plan.visible(self._queries(lane, lane, q))

    def _queries(self, first: int, last: int, q: tuple[int, int]) -> Queries:
        """Rows of the lanes from `first` to `last`, as `block_bounds` wants them."""
        b = first // self.kv_heads, last // self.kv_heads
        h = (0, self.heads - 1)
        if b[0] == b[1]:
            h = (
                first % self.kv_heads * self.group,
                (last % self.kv_heads + 1) * self.group - 1,
            )
        return Queries(b, h, q, self.sizes)

    def groups(self) -> Iterator[list[Chunk]]:
        """Chunks of lanes side by side that see about the same keys, to be computed together."""
        lanes = self._chunks()
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

    # --- computing -----------------------------------------------------------------------------

    def run(self) -> Tensor:
        """The output `[B, Hq, L, Dv]`."""
        rows = self.batch * self.heads * self.q_len
        out = torch.zeros(rows + 1, self.value_dim, dtype=self.value_dtype, device=self.q.device)
        for group in self.groups():  # the last row takes what pads the chunks
            self._compute(group, out)
        return out[:rows].view(self.batch, self.heads, self.q_len, self.value_dim)

    def _compute(self, group: list[Chunk], out: Tensor) -> None:
        index, is_row = self._index(group)
        row = self.row[index]  # [n, R]
        keys = _hull([c.keys for c in group])
        lane = torch.arange(group[0].lane, group[-1].lane + 1, device=row.device)
        b = (lane // self.kv_heads).view(-1, 1, 1, 1)
        h, q = (x[index].view(len(group), 1, -1, 1) for x in (self.head, self.position))
        h = h[:, :, :1] if self.group == 1 else h
        x = Rows(self, b, h, q, keys)
        o = self._output(x, group, self.q[row].to(self.dtype))
        o *= self.factor[row][..., None]
        if is_row is not None:
            row = torch.where(is_row, row, out.shape[0] - 1)
        out.index_copy_(0, row.flatten(), o.flatten(0, 1).to(out.dtype))

    def _index(self, group: list[Chunk]) -> tuple[Tensor, Tensor | None]:
        """Which packed row stands where in `[n, R]`, and where there is one; None: everywhere."""
        device = self.row.device
        starts = torch.tensor([c.start for c in group], device=device)[:, None]
        counts = [c.stop - c.start for c in group]
        places = torch.arange(max(counts), device=device)
        if min(counts) == max(counts):
            return starts + places, None
        last = torch.tensor(counts, device=device)[:, None] - 1
        return starts + torch.minimum(places, last), places <= last

    def _output(self, x: Rows, group: list[Chunk], q: Tensor) -> Tensor:
        """The output of packed rows `[n, R, Dv]`, before the factor of the heads."""
        lanes = slice(group[0].lane, group[-1].lane + 1)
        if not x.keys:
            return self._of_empty(x, lanes).expand(*q.shape[:2], self.value_dim).clone()
        k, v = (_columns(t[lanes], x.keys) for t in (self.k, self.v))
        if self.is_one_call:
            scale = self.plan.code.scale
            return scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
        s = self._buffer(q.shape[0], q.shape[1], k.shape[1])
        torch.baddbmm(s, q, k.mT, beta=0, alpha=self.plan.code.scale, out=s)
        s = self._score(x, s[:, None])
        may_be_empty = self._hide(x, s, self._queries(lanes.start, lanes.stop - 1, _span(x)))
        top = s.amax(-1, keepdim=True) if self.plan.code.sink is not None else None
        p = torch.softmax(s, -1, out=s)
        o = torch.bmm(p[:, 0], v)
        if top is not None:
            o *= self._share(x, top - p.amax(-1, keepdim=True).log())[:, 0]
        if may_be_empty and bool(o[..., 0].isnan().any()):
            empty = any_hidden(x, self.plan.terms).expand(s.shape).all(-1)[:, 0, :, None]
            o = torch.where(empty, self._of_empty(x, lanes), o)
        return o

    @cached_property
    def is_one_call(self) -> bool:
        """The rows of a lane are one call of `scaled_dot_product_attention`, without a mask."""
        return _is_bare(self.plan) and self.value_dim == self.q.shape[-1]

    def _buffer(self, *shape: int) -> Tensor:
        """Memory for scores that every group reuses."""
        count = math.prod(shape)
        if self.memory.numel() < count:
            self.memory = torch.empty(count, dtype=self.dtype, device=self.q.device)
        return self.memory[:count].view(shape)

    def _score(self, x: Rows, s: Tensor) -> Tensor:
        """The score as a tensor that may be overwritten, `[n, 1, R, K]`."""
        code = self.plan.code
        if code.score is None:
            return s
        found: Value = (code.score_in_place or code.score)(x, s)
        score = found if isinstance(found, Tensor) else x.value(found)
        if score.shape == s.shape and score.is_contiguous() and score.dtype == s.dtype:
            return score if self.spec.score.has(sym.s) else score.clone()
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
        mean = self.v[lanes].mean(1, keepdim=True)
        if self.plan.drops_empty:
            return torch.zeros_like(mean)
        if self.plan.code.sink is None:
            return mean
        lowest = torch.full((1, 1, 1, 1), torch.finfo(self.dtype).min, dtype=self.dtype)
        return mean * self._share(x, lowest.to(mean.device))[:, 0]


def compact_forward(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """The attention that the spec describes, `[B, Hq, L, Dv]` in the dtype of v.

    Takes what `compact_supports` takes, however few heads are off. Rows of heads that are off are
    0, whatever they would have been; the work for them is left out, that for keys and values is
    not.

    Args:
        q: queries `[B, Hq, L, D]`; k: `[B, Hkv, M, D]`; v: `[B, Hkv, M, Dv]`; any strides.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
    """
    with torch.no_grad():
        return _Call(spec, q, k, v, tensors, sizes).run()


# --- pieces ---------------------------------------------------------------------------------------


def _lanes(x: Tensor) -> Tensor:
    """`[B, Hkv, M, D]` as `[B · Hkv, M, D]`; a view where batch and heads are one stride."""
    merges = x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return (x if merges and 1 in x.stride()[2:] else x.contiguous()).flatten(0, 1)


def _columns(x: Tensor, keys: Segments) -> Tensor:
    """The keys or values of a block `[n, K, D]`: a view where they are one range."""
    pieces = [x[:, start:stop] for start, stop in keys]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _fits(group: list[Chunk], chunk: Chunk) -> bool:
    """The chunk is that of the next lane and sees about the same keys."""
    if chunk.lane != group[-1].lane + 1 or bool(chunk.keys) != bool(group[0].keys):
        return False
    widths = [c.width for c in (*group, chunk)]
    union = sum(z - a for a, z in _hull([*(c.keys for c in group), chunk.keys]))
    rows = max(c.stop - c.start for c in (*group, chunk))
    return union <= SLACK * min(widths) + 32 and (len(group) + 1) * rows * union <= SCORES


def _hull(ranges: Sequence[Segments]) -> Segments:
    """The ranges of keys that hold all of them."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted({x for segments in ranges for x in segments}):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return tuple(found)


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
