"""What of a spec a lowering is asked to compute; the rest is done around it, as the op does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rewriter import op
from rewriter.lowering import Lowering, at_lengths
from rewriter.spec import Spec
from rewriter.testing.cases import Case

__all__ = ["core_of", "refusal", "whole"]


def core_of(spec: Spec, q_len: int, kv_len: int) -> Spec:
    """What the op hands to a lowering at these lengths."""
    core, _ = op.core_of(spec.to_json())
    return at_lengths(core, q_len, kv_len)


def refusal(lowering: Lowering, case: Case, *, grad: bool) -> str | None:
    """Why a lowering does not take a case; None if it does."""
    d = case.dims
    core = core_of(case.spec, d.q_len, d.kv_len)
    return lowering.supports(core, case.shapes(grad=grad))


def whole(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of a lowering for specs with every stage."""

    def with_the_rest(
        spec: Spec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
        *more: Any,
    ) -> Tensor:
        core, kept = op.core_of(spec.to_json())
        read = [tensors[n] for n in kept]
        here = at_lengths(core, q.shape[2], k.shape[2])
        out = forward(here, q, k, v, read, sizes, *more)
        return out if core == spec else op.finish(spec, core, out, v, tensors, sizes)

    return with_the_rest
