"""The torch lowerings of the softmax family: `torch.sdpa` and `torch.blocked`.

`torch.sdpa` is one call of `scaled_dot_product_attention`, for specs that can be said that way
without an L x M tensor: the score is s plus a bias of the key, and the mask is causal, a mask of
the keys or, for the sizes of this call, nothing. A single query row is always such a case. Its
causal mask is the top-left one, `k <= q`. `torch.blocked` takes everything (`torch_blocked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.kernels.block_bounds import Queries
from rewriter.kernels.torch_block import Block
from rewriter.kernels.torch_blocked import blocked as blocked_forward
from rewriter.kernels.torch_plan import Plan, plan_of
from rewriter.spec import SoftmaxSpec

if TYPE_CHECKING:
    from rewriter.lowering import Shapes

__all__ = ["blocked_forward", "blocked_supports", "sdpa_forward", "sdpa_supports"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# --- blocked --------------------------------------------------------------------------------------


def blocked_supports(spec: SoftmaxSpec, shapes: Shapes) -> str | None:
    """None: every spec can be computed in blocks; a reason only for tensors that do not fit."""
    if shapes.dtype not in _DTYPES:
        return f"{str(shapes.dtype).removeprefix('torch.')} is not a floating dtype of attention"
    if shapes.heads % shapes.kv_heads:
        return f"{shapes.heads} query heads are not a multiple of {shapes.kv_heads} key heads"
    return None


# --- scaled_dot_product_attention -----------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How one call says the spec at given sizes."""

    keys: tuple[int, int]
    """The range of keys that it is given."""
    is_causal: bool
    masks: tuple[int, ...]
    """The terms of the mask that go into a mask of the keys."""
    has_bias: bool


def sdpa_supports(spec: SoftmaxSpec, shapes: Shapes) -> str | None:
    """None if one call of `scaled_dot_product_attention` computes the spec, else the reason."""
    reason = blocked_supports(spec, shapes)
    if reason is not None:
        return reason
    if shapes.head_dim != shapes.value_dim:
        return f"keys have dim {shapes.head_dim} and values {shapes.value_dim}"
    if len(shapes.sizes) != len(spec.sizes):
        return f"the mask depends on {', '.join(spec.sizes)}, known when the graph runs"
    form = _form(
        spec.to_json(), shapes.batch, shapes.heads, shapes.q_len, shapes.kv_len, shapes.sizes
    )
    if isinstance(form, str):
        return form
    if not (form.masks or form.has_bias):
        return None
    if shapes.grad and form.masks and spec.masked != "zero":
        return "rows without a key would get another gradient"  # on CPUs, M times the right one
    if shapes.grad and form.has_bias and any("float" in t.dtype for t in spec.tensors):
        return "the bias may want a gradient"
    if shapes.device == "cuda" and shapes.heads != shapes.kv_heads:
        return "with a mask, shared key heads would be repeated in memory"
    return None


def sdpa_forward(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """The attention by one call of `scaled_dot_product_attention`; autograd can record it.

    Raises:
        LoweringError: if `sdpa_supports` has a reason against it.
    """
    plan = plan_of(spec.to_json())
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    form = _form(spec.to_json(), batch, heads, q_len, kv_len, tuple(sizes))
    if isinstance(form, str):
        raise LoweringError(f"torch.sdpa: {form}")

    def block(rows: int, dtype: torch.dtype) -> Block:
        spans = {"b": (0, batch), "h": (0, heads), "q": (0, rows)}
        named = {"B": batch, "H": heads, "L": q_len, "M": kv_len}
        named |= dict(zip(spec.sizes, sizes, strict=True))
        return Block(spans, (form.keys,), named, tensors, dtype, q.device)

    values = v.dtype
    kind = values if q.dtype == values else torch.promote_types(q.dtype, values)
    mask = _mask(plan, form, block(1, kind)) if form.masks or form.has_bias else None
    start, stop = form.keys
    if (start, stop) != (0, kv_len):
        k, v = k[:, :, start:stop], v[:, :, start:stop]
    q, k, v = (x.to(kind) if x.stride(-1) == 1 else x.to(kind).contiguous() for x in (q, k, v))
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=form.is_causal,
        scale=plan.code.scale,
        enable_gqa=heads != k.shape[1],
    )
    if plan.code.heads is not None:
        out = out * plan.code.heads(block(q_len, torch.promote_types(kind, torch.float32)))
    return out.to(values)


