"""From a spec to an implementation: the table and the choice.

A lowering says whether it takes a spec at the shapes of a call, or why not; the first one in the
order of preference that takes it wins, and the refusals are kept for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import sympy
import torch
from sympy import Integer
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import InputError, LoweringError
from rewriter.families import from_json
from rewriter.kernels import torch_backward, torch_linear, torch_routed
from rewriter.kernels.torch_compact import compact_forward, compact_supports
from rewriter.kernels.torch_softmax import (
    blocked_forward,
    blocked_supports,
    sdpa_forward,
    sdpa_supports,
)
from rewriter.linear import LinearSpec
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec, Spec

__all__ = [
    "LOWERINGS",
    "Backward",
    "Choice",
    "Forward",
    "Gradients",
    "Lowering",
    "Shapes",
    "at_lengths",
    "backward_of",
    "check_target",
    "choose",
    "explain",
    "families_of",
    "kernel_sources",
]


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


Forward = Callable[..., Tensor]
"""`forward(spec, q, k, v, tensors, sizes)` gives the output `[B, Hq, L, Dv]` in the dtype of v."""


Backward = Callable[..., list[Tensor | None]]
"""`backward(spec, grad, q, k, v, tensors, sizes, wanted, seed=)` gives the gradients of q, k, v and
then each of the tensors; None where not wanted."""


@dataclass(frozen=True)
class Gradients:
    """Gradients that an implementation has of its own, from what its forward keeps."""

    refusal: Callable[..., str | None]
    """`refusal(spec, shapes, wanted)`: None if it takes the spec, else the reason in one clause;
    `wanted` are the tensors of the spec that want a gradient."""
    forward: Callable[..., tuple[Tensor, Tensor]]
    """Like `Forward`, with the seed of the dropout as the last argument; it gives the log-sum-exp
    of each row, `[B, Hq, L]` in float32, too."""
    backward: Callable[..., list[Tensor | None]]
    """`backward(spec, grad, out, lse, q, k, v, tensors, sizes, wanted, seed)`, as `Backward`."""


@dataclass(frozen=True)
class Lowering:
    """One implementation, of one family or of several."""

    name: str
    supports: Callable[..., str | None]
    """None if it takes the spec at these shapes, else the reason in one clause."""
    forward: Forward
    records: bool = False
    """The forward consists of ops that autograd may record, in memory that it should keep."""
    cached: Callable[..., Tensor] | None = None
    """`forward` with a `Beside` as the last argument, for calls that go on from a KV cache."""
    families: tuple[str, ...] = ("softmax",)
    """What it computes, by `families_of`; for others it is not even asked."""
    gradients: Gradients | None = None
    """What gives its gradients, for specs without a factor of the heads; else `backward_of`."""


# --- the table and the choice ---------------------------------------------------------------------


def families_of(spec: Spec) -> tuple[str, ...]:
    """`"softmax"`, which is also `"gated"` where heads may be off; `"routed"` for softmax attention
    to chosen blocks of keys; `"linear"`."""
    if not isinstance(spec, SoftmaxSpec):
        return (spec.family,)
    if spec.route is not None:
        return ("routed",)
    return ("softmax",) if spec.active is None else ("softmax", "gated")


def _of(
    *families: str, supports: Callable[..., str | None]
) -> Callable[[Spec, Shapes], str | None]:
    """The guard of an implementation of some families."""

    def guard(spec: Spec, shapes: Shapes) -> str | None:
        found = families_of(spec)
        if not set(found) & set(families):
            return f"it computes {' and '.join(families)} attention, and this is {found[0]}"
        return supports(spec, shapes)

    return guard


def _triton(spec: Spec) -> Any:
    """The module with the kernels of its family; imported where it is needed."""
    from rewriter.kernels import triton_launch, triton_linear, triton_routed

    found = {"softmax": triton_launch, "routed": triton_routed, "linear": triton_linear}
    return found[families_of(spec)[0]]


def _triton_supports(spec: Spec, shapes: Shapes) -> str | None:
    if shapes.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return cast("str | None", _triton(spec).supports(spec, shapes))


def _triton_forward(spec: Spec, *args: Any) -> Tensor:
    return cast(Tensor, _triton(spec).forward(spec, *args))


def _triton_cached(spec: Spec, *args: Any) -> Tensor:
    if families_of(spec)[0] == "softmax":
        *args, _ = args  # type: ignore[assignment]  # it keeps nothing beside the cache
    return _triton_forward(spec, *args)


def _triton_refusal(spec: Spec, shapes: Shapes, wanted: Sequence[bool]) -> str | None:
    if families_of(spec)[0] != "softmax":
        return "only softmax attention has kernels for its gradients"
    from rewriter.kernels import triton_backward

    return triton_backward.refusal(cast(SoftmaxSpec, spec), shapes, wanted)


def _triton_with_lse(spec: Spec, *args: Any) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", _triton(spec).forward_with_lse(spec, *args))


def _triton_backward(spec: Spec, *args: Any) -> list[Tensor | None]:
    from rewriter.kernels import triton_backward

    return triton_backward.backward(cast(SoftmaxSpec, spec), *args)


TRITON = Lowering(
    "triton",
    _of("softmax", "routed", "linear", supports=_triton_supports),
    _triton_forward,
    cached=_triton_cached,
    families=("softmax", "routed", "linear"),
    gradients=Gradients(_triton_refusal, _triton_with_lse, _triton_backward),
)


def kernel_sources(
    spec: Spec,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    wanted: Sequence[str],
    capability: int,
) -> list[tuple[str, str]]:
    """What the generated Triton files compute, and their texts.

    Args:
        wanted: names of the tensors that want a gradient.
        capability: compute capability of the GPU times ten.

    Raises:
        LoweringError: if a formula has no kernel.
    """
    made = _triton(spec).source_of(spec, head_dim, value_dim, dtype, capability)
    sources = [("forward", cast(str, made.text))]
    if families_of(spec)[0] == "softmax":
        from rewriter.kernels import triton_backward

        plain = cast(SoftmaxSpec, replace(cast(Any, spec), heads=Integer(1)))
        found = triton_backward.source_of(plain, head_dim, value_dim, dtype, wanted, capability)
        sources.append(("gradients", found.text))
    return sources


SDPA = Lowering("torch.sdpa", _of("softmax", supports=sdpa_supports), sdpa_forward, records=True)
COMPACT = Lowering(
    "torch.compact",
    _of("gated", supports=compact_supports),
    compact_forward,
    families=("gated",),
)
BLOCKED = Lowering("torch.blocked", _of("softmax", supports=blocked_supports), blocked_forward)
ROUTED = Lowering(
    "torch.routed",
    _of("routed", supports=torch_routed.supports),
    torch_routed.forward,
    cached=torch_routed.forward,
    families=("routed",),
)
LINEAR = Lowering(
    "torch.linear",
    _of("linear", supports=torch_linear.supports),
    torch_linear.forward,
    cached=torch_linear.forward,
    families=("linear",),
)
REFERENCE = Lowering(
    "reference", blocked_supports, reference, records=True, families=("softmax", "routed", "linear")
)

LOWERINGS: tuple[Lowering, ...] = (
    TRITON,
    COMPACT,
    SDPA,
    BLOCKED,
    ROUTED,
    LINEAR,
    REFERENCE,
)
"""Every lowering, in the order of preference; `"auto"` leaves the reference out."""

_TARGETS: dict[str, tuple[Lowering, ...]] = {
    "auto": tuple(x for x in LOWERINGS if x is not REFERENCE),
    "torch": tuple(x for x in LOWERINGS if x.name.startswith("torch.")),
    **{lowering.name: (lowering,) for lowering in LOWERINGS},
}


def check_target(target: str) -> None:
    """Nothing, if there is such a target.

    Raises:
        InputError: with the targets that there are.
    """
    if target not in _TARGETS:
        raise InputError(f"there is no target {target!r}; one of {', '.join(_TARGETS)}")


def at_lengths(spec: Spec, q_len: int, kv_len: int) -> Spec:
    """The spec without a route that, at these lengths, hides no key that the mask shows."""
    if not isinstance(spec, SoftmaxSpec) or spec.route is None:
        return spec
    route = spec.route
    if kv_len <= route.dense_below:
        everything = True
    elif route.by == "region":
        down, across = route.region_counts
        everything = route.topk >= down * across
    else:
        everything = kv_len <= route.block or (
            kv_len <= route.topk * route.block and _ends_before(spec, q_len, kv_len)
        )
    return replace(spec, route=None) if everything else spec


def _ends_before(spec: SoftmaxSpec, q_len: int, kv_len: int) -> bool:
    """No query sees a key behind its position in the route, by a term of the mask or because there
    is none: later blocks, which the route hides, are hidden without it."""
    position = cast(Any, spec.route).position
    ends = [sym.M - 1]
    for term in sympy.And.make_args(spec.mask):
        if isinstance(term, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
            end = term.gts - term.lts + sym.k  # the term says k <= end, or k < end
            strict = isinstance(term, sympy.Lt | sympy.Gt) and end.is_integer
            ends.append(end - 1 if strict else end)
    for end in ends:
        beyond = sympy.expand((position - end).xreplace({sym.L: q_len, sym.M: kv_len}))
        least = beyond.xreplace({sym.q: Integer(0)})
        if least.is_Integer and least >= 0 and beyond - least in (0, sym.q):
            return True
    return False


def backward_of(spec: Spec) -> Backward:
    """What gives the gradients, whichever lowering gave the output."""
    if isinstance(spec, LinearSpec):
        return torch_linear.backward
    assert isinstance(spec, SoftmaxSpec)
    return torch_backward.backward if spec.route is None else torch_routed.backward


Refusals = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Choice:
    """Who computes a spec at given shapes."""

    lowering: Lowering
    spec: Spec
    """The spec, or a simpler one that is the same at these lengths."""
    refusals: Refusals
    """Who was asked before, and why not."""


@lru_cache(maxsize=4096)
def _chosen(spec_json: str, shapes: Shapes, target: str) -> tuple[Lowering | None, Spec, Refusals]:
    check_target(target)
    spec = at_lengths(from_json(spec_json), shapes.q_len, shapes.kv_len)
    refusals: list[tuple[str, str]] = []
    for lowering in _TARGETS[target]:
        if lowering is TRITON and target == "auto" and shapes.device != "cuda":
            continue
        if target in ("auto", "torch") and not set(families_of(spec)) & set(lowering.families):
            continue
        reason = lowering.supports(spec, shapes)
        if reason is None:
            return lowering, spec, tuple(refusals)
        refusals.append((lowering.name, reason))
    return None, spec, tuple(refusals)


def choose(spec: Spec, shapes: Shapes, target: str = "auto") -> Choice:
    """The first lowering of the target that takes the spec, and who refused it before, and why.

    Raises:
        InputError: if there is no such target.
        LoweringError: if none takes it.
    """
    found, simpler, refusals = _chosen(spec.to_json(), shapes, target)
    if found is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
        raise LoweringError(f"target {target!r} does not take {spec} on {shapes.device}: {reasons}")
    return Choice(found, simpler, refusals)


def explain(spec: Spec, shapes: Shapes, target: str = "auto") -> tuple[str | None, str]:
    """The name of the lowering that would be chosen, and the refusals as text; None if none."""
    found, _, refusals = _chosen(spec.to_json(), shapes, target)
    text = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    return (None if found is None else found.name), text
