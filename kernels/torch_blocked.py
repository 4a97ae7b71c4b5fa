"""Attention in blocks of queries, in plain torch: any spec, O(N) memory, nothing to compile.

A block computes the scores of a few query rows against the keys that these rows can see, in place
in one buffer. Half dtypes are computed in float32. Query heads that share a key head are rows of
one product, so that keys and values are never repeated.

Rows that see no key: the scores of a block are filled with minus infinity, so that such a row
turns up as NaN. Only then is the mask looked at closely (`Call.weights`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import ShapeError
from rewriter.kernels.block_bounds import Segments
from rewriter.kernels.torch_block import Block, Value
from rewriter.kernels.torch_edit import EditedBlock
from rewriter.kernels.torch_edit_few import edited_at_few_keys
from rewriter.kernels.torch_edit_fused import fused_edit_of
from rewriter.kernels.torch_edit_spans import edited_in_spans
from rewriter.kernels.torch_plan import Spans, Term, any_hidden, plan_of, queries_of
from rewriter.spec import SoftmaxSpec

__all__ = ["SCORES", "Call", "Weights", "blocked"]

SCORES = {"cpu": (2**17, 2**19, 2**19), "cuda": (2**22, 2**24, 2**26)}
"""Scores that a block aims at, where fewer rows see fewer keys and where they do not, and the most.

Measured on a CPU (`benchmarks/cpu.py`): small blocks waste less of a causal triangle and
stay in the cache; each costs some 60 us of Python.
"""
_FEWEST_ROWS, _MOST_ROWS = 64, 256


def blocked(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    *,
    seed: int | None = None,
) -> Tensor:
    """The attention that the spec describes, `[B, Hq, L, Dv]` in the dtype of v.

    Args:
        q: queries `[B, Hq, L, D]`; k: `[B, Hkv, M, D]`; v: `[B, Hkv, M, Dv]`; any strides.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
        seed: of the dropout; drawn from torch's default generator if it is not given.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return blocked(spec, q, k, v, tensors, sizes, seed=seed)
    fused = None if spec.edit is None else fused_edit_of(spec, q, k, v, tensors, sizes)
    if fused is not None:
        found = edited_at_few_keys(fused)
        found = edited_in_spans(fused) if found is None else found
        if found is not None:
            return found
    return Call(spec, q, k, v, tensors, sizes, seed=seed).forward()


@dataclass
class Weights:
    """The weights of one block, and what belongs to them."""

    x: Block
    p: Tensor
    """Softmax over the keys alone, `[B · Hkv, G · rows, K]`."""
    share: Tensor | None
    """With a sink, what the keys together get of it, `[B, H, rows, 1]`."""
    q: Tensor
    """Queries `[B · Hkv, G · rows, D]`, not scaled."""
    is_filled: bool
    """Rows without a key were looked at over all keys, by scores that are finite or NaN."""
    score: tuple[Tensor, Tensor] | None = None
    """The scaled product and the score of it with an autograd graph between them, if asked for."""


