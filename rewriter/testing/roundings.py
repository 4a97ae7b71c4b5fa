"""The size of the terms that outputs and gradients are sums of, which round also where the sums
are small; for softmax attention and for linear attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from sympy import Expr
from torch import Tensor

from rewriter.evaluate import evaluate, index_values
from rewriter.linear import EPS_RMS, EPS_SUM, Features, LinearSpec
from rewriter.reference import reference_weights
from rewriter.reference_linear import features, linear_weights
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.testing.operands import Operands
from rewriter.verify.compare import SUMMED
from rewriter.verify.rows import Errors

__all__ = ["gradient_terms", "output_terms"]

_ROUNDINGS_OF_A_SCORE = 1.0
"""Half of one for the sum over the channels, and half of one for the scale."""
_ROUNDINGS_OF_A_TERM = 4.0
"""Of a product of features, a decay, and a sum over blocks and one over the blocks."""


def output_terms(spec: Spec, x: Operands) -> Errors:
    """The size at which roundings inside show in the output."""
    if isinstance(spec, LinearSpec):
        return _linear_output(spec, x)
    assert isinstance(spec, SoftmaxSpec)
    return _softmax_output(spec, x)


def gradient_terms(spec: Spec, x: Operands, cotangent: Tensor) -> list[Errors]:
    """The same for the gradients of q, k, v and the floating tensors."""
    if isinstance(spec, LinearSpec):
        return _linear_gradients(spec, x, cotangent)
    assert isinstance(spec, SoftmaxSpec)
    return _softmax_gradients(spec, x, cotangent)


def _errors(terms: Tensor, factor: float = 1.0) -> Errors:
    if not terms.numel():
        return Errors(0.0, 0.0)
    return Errors(factor * float(terms.mean()), factor * float(terms.max()))


def _shared(x: Tensor, kv_heads: int) -> Tensor:
    """Summed over the query heads of a key head."""
    return x.view(x.shape[0], kv_heads, -1, *x.shape[2:]).sum(2)


def _of_reads(x: Operands, score: Tensor) -> list[Errors]:
    """Floating tensors, each a sum of the terms of the scores."""
    total, most = float(score.sum()), float(score.max())
    read = [t for t in x.tensors if t.is_floating_point()]
    return [Errors(total / t.numel(), max(total / t.numel(), most)) for t in read]


# --- softmax --------------------------------------------------------------------------------------


def _softmax_output(spec: SoftmaxSpec, x: Operands) -> Errors:
    """A score of 1e4 rounds by 1e-3, which moves weight between keys that nearly tie: the output
    moves by that times how far the values of a row spread. Which of two orders of summation comes
    nearer to gold there is luck."""
    group = x.q.shape[1] // x.k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (x.k, x.v))
    p = reference_weights(spec, x.q, x.k, x.tensors, x.sizes).nan_to_num()
    spread = (p @ v.square() - (p @ v).square()).clamp_min(0.0).sqrt()
    score = (x.q @ k.mT).abs().amax(-1, keepdim=True) * _largest(spec, spec.scale, x)
    return _errors(score * spread, _ROUNDINGS_OF_A_SCORE / SUMMED["output"])


def _softmax_gradients(spec: SoftmaxSpec, x: Operands, cotangent: Tensor) -> list[Errors]:
    """The gradient of a score is `p (dp - sum of p dp)`: where one key has all the weight it is a
    difference of equal numbers. And weights that are computed again from their logsumexp carry the
    rounding of numbers of the size of the scores."""
    kv_heads, group = x.k.shape[1], x.q.shape[1] // x.k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (x.k, x.v))
    p = reference_weights(spec, x.q, x.k, x.tensors, x.sizes).abs()
    dp = (cotangent @ v.mT).abs()
    score = p * (dp + (p * dp).sum(-1, keepdim=True))  # [B, H, L, M]
    scale = _largest(spec, spec.scale, x)
    dq, dk, dv = score @ k.abs() * scale, score.mT @ x.q.abs() * scale, p.mT @ cotangent.abs()
    again = max(1.0, float((x.q @ k.mT).abs().max()) * scale / SUMMED["gradient"])
    found = [_errors(t, again) for t in (dq, _shared(dk, kv_heads), _shared(dv, kv_heads))]
    return found + _of_reads(x, score)


def _largest(spec: Spec, scale: Expr, x: Operands) -> float:
    """The largest absolute value of a scale."""
    batch, heads, q_len, _ = x.q.shape
    named = dict(zip((t.name for t in spec.tensors), x.tensors, strict=True))
    values = index_values(spec, batch, heads, q_len, x.k.shape[2], x.sizes, x.q.device)
    found = evaluate(scale, values, named, torch.float64)
    return float(torch.as_tensor(found).abs().max())


# --- linear ---------------------------------------------------------------------------------------


def _linear_output(spec: LinearSpec, x: Operands) -> Errors:
    """Features of both signs cancel in a product, and products in a state."""
    group = x.q.shape[1] // x.v.shape[1]
    weights, _, _, _ = _absolute(spec, x)
    norm = _norm(spec, x)
    terms = weights @ x.v.abs().repeat_interleave(group, 1) / norm
    return _errors(terms, _ROUNDINGS_OF_A_TERM / SUMMED["output"])


def _linear_gradients(spec: LinearSpec, x: Operands, cotangent: Tensor) -> list[Errors]:
    """As for the output, through maps whose slope is about one."""
    kv_heads, group = x.k.shape[1], x.q.shape[1] // x.k.shape[1]
    v = x.v.repeat_interleave(group, 1)
    weights, factor, a, c = _absolute(spec, x)
    norm = _norm(spec, x)
    dp = (cotangent.abs() / norm) @ v.abs().mT
    if spec.norm != "none":  # the normaliser has a gradient of the same size
        dp = dp + (dp * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp_min(
            EPS_SUM
        )
    named = dict(zip((t.name for t in spec.tensors), x.tensors, strict=True))
    dq = _through(spec.q_map, named, (dp * factor) @ c)
    dk = _through(spec.k_map, named, _shared((dp * factor).mT @ a, kv_heads))
    dv = _shared(weights.mT @ (cotangent.abs() / norm), kv_heads)
    if spec.near is not None:
        size = _largest(spec, spec.near.scale, x)
        near = dp * linear_weights(spec, x.q, x.k, x.tensors, x.sizes).abs() * size
        dq = dq + near @ x.k.abs().repeat_interleave(group, 1)
        dk = dk + _shared(near.mT @ x.q.abs(), kv_heads)
    return [_errors(t) for t in (dq, dk, dv)] + _of_reads(x, dp * weights)


def _absolute(spec: LinearSpec, x: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights `[B, H, L, M]` with every feature positive; what they hold besides the features;
    and the features of queries and keys."""
    named = dict(zip((t.name for t in spec.tensors), x.tensors, strict=True))
    group = x.q.shape[1] // x.k.shape[1]
    a = features(x.q, spec.q_map, named).abs()
    c = features(x.k, spec.k_map, named).abs().repeat_interleave(group, 1)
    bare = replace(spec, q_map=Features(), k_map=Features(), near=None)
    one: Callable[[Tensor], Tensor] = lambda t: torch.ones_like(t[..., :1])  # noqa: E731
    factor = linear_weights(bare, one(x.q), one(x.k), x.tensors, x.sizes).abs()
    weights = torch.maximum(
        factor * (a @ c.mT), linear_weights(spec, x.q, x.k, x.tensors, x.sizes).abs()
    )
    return weights, factor, a, c


def _norm(spec: LinearSpec, x: Operands) -> Tensor:
    """What the sums are divided by, `[B, H, L, 1]`, or one number."""
    weights = linear_weights(spec, x.q, x.k, x.tensors, x.sizes)
    if spec.norm == "sum":
        return weights.sum(-1, keepdim=True).abs() + EPS_SUM
    if spec.norm == "rms":
        out = weights @ x.v.repeat_interleave(x.q.shape[1] // x.v.shape[1], 1)
        return (out.square().mean(dim=(1, 3), keepdim=True) + EPS_RMS).sqrt()
    return torch.ones((), dtype=weights.dtype, device=weights.device)


def _through(phi: Features, named: dict[str, Tensor], grad: Tensor) -> Tensor:
    """Back from features to rows: `exp` has two features for each channel."""
    if phi.map == "exp":
        up, down = grad.chunk(2, dim=-1)
        grad = up + down
    if not phi.weight:
        return grad
    return torch.einsum("bhnp,hdp->bhnd", grad, named[phi.weight].abs().to(grad.dtype))
