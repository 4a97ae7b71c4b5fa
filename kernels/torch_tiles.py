"""Softmax attention of tiles: some rows of queries against some keys, formulas at gathered indices.

A tile is a list of rows, each with its batch, head and query, and a list of keys of one key head.
A batch of tiles of one shape is a pair of batched products. Rows may stand in several tiles: what
the tiles give of a row is joined by the logarithms of their sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import sympy
import torch
from sympy import Expr
from torch import Tensor

from rewriter import symbols as sym
from rewriter.evaluate import Value, evaluate, index_values, tensor_of
from rewriter.families import from_json
from rewriter.kernels.torch_flash import flash
from rewriter.reference_routes import key_terms
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import Formula

__all__ = ["Operands", "Plan", "Sums", "Tiles", "plan_of"]

AT_ONCE = 2**20
"""Scores, or numbers in the keys, that a batch of tiles has at most."""


@dataclass(frozen=True)
class Tiles:
    """`n` tiles of `T` rows and `m` keys."""

    unit: Tensor
    """The batch and key head of each tile, `b · Hkv + h`, `[n]`."""
    rows: Tensor
    """Flat numbers `(b · Hq + h) · L + q`, `[n, T]`; `B · Hq · L` where there is no row."""
    keys: Tensor
    """Places on the key axis, `[n, m]`."""
    filled: Tensor | None = None
    """Where there is a key, `[n, m]`; None: everywhere."""
    is_full: bool = False
    """Every row sees every key; the mask is not asked."""
    is_uniform: bool = False
    """All keys weigh the same, seen or not: rows that see none, where the model gives them the
    mean of the values."""

    def split(self, dim: int) -> Iterator[Tiles]:
        """The same in batches of at most `AT_ONCE` scores, or numbers in keys of `dim`."""
        count, width = self.rows.shape
        step = max(1, AT_ONCE // max(1, max(width, dim) * self.keys.shape[1]))
        for start in range(0, count, step):
            part = slice(start, start + step)
            filled = None if self.filled is None else self.filled[part]
            yield replace(
                self,
                unit=self.unit[part],
                rows=self.rows[part],
                keys=self.keys[part],
                filled=filled,
            )


@dataclass(frozen=True)
class Plan:
    """What is worked out once a spec."""

    scale: float | None
    """The factor of the product of q and k, if it is a number."""
    is_plain: bool
    """The score is s, and `scale` a number."""
    keys: Formula
    """The terms of the mask without q."""
    is_causal: bool
    """Its other terms say that a query sees the keys up to its position, and nothing else."""
    keys_of_heads: bool
    """Which keys are there depends on the query head."""


@lru_cache(maxsize=1024)
def plan_of(spec_json: str) -> Plan:
    """The plan of a routed spec."""
    spec = from_json(spec_json)
    assert isinstance(spec, SoftmaxSpec)
    assert spec.route is not None
    scale = float(spec.scale) if spec.scale.is_number else None
    keys = key_terms(spec.mask)
    others = [t for t in sympy.And.make_args(spec.mask) if t.has(sym.q)]
    causal = bool(others) and all(_ends_at(t, spec.route.position) for t in others)
    return Plan(scale, scale is not None and spec.is_plain_score, keys, causal, keys.has(sym.h))


def _ends_at(term: Formula, position: Expr) -> bool:
    """The term says `k <= position`."""
    if not isinstance(term, sympy.Ge | sympy.Le):
        return False
    return bool(sympy.expand(term.gts - term.lts + sym.k - position) == 0)


class Sums(NamedTuple):
    """Where the gradients of one call are added up, in flat rows; None where not wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    tensors: list[Tensor | None]


