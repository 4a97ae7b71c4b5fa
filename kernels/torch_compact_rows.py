"""The rows of heads that are on, packed densely; formulas evaluated at packed rows.

A lane is one batch and one key head: query heads that share a key head share its lane. Packed rows
are sorted by lane, then by position, so that a causal range of keys stays short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewriter.kernels.block_bounds import Queries, Segments
from rewriter.kernels.torch_block import Axis, Block
from rewriter.kernels.torch_plan import Plan, plan_of
from rewriter.spec import SoftmaxSpec

__all__ = ["Packed", "Rows"]


class Packed:
    """One call: its tensors, and the rows that are on."""

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
        self.device = q.device
        self.q = q.reshape(-1, q.shape[-1])
        self.k, self.v = (_lanes(x.to(self.dtype)) for x in (k, v))
        """Keys and values of each lane, `[B · Hkv, M, D]`."""
        self.value_dtype, self.value_dim = v.dtype, v.shape[-1]
        self.factor = self._factor()
        """The factor of the heads, `[B, H, L]`."""
        self.pack(self.factor != 0)

    def _factor(self) -> Tensor:
        full = (self.batch, self.heads, self.q_len)
        everything = {n: (0, size) for n, size in zip("bhq", full, strict=True)}
        whole = Block(everything, ((0, 1),), self.sizes, self.tensors, self.dtype, self.device)
        heads = self.plan.code.heads
        found = 1.0 if heads is None else heads(whole)
        factor = found if isinstance(found, Tensor) else whole.value(found)
        return factor.to(self.dtype).expand(*full, 1).reshape(full).contiguous()

    def pack(self, on: Tensor) -> None:
        """Packs the rows that are on: `row` is their place in `[B, H, L]`, `counts` how many of
        them each lane has."""
        lanes = on.view(self.batch, self.kv_heads, self.group, self.q_len).mT
        self.counts: list[int] = lanes.sum((2, 3)).flatten().tolist()
        b, head, self.position, within = lanes.nonzero().unbind(1)
        self.lane = b * self.kv_heads + head
        self.head = head * self.group + within
        self.row = (b * self.heads + self.head) * self.q_len + self.position

    def queries(self, first: int, last: int, q: tuple[int, int]) -> Queries:
        """Rows of the lanes from `first` to `last`, as `block_bounds` wants them."""
        b = first // self.kv_heads, last // self.kv_heads
        h = (0, self.heads - 1)
        if b[0] == b[1]:
            h = (
                first % self.kv_heads * self.group,
                (last % self.kv_heads + 1) * self.group - 1,
            )
        return Queries(b, h, q, self.sizes)

    def empty_output(self, more: int = 0) -> Tensor:
        """Zeros for all rows, `[B · H · L + more, Dv]`."""
        rows = self.batch * self.heads * self.q_len + more
        return torch.zeros(rows, self.value_dim, dtype=self.value_dtype, device=self.device)

    def unpacked(self, out: Tensor) -> Tensor:
        """Rows of `empty_output` as the output `[B, H, L, Dv]`."""
        rows = self.batch * self.heads * self.q_len
        return out[:rows].view(self.batch, self.heads, self.q_len, self.value_dim)


class Rows(Block):
    """Chunks of packed rows that are computed together: b `[n, 1, 1, 1]`, h and q `[n, 1, R, 1]`.

    What the code of a formula gives broadcasts to `[n, 1, R, K]`.
    """

    def __init__(self, call: Packed, b: Tensor, h: Tensor, q: Tensor, keys: Segments) -> None:
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


def _lanes(x: Tensor) -> Tensor:
    """`[B, Hkv, M, D]` as `[B · Hkv, M, D]`; a view where batch and heads are one stride."""
    merges = x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return (x if merges and 1 in x.stride()[2:] else x.contiguous()).flatten(0, 1)
