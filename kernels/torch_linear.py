"""Linear attention in chunks, in plain torch: O(N) time and memory, any linear spec.

The state is kept beside the KV cache: a step of decoding reads its new keys, and those of the
window, and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.beside import Beside
from rewriter.kernels.torch_linear_backward import backward
from rewriter.kernels.torch_linear_call import Call, Vectors, offset_of
from rewriter.kernels.torch_linear_step import Parts, advance
from rewriter.linear import LinearSpec
from rewriter.spec import Spec

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = ["backward", "forward", "keep", "supports"]


def supports(spec: Spec, shapes: Shapes) -> str | None:
    assert isinstance(spec, LinearSpec)
    if spec.position is not None and offset_of(spec.position) is None:
        return f"query q stands at {spec.position} of the keys, not at q plus one number"
    return None


@torch.no_grad()
def forward(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    beside: Beside | None = None,
) -> Tensor:
    """The attention that the spec describes, `[B, Hq, L, Dv]` in the dtype of v.

    Args:
        q: queries `[B, Hq, L, D]`; k: `[B, Hkv, M, D]`; v: `[B, Hkv, M, Dv]`; any strides.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
        beside: where the state of the keys before this call is found, and that of all is left.
    """
    assert isinstance(spec, LinearSpec)
    call = Call(spec, q, k, tensors, sizes)
    vectors = call.vectors(call.named)
    found = None if beside is None else _recalled(call, vectors, beside)
    state, done = (None, 0) if found is None else (found.state, found.count)
    out = v.new_zeros(*q.shape[:3], v.shape[3])
    for step in call.steps(done):
        block = call.block(step)
        part = Parts(
            q=call.queries(q, step),
            k=call.keys(k, block),
            v=call.keys(v, block),
            vectors={n: call.vector(n, x, step, block) for n, x in vectors.items()},
            named=call.named,
            state=state,
        )
        rows, state = advance(call, step, block, part)
        if rows is not None:
            out[:, :, step.q0 : step.q1] = rows
    if beside is not None and call.takes_all:
        keep(beside, call, state)
    return out


# --- what is kept beside a cache ------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """The state after some keys, and what it was made with besides them."""

    count: int
    state: Tensor | None
    seen: Tensor | None
    key_weight: Tensor | None
    decay: Tensor | None


def keep(beside: Beside, call: Call, state: Tensor | None) -> None:
    """Leaves the state of all keys of a call, `[B, Hkv, 1 or G, P, Dv]`, with a column more for the
    sum of the weights where they are divided by it; whoever computed it."""
    marks = _marks(call, call.vectors(call.named))
    beside.keep(_Kept(call.kv_len, state, *marks))


def _marks(call: Call, vectors: Vectors) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What may be other in the next call, though the keys are the same."""
    decay = vectors.get("decay") if sym.reads(call.spec.decay) else None
    return call.seen, vectors.get("key_weight"), decay


def _recalled(call: Call, vectors: Vectors, beside: Beside) -> _Kept | None:
    """The state that was kept, if it still is the one of the first keys of this call."""
    kept = cast("_Kept | None", beside.recall())
    if kept is None or kept.count > call.before:
        return None
    found = (kept.seen, kept.key_weight, kept.decay)
    for old, new in zip(found, _marks(call, vectors), strict=True):
        if old is None and new is None:
            continue
        if old is None or new is None:
            return None
        part = new[..., : kept.count] if new.shape[-1] == call.kv_len else new
        if not torch.equal(old, part):
            return None
    return kept
