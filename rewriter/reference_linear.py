"""The meaning of a `LinearSpec`: its weights as a dense matrix, in float32 or float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from rewriter.errors import ShapeError
from rewriter.evaluate import Value, evaluate, index_values, tensor_of
from rewriter.linear import EPS_RMS, EPS_SUM, POSITIVE, Features, LinearSpec, Near

__all__ = ["features", "linear", "linear_weights", "ordinals"]

_LEAST = 1e-12


def features(x: Tensor, phi: Features, named: Mapping[str, Tensor]) -> Tensor:
    """φ of the rows of x `[B, H, N, D]`, `[B, H, N, P]` in float32 or float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if phi.weight:
        x = torch.einsum("bhnd,hdp->bhnp", x, named[phi.weight].to(x.dtype))
    if phi.bias:
        x = x + named[phi.bias].to(x.dtype)[:, None]
    match phi.map:
        case "silu":
            x = x * torch.sigmoid(x)
        case "relu":
            x = torch.relu(x)
        case "elu":
            x = torch.nn.functional.elu(x) + 1.0
        case "exp":
            up = x - x.amax(-1, keepdim=True)
            down = x.amin(-1, keepdim=True) - x
            x = torch.cat([up, down], dim=-1).exp()
    return x.clamp_min(_LEAST) if phi.map in POSITIVE else x


def ordinals(
    spec: LinearSpec, values: Mapping[str, Value], named: Mapping[str, Tensor], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Which keys take part, `[B, H, 1, M]`; the number of each among them; and, for each query,
    `[B, H, L, 1]`, the number of the last one up to its position, -1 if there is none."""
    kv_len = int(values["M"])
    seen = tensor_of(evaluate(spec.seen, values, named, like.dtype), like, like.dtype)
    seen = seen.expand(int(values["B"]), int(values["H"]), 1, kv_len)
    number = seen.long().cumsum(-1) - 1
    if not kv_len:
        return seen, number, number.new_full((*seen.shape[:2], int(values["L"]), 1), -1)
    if spec.position is None:
        last = number[..., -1:].expand(-1, -1, int(values["L"]), 1)
        return seen, number, last
    position = evaluate(spec.position, values, named, like.dtype)
    position = (
        tensor_of(position, like, like.dtype).long().expand(*seen.shape[:2], int(values["L"]), 1)
    )
    found = number.mT.expand(-1, -1, -1, 1).gather(2, position.clamp(0, kv_len - 1))
    return seen, number, torch.where(position < 0, -1, found)


def linear_weights(
    spec: LinearSpec,
    q: Tensor,
    k: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Tensor:
    """The weights w(q, k) `[B, H, L, M]` before any normaliser, those of near keys included."""
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if heads % kv_heads:
        raise ShapeError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    named = dict(zip((t.name for t in spec.tensors), tensors, strict=True))
    values = index_values(spec, batch, heads, q_len, kv_len, sizes, q.device)
    a, c = features(q, spec.q_map, named), features(k, spec.k_map, named)
    dtype = a.dtype
    weights = a @ c.repeat_interleave(heads // kv_heads, dim=1).mT  # [B, H, L, M]
    weights = weights * evaluate(spec.query_weight, values, named, dtype)
    weights = weights * evaluate(spec.key_weight, values, named, dtype)
    seen, number, last = ordinals(spec, values, named, weights)
    visible = seen.expand_as(weights)
    if spec.position is not None:
        distance = last - number
        visible = visible & (distance >= 0)
        decay = evaluate(spec.decay, values, named, dtype)
        weights = weights * torch.exp(decay * distance.clamp_min(0).to(dtype))
    weights = weights.masked_fill(~visible, 0.0)
    if spec.near is not None:
        near = visible & (last - number < spec.near.window)
        weights = torch.where(near, _near(spec.near, near, q, k, named, values), weights)
    return weights


def _near(
    near: Near,
    here: Tensor,
    q: Tensor,
    k: Tensor,
    named: Mapping[str, Tensor],
    values: Mapping[str, Value],
) -> Tensor:
    """`f e^(z - c)` of every key, `[B, H, L, M]`; c is the largest score of a near key."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    product = q.to(dtype) @ k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT
    scaled = product * evaluate(near.scale, values, named, dtype)
    score = evaluate(near.score, {**values, "s": scaled}, named, dtype)
    score = tensor_of(score, q, dtype).expand_as(product).masked_fill(~here, -torch.inf)
    largest = pad(score, (0, 1), value=-torch.inf).amax(-1, keepdim=True)  # there may be no key
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    return torch.exp(score - largest) * evaluate(near.factor, values, named, dtype)


def linear(
    spec: LinearSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Tensor:
    """The attention `[B, Hq, L, Dv]` in the dtype of v, before the factor of the heads."""
    weights = linear_weights(spec, q, k, tensors, sizes)
    values = v.to(weights.dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out = weights @ values
    if spec.norm == "sum":
        out = out / (weights.sum(-1, keepdim=True) + EPS_SUM)
    elif spec.norm == "rms":
        out = out * torch.rsqrt(out.square().mean(dim=(1, 3), keepdim=True) + EPS_RMS)
    return out.to(v.dtype)
