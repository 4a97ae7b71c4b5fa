"""The meaning of a `Route`: which keys it lets a query see, as a dense boolean tensor."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import ShapeError
from rewriter.evaluate import Value, evaluate, tensor_of
from rewriter.spec import SoftmaxSpec
from rewriter.stages import Route
from rewriter.symbols import Formula

__all__ = ["chosen", "countable", "key_terms", "routed_keys"]


def key_terms(mask: Formula) -> Formula:
    """The terms of a mask that do not depend on the query: which keys are there at all."""
    return sympy.And(*(t for t in sympy.And.make_args(mask) if not t.has(sym.q)))


def countable(
    spec: SoftmaxSpec, named: Mapping[str, Tensor], values: Mapping[str, Value], like: Tensor
) -> Tensor:
    """The keys that are counted, `[B, H, 1, M]`."""
    seen = evaluate(key_terms(spec.mask), values, named, like.dtype)
    shape = (int(values["B"]), int(values["H"]), 1, int(values["M"]))
    return tensor_of(seen, like, like.dtype).expand(shape)


def routed_keys(
    spec: SoftmaxSpec,
    q: Tensor,
    k: Tensor,
    named: Mapping[str, Tensor],
    values: Mapping[str, Value],
) -> Tensor:
    """True where the route lets query q see key k, `[B, H, L, M]`; the mask comes on top."""
    route = spec.route
    assert route is not None
    wide = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
    there = countable(spec, named, values, q)
    if route.by == "region":
        return _by_region(route, q.float(), wide, there)
    position = tensor_of(evaluate(route.position, values, named, q.dtype), q, q.dtype).long()
    return _by_query(route, q.float(), wide, there, position)


def chosen(affinity: Tensor, count: Tensor | int) -> Tensor:
    """True at the largest `count` of the last dimension that are not minus infinity; of equal ones
    the first."""
    order = affinity.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count) & (affinity > -torch.inf)


def _by_query(route: Route, q: Tensor, k: Tensor, there: Tensor, position: Tensor) -> Tensor:
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    number = there.long().cumsum(-1) - 1  # [B, H, 1, M]
    position = position.expand(batch, heads, q_len, 1).clamp(0, kv_len - 1)
    last = number.mT.gather(2, position)  # [B, H, L, 1]
    block = number.clamp_min(0) // route.block
    own = last.clamp_min(0) // route.block
    count = int(block.max()) + 1
    member = (block == torch.arange(count, device=q.device)[:, None]) & there  # [B, H, C, M]
    means = member.float() @ k / member.sum(-1, keepdim=True).clamp_min(1)
    affinity = q @ means.mT  # [B, H, L, C]
    earlier = torch.arange(count, device=q.device) < own
    best = chosen(affinity.masked_fill(~earlier, -torch.inf), route.topk - 1)
    of_key = block.expand(batch, heads, q_len, kv_len)
    seen = best.gather(-1, of_key) | (of_key == own)
    return (seen | (last < route.dense_below)) & there


def _by_region(route: Route, q: Tensor, k: Tensor, there: Tensor) -> Tensor:
    batch, extra, length = q.shape[0], route.extra, q.shape[2]
    (rows, columns), (high, wide) = route.grid, route.region
    if length != k.shape[2] or length != extra + rows * columns:
        raise ShapeError(
            f"{length} queries and {k.shape[2]} keys are not {extra} and a grid of "
            f"{rows} x {columns}"
        )
    token = torch.arange(rows * columns, device=q.device)
    down, across = route.region_counts
    region = token // columns // high * across + token % columns // wide
    member = region == torch.arange(down * across, device=q.device)[:, None]  # [R, N]
    mean_q = member.float() @ q[:, :, extra:] / member.sum(-1, keepdim=True)
    visible = member & there[..., extra:]  # [B, H, R, N]
    counts = visible.sum(-1, keepdim=True)
    mean_k = visible.float() @ k[:, :, extra:] / counts.clamp_min(1)
    affinity = (mean_q @ mean_k.mT).sum(1)  # [B, R, R]
    affinity = affinity.masked_fill(~visible.any(-1).any(1)[:, None], -torch.inf)
    best = chosen(affinity, route.topk)[:, region][:, :, region]  # [B, N, N]
    seen = torch.ones(batch, length, length, dtype=torch.bool, device=q.device)
    seen[:, extra:, extra:] = best
    dense = there.sum(-1, keepdim=True) <= route.dense_below
    return (seen[:, None] | dense) & there
