"""One step of chunkwise linear attention (Lightning Attention-2, arXiv 2401.04658), as a function
that autograd can follow.

With the numbers n of keys among those that take part, w the window, `n0` and `n1` those of the last
key before and in the step, the state before it is

    S = Σ_{n <= n0 - w} e^(decay (n0 - w - n)) key_weight φ(k) v

and every exponent is <= 0. Keys that are no further than the window are read with their softmax
weights; the keys that leave it during the step are read one by one, and then join the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.evaluate import Value, evaluate, tensor_of
from rewriter.kernels.torch_linear_call import Block, Call, Step, Vectors
from rewriter.linear import EPS_RMS, EPS_SUM, Features, Near
from rewriter.reference_linear import features

__all__ = ["Parts", "advance"]


@dataclass(frozen=True)
class Parts:
    """What one step reads; each of them may require a gradient."""

    q: Tensor
    """`[B, Hkv, G, rows, D]`."""
    k: Tensor
    """`[B, Hkv, 1 or G, n, D]`."""
    v: Tensor
    """`[B, Hkv, 1 or G, n, Dv]`."""
    vectors: Vectors
    named: Mapping[str, Tensor]
    state: Tensor | None
    """`[B, Hkv, 1 or G, P, Dv]`, with a column more for the sum of the weights; None: zero."""


def advance(call: Call, step: Step, block: Block, x: Parts) -> tuple[Tensor | None, Tensor | None]:
    """The outputs `[B, Hq, rows, Dv]` of the queries of a step, None if there are none; and the
    state after it."""
    keys, values = None, x.v.to(call.dtype)
    if call.spec.norm == "sum":
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    if block.far:
        keys = _features(x.k[..., : block.far, :], call.spec.k_map, x.named)
    out = None
    if step.q1 > step.q0:
        out = _finished(call, x, _attended(call, step, block, x, keys, values))
    return out, x.state if keys is None else _absorbed(call, step, block, x, keys, values)


def _features(x: Tensor, phi: Features, named: Mapping[str, Tensor]) -> Tensor:
    """φ of rows `[B, Hkv, G, n, D]` with a matrix for each key head."""
    return torch.unflatten(features(x.flatten(2, 3), phi, named), 2, x.shape[2:4])


def _times(a: Tensor, c: Tensor) -> Tensor:
    """`a @ c`; where c is one for a group of heads, their rows are those of one product."""
    if a.shape[2] == 1 or c.shape[2] > 1:
        return a @ c
    return torch.unflatten(a.flatten(2, 3) @ c.squeeze(2), 2, a.shape[2:4])


# --- outputs --------------------------------------------------------------------------------------


def _attended(
    call: Call, step: Step, block: Block, x: Parts, keys: Tensor | None, values: Tensor
) -> Tensor:
    """`Σ w v` of every query, `[B, Hkv, G, rows, E]`."""
    phi = torch.unflatten(features(x.q.flatten(1, 2), call.spec.q_map, x.named), 1, x.q.shape[1:3])
    if "query_weight" in x.vectors:
        phi = phi * x.vectors["query_weight"]
    last = call.last(step)
    total = values.new_zeros(*phi.shape[:4], values.shape[-1])
    if x.state is not None:
        since = last - (call.number(step.k0 - 1) - call.window)
        total = total + _times(_decayed(phi, x.vectors, since), x.state)
    if keys is not None:
        far = slice(0, block.far)
        distance = last - block.number[..., far]
        weights = _times(phi, keys.mT)
        if "key_weight" in x.vectors:
            weights = weights * _until(x.vectors["key_weight"], block.far)
        hidden = _hidden(block, far, distance < call.window)
        weights = _decayed(weights, x.vectors, distance).masked_fill(hidden, 0.0)
        total = total + _times(weights, values[..., far, :])
    if call.spec.near is not None:
        distance = last - block.number
        hidden = _hidden(block, slice(None), (distance < 0) | (distance >= call.window))
        total = total + _times(_near(call, call.spec.near, step, block, x, hidden), values)
    return total


def _until(x: Tensor, count: int) -> Tensor:
    return x[..., :count] if x.shape[-1] > 1 else x


def _decayed(x: Tensor, vectors: Vectors, distance: Tensor) -> Tensor:
    if "decay" not in vectors:
        return x
    return x * torch.exp(vectors["decay"] * distance.clamp_min(0).to(x.dtype))


def _hidden(block: Block, part: slice, hidden: Tensor) -> Tensor:
    return hidden if block.seen is None else hidden | ~block.seen[..., part]


def _near(call: Call, near: Near, step: Step, block: Block, x: Parts, hidden: Tensor) -> Tensor:
    """`f e^(z - c)` of the keys near a query, 0 of the others, `[B, Hkv, G, rows, n]`."""
    score = _times(x.q.to(call.dtype), x.k.to(call.dtype).mT)
    if "scale" in x.vectors:
        score = score * x.vectors["scale"]
    if near.score != sym.s:
        shape = score.shape
        values: dict[str, Value] = {**call.indices, "s": score.flatten(1, 2)}
        values["q"] = cast(Tensor, call.indices["q"])[step.q0 : step.q1]
        values["k"] = _places(call, block)
        found = tensor_of(evaluate(near.score, values, x.named, call.dtype), score, call.dtype)
        score = found.to(call.dtype).expand(shape[0], call.heads, *shape[3:])
        score = torch.unflatten(score, 1, shape[1:3])
    score = score.masked_fill(hidden, -torch.inf)
    largest = score.amax(-1, keepdim=True)
    weights = torch.exp(score - torch.where(largest == -torch.inf, 0.0, largest))
    return weights * x.vectors["factor"] if "factor" in x.vectors else weights


def _places(call: Call, block: Block) -> Tensor:
    """The index k of every key of the block, broadcastable to `[B, Hq, rows, n]`."""
    if isinstance(block.at, slice):
        return cast(Tensor, call.indices["k"])[block.at]
    return block.at.flatten(1, 2)


def _finished(call: Call, x: Parts, total: Tensor) -> Tensor:
    if call.spec.norm == "sum":
        total = total[..., :-1] / (total[..., -1:] + EPS_SUM)
    elif call.spec.norm == "rms":
        total = total * torch.rsqrt(total.square().mean((1, 2, 4), keepdim=True) + EPS_RMS)
    if "heads" in x.vectors:
        total = total * x.vectors["heads"]
    return total.flatten(1, 2)


# --- state ----------------------------------------------------------------------------------------


def _absorbed(
    call: Call, step: Step, block: Block, x: Parts, keys: Tensor, values: Tensor
) -> Tensor:
    """The state after the keys that left the window during the step."""
    far = slice(0, block.far)
    end = call.number(step.k1 - 1)
    age = end - call.window - block.number[..., far]
    keys = _decayed(keys, x.vectors, age.mT)
    if "key_weight" in x.vectors:
        keys = keys * _until(x.vectors["key_weight"], block.far).mT
    if block.seen is not None:
        keys = keys.masked_fill(~(block.seen[..., far] & (age >= 0)).mT, 0.0)
    new = keys.mT @ values[..., far, :]
    if x.state is None:
        return new
    since = end - call.number(step.k0 - 1)
    since = call.folded(since) if isinstance(since, int) else since
    return new + _decayed(x.state, x.vectors, since)
