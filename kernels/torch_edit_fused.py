"""Edits of the softmax of a scaled product, by fused calls: no mask, or a causal one alone.

The weights are never there. What an edit needs is the attention `o_g` to the keys of each group
alone, with its logsumexp, from which the masses follow:

    o' = Σ_g a_g m_g o_g,     m_g = exp(logsumexp_g - logsumexp)

`torch_edit_few` does that where some group has the factor 1 whatever the row, `torch_edit_spans`
where the groups are a few ranges of keys. Every other edit is left to `torch_blocked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.torch_block import Block
from rewriter.kernels.torch_edit import groups_of
from rewriter.kernels.torch_flash import dense, flash
from rewriter.kernels.torch_plan import Plan, Spans, plan_of, queries_of
from rewriter.spec import SoftmaxSpec

__all__ = ["FusedEdit", "fused_edit_of"]

FEWEST_SCORES = 2**21
"""Scores of the call below which the softmax in blocks is as fast."""


def fused_edit_of(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> FusedEdit | None:
    """The call, if fused calls can compute it and it is long enough; else None."""
    plan = plan_of(spec.to_json())
    code = plan.code
    if code.edit is None or not code.is_linear or code.bias is not None or spec.dropout:
        return None
    if len(plan.terms) > 1 or q.device.type != "cpu":
        return None
    if q.shape[1] % k.shape[1] or q.shape[3] != v.shape[3]:
        return None
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] < FEWEST_SCORES:
        return None
    call = FusedEdit(plan, q, k, v, tensors, sizes)
    return None if call.is_causal is None or call.groups is None else call


class FusedEdit:
    """One call of an edited attention, and what its parts are made of."""

    def __init__(
        self,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> None:
        assert plan.code.edit is not None
        self.plan, self.edit, self.tensors = plan, plan.code.edit, tensors
        self.dtype = torch.float64 if torch.float64 in (q.dtype, v.dtype) else torch.float32
        self.value_dtype = v.dtype
        self.q, self.k, self.v = (dense(x.to(self.dtype)) for x in (q, k, v))
        (self.batch, self.heads, self.q_len, _), self.kv_len = q.shape, k.shape[2]
        self.shared = self.heads // k.shape[1]
        self.sizes = {"B": self.batch, "H": self.heads, "L": self.q_len, "M": self.kv_len}
        self.sizes |= dict(zip(plan.spec.sizes, sizes, strict=True))
        self.everything = {"b": (0, self.batch), "h": (0, self.heads), "q": (0, self.q_len)}

    @cached_property
    def is_causal(self) -> bool | None:
        """Whether the mask is `k <= q`, and not nothing; None if it is another one."""
        if not self.plan.terms:
            return False
        term = self.plan.terms[0]
        if term.causal is None:
            return None
        return True if term.causal(queries_of(self.everything, self.sizes)) == 0 else None

    @cached_property
    def groups(self) -> Tensor | None:
        """The group of each key, `[B, M]`, as many as there are for none; None if heads differ."""
        spans = {**self.everything, "q": (0, 1)}
        groups = groups_of(self.block(spans, (0, self.kv_len)), self.edit)
        if groups.shape[1] > 1:
            return None
        return groups[:, 0, 0].expand(self.batch, self.kv_len)

    def block(self, spans: Spans, keys: tuple[int, int] = (0, 1)) -> Block:
        """A block of rows, for what formulas say of them."""
        return Block(spans, (keys,), self.sizes, self.tensors, self.dtype, self.q.device)

    def fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output and logsumexp without the edit; query heads that share a key head take turns."""
        more: dict[str, Any] = {"scale": self.plan.code.scale, "is_causal": is_causal, "mask": mask}
        if self.shared == 1:
            return flash(q, k, v, **more)
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3])
        for n in range(self.shared):
            heads = slice(n, None, self.shared)
            out[:, heads], lse[:, heads] = flash(q[:, heads], k, v, **more)
        return out, lse

    def with_sink(self, lse: Tensor, x: Block) -> Tensor:
        """The logsumexp `[B, H, L]` of the rows of a block with the learned sink, if there is
        one."""
        if self.plan.code.sink is None:
            return lse
        found = self.plan.code.sink(x)
        sink = found if isinstance(found, Tensor) else x.value(found)
        return torch.logaddexp(lse, sink.to(lse.dtype).expand(*lse.shape, 1)[..., 0])

    def factor(self, x: Block, group: int, masses: Sequence[Tensor]) -> Tensor:
        """The factor of a group, broadcastable to `[B, H, rows, 1]`; 0 for no group."""
        found = self.edit.factors[group](x, masses) if group < len(self.edit.factors) else 0.0
        return (found if isinstance(found, Tensor) else x.value(found)).to(x.dtype)

    def finished(self, out: Tensor) -> Tensor:
        """The output times the factor of the heads, in the dtype of v."""
        if self.plan.code.heads is not None:
            out *= self.plan.code.heads(self.block(self.everything))
        return out.to(self.value_dtype)
