"""What of a spec a lowering is asked to compute; the rest is done around it, as the op does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from sympy import Integer
from torch import Tensor

from rewriter.lowering import Lowering, at_lengths
from rewriter.reference import finished
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.testing.cases import Case

__all__ = ["core_of", "refusal", "whole"]


def core_of(spec: Spec, q_len: int, kv_len: int) -> Spec:
    """Without what follows the product with the values for every family, and without a route that
    lets every query see every key."""
    less: dict[str, Any] = {"patch": None}
    if isinstance(spec, SoftmaxSpec) and spec.local is not None:
        less |= {"local": None, "heads": Integer(1), "active": None}
    if spec.patch is None and len(less) == 1:
        return at_lengths(spec, q_len, kv_len)
    return at_lengths(cast(Spec, replace(cast(Any, spec), **less)).without_unused(), q_len, kv_len)


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
        core = core_of(spec, q.shape[2], k.shape[2])
        named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
        read = [named[t.name] for t in core.tensors]
        out = forward(core, q, k, v, read, sizes, *more)
        if spec.patch is None and getattr(spec, "local", None) is None:
            return out
        rest = cast(Any, spec)
        if core.heads == spec.heads:
            rest = replace(rest, heads=Integer(1))
        return finished(rest, out, v, tensors, sizes)

    return with_the_rest