def _mask(plan: Plan, form: _Form, row: Block) -> Tensor:
    """The mask of the keys as `[B, H, 1, K]`: boolean, or what is added to the scores."""
    hidden = None
    for i in form.masks:
        found = plan.terms[i].hidden(row)
        found = found if isinstance(found, Tensor) else row.value(bool(found))
        hidden = found if hidden is None else hidden | found
    if not form.has_bias and plan.drops_empty:
        assert hidden is not None
        return _four(~hidden)
    bias = plan.code.bias(row) if form.has_bias and plan.code.bias is not None else 0.0
    bias = _four(bias if isinstance(bias, Tensor) else row.value(float(bias))).to(row.dtype)
    if hidden is None:
        return bias.expand(*bias.shape[:3], row.k.shape[0])
    fill = -torch.inf if plan.drops_empty else torch.finfo(row.dtype).min
    return torch.where(hidden, fill, bias).to(row.dtype)


def _four(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]


@lru_cache(maxsize=1024)
def _form(
    spec_json: str, batch: int, heads: int, q_len: int, kv_len: int, sizes: tuple[int, ...]
) -> _Form | str:
    """How `scaled_dot_product_attention` says the spec at these sizes, or why it cannot."""
    plan = plan_of(spec_json)
    spec = plan.spec
    if spec.edit is not None:
        return "the weights are edited by groups of keys"
    if not plan.code.is_linear:
        return "the score is not the scaled product plus a bias"
    if spec.sink is not None:
        return "the softmax has a sink"
    if spec.dropout:
        return "dropout would make it keep an L x M tensor"
    if not q_len or not kv_len or not batch:
        return "there are no queries or no keys"
    bias = spec.bias
    has_bias = bias is not None and bias != 0
    if has_bias and bias is not None and bias.has(sym.q) and q_len > 1:
        return "the bias varies with the query"
    named = {"B": batch, "H": heads, "L": q_len, "M": kv_len}
    named |= dict(zip(spec.sizes, sizes, strict=True))
    queries = Queries((0, batch - 1), (0, heads - 1), (0, q_len - 1), named)
    seen = plan.visible(queries) if plan.visible is not None else ((0, kv_len),)
    if not seen:
        return "no query sees a key"
    hull = (seen[0][0], seen[-1][1])
    form = _form_on(plan, queries, hull, has_bias)
    if isinstance(form, str) or not form.masks or plan.drops_empty or hull == (0, kv_len):
        return form
    if spec.masked != "nan" and 2 * (hull[1] - hull[0]) < kv_len:
        return "rows without a key are the mean of all keys, most of which no query sees"
    return _form_on(plan, queries, (0, kv_len), has_bias)


def _form_on(plan: Plan, queries: Queries, keys: tuple[int, int], has_bias: bool) -> _Form | str:
    """The form that is given a range of keys."""
    is_causal, masks = False, []
    one_row = queries.q[1] == 0
    for i, term in enumerate(plan.terms):
        found = ((0, keys[1]),) if term.where_hidden is None else term.where_hidden(queries)
        if not any(start < keys[1] and stop > keys[0] for start, stop in found):
            continue
        if not one_row and term.causal is not None and term.causal(queries) == 0 == keys[0]:
            is_causal = True
        elif one_row or not term.has_q:
            masks.append(i)
        else:
            return "the mask varies with query and key"
    if is_causal and (masks or has_bias):
        return "a causal mask and a mask or bias of the keys would make an L x M tensor"
    if masks and plan.spec.masked == "nan":
        return "a row without a key would give 0, not NaN"
    return _Form(keys, is_causal, tuple(masks), has_bias)
