"""The op `rewriter::attention`: what stands in a graph, one node a site, with the spec as JSON.

Whichever lowering computes the output, gradients come from autograd, where the lowering consists of
ops that it may record, or from recomputing block by block; neither keeps an L x M tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from sympy import Integer
from torch import Tensor

from rewriter.beside import beside
from rewriter.errors import LoweringError, ShapeError
from rewriter.families import from_json
from rewriter.kernels.torch_blocked import blocked
from rewriter.lowering import Choice, Gradients, Shapes, backward_of, choose
from rewriter.reference import finished
from rewriter.spec import SoftmaxSpec, Spec

__all__ = ["attention", "core_of", "finish"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: Spec,
    target: str = "auto",
) -> Tensor:
    """The attention that the spec describes, by the lowering that is best here; differentiable.

    Args:
        q: queries `[B, Hq, L, D]`.
        k: keys `[B, Hkv, M, D]` in the dtype of q; `Hq` is a multiple of `Hkv`.
        v: values `[B, Hkv, M, Dv]`, of a dtype of their own.
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
_LIBRARY.define(
    f"attention({_INPUTS}, Tensor[]? full=None, Tensor[]? past=None, str site='') -> Tensor"
)
_LIBRARY.define(f"attention_seeded({_INPUTS}, Tensor? seed) -> Tensor")
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] tensors,"
    " SymInt[] sizes, str spec, Tensor? seed, bool[] wanted) -> Tensor[]"
)
_LIBRARY.define(f"attention_with_lse({_INPUTS}, Tensor? seed) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_with_lse_backward(Tensor grad, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,"
    " Tensor[] tensors, SymInt[] sizes, str spec, str target, Tensor? seed, bool[] wanted)"
    " -> Tensor[]"
)
"""`full` and `past` of `attention` are the keys and values as they go into the KV cache and as they
came out of it; with the name of the site they find what `rewriter.beside` keeps.
`attention_seeded` is what is recorded: the backward draws the same dropout from `seed`.
`attention_backward` gives the wanted gradients of q, k, v and the tensors, in this order. The two
with the log-sum-exp are those of a target that has gradients of its own."""


def _check(
    q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], spec: Spec
) -> None:
    """Raises ShapeError if the tensors do not fit each other or the spec."""
    if not (q.dim() == k.dim() == v.dim() == 4):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ShapeError(f"q, k and v are [B, H, L, D], got {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ShapeError(f"q, k and v do not fit each other: {shapes}")
    if q.dtype != k.dtype:
        raise ShapeError(f"q is {q.dtype} and k is {k.dtype}; cast one to the dtype of the other")
    if len(tensors) != len(spec.tensors):
        names = ", ".join(t.name for t in spec.tensors) or "no tensors"
        raise ShapeError(f"the spec reads {names}, got {len(tensors)} tensors")
    if len(sizes) != len(spec.sizes):
        names = f"the sizes {', '.join(spec.sizes)}" if spec.sizes else "no sizes"
        raise ShapeError(f"the spec uses {names}, got {len(sizes)}")


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
) -> Choice:
    """`choose`, on what a call has at hand: a call happens once a layer a token."""
    shapes = _shapes_of(device, dtype, q_shape, v_shape, sizes, grad)
    return choose(from_json(spec_json), shapes, target)


def _shapes_of(
    device: str,
    dtype: torch.dtype,
    q_shape: torch.Size,
    v_shape: torch.Size,
    sizes: tuple[int, ...],
    grad: bool,
) -> Shapes:
    batch, heads, q_len, head_dim = q_shape
    _, kv_heads, kv_len, value_dim = v_shape
    dims = (batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim)
    return Shapes(device, dtype, *dims, grad, sizes)