class Call:
    """One call of an attention: its tensors, and how it is cut into blocks."""

    def __init__(
        self,
        spec: SoftmaxSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
        *,
        seed: int | None = None,
        wanted: Sequence[bool] = (),
    ) -> None:
        self.plan = plan_of(spec.to_json())
        self.spec, self.tensors, self.wanted = spec, tensors, wanted
        self.batch, self.heads, self.q_len, _ = q.shape
        self.kv_heads, self.kv_len = k.shape[1], k.shape[2]
        if self.heads % self.kv_heads:
            raise ShapeError(
                f"{self.heads} query heads are not a multiple of {self.kv_heads} key heads"
            )
        self.group = self.heads // self.kv_heads
        doubled = torch.float64 in (q.dtype, v.dtype)
        self.dtype = torch.float64 if doubled else torch.float32
        self.device = q.device
        self.sizes = {"B": self.batch, "H": self.heads, "L": self.q_len, "M": self.kv_len}
        if spec.sizes:
            self.sizes |= dict(zip(spec.sizes, sizes, strict=True))
        self.q, self.raw = q, (k, v)
        self.seed = seed
        self.workspaces: dict[str, Tensor] = {}
        self.all_keys: Segments = ((0, self.kv_len),) if self.kv_len else ()
        self.everything = {"b": (0, self.batch), "h": (0, self.heads), "q": (0, self.q_len)}
        self.seen = self._visible(self.everything) if q.numel() else ()
        self._use_keys(self.seen[0][0], self.seen[-1][1]) if self.seen else self._use_keys(0, 0)

    # --- cutting -------------------------------------------------------------------------------

    def _use_keys(self, start: int, stop: int) -> None:
        """Casts the keys and values that blocks will need, once; a view where that is enough."""
        self.start, self.stop = start, stop
        k, v = self.raw
        if (start, stop) != (0, self.kv_len):
            k, v = k[:, :, start:stop], v[:, :, start:stop]
        self.k = _mergeable(k.to(self.dtype), self.batch)
        self.v = _mergeable(v.to(self.dtype), self.batch)

    def visible(self, spans: Spans) -> Segments:
        """The ranges of keys that some query of the block may see."""
        return self.seen if spans is self.everything else self._visible(spans)

    def _visible(self, spans: Spans) -> Segments:
        if self.plan.visible is None:
            return self.all_keys
        return self.plan.visible(queries_of(spans, self.sizes))

    def blocks(self) -> Iterator[Spans]:
        """The blocks; the same ones in the backward as in the forward."""
        batch, heads, rows = self._block_shape()
        if (batch, heads, rows) == (self.batch, self.heads, self.q_len):
            yield self.everything
            return
        for b in range(0, self.batch, batch):
            for h in range(0, self.heads, heads):
                for q in range(0, self.q_len, rows):
                    yield {
                        "b": (b, min(b + batch, self.batch)),
                        "h": (h, min(h + heads, self.heads)),
                        "q": (q, min(q + rows, self.q_len)),
                    }

    def _block_shape(self) -> tuple[int, int, int]:
        """Batches, heads (whole groups) and rows of a block."""
        batch, heads, rows = self.batch, self.heads, self.q_len
        bounded, free, most = SCORES.get(self.device.type, SCORES["cpu"])
        aim = free if self.plan.visible is None else bounded
        if batch * heads * rows * (self.stop - self.start) <= 2 * aim:
            return batch, heads, rows
        ends = ((0, 1), (rows - 1, rows))
        seen = (self.visible({**self.everything, "q": x}) for x in ends)
        width = max(1, *(sum(stop - start for start, stop in x) for x in seen))
        fitting = aim // (batch * heads * width) // 32 * 32
        rows = min(rows, max(_FEWEST_ROWS, min(_MOST_ROWS, fitting)))
        if batch * heads * rows * width > most:
            batch = max(1, most // (heads * rows * width))
            if heads * rows * width > most:
                heads = self.group * max(1, most // (self.group * rows * width))
        return batch, heads, rows

    # --- one block -----------------------------------------------------------------------------

    def weights(self, spans: Spans, *, with_graph: bool = False) -> Weights | None:
        """The weights of a block; None if its rows see no key and give 0."""
        keys = self.visible(spans)
        if not keys and (self.plan.drops_empty or not self.kv_len):
            return None
        found, may_be_empty = self._softmax(spans, keys or self.all_keys, with_graph)
        if not may_be_empty or not bool(found.p[..., 0].isnan().any()):
            return found
        if not self.plan.drops_empty:
            if found.x.keys != self.all_keys:
                found, _ = self._softmax(spans, self.all_keys, with_graph)
            found.is_filled = True
            return found
        empty = self.hidden(found.x).expand(found.x.shape).all(-1, keepdim=True)
        found.p.view(found.x.shape).masked_fill_(empty, 0.0)
        if found.share is not None:
            found.share.masked_fill_(empty, 0.0)
        return found

    def _softmax(self, spans: Spans, keys: Segments, with_graph: bool) -> tuple[Weights, bool]:
        """The weights over some keys, and whether there may be rows of NaN: they see no key."""
        if keys[0][0] < self.start or keys[-1][1] > self.stop:
            self._use_keys(0, self.kv_len)
        x = Block(
            spans, keys, self.sizes, self.tensors, self.dtype, self.device, wanted=self.wanted
        )
        queries, k = self.rows(self.q, x), self.columns(self.k, x)
        product = self.buffer("scores", (k.shape[0], queries.shape[1], k.shape[1]))
        product.baddbmm_(queries, k.mT, beta=0, alpha=self.plan.code.scale)
        s, graph = self._score(x, product.view(x.shape), with_graph)
        fills = self.spec.masked in ("mean", "add") and keys == self.all_keys
        may_be_empty = self._hide(x, s, torch.finfo(self.dtype).min if fills else -math.inf)
        top = s.amax(-1, keepdim=True) if self.plan.code.sink is not None else None
        p = torch.softmax(s, -1, out=s) if self.device.type == "cpu" else torch.softmax(s, -1)
        share = None if top is None else self._share(x, p, top)
        found = Weights(x, p.view(product.shape), share, queries, fills, graph)
        return found, may_be_empty and not fills

    def _score(
        self, x: Block, s: Tensor, with_graph: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        code = self.plan.code
        if code.score is None:
            return s, None
        if not with_graph:
            found = (code.score_in_place or code.score)(x, s)
            return self._owned(x, found, s), None
        with torch.enable_grad():
            s = s.detach().requires_grad_()
            z = self._tensor(x, code.score(x, s)).expand(s.shape)
        return z.detach().clone(memory_format=torch.contiguous_format), (s, z)

    def _owned(self, x: Block, score: Value, s: Tensor) -> Tensor:
        """The score as a tensor that may be overwritten."""
        score = self._tensor(x, score)
        if score.shape == s.shape and score.is_contiguous() and score.dtype == s.dtype:
            return score if self.spec.score.has(sym.s) else score.clone()
        return score.to(s.dtype).expand(s.shape).clone(memory_format=torch.contiguous_format)

    def _tensor(self, x: Block, value: Value) -> Tensor:
        return value if isinstance(value, Tensor) else x.value(value).to(self.dtype)

    def _hide(self, x: Block, s: Tensor, fill: float) -> bool:
        """Fills the scores of keys that are not seen; False if each row sees a key for certain."""
        columns: dict[tuple[int, int], list[Term]] = {}
        for term in self.plan.terms:
            columns.setdefault(self._columns_hidden(x, term), []).append(term)
        for (start, stop), terms in columns.items():
            if start == stop:
                continue
            if len(x.keys) > 1 or (start, stop) == x.keys[0]:
                _fill(s, any_hidden(x, terms), fill)
                continue
            first = x.keys[0][0]
            part = Block(
                x.spans, ((start, stop),), self.sizes, self.tensors, self.dtype, self.device
            )
            _fill(s[..., start - first : stop - first], any_hidden(part, terms), fill)
        return sum(stop - start for start, stop in columns) >= x.shape[3]

    def _columns_hidden(self, x: Block, term: Term) -> tuple[int, int]:
        """The range of keys in which a term of the mask hides something from the block."""
        first, last = x.keys[0][0], x.keys[-1][1]
        if term.where_hidden is None:
            return first, last
        found = term.where_hidden(queries_of(x.spans, self.sizes))
        inside = [(max(a, first), min(c, last)) for a, c in found if a < last and c > first]
        if not inside:
            return first, first
        return (inside[0][0], inside[-1][1]) if len(x.keys) == 1 else (first, last)

    def hidden(self, x: Block) -> Tensor:
        """Where the mask hides a key, broadcastable to the scores of the block."""
        plain = Block(x.spans, x.keys, self.sizes, self.tensors, self.dtype, self.device)
        return any_hidden(plain, self.plan.terms)

    def _share(self, x: Block, p: Tensor, top: Tensor) -> Tensor:
        """`sum exp(score) / (sum exp(score) + exp(sink))`, from the largest score and weight."""
        sink = self.sink(x)
        logsumexp = top - p.amax(-1, keepdim=True).log()
        return torch.sigmoid(logsumexp - sink).expand(*x.shape[:3], 1).clone()

    def sink(self, x: Block) -> Tensor:
        """The sink, broadcastable to `[B, H, rows, 1]`."""
        assert self.plan.code.sink is not None
        found = self._tensor(x, self.plan.code.sink(x)).to(self.dtype)
        return found if found.dim() else found.view(1)

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory that every block of the call reuses."""
        count = math.prod(shape)
        have = self.workspaces.get(name)
        if have is None or have.numel() < count:
            have = torch.empty(count, dtype=self.dtype, device=self.device)
            self.workspaces[name] = have
        return have[:count].view(shape)

    def rows(self, source: Tensor, x: Block) -> Tensor:
        """Rows of a `[B, Hq, L, ·]` tensor for the block, `[B · Hkv, G · rows, ·]`."""
        if x.spans is not self.everything:
            (b, b1), (h, h1), (q, q1) = (x.spans[n] for n in "bhq")
            source = source[b:b1, h:h1, q:q1]
        count = x.shape[0] * x.shape[1] // self.group
        return source.to(self.dtype).reshape(count, self.group * x.shape[2], source.shape[-1])

    def columns(self, source: Tensor, x: Block) -> Tensor:
        """Keys or values of the block, `[B · Hkv, K, ·]`: a view where the keys are one range."""
        pieces = [self.piece(source, x, span, first=self.start) for span in x.keys]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def piece(self, source: Tensor, x: Block, span: tuple[int, int], *, first: int) -> Tensor:
        """One range of keys of a `[B, Hkv, ·, ·]` tensor that begins with key `first`; a view."""
        if x.spans is not self.everything or span[1] - span[0] != source.shape[2]:
            (b, b1), (h, h1) = x.spans["b"], x.spans["h"]
            h, h1 = h // self.group, h1 // self.group
            source = source[b:b1, h:h1, span[0] - first : span[1] - first]
        return source[0] if source.shape[0] == 1 else source.flatten(0, 1)

    # --- all blocks ----------------------------------------------------------------------------

    @cached_property
    def drawn_seed(self) -> int:
        """The seed of the dropout, from torch's default generator unless it was given."""
        return int(torch.randint(2**62, ()).item()) if self.seed is None else self.seed

    def kept(self, number: int, shape: torch.Size) -> Tensor:
        """1 where dropout keeps a weight of that block, else 0; the same on every call."""
        generator = torch.Generator(self.device).manual_seed(self.drawn_seed + number)
        keep = self.buffer("keep", tuple(shape))
        return keep.bernoulli_(1.0 - self.spec.dropout, generator=generator)

    def forward(self) -> Tensor:
        """The output `[B, Hq, L, Dv]`, in the dtype of v."""
        v = self.raw[1]
        shape = (self.batch, self.heads, self.q_len, v.shape[-1])
        out = torch.zeros(shape, dtype=v.dtype, device=self.device) if not self.seen else None
        for number, spans in enumerate(self.blocks() if math.prod(shape) else ()):
            found = self.weights(spans)
            product = None if found is None else self.output(number, found)
            if spans is self.everything and product is not None:
                return product.to(v.dtype)
            if out is None:
                out = torch.empty(shape, dtype=v.dtype, device=self.device)
            (b, b1), (h, h1), (q, q1) = (spans[n] for n in "bhq")
            out[b:b1, h:h1, q:q1] = 0.0 if product is None else product
        assert out is not None
        return out

    def edit(self, found: Weights, p: Tensor, share: Tensor | None) -> EditedBlock | None:
        """The edit of the weights p `[B · Hkv, G · rows, K]` of a block, if the spec has one."""
        code = self.plan.code.edit
        return None if code is None else EditedBlock(code, found.x, p.view(found.x.shape), share)

    def part(self, edit: EditedBlock, p: Tensor) -> Tensor:
        """The keys that the edit concerns, of weights or their gradients, `[B, H, rows, ·]`."""
        return p.view(edit.x.shape)[..., edit.keys]

    def spread(self, edit: EditedBlock, values: Sequence[Tensor]) -> Tensor:
        """The value of each such key's group, in memory that the next call reuses."""
        return edit.spread(values, self.buffer("spread", (*edit.x.shape[:3], edit.width)))

    def output(self, number: int, found: Weights) -> Tensor:
        """The output of a block, `[B, H, rows, Dv]`. Overwrites the weights."""
        p = found.p
        edit = self.edit(found, p, found.share)
        if edit is not None:
            self.part(edit, p).mul_(self.spread(edit, edit.factors()))
        if self.spec.dropout:
            p = p.mul_(self.kept(number, p.shape))
        o = torch.bmm(p, self.columns(self.v, found.x)).view(*found.x.shape[:3], -1)
        if found.share is not None:
            o *= found.share
        if self.spec.dropout:
            o /= 1.0 - self.spec.dropout
        if self.plan.code.heads is not None:
            o *= self.plan.code.heads(found.x)
        return o


def _fill(s: Tensor, hidden: Tensor, fill: float) -> None:
    """Fills scores that are hidden; an addition, which is several times as fast, if it is small.

    Two terms may hide the same key: minus infinity may be added twice, a finite number may not.
    """
    if 4 * hidden.numel() > s.numel() or math.isfinite(fill):
        s.masked_fill_(hidden, fill)
    else:
        s.add_(torch.zeros(hidden.shape, dtype=s.dtype, device=s.device).masked_fill_(hidden, fill))


def _mergeable(x: Tensor, batch: int) -> Tensor:
    """x with batch and heads in one stride, and rows or columns contiguous; else a copy."""
    fits = batch == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if fits and 1 in (x.stride(-1), x.stride(-2)) else x.contiguous()
