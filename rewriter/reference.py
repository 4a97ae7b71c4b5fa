"""The meaning of the IR: a dense, slow interpreter of specs in plain PyTorch, in any dtype up to
float64.

Every other lowering is tested against this file and the two beside it (`reference_linear`,
`reference_routes`), and nothing else is trusted. It allocates B x H x L x M tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import ShapeError
from rewriter.evaluate import Value, evaluate, index_values, tensor_of
from rewriter.linear import LinearSpec
from rewriter.reference_linear import linear
from rewriter.reference_routes import routed_keys
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.stages import Edit, Local

__all__ = ["edited", "finished", "mask_of", "reference", "reference_weights"]


def mask_of(
    spec: SoftmaxSpec,
    *,
    q_len: int,
    kv_len: int,
    batch: int = 1,
    heads: int = 1,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Tensor:
    """The mask as a boolean tensor `[L, M]` for one batch and head, else `[B, H, L, M]`; True where
    the key is seen. A route is not part of it."""
    named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
    values = index_values(spec, batch, heads, q_len, kv_len, sizes, torch.device("cpu"))
    mask = evaluate(spec.mask, values, named, torch.float32)
    mask = tensor_of(mask, torch.empty(()), torch.float32).expand(batch, heads, q_len, kv_len)
    return mask[0, 0] if batch == heads == 1 else mask


def reference_weights(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Tensor:
    """The attention weights `[B, H, L, M]` before dropout. A row may sum to less than 1: a sink
    takes the rest, or an edit."""
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    if heads % k.shape[1]:
        raise ShapeError(f"{heads} query heads are not a multiple of {k.shape[1]} key heads")
    named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
    values = index_values(spec, batch, heads, q_len, kv_len, sizes, q.device)
    dtype = q.dtype

    product = q @ k.repeat_interleave(heads // k.shape[1], dim=1).mT  # [B, H, L, M]
    values["s"] = product * evaluate(spec.scale, values, named, dtype)
    score = tensor_of(evaluate(spec.score, values, named, dtype), q, dtype)
    score = score.to(dtype).expand_as(product)
    seen = tensor_of(evaluate(spec.mask, values, named, dtype), q, dtype).expand_as(product)
    if spec.route is not None:
        seen = seen & routed_keys(spec, q, k, named, values)

    if spec.masked == "add":
        score = score + torch.zeros_like(score).masked_fill(~seen, torch.finfo(dtype).min)
    elif spec.masked == "mean":
        score = score.masked_fill(~seen, torch.finfo(dtype).min)
    else:
        score = score.masked_fill(~seen, -torch.inf)
    if spec.edit is not None:  # masses are divided by, down to 1e-12, which float16 has not
        score = score.to(torch.promote_types(dtype, torch.float32))
    if spec.sink is not None:
        sink = tensor_of(evaluate(spec.sink, values, named, dtype), q, dtype)
        column = sink.expand(batch, heads, q_len, 1).to(score.dtype)
        weights = torch.cat([score, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = score.softmax(-1)
    if spec.masked == "zero":
        weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    if spec.edit is not None:
        weights = edited(spec.edit, weights, named, values)
    return weights.to(dtype)


def edited(
    edit: Edit, weights: Tensor, named: Mapping[str, Tensor], values: Mapping[str, Value]
) -> Tensor:
    """The weights `[B, H, L, M]` times the factors of their groups."""
    dtype = weights.dtype
    group = tensor_of(evaluate(edit.group, values, named, dtype), weights, dtype)
    group = group.expand(weights.shape[0], weights.shape[1], 1, weights.shape[3])
    here = [group == g for g in range(len(edit.factors))]
    masses = {
        str(m): (weights * x).sum(-1, keepdim=True) for m, x in zip(sym.masses, here, strict=False)
    }
    result = torch.zeros_like(weights)
    for factor, x in zip(edit.factors, here, strict=True):
        a = tensor_of(evaluate(factor, {**values, **masses}, named, dtype), weights, dtype)
        result = torch.where(x, weights * a, result)
    return result


def reference(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The attention that the spec describes, computed densely in the dtype of q; weights that are
    edited are in float32 at least, up to the product with the values.

    Args:
        q: queries `[B, Hq, L, D]`.
        k: keys `[B, Hkv, M, D]`; `Hq` is a multiple of `Hkv`.
        v: values `[B, Hkv, M, Dv]`.
        tensors: what the formulas read, in the order of `spec.tensors`.
        sizes: the integers named by `spec.sizes`.
        generator: draws the dropout, if the spec has any.

    Returns:
        `[B, Hq, L, Dv]` in the dtype of v.
    """
    if isinstance(spec, LinearSpec):
        return finished(spec, linear(spec, q, k, v, tensors, sizes), v, tensors, sizes)
    assert isinstance(spec, SoftmaxSpec)
    weights = reference_weights(spec, q, k, tensors, sizes)
    if spec.dropout:
        keep = torch.rand(weights.shape, generator=generator, device=weights.device) >= spec.dropout
        weights = weights * keep / (1.0 - spec.dropout)
    out = weights.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return finished(spec, out, v, tensors, sizes)


def finished(
    spec: Spec, out: Tensor, v: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """What follows the product with the values, `[B, Hq, L, Dv]`: the local term, the factor of the
    heads, the patch."""
    named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
    batch, heads, q_len, _ = out.shape
    values = index_values(spec, batch, heads, q_len, v.shape[2], sizes, out.device)
    if isinstance(spec, SoftmaxSpec) and spec.local is not None:
        out = out + _convolved(spec.local, v, heads, q_len, named)
    out = out * evaluate(spec.heads, values, named, out.dtype)
    if spec.patch is not None:
        where = tensor_of(evaluate(spec.patch.where, values, named, out.dtype), out, out.dtype)
        out = torch.where(where, named[spec.patch.tensor].to(out.dtype), out)
    return out


def _convolved(
    local: Local, v: Tensor, heads: int, q_len: int, named: Mapping[str, Tensor]
) -> Tensor:
    rows, columns = local.grid
    batch, kv_heads, length, dim = v.shape
    if q_len != length or length != local.extra + rows * columns:
        raise ShapeError(
            f"{q_len} queries and {length} keys are not {local.extra} and a grid of "
            f"{rows} x {columns}"
        )
    image = v[:, :, local.extra :].repeat_interleave(heads // kv_heads, dim=1)
    image = image.mT.reshape(batch, heads * dim, rows, columns)
    weight = named[local.weight].to(v.dtype)
    found = torch.nn.functional.conv2d(
        image,
        weight,
        named[local.bias].to(v.dtype),
        padding=weight.shape[-1] // 2,
        groups=heads * dim,
    )
    tokens = found.reshape(batch, heads, dim, rows * columns).mT
    return torch.nn.functional.pad(tokens, (0, 0, local.extra, 0))