class Operands:
    """One call: q, k and v as flat rows, the tensors by name, and formulas over tiles."""

    def __init__(
        self,
        spec: SoftmaxSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> None:
        self.spec, self.plan = spec, plan_of(spec.to_json())
        self.batch, self.heads, self.q_len, _ = q.shape
        if self.plan.keys_of_heads and k.shape[1] != self.heads:
            k, v = (x.repeat_interleave(self.heads // k.shape[1], dim=1) for x in (k, v))
        self.kv_heads, self.kv_len = k.shape[1:3]
        self.q, self.k, self.v = q, k, v
        self.width = max(q.shape[3], v.shape[3])
        self.group = self.heads // self.kv_heads
        self.units, self.rows = self.batch * self.kv_heads, self.batch * self.heads * self.q_len
        self.dtype = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
        self.device = q.device
        self.tensors = list(tensors)
        self.grid = index_values(
            spec, self.batch, self.heads, self.q_len, self.kv_len, sizes, q.device
        )

    # Rows that do not follow each other in memory are copied, so only what is read is made flat.

    @cached_property
    def flat_q(self) -> Tensor:
        return self.q.flatten(0, 2)

    @cached_property
    def flat_k(self) -> Tensor:
        return self.k.flatten(0, 2)

    @cached_property
    def flat_v(self) -> Tensor:
        return self.v.flatten(0, 2)

    @property
    def named(self) -> dict[str, Tensor]:
        return dict(zip((t.name for t in self.spec.tensors), self.tensors, strict=True))

    def of_rows(self, formula: Formula, dtype: torch.dtype | None = None) -> Tensor:
        """The value of a formula in b, h and q, as `[B, Hq, L]`."""
        dtype = dtype or self.dtype
        found = tensor_of(evaluate(formula, self.grid, self.named, dtype), self.q, dtype)
        return found.expand(self.batch, self.heads, self.q_len, 1)[..., 0]

    # --- tiles --------------------------------------------------------------------------------

    def attend(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """The attention of the rows `[n, T, Dv]`, and the logarithms of their sums `[n, T]`; 0 and
        minus infinity where no key is seen."""
        q, k = self._qk(tiles)
        if self.has_flash:
            return self.flash(q, k, self._gathered(self.flat_v, tiles), self._hidden(tiles))
        z = self._scores(tiles, self._product(q, k))
        top = z.amax(-1, keepdim=True)
        p = z.sub_(top.clamp_min(torch.finfo(z.dtype).min)).exp_()
        total = p.sum(-1, keepdim=True)
        out = torch.bmm(p, self._gathered(self.flat_v, tiles))
        out /= total.clamp_min(torch.finfo(z.dtype).tiny)
        return out, (top + total.log()).squeeze(-1)

    @property
    def has_flash(self) -> bool:
        """One op of torch computes a tile: the score is the product."""
        is_cpu = self.device.type == "cpu"
        return is_cpu and self.plan.is_plain and self.q.shape[3] == self.v.shape[3]

    def flash(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, *, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`attend` for scaled queries `[n, T, D]` and keys `[n, m, D]`."""
        mask = None
        if hidden is not None:
            mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)[:, None]
        q, k, v = (x[:, None] for x in (q, k, v))
        out, lse = flash(q, k, v, scale=1.0, is_causal=is_causal, mask=mask)
        out, lse = out[:, 0], lse[:, 0]
        if hidden is not None:
            lse = lse.masked_fill(hidden.all(-1), -torch.inf)  # it gives 0
        return out, lse

    def _qk(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Queries, scaled if the scale is a number, and keys."""
        rows = tiles.rows.clamp_max(self.rows - 1).view(-1)
        q = self.flat_q.index_select(0, rows).to(self.dtype).view(*tiles.rows.shape, -1)
        if self.plan.scale is not None:
            q = q * self.plan.scale
        return q, self._gathered(self.flat_k, tiles)

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.bmm(q, k.mT)

    def key_rows(self, tiles: Tiles) -> Tensor:
        """Flat numbers `(b · Hkv + h) · M + k` of the keys, `[n · m]`."""
        return (tiles.unit[:, None] * self.kv_len + tiles.keys).view(-1)

    def _gathered(self, flat: Tensor, tiles: Tiles) -> Tensor:
        found = flat.index_select(0, self.key_rows(tiles)).to(self.dtype)
        return found.view(*tiles.keys.shape, -1)

    def _values(self, tiles: Tiles) -> dict[str, Value]:
        row = tiles.rows.clamp_max(self.rows - 1)[..., None]
        head = row // self.q_len
        found = {"b": head // self.heads, "h": head % self.heads, "q": row % self.q_len}
        return {**self.grid, **found, "k": tiles.keys[:, None]}

    def _scores(self, tiles: Tiles, product: Tensor) -> Tensor:
        """The scores `[n, T, m]`; minus infinity where a key is not seen."""
        z = product if self.plan.is_plain else self.formula(tiles, product)
        hidden = self._hidden(tiles)
        return z if hidden is None else z.masked_fill(hidden, -torch.inf)

    def _hidden(self, tiles: Tiles) -> Tensor | None:
        """Where a row does not see a key, `[n, T, m]`; None: nowhere."""
        shape = (*tiles.rows.shape, tiles.keys.shape[1])
        hidden = None if tiles.filled is None else ~tiles.filled[:, None]
        if not tiles.is_full and not self.spec.is_unmasked:
            found = evaluate(self.spec.mask, self._values(tiles), self.named, self.dtype)
            unseen = ~tensor_of(found, self.q, self.dtype).bool()
            hidden = unseen if hidden is None else hidden | unseen
        return None if hidden is None else hidden.expand(shape)

    def formula(self, tiles: Tiles, product: Tensor) -> Tensor:
        """The scores before anything is hidden."""
        values, named = self._values(tiles), self.named
        s = product
        if self.plan.scale is None:
            s = s * evaluate(self.spec.scale, values, named, self.dtype)
        found = evaluate(self.spec.score, {**values, "s": s}, named, self.dtype)
        return tensor_of(found, product, self.dtype).to(self.dtype).expand_as(product).clone()

    # --- gradients ----------------------------------------------------------------------------

    def add_gradients(
        self, tiles: Tiles, sums: Sums, lse: Tensor, delta: Tensor, grad: Tensor
    ) -> None:
        """Adds the gradients that come through the tiles.

        Args:
            lse: logarithm of the whole sum of each row, `[rows + 1]`; infinity for the row that
                stands where there is none.
            delta: the product of the gradient and the output of each row, `[rows + 1]`.
            grad: gradient of the output before the factor of the heads, `[rows + 1, Dv]`.
        """
        q, k = self._qk(tiles)
        product, shape = self._product(q, k), tiles.rows.shape
        rows = tiles.rows.view(-1)
        if tiles.is_uniform:
            here = (rows < self.rows).to(self.dtype).view(*shape, 1)
            p = (here / self.kv_len).expand_as(product)
        else:
            p = (self._scores(tiles, product.clone()) - lse[rows].view(*shape, 1)).exp_()
        g = grad.index_select(0, rows).view(*shape, -1)
        if sums.v is not None:
            dv = torch.bmm(p.mT, g)
            sums.v.index_add_(0, self.key_rows(tiles), dv.view(-1, dv.shape[2]))
        dz = torch.bmm(g, self._gathered(self.flat_v, tiles).mT)
        dz = dz.sub_(delta[rows].view(*shape, 1)).mul_(p)
        ds = dz if self.plan.is_plain else self._through_formula(tiles, product, dz, sums)
        if ds is None:
            return
        if sums.q is not None:
            dq = torch.bmm(ds, k) * (1.0 if self.plan.scale is None else self.plan.scale)
            sums.q.index_add_(0, rows, dq.view(-1, dq.shape[2]))
        if sums.k is not None:
            dk = torch.bmm(ds.mT, q)
            sums.k.index_add_(0, self.key_rows(tiles), dk.view(-1, dk.shape[2]))

    def _through_formula(
        self, tiles: Tiles, product: Tensor, dz: Tensor, sums: Sums
    ) -> Tensor | None:
        """Gradient of the product; gradients of tensors are added to their sums."""
        product = product.requires_grad_()
        return self.differentiated(lambda: self.formula(tiles, product), dz, sums, product)

    def differentiated(
        self, value: object, grad: Tensor, sums: Sums, leaf: Tensor | None = None
    ) -> Tensor | None:
        """Differentiates what a function of the tensors gives: adds to the sums of the tensors, and
        returns the gradient of `leaf`; None if the value does not depend on it."""
        assert callable(value)
        wanted = [n for n, total in enumerate(sums.tensors) if total is not None]
        kept = self.tensors
        self.tensors = [x.detach() for x in kept]
        for n in wanted:
            self.tensors[n].requires_grad_()
        leaves = [self.tensors[n] for n in wanted] + ([] if leaf is None else [leaf])
        try:
            with torch.enable_grad():
                found = value()
        finally:
            self.tensors = kept
        if not leaves or not found.requires_grad:
            return None
        got = torch.autograd.grad(found, leaves, grad, allow_unused=True)
        for n, g in zip(wanted, got, strict=False):
            total = sums.tensors[n]
            if g is not None and total is not None:
                total += g
        return None if leaf is None else got[-1]
