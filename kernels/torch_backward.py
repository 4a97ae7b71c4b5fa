"""Gradients of an attention, block by block: each block's weights are computed again.

The products are written out; autograd only differentiates the formulas: the score, where it is
more than `s + bias` or reads a tensor that wants a gradient, the sink, the factors of an edit by
what they read, and the factor of the heads. Selections (`Where`) have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewriter.kernels.torch_block import Part, narrowed
from rewriter.kernels.torch_blocked import Call, Weights
from rewriter.kernels.torch_edit import EditedBlock
from rewriter.spec import SoftmaxSpec

__all__ = ["backward"]


def backward(
    spec: SoftmaxSpec,
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
    """Gradients of `blocked` for q, k, v and then each of the tensors; None where not wanted.

    Args:
        grad: gradient of the output `[B, Hq, L, Dv]`.
        wanted: which gradients are wanted, in the order of the result.
        seed: the seed with which the dropout of the forward was drawn.
    """
    with torch.no_grad():
        call = Call(spec, q, k, v, tensors, sizes, seed=seed, wanted=wanted[3:])
        sums = [
            torch.zeros(x.shape, dtype=call.dtype, device=x.device) if want else None
            for x, want in zip((q, k, v, *tensors), wanted, strict=True)
        ]
        if grad.numel() and call.kv_len:
            for number, spans in enumerate(call.blocks()):
                found = call.weights(spans, with_graph=_needs_graph(call))
                if found is not None:
                    _Step(call, number, found, sums).run(grad)
        inputs = (q, k, v, *tensors)
        return [None if s is None else s.to(x.dtype) for s, x in zip(sums, inputs, strict=True)]


def _needs_graph(call: Call) -> bool:
    code = call.plan.code
    return code.score is not None and (not code.is_linear or any(call.wanted))


@dataclass
class _Step:
    """The backward of one block."""

    call: Call
    number: int
    found: Weights
    sums: list[Tensor | None]
    """Gradients of q, k, v and the tensors, added up over the blocks."""
    outputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Values of formulas that autograd has to differentiate, and their gradients."""

    def run(self, grad: Tensor) -> None:
        call, found = self.call, self.found
        keep = None
        if call.spec.dropout:
            keep = call.kept(self.number, found.p.shape)
            grad = grad / (1.0 - call.spec.dropout)
        p = found.p if found.share is None else self._shared(found.p)
        edit = call.edit(found, p, None)
        edited = p if edit is None else self._edited(edit, p)
        dropped = edited if keep is None else edited * keep
        grad = self._through_heads(call.rows(grad, found.x), dropped)  # [B · Hkv, G · rows, Dv]
        self._add_columns(2, dropped, grad)
        if self.sums[0] is None and self.sums[1] is None and not any(call.wanted):
            return
        dp = call.buffer("dp", tuple(p.shape))
        torch.bmm(grad, call.columns(call.v, found.x).mT, out=dp)
        if keep is not None:
            dp *= keep
        if edit is not None:
            self._through_edit(edit, p, dp)
        self._through_sink(p, dp)
        dz = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        if call.plan.terms and found.is_filled and call.spec.masked != "add":
            shape = found.x.shape
            dz.view(shape).masked_fill_(call.hidden(found.x), 0.0)
        ds = self._through_formulas(dz)
        if ds is None:
            return
        if self.sums[0] is not None:
            dq = torch.bmm(ds, call.columns(call.k, found.x)).mul_(call.plan.code.scale)
            (b, b1), (h, h1), (i, i1) = (found.x.spans[n] for n in "bhq")
            self.sums[0][b:b1, h:h1, i:i1] = dq.view(*found.x.shape[:3], -1)
        self._add_columns(1, ds, found.q, call.plan.code.scale)

    def _shared(self, p: Tensor) -> Tensor:
        """The weights with what the sink takes taken off."""
        assert self.found.share is not None
        return p.mul_(self.found.share.reshape(p.shape[0], -1, 1))

    def _edited(self, edit: EditedBlock, p: Tensor) -> Tensor:
        call = self.call
        edited = call.buffer("edited", tuple(p.shape)).copy_(p)
        call.part(edit, edited).mul_(call.spread(edit, edit.factors()))
        return edited

    def _through_edit(self, edit: EditedBlock, p: Tensor, dp: Tensor) -> None:
        """Turns dp from the gradient of the edited weights, t, into that of the weights before:
        `u_j = a_g t_j + b_g`. Their softmax backward then gives `p_j (u_j - Δ)`."""
        call = self.call
        p, dp = call.part(edit, p), call.part(edit, dp)
        with torch.enable_grad():
            factors = edit.factors()
        b = None
        if edit.code.slopes or any(a.requires_grad for a in factors):
            weighted = torch.mul(p, dp, out=call.buffer("weighted", tuple(p.shape)))
            t = edit.sums(weighted)
            b = edit.through_masses(t)
            for a, total in zip(factors, torch.split(t, 1, -1), strict=True):
                if a.requires_grad:
                    self.outputs.append((a, total.sum_to_size(_four(a))))
        dp.mul_(call.spread(edit, factors))
        if b is not None:
            dp.add_(call.spread(edit, b))

    def _through_heads(self, grad: Tensor, dropped: Tensor) -> Tensor:
        call, x = self.call, self.found.x
        if call.plan.code.heads is None:
            return grad
        with torch.enable_grad():
            factor = call.plan.code.heads(x)
        shape = (*x.shape[:3], -1)
        if isinstance(factor, Tensor) and factor.requires_grad:
            o = torch.bmm(dropped, call.columns(call.v, x))
            self.outputs.append((factor, (grad * o).view(shape).sum_to_size(_four(factor))))
            factor = factor.detach()
        return (grad.view(shape) * factor).reshape(grad.shape)

    def _through_sink(self, p: Tensor, dp: Tensor) -> None:
        """A sink takes `1 - share` of a row and has no value: only `-sum p dp` reaches it."""
        call, found = self.call, self.found
        if found.share is None or not any(call.wanted):
            return
        with torch.enable_grad():
            sink = call.sink(found.x)
        if sink.requires_grad:
            delta = (p * dp).sum(-1).view(found.share.shape)
            grad = (found.share - 1.0) * delta
            self.outputs.append((sink, grad.sum_to_size(_four(sink))))

    def _through_formulas(self, dz: Tensor) -> Tensor | None:
        """Gradient of the scaled product; gradients of tensors are added to their sums."""
        found = self.found
        parts = found.x.parts
        leaves = [part.leaf for part in parts]
        ds: Tensor | None = dz
        if found.score is not None:
            s, z = found.score
            if z.requires_grad:
                self.outputs.append((z, dz.view(z.shape)))
            leaves.append(s)
        if not self.outputs or not leaves:
            return ds if found.score is None else None
        outputs = [o for o, _ in self.outputs]
        grads = [g.reshape(o.shape) for o, g in self.outputs]
        got = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        for part, g in zip(parts, got, strict=False):
            if g is not None:
                self._add_part(part, g)
        if found.score is not None:
            ds = None if got[-1] is None else got[-1].reshape(dz.shape)
        return ds

    def _add_part(self, part: Part, grad: Tensor) -> None:
        total = self.sums[3 + part.tensor]
        assert total is not None
        lengths = (
            [
                next((n for dim, _, n in piece if dim == part.joined), grad.shape[part.joined])
                for piece in part.pieces
            ]
            if len(part.pieces) > 1
            else []
        )
        grads = torch.split(grad, lengths, part.joined) if lengths else (grad,)
        for piece, g in zip(part.pieces, grads, strict=True):
            narrowed(total, piece).add_(g)

    def _add_columns(self, which: int, rows: Tensor, values: Tensor, alpha: float = 1.0) -> None:
        """Adds `alpha rows.mT @ values` to the gradient of the block's keys (1) or values (2)."""
        total = self.sums[which]
        if total is None:
            return
        call, x = self.call, self.found.x
        done = 0
        for start, stop in x.keys:
            part = rows[..., done : done + stop - start]
            done += stop - start
            place = call.piece(total, x, (start, stop), first=0)
            place.baddbmm_(part.mT, values, alpha=alpha)


def _four(x: Tensor) -> tuple[int, ...]:
    """The shape of x with ones in front, for `[B, H, rows, ·]`."""
    return (1,) * (4 - x.dim()) + tuple(x.shape)
