"""What only looks like attention, or is an attention with something in its way.

A near-miss changes one stage of `rewriter.testing.spellings.Attention`: the scores, the weights and
values, or the output. Each may be read as what it computes or be left alone; none may be taken for
the plain attention that it resembles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.testing.choices import Choices

__all__ = ["NEAR_MISSES", "NearMiss"]

Model = Any  # `spellings.Attention`, which imports this module


def _square(c: Choices) -> bool:
    """As many queries as keys, and so always."""
    return not c.cross


def _four(c: Choices) -> bool:
    """Scores are `[B, H, L, M]`."""
    return not c.is_flat


def _always(c: Choices) -> bool:
    return True


@dataclass(frozen=True)
class NearMiss:
    """One change; what is not changed stays as it is."""

    scores: Callable[[Model, Tensor, Tensor, Tensor, Tensor], Tensor] = lambda m, s, q, k, v: s
    """Of the scores before the softmax, from (module, scores, q, k, v)."""
    weights: Callable[[Model, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = (
        lambda m, w, q, k, v: (w, v)
    )
    """Of the weights and the values, from (module, weights, q, k, v)."""
    output: Callable[[Model, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]] = (
        lambda m, out, s, w, v: (out, ())
    )
    """Of the output `[B, H, L, D]`, from (module, output, scores, weights, values), and what else
    is returned."""
    needs: Callable[[Choices], bool] = _always

    def fits(self, c: Choices) -> bool:
        return c.product != "sdpa" and c.sink == "none" and self.needs(c)


def _flat(c: Choices, x: Tensor) -> Tensor:
    return x.flatten(0, 1) if c.is_flat else x


# --- scores ---------------------------------------------------------------------------------------


def _data_scale(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.clamp(-50, 50) * q.mean()


def _row_scale(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.clamp(-50, 50) * _flat(m.c, q).mean(-1, keepdim=True)


def _key_scale(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.clamp(-50, 50) * _flat(m.c, k).mean(-1).unsqueeze(-2)


def _second_product(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s + _flat(m.c, q.tanh()) @ _flat(m.c, k).mT


def _product_of_products(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.clamp(-50, 50) * (_flat(m.c, q) @ _flat(m.c, k).mT)


def _times_matrix(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.clamp(-50, 50) @ torch.eye(s.shape[-1], dtype=s.dtype).roll(1, 0)


def _talking_before(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,hg->bgqk", s.clamp(-50, 50), m.mixing)


def _softmax_twice(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1) * 3.0


def _less_other_maximum(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s - s.clamp(-50, 50).amax(-2, keepdim=True)


def _less_mean(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s - s.clamp(-50, 50).mean(-1, keepdim=True)


def _largest_only(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    least = s.topk(min(2, s.shape[-1]), dim=-1).values[..., -1:]
    return s.masked_fill(s < least, torch.finfo(s.dtype).min)


def _positive_only(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.masked_fill(s < 0, torch.finfo(s.dtype).min)


def _reversed_keys(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.flip(-1)


def _rolled_keys(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.roll(1, -1)


def _transposed(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.mT


def _first_head(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s[:, :1].expand_as(s)


def _other_heads(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.flip(1)


def _detached_scores(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.detach()


def _without_grad(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return s * 2.0


def _bias_without_grad(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        bias: Tensor = m.per_head(m.lean * 2.0, s)
    return s + bias * torch.arange(s.shape[-1])


def _one_row_written(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = s.clone()
    s[..., :1, :] = 0.0
    return s


def _view_written(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = s.clone(memory_format=torch.contiguous_format)
    s.view(-1, s.shape[-1]).mul_(0.5)
    return s


def _rounded_scores(m: Model, s: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s + s.clamp(-50, 50).round()


# --- weights and values ---------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]


def _masked_after(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w * (torch.arange(w.shape[-1]) < 2), v


def _filled_after(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w.masked_fill(torch.arange(w.shape[-1]) > 2, 0.0), v


def _renormalised(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    w = w * (torch.arange(w.shape[-1]) < 2)
    return w / w.sum(-1, keepdim=True).clamp_min(0.1), v


def _scaled_weights(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w * 2.0, v


def _gated_rows(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w * _flat(m.c, q).mean(-1, keepdim=True).sigmoid(), v


def _sharpened(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w.square(), v


def _rounded_weights(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w + (w.detach() * 8).round(), v


def _without_nan(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return torch.nan_to_num(w), v


def _talking_after(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return torch.einsum("bhqk,hg->bgqk", w, m.mixing), v


def _two_weights(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w + (_flat(m.c, q) @ _flat(m.c, k.tanh()).mT).softmax(-1), v


def _two_weights_multiplied(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w @ (_flat(m.c, k) @ _flat(m.c, k).mT).softmax(-1), v


def _more_of_itself(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w + torch.eye(w.shape[-2], w.shape[-1], dtype=w.dtype), v


def _transposed_weights(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w.mT, v


def _over_queries(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return (_flat(m.c, q) @ _flat(m.c, k).mT).softmax(-2), v


def _detached_weights(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w.detach(), v


def _dropped_weights(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return functional.dropout(functional.dropout(w, 0.5, m.training), 0.5, m.training), v


def _written_weights(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    w = w.clone()
    w[..., 0] = 0.5
    return w, v


def _dependent_values(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w, v * w.mean(-2).view(*v.shape[:-1], 1)


def _written_values(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    v = v.clone()
    v[:, :, :1] = 1.0
    return w, v


def _keys_left_out(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w[..., :-1], v[:, :, :-1]


def _keys_shifted(m: Model, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    return w[..., :-1], v[:, :, 1:]


# --- output ---------------------------------------------------------------------------------------

Output = tuple[Tensor, tuple[Tensor, ...]]


def _returned_weights(m: Model, out: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Output:
    return out, (w,)


def _returned_last_row(m: Model, out: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Output:
    return out, (w[..., -1, :],)


def _returned_scores(m: Model, out: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Output:
    return out, (s.clamp(-50, 50),)


def _gated_by_scores(m: Model, out: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Output:
    gate = s.clamp(-50, 50).mean(-1).view(*out.shape[:-1], 1)
    return out * gate.sigmoid(), ()


def _weights_used_twice(m: Model, out: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Output:
    return out + m.mixed(w, v.tanh()), ()


def _scores_used_twice(m: Model, out: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Output:
    return out + m.mixed((s.clamp(-50, 50) * 0.5).softmax(-1), v), ()


def _scores_written_between(m: Model, out: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Output:
    other = s.clamp(-50, 50)
    first = m.mixed(other.softmax(-1), v)
    other.add_(torch.arange(s.shape[-1]))
    return out + first + m.mixed(other.softmax(-1), v), ()


def _output_written(m: Model, out: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Output:
    out = out.clone()
    out[:, :, :1] = 0.0
    return out, ()


NEAR_MISSES: dict[str, NearMiss] = {
    "scale is computed": NearMiss(scores=_data_scale),
    "scale of each row": NearMiss(scores=_row_scale),
    "scale of each key": NearMiss(scores=_key_scale),
    "two products added": NearMiss(scores=_second_product),
    "two products multiplied": NearMiss(scores=_product_of_products),
    "scores times a matrix": NearMiss(scores=_times_matrix),
    "heads mixed before": NearMiss(scores=_talking_before, needs=_four),
    "softmax twice": NearMiss(scores=_softmax_twice),
    "maximum over queries": NearMiss(scores=_less_other_maximum),
    "less the mean": NearMiss(scores=_less_mean),
    "largest scores only": NearMiss(scores=_largest_only),
    "positive scores only": NearMiss(scores=_positive_only),
    "keys reversed": NearMiss(scores=_reversed_keys),
    "keys rolled": NearMiss(scores=_rolled_keys),
    "scores transposed": NearMiss(scores=_transposed, needs=_square),
    "first head for all": NearMiss(scores=_first_head, needs=_four),
    "heads reversed": NearMiss(scores=_other_heads, needs=_four),
    "scores detached": NearMiss(scores=_detached_scores),
    "scores without gradient": NearMiss(scores=_without_grad),
    "bias without gradient": NearMiss(scores=_bias_without_grad),
    "one row written": NearMiss(scores=_one_row_written),
    "view written": NearMiss(scores=_view_written),
    "scores rounded": NearMiss(scores=_rounded_scores),
    "mask after the softmax": NearMiss(weights=_masked_after),
    "filled after the softmax": NearMiss(weights=_filled_after),
    "renormalised": NearMiss(weights=_renormalised),
    "weights scaled": NearMiss(weights=_scaled_weights),
    "rows gated": NearMiss(weights=_gated_rows),
    "weights squared": NearMiss(weights=_sharpened),
    "weights rounded": NearMiss(weights=_rounded_weights),
    "NaN replaced": NearMiss(weights=_without_nan),
    "heads mixed after": NearMiss(weights=_talking_after, needs=_four),
    "two softmaxes added": NearMiss(weights=_two_weights),
    "two softmaxes multiplied": NearMiss(weights=_two_weights_multiplied),
    "identity added": NearMiss(weights=_more_of_itself),
    "weights transposed": NearMiss(weights=_transposed_weights, needs=_square),
    "softmax over queries": NearMiss(weights=_over_queries),
    "weights detached": NearMiss(weights=_detached_weights),
    "dropped twice": NearMiss(weights=_dropped_weights),
    "weights written": NearMiss(weights=_written_weights),
    "values depend on weights": NearMiss(weights=_dependent_values),
    "values written": NearMiss(weights=_written_values),
    "last key left out": NearMiss(weights=_keys_left_out),
    "values shifted": NearMiss(weights=_keys_shifted),
    "weights returned": NearMiss(output=_returned_weights),
    "last row returned": NearMiss(output=_returned_last_row),
    "scores returned": NearMiss(output=_returned_scores),
    "gated by scores": NearMiss(output=_gated_by_scores),
    "weights used twice": NearMiss(output=_weights_used_twice),
    "scores used twice": NearMiss(output=_scores_used_twice),
    "scores written between": NearMiss(output=_scores_written_between),
    "output written": NearMiss(output=_output_written),
}
"""By name. Scores are clamped where a mask of -inf or of the lowest number would only give NaN."""