def _choose_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    spec: Spec,
    target: str,
    *,
    grad: bool = False,
) -> Choice:
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
    full: Sequence[Tensor] | None = None,
    past: Sequence[Tensor] | None = None,
    site: str = "",
) -> Tensor:
    """The kernel of the op that is not recorded."""
    if torch.is_autocast_enabled(q.device.type):
        with _without_autocast(q.device.type):
            return _attention(q, k, v, tensors, sizes, spec, target, full, past, site)
    whole = from_json(spec)
    _check(q, k, v, tensors, sizes, whole)
    core, kept = core_of(spec)
    read = [tensors[i] for i in kept]
    choice = _choose_for(q, k, v, sizes, core, target)
    found = choice.lowering
    args = (choice.spec, q, k, v, read, sizes)
    memory = None
    if found.cached is not None and full and past:
        weights = [x for x, t in zip(read, core.tensors, strict=True) if t.name in core.whole]
        name, values = (site, choice.spec.kept), (full[1], past[1])
        memory = beside(full[0], past[0], name, weights, values)
    out = found.forward(*args) if memory is None else cast(Any, found.cached)(*args, memory)
    return out if core == whole else finish(whole, core, out, v, tensors, sizes)


def _seeded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    target: str,
    seed: Tensor | None = None,
) -> Tensor:
    """The kernel of the op that is recorded; its spec has no stages after the product."""
    if torch.is_autocast_enabled(q.device.type):
        with _without_autocast(q.device.type):
            return _seeded(q, k, v, tensors, sizes, spec, target, seed)
    parsed = from_json(spec)
    choice = _choose_for(q, k, v, sizes, parsed, target)  # an error, if the target refuses
    if seed is not None:  # whoever was chosen: the backward draws again by blocks
        return blocked(cast(SoftmaxSpec, parsed), q, k, v, tensors, sizes, seed=int(seed))
    return choice.lowering.forward(choice.spec, q, k, v, tensors, sizes)


@lru_cache(maxsize=4096)
def core_of(spec_json: str) -> tuple[Spec, tuple[int, ...]]:
    """What a lowering computes of a spec, and which of its tensors that reads: the stages that
    every family shares, after the product with the values, are ordinary torch."""
    spec = from_json(spec_json)
    if getattr(spec, "local", None) is None and spec.patch is None:
        return spec, tuple(range(len(spec.tensors)))
    less: dict[str, Any] = {"patch": None}
    if isinstance(spec, SoftmaxSpec) and spec.local is not None:
        less |= {"local": None, "heads": Integer(1), "active": None}
    core = cast(Spec, replace(cast(Any, spec), **less))
    used = core.without_unused()
    core = cast(Spec, replace(cast(Any, core), tensors=used.tensors))
    return core, tuple(n for n, t in enumerate(spec.tensors) if t in core.tensors)


