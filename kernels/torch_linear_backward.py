"""Gradients of linear attention: the steps once more, from the last to the first.

The states are computed again from the keys; each step is then differentiated by autograd, with the
gradient of the state that it leaves, and hands on that of the state that it found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.kernels.torch_linear_call import Block, Call, Step, Vectors
from rewriter.kernels.torch_linear_step import Parts, advance
from rewriter.linear import LinearSpec
from rewriter.spec import Spec

__all__ = ["backward"]


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
    """The gradients of q, k, v and each of the tensors; None where not wanted.

    Args:
        grad: of the output, `[B, Hq, L, Dv]`.
        wanted: one for q, k, v and each tensor.
        seed: not used: there is no dropout.
    """
    assert isinstance(spec, LinearSpec)
    call = Call(spec, q, k, tensors, sizes)
    names = [t.name for t in spec.tensors]
    leaves = {
        name: x.detach().to(call.dtype).requires_grad_(want) if x.is_floating_point() else x
        for name, x, want in zip(names, tensors, wanted[3:], strict=True)
    }
    with torch.enable_grad():
        vectors = call.vectors(leaves)
    run = _Run(call, q, k, v, vectors, leaves)
    run.differentiate(grad)
    run.through_vectors()
    found: list[Tensor | None] = [
        x.to(of.dtype) if want else None
        for x, of, want in zip((run.dq, run.dk, run.dv), (q, k, v), wanted, strict=False)
    ]
    for name, x, want in zip(names, tensors, wanted[3:], strict=True):
        found.append(run.tensors[name].to(x.dtype) if want else None)
    return found


class _Run:
    """One backward: what it reads, and the gradients as they add up, in the dtype of the call."""

    def __init__(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        vectors: Vectors,
        leaves: Mapping[str, Tensor],
    ) -> None:
        self.call, self.q, self.k, self.v = call, q, k, v
        self.graph = vectors
        self.vectors = {n: x.detach().requires_grad_(x.requires_grad) for n, x in vectors.items()}
        self.leaves = leaves
        self.dq, self.dk, self.dv = (torch.zeros_like(x, dtype=call.dtype) for x in (q, k, v))
        self.d_vectors = {n: torch.zeros_like(x) for n, x in self.vectors.items()}
        self.tensors = {n: torch.zeros_like(x) for n, x in leaves.items() if x.is_floating_point()}
        self.inside = _inside(call.spec)

    def differentiate(self, grad: Tensor) -> None:
        """Adds up the gradients of all steps."""
        steps: list[tuple[Step, Tensor | None]] = []
        state: Tensor | None = None
        with torch.no_grad():
            for step in self.call.steps():
                steps.append((step, state))
                if step.k1 > step.k0:
                    only_keys = replace(step, q0=0, q1=0)
                    block = self.call.block(only_keys)
                    _, state = advance(
                        self.call, only_keys, block, self._parts(only_keys, block, state)
                    )
        d_state: Tensor | None = None
        for step, before in reversed(steps):
            d_state = self._one(step, before, grad, d_state)

    def _parts(self, step: Step, block: Block, state: Tensor | None) -> Parts:
        call = self.call
        vectors = {n: call.vector(n, x, step, block) for n, x in self.vectors.items()}
        q, k, v = call.queries(self.q, step), call.keys(self.k, block), call.keys(self.v, block)
        return Parts(q, k, v, vectors, self.leaves, state)

    def _one(
        self, step: Step, state: Tensor | None, grad: Tensor, d_state: Tensor | None
    ) -> Tensor | None:
        """Adds the gradients of one step; the gradient of the state before it."""
        call, block = self.call, self.call.block(step)
        x = _fresh(self._parts(step, block, state), self.vectors)
        with torch.enable_grad():
            out, after = advance(call, step, block, x)
        ends = [] if out is None else [(out, grad[:, :, step.q0 : step.q1].to(call.dtype))]
        if after is not None and d_state is not None:
            ends.append((after, d_state))
        if not ends:
            return None
        names = [n for n in self.inside if self.leaves[n].requires_grad]
        asked = [n for n, y in x.vectors.items() if y.requires_grad]
        inputs = [x.q, x.k, x.v, *(self.leaves[n] for n in names)]
        inputs += [x.vectors[n] for n in asked] + ([] if x.state is None else [x.state])
        outs, grads = [y for y, _ in ends], [g for _, g in ends]
        found = iter(torch.autograd.grad(outs, inputs, grads, allow_unused=True))
        self._add_rows(step, block, next(found), next(found), next(found))
        for n in names:
            _add(self.tensors[n], next(found))
        for n in asked:
            self._add_vector(n, next(found), step, block)
        return None if x.state is None else next(found)

    def _add_rows(
        self, step: Step, block: Block, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
    ) -> None:
        if dq is not None:
            self.dq[:, :, step.q0 : step.q1] += dq.flatten(1, 2)
        for total, part in ((self.dk, dk), (self.dv, dv)):
            if part is None:
                continue
            if isinstance(block.at, slice):
                total[:, :, block.at] += part.squeeze(2)
            else:
                at, rows = self.call.rows(block.at), part.flatten(2, 3)
                total.scatter_add_(2, at.expand(rows.shape), rows.to(total.dtype))

    def _add_vector(self, name: str, part: Tensor | None, step: Step, block: Block) -> None:
        if part is None:
            return
        total = self.d_vectors[name]
        if name == "key_weight" and total.shape[-1] > 1 and not isinstance(block.at, slice):
            wide = total.new_zeros(*part.shape[:-1], total.shape[-1])
            at = block.at.expand(*part.shape[:-1], -1)
            total += wide.scatter_add_(-1, at, part).sum_to_size(total.shape)
        else:
            place = self.call.vector(name, total, step, block)  # a view
            place += part

    def through_vectors(self) -> None:
        """The gradients of the tensors that the vectors were computed from."""
        names = [n for n, x in self.graph.items() if x.requires_grad]
        wanted = [n for n, x in self.leaves.items() if x.requires_grad]
        if not names or not wanted:
            return
        found = torch.autograd.grad(
            [self.graph[n] for n in names],
            [self.leaves[n] for n in wanted],
            [self.d_vectors[n] for n in names],
            allow_unused=True,
        )
        for n, g in zip(wanted, found, strict=True):
            _add(self.tensors[n], g)


def _inside(spec: LinearSpec) -> tuple[str, ...]:
    """Names of tensors that a step reads itself: those of the maps, and of the scores near by."""
    score = () if spec.near is None else (r.tensor for r in sym.reads(spec.near.score))
    known = {t.name for t in spec.tensors if "float" in t.dtype}
    found = (*spec.q_map.tensors, *spec.k_map.tensors, *score)
    return tuple(n for n in dict.fromkeys(found) if n in known)


def _fresh(x: Parts, whole: Mapping[str, Tensor]) -> Parts:
    """The same parts, each a leaf of its own; vectors that want a gradient are those of `whole`."""

    def leaf(y: Tensor) -> Tensor:
        return y.detach().requires_grad_()

    wanted = {n: y.requires_grad for n, y in whole.items()}
    vectors = {n: y.detach().requires_grad_(wanted[n]) for n, y in x.vectors.items()}
    state = None if x.state is None else leaf(x.state)
    return replace(x, q=leaf(x.q), k=leaf(x.k), v=leaf(x.v), vectors=vectors, state=state)


def _add(total: Tensor, part: Tensor | None) -> None:
    if part is not None:
        total += part
