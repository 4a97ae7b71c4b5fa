"""From a spec to an implementation: the table, the choice, and the op `rewriter::attention`.

A lowering says whether it takes a spec at the shapes of a call, or why not; the first one in the
order of preference that takes it wins, and the refusals are kept for the report. The op is what
stands in a graph: one node a site, with the spec as JSON. Whichever lowering computes the output,
gradients come from `torch.sdpa`, where that was chosen, or from recomputing blocks; neither keeps
an L x M tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from rewriter.errors import InputError, LoweringError, ShapeError
from rewriter.kernels.torch_backward import backward
from rewriter.kernels.torch_blocked import blocked
from rewriter.kernels.torch_softmax import (
    blocked_forward,
    blocked_supports,
    sdpa_forward,
    sdpa_supports,
)
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec

__all__ = ["LOWERINGS", "Lowering", "Shapes", "attention", "check_target", "choose", "explain"]


@dataclass(frozen=True)
class Shapes:
    """The shapes of one call, as plain numbers."""

    device: str
    """`"cpu"` or `"cuda"`."""
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    grad: bool
    """Some input requires a gradient, and gradients are recorded."""
    sizes: tuple[int, ...] = ()
    """The integers named by `spec.sizes`; empty if they are not known yet."""


@dataclass(frozen=True)
class Lowering:
    """One implementation of the softmax family."""

    name: str
    supports: Callable[[SoftmaxSpec, Shapes], str | None]
    """None if it takes the spec at these shapes, else the reason in one clause."""
    forward: Callable[
        [SoftmaxSpec, Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[int]], Tensor
    ]
    records: bool = False
    """The forward consists of ops that autograd may record, in memory that it should keep."""


# --- the table and the choice ---------------------------------------------------------------------


def _triton_supports(spec: SoftmaxSpec, shapes: Shapes) -> str | None:
    from rewriter.kernels import triton_launch

    if shapes.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return triton_launch.supports(spec, shapes)


def _triton_forward(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    from rewriter.kernels import triton_launch

    return triton_launch.forward(spec, q, k, v, tensors, sizes)


TRITON = Lowering("triton", _triton_supports, _triton_forward)
SDPA = Lowering("torch.sdpa", sdpa_supports, sdpa_forward, records=True)
BLOCKED = Lowering("torch.blocked", blocked_supports, blocked_forward)
REFERENCE = Lowering("reference", blocked_supports, reference, records=True)

LOWERINGS: tuple[Lowering, ...] = (TRITON, SDPA, BLOCKED, REFERENCE)
"""Every lowering, in the order of preference; `"auto"` leaves the reference out."""

_TARGETS: dict[str, tuple[Lowering, ...]] = {
    "auto": (TRITON, SDPA, BLOCKED),
    "torch": (SDPA, BLOCKED),
    **{lowering.name: (lowering,) for lowering in LOWERINGS},
}


def check_target(target: str) -> None:
    """Nothing, if there is such a target.

    Raises:
        InputError: with the targets that there are.
    """
    if target not in _TARGETS:
        raise InputError(f"there is no target {target!r}; one of {', '.join(_TARGETS)}")


Refusals = tuple[tuple[str, str], ...]


@lru_cache(maxsize=4096)
def _chosen(spec_json: str, shapes: Shapes, target: str) -> tuple[Lowering | None, Refusals]:
    check_target(target)
    spec = SoftmaxSpec.from_json(spec_json)
    refusals: list[tuple[str, str]] = []
    for lowering in _TARGETS[target]:
        if lowering is TRITON and target == "auto" and shapes.device != "cuda":
            continue
        reason = lowering.supports(spec, shapes)
        if reason is None:
            return lowering, tuple(refusals)
        refusals.append((lowering.name, reason))
    return None, tuple(refusals)


def choose(
    spec: SoftmaxSpec, shapes: Shapes, target: str = "auto"
) -> tuple[Lowering, list[tuple[str, str]]]:
    """The first lowering of the target that takes the spec, and who refused it before, and why.

    Raises:
        InputError: if there is no such target.
        LoweringError: if none takes it.
    """
    found, refusals = _chosen(spec.to_json(), shapes, target)
    if found is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
        raise LoweringError(f"target {target!r} does not take {spec} on {shapes.device}: {reasons}")
    return found, list(refusals)


def explain(spec: SoftmaxSpec, shapes: Shapes, target: str = "auto") -> tuple[str | None, str]:
    """The name of the lowering that would be chosen, and the refusals as text; None if none."""
    found, refusals = _chosen(spec.to_json(), shapes, target)
    text = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    return (None if found is None else found.name), text


# --- the op ---------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: SoftmaxSpec,
    target: str = "auto",
) -> Tensor:
    """The attention that the spec describes, by the lowering that is best here; differentiable.

    Args:
        q: queries `[B, Hq, L, D]`.
        k: keys `[B, Hkv, M, D]`; `Hq` is a multiple of `Hkv`.
        v: values `[B, Hkv, M, Dv]`.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
        target: `"auto"`, `"torch"` or the name of a lowering.

    Returns:
        `[B, Hq, L, Dv]` in the dtype of v.

    Raises:
        ShapeError: if the tensors do not fit each other or the spec.
        LoweringError: if the target does not take the spec.
    """
    return cast(
        Tensor,
        torch.ops.rewriter.attention.default(q, k, v, tensors, sizes, spec.to_json(), target),
    )


_LIBRARY: Any = cast(Any, torch.library.Library)("rewriter", "DEF")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] tensors, SymInt[] sizes, str spec, str target"
_LIBRARY.define(f"attention({_INPUTS}) -> Tensor")
_LIBRARY.define(f"attention_seeded({_INPUTS}, Tensor? seed) -> Tensor")
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] tensors,"
    " SymInt[] sizes, str spec, Tensor? seed, bool[] wanted) -> Tensor[]"
)
"""`attention_seeded` is what is recorded: the backward draws the same dropout from `seed`.
`attention_backward` gives the wanted gradients of q, k, v and the tensors, in this order."""


def _check(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: SoftmaxSpec) -> None:
    """Raises ShapeError if the tensors do not fit each other or the spec."""
    if not (q.dim() == k.dim() == v.dim() == 4):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ShapeError(f"q, k and v are [B, H, L, D], got {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ShapeError(f"q, k and v do not fit each other: {shapes}")
    if len(tensors) != len(spec.tensors):
        names = ", ".join(t.name for t in spec.tensors) or "no tensors"
        raise ShapeError(f"the spec reads {names}, got {len(tensors)} tensors")


@lru_cache(maxsize=4096)
def _chosen_for(
    spec_json: str,
    target: str,
    device: str,
    dtype: torch.dtype,
    q_shape: torch.Size,
    v_shape: torch.Size,
    sizes: tuple[int, ...],
    grad: bool,
) -> Lowering:
    """`choose`, on what a call has at hand: a call happens once a layer a token."""
    batch, heads, q_len, head_dim = q_shape
    _, kv_heads, kv_len, value_dim = v_shape
    dims = (batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim)
    shapes = Shapes(device, dtype, *dims, grad, sizes)
    return choose(SoftmaxSpec.from_json(spec_json), shapes, target)[0]


def _choose_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: SoftmaxSpec,
    target: str,
    *,
    grad: bool = False,
) -> Lowering:
    _check(q, k, v, tensors, spec)
    shapes = (q.device.type, q.dtype, q.shape, v.shape, tuple(sizes))
    return _chosen_for(spec.to_json(), target, *shapes, grad)


def _without_autocast(device: str) -> Any:
    """Formulas and products keep the dtypes of the spec, whatever surrounds the op."""
    return torch.autocast(device, enabled=False)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    target: str,
    seed: Tensor | None = None,
) -> Tensor:
    """The kernel of both ops."""
    if torch.is_autocast_enabled(q.device.type):
        with _without_autocast(q.device.type):
            return _attention(q, k, v, tensors, sizes, spec, target, seed)
    parsed = SoftmaxSpec.from_json(spec)
    lowering = _choose_for(q, k, v, tensors, sizes, parsed, target)
    if seed is not None:
        out = blocked(parsed, q, k, v, tensors, sizes, seed=int(seed))
    else:
        out = lowering.forward(parsed, q, k, v, tensors, sizes)
    return out


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    target: str,
    seed: Tensor | None = None,
) -> Tensor:
    return v.new_empty((*q.shape[:3], v.shape[3]))


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    drawn = None if seed is None else int(seed)
    with _without_autocast(q.device.type):
        parsed = SoftmaxSpec.from_json(spec)
        found = backward(parsed, grad, q, k, v, tensors, sizes, wanted, seed=drawn)
    return [g for g in found if g is not None]


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    inputs = (q, k, v, *tensors)
    return [x.new_empty(x.shape) for x, want in zip(inputs, wanted, strict=True) if want]


# --- autograd -------------------------------------------------------------------------------------


class _Recomputed(torch.autograd.Function):
    """Keeps the inputs; its backward computes the attention again, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        sizes: Sequence[int],
        spec: str,
        target: str,
        seed: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, *tensors)
        ctx.sizes, ctx.spec, ctx.seed = sizes, spec, seed
        with torch._C._AutoDispatchBelowAutograd():
            return cast(
                Tensor,
                torch.ops.rewriter.attention_seeded(q, k, v, tensors, sizes, spec, target, seed),
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, *tensors = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[4:])
        with torch.no_grad():
            got = iter(
                torch.ops.rewriter.attention_backward(
                    grad, q, k, v, tensors, ctx.sizes, ctx.spec, ctx.seed, wanted
                )
            )
        found = [next(got) if want else None for want in wanted]
        if torch.is_grad_enabled():
            once = cast(Any, _NoSecondDerivative).apply
            found = [None if g is None else once(g, grad, q, k, v, *tensors) for g in found]
        return (None, None, None, None, *found)


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient that says, when it is differentiated in turn, that this cannot be done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *sources: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise LoweringError(
            "rewriter::attention can be differentiated once only; for second derivatives,"
            ' use restore(model) or optimize(model, target="reference")'
        )


def _autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    target: str,
) -> Tensor:
    """Records what is needed for a gradient, if one is wanted."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v, *tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            return cast(
                Tensor, torch.ops.rewriter.attention.default(q, k, v, tensors, sizes, spec, target)
            )
    parsed = SoftmaxSpec.from_json(spec)
    if all(type(n) is int for n in (*q.shape, *k.shape, *sizes)):
        lowering = _choose_for(q, k, v, tensors, sizes, parsed, target, grad=True)
        if lowering.records:
            with _without_autocast(q.device.type):
                return lowering.forward(parsed, q, k, v, tensors, sizes)
    seed = torch.randint(2**62, ()) if parsed.dropout else None
    record = cast(Any, _Recomputed).apply
    return cast(Tensor, record(sizes, spec, target, seed, q, k, v, *tensors))


for _name, _kernel, _meta in (
    ("attention", _attention, _fake),
    ("attention_seeded", _attention, _fake),
    ("attention_backward", _backward, _fake_backward),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rewriter::{_name}", _meta, lib=_LIBRARY)
_LIBRARY.impl("attention", _autograd, "Autograd")