def finish(
    spec: Spec,
    core: Spec,
    out: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """The output with the stages that `core_of` left out, in the dtype of v."""
    if core.heads == spec.heads:
        spec = cast(Spec, replace(cast(Any, spec), heads=Integer(1)))
    return finished(spec, out, v, tensors, sizes).to(v.dtype)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    target: str,
    *rest: Any,
    **more: Any,
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
        parsed = from_json(spec)
        found = backward_of(parsed)(parsed, grad, q, k, v, tensors, sizes, list(wanted), seed=drawn)
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


def _with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    target: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    drawn = None if seed is None else int(seed)
    with _without_autocast(q.device.type):
        choice = _choose_for(q, k, v, sizes, from_json(spec), target)
        own = cast(Gradients, choice.lowering.gradients)
        return own.forward(choice.spec, q, k, v, tensors, sizes, drawn)


def _fake_with_lse(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(q, k, v, *rest), q.new_empty(q.shape[:3], dtype=torch.float32)


def _with_lse_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    target: str,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    drawn = None if seed is None else int(seed)
    with _without_autocast(q.device.type):
        choice = _choose_for(q, k, v, sizes, from_json(spec), target)
        own = cast(Gradients, choice.lowering.gradients)
        args = (q, k, v, tensors, sizes, list(wanted), drawn)
        found = own.backward(choice.spec, grad, out, lse, *args)
    return [g for g in found if g is not None]


def _fake_with_lse_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    target: str,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return _fake_backward(grad, q, k, v, tensors, sizes, spec, seed, wanted)


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
            got = torch.ops.rewriter.attention_backward(
                grad, q, k, v, tensors, ctx.sizes, ctx.spec, ctx.seed, wanted
            )
        return (None, None, None, None, *_once(got, wanted, grad, q, k, v, *tensors))


class _Kept(torch.autograd.Function):
    """Keeps the inputs, the output and the log-sum-exp, for a target with gradients of its own."""

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
        with torch._C._AutoDispatchBelowAutograd():
            args = (q, k, v, tensors, sizes, spec, target, seed)
            out, lse = torch.ops.rewriter.attention_with_lse(*args)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.sizes, ctx.spec, ctx.target, ctx.seed = sizes, spec, target, seed
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[4:])
        rest = (tensors, ctx.sizes, ctx.spec, ctx.target, ctx.seed, wanted)
        with torch.no_grad():
            got = torch.ops.rewriter.attention_with_lse_backward(grad, out, lse, q, k, v, *rest)
        return (None, None, None, None, *_once(got, wanted, grad, q, k, v, *tensors))


def _once(got: Sequence[Tensor], wanted: Sequence[bool], *sources: Tensor) -> list[Tensor | None]:
    """The wanted gradients, each in its place; where gradients of gradients are recorded, such that
    asking for one is an error."""
    left = iter(got)
    found = [next(left) if want else None for want in wanted]
    if torch.is_grad_enabled():
        once = cast(Any, _NoSecondDerivative).apply
        found = [None if g is None else once(g, *sources) for g in found]
    return found


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
    full: Sequence[Tensor] | None = None,
    past: Sequence[Tensor] | None = None,
    site: str = "",
) -> Tensor:
    """Records what is needed for a gradient, if one is wanted."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v, *tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            return cast(
                Tensor,
                torch.ops.rewriter.attention.default(
                    q, k, v, tensors, sizes, spec, target, full, past, site
                ),
            )
    whole = from_json(spec)
    _check(q, k, v, tensors, sizes, whole)
    core, kept = core_of(spec)
    out = _recorded(q, k, v, [tensors[i] for i in kept], sizes, core, target)
    if core == whole:
        return out
    with _without_autocast(q.device.type):
        return finish(whole, core, out, v, tensors, sizes)


def _recorded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    spec: Spec,
    target: str,
) -> Tensor:
    if all(type(n) is int for n in (*q.shape, *k.shape, *sizes)):
        choice = _choose_for(q, k, v, sizes, spec, target, grad=True)
        spec = choice.spec
        if choice.lowering.records:
            with _without_autocast(q.device.type):
                return choice.lowering.forward(spec, q, k, v, tensors, sizes)
        if _has_gradients(choice, q, k, v, tensors, sizes):
            return _recorded_with_lse(choice.spec, q, k, v, tensors, sizes, target)
    record = cast(Any, _Recomputed).apply
    return cast(Tensor, record(sizes, spec.to_json(), target, _seed_of(spec), q, k, v, *tensors))


def _seed_of(spec: Spec) -> Tensor | None:
    """A seed for the dropout, if there is any."""
    drops = isinstance(spec, SoftmaxSpec) and spec.dropout
    return torch.randint(2**62, ()) if drops else None


def _has_gradients(
    choice: Choice,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> bool:
    """The lowering gives the gradients of this call itself."""
    own, spec = choice.lowering.gradients, choice.spec
    if own is None:
        return False
    shapes = _shapes_of(q.device.type, q.dtype, q.shape, v.shape, tuple(sizes), True)
    return own.refusal(spec, shapes, [x.requires_grad for x in tensors]) is None


def _recorded_with_lse(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    target: str,
) -> Tensor:
    """The factor of the heads multiplies what the kernel gives: its gradient needs that."""
    plain = cast(Spec, replace(cast(Any, spec), heads=Integer(1)))
    core = cast(Spec, replace(cast(Any, plain), tensors=plain.without_unused().tensors))
    used = [x for x, t in zip(tensors, spec.tensors, strict=True) if t in core.tensors]
    record = cast(Any, _Kept).apply
    out = record(sizes, core.to_json(), target, _seed_of(core), q, k, v, *used)
    if spec.heads == 1:
        return cast(Tensor, out)
    with _without_autocast(q.device.type):
        return finish(spec, core, out, v, tensors, sizes)


for _name, _kernel, _meta in (
    ("attention", _attention, _fake),
    ("attention_seeded", _seeded, _fake),
    ("attention_backward", _backward, _fake_backward),
    ("attention_with_lse", _with_lse, _fake_with_lse),
    ("attention_with_lse_backward", _with_lse_backward, _fake_with_lse_backward),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rewriter::{_name}", _meta, lib=_LIBRARY)
_LIBRARY.impl("attention", _autograd, "Autograd")
