"""One call of linear attention: its tensors, and how keys and queries are cut into steps.

All tensors have five dims, `[B, Hkv, G, rows, columns]` with G query heads to a key head, any of
the first three 1 where nothing depends on it: keys and values are never repeated for a group, and
the state is one for a group unless a decay, a weight or the mask tells its heads apart.

A key that does not take part has no number: distances are counted among those that do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import sympy
import torch
from sympy import Expr
from sympy.logic.boolalg import BooleanTrue
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import ShapeError
from rewriter.evaluate import Value, evaluate, index_values, tensor_of
from rewriter.linear import LinearSpec

__all__ = ["CHUNK", "Block", "Call", "Step", "Vectors", "offset_of"]

CHUNK = 128
"""Keys and queries of one step, at most."""
_APART = 1024
"""Keys that come without queries, and queries without new keys: no product of the two is made."""
_FEWEST = 16
_SCORES = {"cpu": 2**22, "cuda": 2**26}
"""Scores of one step that it aims at, those of the near keys included."""

Vectors = dict[str, Tensor]
"""The formulas that depend on a query or on a key alone, `[B, Hkv, G, rows, columns]`, by the name
of their field; those that multiply by 1 are left out."""


def offset_of(position: Expr) -> Expr | None:
    """`position - q`, where that is one number for all queries, heads and sequences."""
    rest = cast(Expr, sympy.expand(position - sym.q))
    return None if rest.has(sym.q, sym.b, sym.h, sym.k, sym.s) else rest


@dataclass(frozen=True)
class Step:
    """Queries `q0` to `q1 - 1`, as the keys `k0` to `k1 - 1` come: query q0 + r stands at key
    k0 + r. With no new key, all of them stand at key k0 - 1; with no query, keys only come."""

    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True)
class Block:
    """The keys that a step reads: those that leave the window in it first, then those within."""

    at: slice | Tensor
    """Where they are on the key axis; the same for every row, or `[B, Hkv, G, 1, n]`."""
    number: Tensor
    """`[B, Hkv, G, 1, n]`, counted among the keys that take part."""
    seen: Tensor | None
    """Which of them take part; None: all."""
    far: int
    """How many of them, from the first one, some query may see beyond its window."""


class Call:
    """What the steps of one call have in common."""

    def __init__(
        self,
        spec: LinearSpec,
        q: Tensor,
        k: Tensor,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> None:
        self.spec = spec
        self.batch, self.heads, self.q_len, _ = q.shape
        self.kv_heads, self.kv_len = k.shape[1:3]
        if self.heads % self.kv_heads:
            raise ShapeError(
                f"{self.heads} query heads are not a multiple of {self.kv_heads} key heads"
            )
        self.group = self.heads // self.kv_heads
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.device = q.device
        self.named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
        self.indices = index_values(
            spec, self.batch, self.heads, self.q_len, self.kv_len, sizes, q.device
        )
        self.window = 0 if spec.near is None else spec.near.window
        self.offset = self._offset()
        self.seen = self._seen()
        self.numbers = None if self.seen is None else self.seen.long().cumsum(-1) - 1

    def _offset(self) -> int | None:
        if self.spec.position is None:
            return None
        rest = offset_of(self.spec.position)
        assert rest is not None, "`supports` refuses such a position"
        return int(cast(int, evaluate(rest, self.indices, self.named, self.dtype)))

    def _seen(self) -> Tensor | None:
        if isinstance(self.spec.seen, BooleanTrue):
            return None
        found = self.folded(evaluate(self.spec.seen, self.indices, self.named, self.dtype))
        return found.bool().expand(*found.shape[:-1], self.kv_len)

    def folded(self, x: Value) -> Tensor:
        """What broadcasts to `[B, Hq, L, M]`, in five dims."""
        found = tensor_of(x, torch.empty((), device=self.device), self.dtype)
        found = found.reshape((1,) * (4 - found.dim()) + found.shape)
        heads = (1, 1) if found.shape[1] == 1 else (self.kv_heads, self.group)
        return torch.unflatten(found, 1, heads)

    def vectors(self, named: Mapping[str, Tensor]) -> Vectors:
        """The vectors of the spec, differentiable in the tensors."""
        spec, near = self.spec, self.spec.near
        formulas = {
            "query_weight": spec.query_weight,
            "key_weight": spec.key_weight,
            "heads": spec.heads,
        }
        if near is not None:
            formulas |= {"scale": near.scale, "factor": near.factor}
        formulas = {name: f for name, f in formulas.items() if f != 1}
        if spec.decay != 0:
            formulas["decay"] = spec.decay
        return {
            name: self.folded(evaluate(f, self.indices, named, self.dtype)).to(self.dtype)
            for name, f in formulas.items()
        }

    # --- steps ---------------------------------------------------------------------------------

    @property
    def before(self) -> int:
        """Keys that come before the first query."""
        return self.kv_len if self.offset is None else min(max(self.offset, 0), self.kv_len)

    @property
    def takes_all(self) -> bool:
        """The steps end with a state of all keys."""
        return self.offset is None or self.offset + self.q_len >= self.kv_len

    def steps(self, done: int = 0) -> Iterator[Step]:
        """The steps after the first `done` keys, of which there are no more than `before`. A query
        that stands before the first key has none: its output is 0."""
        offset, q_len, kv_len = self.offset, self.q_len, self.kv_len
        if not kv_len or (offset is not None and offset + q_len <= 0):
            return
        for at in range(done, self.before, _APART):
            yield Step(0, 0, at, min(at + _APART, self.before))
        chunk = self._chunk()
        late = 0
        if offset is not None:
            end, late = min(offset + q_len, kv_len), max(kv_len - offset, 0)
            for at in range(max(offset, 0), end, chunk):
                stop = min(at + chunk, end)
                yield Step(at - offset, stop - offset, at, stop)
        size = _APART if self.spec.near is None else chunk
        for at in range(late, q_len, size):
            yield Step(at, min(at + size, q_len), kv_len, kv_len)

    def _chunk(self) -> int:
        wide = min(self.window, self.kv_len) + CHUNK
        most = _SCORES.get(self.device.type, _SCORES["cpu"])
        return min(CHUNK, max(_FEWEST, most // max(1, self.batch * self.heads * wide)))

    def number(self, at: int) -> Tensor | int:
        """The number of the last key up to position `at`, -1 if there is none."""
        if self.numbers is None or at < 0:
            return at
        return self.numbers[..., at : at + 1]

    def last(self, step: Step) -> Tensor:
        """The number of the last key that each query of the step sees, `[B, Hkv, G, rows, 1]`."""
        if step.k0 == step.k1:
            found = self.number(step.k0 - 1)
            return self.folded(found) if isinstance(found, int) else found
        if self.numbers is None:
            return torch.arange(step.k0, step.k1, device=self.device).view(1, 1, 1, -1, 1)
        return self.numbers[..., step.k0 : step.k1].mT

    def block(self, step: Step) -> Block:
        """The keys of a step; without queries, only those that leave the window."""
        new, back = step.k1 - step.k0, min(self.window, step.k0)
        far = max(0, new - self.window + back)
        count = back + new if step.q1 > step.q0 else far
        if self.numbers is None or not self.window:
            return self._slice(step.k0 - back, step.k0 - back + count, far)
        start = self.number(step.k0 - 1) - back + 1
        number = start + torch.arange(count, device=self.device)
        number = self.folded(number) if number.dim() < 5 else number
        number = number.expand(*self.numbers.shape[:-1], count)
        seen = (number >= 0) & (number <= self.number(step.k1 - 1))
        at = torch.searchsorted(self.numbers.contiguous(), number.contiguous())
        return Block(at.clamp_max(self.kv_len - 1), number, seen, far)

    def _slice(self, start: int, stop: int, far: int) -> Block:
        if self.numbers is not None and self.seen is not None:
            part = slice(start, stop)
            return Block(part, self.numbers[..., part], self.seen[..., part], far)
        number = torch.arange(start, stop, device=self.device).view(1, 1, 1, 1, -1)
        return Block(slice(start, stop), number, None, far)

    # --- parts of tensors ----------------------------------------------------------------------

    def queries(self, x: Tensor, step: Step) -> Tensor:
        """Rows of a tensor `[B, Hq, L, ·]`, `[B, Hkv, G, rows, ·]`."""
        return torch.unflatten(x[:, :, step.q0 : step.q1], 1, (self.kv_heads, self.group))

    def keys(self, x: Tensor, block: Block) -> Tensor:
        """Rows of a tensor `[B, Hkv, M, ·]`, `[B, Hkv, 1 or G, n, ·]`."""
        if isinstance(block.at, slice):
            return x[:, :, block.at].unsqueeze(2)
        at = self.rows(block.at)
        found = x.gather(2, at.expand(*at.shape[:3], x.shape[3]))
        return torch.unflatten(found, 2, (block.at.shape[2], block.at.shape[4]))

    def rows(self, at: Tensor) -> Tensor:
        """Places `[B, Hkv, G, 1, n]` as an index `[B, Hkv, G · n, 1]` into a tensor of keys."""
        at = at.expand(self.batch, self.kv_heads, -1, -1, -1)
        return at.flatten(2).unsqueeze(-1)

    def vector(self, name: str, x: Tensor, step: Step, block: Block) -> Tensor:
        """The part of a vector that a step reads."""
        if name == "key_weight" and x.shape[-1] > 1:
            if isinstance(block.at, slice):
                return x[..., block.at]
            shape = tuple(max(n, m) for n, m in zip(x.shape[:3], block.at.shape[:3], strict=True))
            at = block.at.expand(*shape, 1, -1)
            return x.expand(*shape, 1, -1).gather(-1, at)
        if name in ("query_weight", "heads") and x.shape[-2] > 1:
            return x[..., step.q0 : step.q1, :]
        return x
