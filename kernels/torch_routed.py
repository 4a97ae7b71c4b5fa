"""Softmax attention to chosen blocks of keys: time and memory grow with the keys that are seen.

Selector (`torch_routing`), lists of blocks (`block_lists`), executor (`torch_tiles`). Many queries
are executed block by block: the queries that chose a block are gathered, so that its keys are read
once, and what the blocks give of a query is joined by the logarithms of their sums, as the authors
of MoBA do (arXiv 2502.13189). Few queries, and regions (arXiv 2303.08810), gather their keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from rewriter.beside import Beside
from rewriter.kernels.torch_routed_work import Listed, Work, tokens_of, unfit
from rewriter.kernels.torch_softmax import blocked_supports
from rewriter.kernels.torch_tiles import Operands, Sums, Tiles
from rewriter.spec import SoftmaxSpec, Spec

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = ["backward", "forward", "supports"]


def supports(spec: Spec, shapes: Shapes) -> str | None:
    """None if the spec is computed at these shapes, else the reason in one clause."""
    assert isinstance(spec, SoftmaxSpec)
    assert spec.route is not None
    reason = blocked_supports(spec, shapes)
    if reason is not None:
        return reason
    if spec.dropout:
        return "dropout is not drawn over chosen blocks"
    if spec.edit is not None:
        return "weights are not edited over chosen blocks"
    if spec.route.by == "region" and (
        shapes.q_len != shapes.kv_len or shapes.kv_len != tokens_of(spec.route)
    ):
        return unfit(spec.route, shapes.q_len, shapes.kv_len)
    return None


def forward(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    beside: Beside | None = None,
) -> Tensor:
    """The routed attention `[B, Hq, L, Dv]` in the dtype of v.

    Args:
        beside: keeps the sums of the blocks of the keys from one step of generation to the next.
    """
    with torch.no_grad():
        call = _Call(spec, q, k, v, tensors, sizes, beside)
        out, _ = call.output()
        ops = call.ops
        factor = ops.of_rows(call.spec.heads).reshape(-1, 1)
        out = out[:-1] if call.spec.heads == 1 else out[:-1] * factor
        return out.view(*q.shape[:3], v.shape[3]).to(v.dtype)


def backward(
    spec: Spec,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    wanted: Sequence[bool],
    *,
    seed: int | None = None,
) -> list[Tensor | None]:
    """Gradients of `forward` for q, k, v and then each of the tensors; None where not wanted.

    The choice of blocks has none. Blocks are computed again, those of the forward.
    """
    with torch.no_grad():
        call = _Call(spec, q, k, v, tensors, sizes)
        return call.gradients(grad, (q, k, v, *tensors), wanted)


class _Call:
    """One call: the output, the gradients."""

    def __init__(
        self,
        spec: Spec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
        beside: Beside | None = None,
    ) -> None:
        assert isinstance(spec, SoftmaxSpec)
        self.spec = spec
        self.ops = Operands(spec, q, k, v, tensors, sizes)
        self.work = Work(self.ops, beside)

    # --- the output ---------------------------------------------------------------------------

    def output(self) -> tuple[Tensor, Tensor]:
        """The output before the factor of the heads `[rows + 1, Dv]`, and the logarithm of the
        whole sum of each row, sink included, `[rows + 1]`; the last row stands for none."""
        ops = self.ops
        out = ops.v.new_zeros(ops.rows + 1, ops.v.shape[3], dtype=ops.dtype)
        lse = out.new_full((ops.rows + 1,), -torch.inf)
        for item in self.work.items():
            if isinstance(item, Listed):
                self._join(item, out, lse)
                continue
            for tiles in item.split(ops.width):
                o, total = ops.attend(tiles)
                out[tiles.rows], lse[tiles.rows] = o, total
        lse[-1] = torch.inf
        if self.spec.sink is not None:
            whole = torch.logaddexp(lse[:-1], self._sink)
            share = (lse[:-1] - whole).exp().masked_fill(whole == -torch.inf, 0.0)
            out[:-1] *= share[:, None]
            lse[:-1] = whole
        if self.spec.masked != "zero":
            self._fill_empty(out, lse)
        return out, lse

    @cached_property
    def _sink(self) -> Tensor:
        assert self.spec.sink is not None
        return self.ops.of_rows(self.spec.sink).reshape(-1).to(self.ops.dtype)

    def _fill_empty(self, out: Tensor, lse: Tensor) -> None:
        (empty,) = (lse == -torch.inf).nonzero(as_tuple=True)
        if not len(empty) or not self.ops.kv_len:
            return
        if self.spec.masked == "nan":
            out[empty] = torch.nan
            return
        ops = self.ops
        mean = ops.flat_v.view(ops.units, ops.kv_len, -1).mean(1, dtype=ops.dtype)
        out[empty] = mean[empty // (ops.group * ops.q_len)]

    def _parts_of(self, item: Listed) -> Iterator[tuple[Tensor, Tensor]]:
        if item.has_own:
            yield from self.work.own(item)
        for tiles in item.tiles:
            yield from (self.ops.attend(part) for part in tiles.split(self.ops.width))

    def _join(self, item: Listed, out: Tensor, lse: Tensor) -> None:
        """The rows of a list: the parts that their blocks give, weighted by their sums."""
        ops = self.ops
        count = sum(t.rows.numel() for t in item.tiles)
        count += item.list.row_count if item.has_own else 0
        parts = out.new_empty(count, out.shape[1])
        totals = out.new_empty(count)
        done = 0
        for o, total in self._parts_of(item):
            here = slice(done, done + total.numel())
            parts[here], totals[here] = o.flatten(0, -2), total.flatten()
            done += total.numel()
        rows, found = item.list.rows, totals[item.places]
        least = torch.finfo(found.dtype).min
        top = found.new_full((item.list.row_count,), -torch.inf)
        top.scatter_reduce_(0, rows, found, "amax")
        weights = (found - top.clamp_min(least)[rows]).exp_()
        total = torch.zeros_like(top).index_add_(0, rows, weights)
        weights /= total.clamp_min(torch.finfo(found.dtype).tiny)[rows]
        joined = embedding_bag(
            item.places,
            parts,
            item.list.offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
        shape = (ops.units, ops.group, ops.q_len)
        place = (item.units, slice(None), item.queries)
        out[:-1].view(*shape, -1)[place] = joined.view(*_sized(item, ops), -1)
        lse[:-1].view(shape)[place] = (top + total.log()).view(_sized(item, ops))

    # --- gradients ----------------------------------------------------------------------------

    def gradients(
        self, grad: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The wanted gradients, given that of the output after the factor of the heads."""
        ops = self.ops
        sums = self._sums(inputs, wanted)
        out, lse = self.output()
        grad = grad.reshape(ops.rows, grad.shape[3]).to(ops.dtype)
        if self.spec.heads != 1:
            through = (grad * out[:-1]).sum(-1).view(ops.batch, ops.heads, ops.q_len)
            ops.differentiated(lambda: ops.of_rows(self.spec.heads), through, sums)
            grad = grad * ops.of_rows(self.spec.heads).reshape(-1, 1)
        grad = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
        empty = lse == -torch.inf
        if self.spec.masked == "zero":
            grad[empty] = 0.0
        delta = (grad * out).sum(-1)
        sink = self.spec.sink
        if sink is not None:
            through = -(self._sink - lse[:-1]).exp() * delta[:-1]
            through = through.masked_fill(empty[:-1], 0.0)
            shape = (ops.batch, ops.heads, ops.q_len)
            ops.differentiated(lambda: ops.of_rows(sink), through.view(shape), sums)
        lse = lse.masked_fill(empty, torch.inf)
        for item in self.work.items(for_gradients=True):
            for tiles in item.tiles if isinstance(item, Listed) else (item,):
                for part in tiles.split(ops.width):
                    ops.add_gradients(part, sums, lse, delta, grad)
        if self.spec.masked in ("mean", "add") and ops.kv_len and bool(empty.any()):
            self._through_means(empty, sums, lse, delta, grad)
        return self._given(sums, inputs)

    def _sums(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Sums:
        ops = self.ops
        lengths = (ops.rows + 1, ops.units * ops.kv_len, ops.units * ops.kv_len)
        q, k, v = (
            torch.zeros(rows, x.shape[3], dtype=ops.dtype, device=ops.device) if want else None
            for rows, x, want in zip(lengths, inputs, wanted, strict=False)
        )
        tensors = [
            torch.zeros_like(x) if want else None
            for x, want in zip(inputs[3:], wanted[3:], strict=True)
        ]
        return Sums(q, k, v, tensors)

    def _through_means(
        self, empty: Tensor, sums: Sums, lse: Tensor, delta: Tensor, grad: Tensor
    ) -> None:
        """Rows that see no key are the mean of the values; added masks let a gradient through."""
        ops = self.ops
        (rows,) = empty.nonzero(as_tuple=True)
        unit = rows // (ops.group * ops.q_len)
        if self.spec.masked == "mean":
            if sums.v is not None:
                each = grad.new_zeros(ops.units, grad.shape[1]).index_add_(0, unit, grad[rows])
                sums.v.view(ops.units, ops.kv_len, -1).add_(each[:, None] / ops.kv_len)
            return
        keys = torch.arange(ops.kv_len, device=ops.device).expand(len(rows), ops.kv_len)
        for part in Tiles(unit, rows[:, None], keys, is_uniform=True).split(ops.width):
            ops.add_gradients(part, sums, lse, delta, grad)

    def _given(self, sums: Sums, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums in the shapes and dtypes of the inputs."""
        ops = self.ops
        q = None if sums.q is None else sums.q[:-1]
        shared = inputs[1].shape[1]
        repeats = ops.kv_heads // shared
        found: list[Tensor | None] = [None if q is None else q.view(inputs[0].shape)]
        for x, total in zip(inputs[1:3], (sums.k, sums.v), strict=True):
            if total is not None:
                total = total.view(ops.batch, shared, repeats, ops.kv_len, x.shape[3]).sum(2)
            found.append(total)
        found += sums.tensors
        return [None if g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True)]


def _sized(item: Listed, ops: Operands) -> tuple[int, int, int]:
    units, queries = item.units, item.queries
    return units.stop - units.start, ops.group, queries.stop - queries.start
