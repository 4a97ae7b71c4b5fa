"""Each spelling of attention is read as the formula that it computes, and computes the same.

All spellings stand in one module, so that one capture serves the whole table; the path of a site
ends with the name of its spelling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

import rewriter
from rewriter.errors import Declined
from rewriter.passes.heads import HeadScale
from rewriter.report import Report, SiteReport

B, H, L, D = 2, 2, 7, 4
LOWEST = torch.finfo(torch.float64).min
PLAIN = "softmax( s ) · v, s = q·k/2"
PADDED = "softmax( s | pad[b, k] ) · v, s = q·k/2"
CAUSAL = "softmax( s | k ≤ q ) · v, s = q·k/2"

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The output `[B, H, L, D]` from q, k, v `[B, H, L, D]` and the padding mask `[B, L]`."""

SPELLINGS: dict[str, tuple[Attend, str]] = {}
"""The attention, and the formula that has to be read."""
LEFT_ALONE: dict[str, tuple[Attend, str, str]] = {}
"""The attention, the kind of its softmax, and the reason."""


def spelling(formula: str) -> Callable[[Attend], Attend]:
    def add(attend: Attend) -> Attend:
        SPELLINGS[attend.__name__] = attend, formula
        return attend

    return add


def left_alone(kind: str, reason: str) -> Callable[[Attend], Attend]:
    def add(attend: Attend) -> Attend:
        LEFT_ALONE[attend.__name__] = attend, kind, reason
        return attend

    return add


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.5


def keys(pad: Tensor) -> Tensor:
    return pad[:, None, None, :]


def flat(*tensors: Tensor) -> list[Tensor]:
    """`[B · H, L, D]`."""
    return [x.reshape(-1, x.shape[-2], x.shape[-1]) for x in tensors]


def bool_causal(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()


def sink_column(q: Tensor) -> Tensor:
    sink = torch.tensor([0.3, -0.7], dtype=q.dtype).reshape(1, -1, 1, 1)
    return sink.expand(q.shape[0], -1, q.shape[2], -1)


# --- where the scale stands -----------------------------------------------------------------------


@spelling(PLAIN)
def scale_on_q(q, k, v, pad):
    return ((q * 0.5) @ k.mT).softmax(-1) @ v


@spelling(PLAIN)
def scale_on_q_left(q, k, v, pad):
    return ((0.5 * q) @ k.mT).softmax(-1) @ v


@spelling(PLAIN)
def scale_divides_q(q, k, v, pad):
    return ((q / math.sqrt(D)) @ k.mT).softmax(-1) @ v


@spelling(PLAIN)
def scale_on_k(q, k, v, pad):
    return (q @ (k * 0.5).mT).softmax(-1) @ v


@spelling(PLAIN)
def scale_on_transposed_k(q, k, v, pad):
    return (q @ (k.transpose(-2, -1) * 0.5)).softmax(-1) @ v


@spelling("softmax( s ) · v, s = 0.5·q·k")
def scale_on_both_as_roots(q, k, v, pad):
    return ((q * 0.5**0.5) @ (k * 0.5**0.5).mT).softmax(-1) @ v


@spelling(PLAIN)
def scale_divides_product(q, k, v, pad):
    return (q @ k.mT / math.sqrt(D)).softmax(-1) @ v


@spelling(PLAIN)
def scale_is_a_tensor(q, k, v, pad):
    return (q @ k.mT / torch.sqrt(torch.tensor(float(D)))).softmax(-1) @ v


@spelling(PLAIN)
def scale_is_a_tensor_on_q(q, k, v, pad):
    return ((q / torch.sqrt(torch.tensor(float(D)))) @ k.mT).softmax(-1) @ v


@spelling("softmax( s ) · v, s = 2.01375·q·k")
def scale_is_an_exponential(q, k, v, pad):
    return (q @ k.mT * torch.tensor(0.7, dtype=q.dtype).exp()).softmax(-1) @ v


@spelling("softmax( s ) · v, s = tensor_constant0[h]·q·k")
def scale_of_each_head(q, k, v, pad):
    return (q @ k.mT * torch.tensor([0.5, 0.25], dtype=q.dtype).view(1, H, 1, 1)).softmax(-1) @ v


# --- how the products are spelled -----------------------------------------------------------------


@spelling("softmax( s - 1e+30·(0 if pad[b, k] else 1)·(0 if pad[b, q] else 1) ) · v, s = q·k/2")
def padding_of_both_as_a_product(q, k, v, pad):
    hidden = 1.0 - pad.to(q.dtype)[..., None]
    return (scores(q, k) + ((hidden @ hidden.mT) * -1e30)[:, None]).softmax(-1) @ v


@spelling(PADDED)
def padding_as_a_comparison_of_a_comparison(q, k, v, pad):
    hidden = (pad.long() == 0).long() > 0
    return scores(q, k).masked_fill(keys(hidden), LOWEST).softmax(-1) @ v


@spelling(PLAIN)
def keys_times_queries(q, k, v, pad):
    return (k @ q.mT * 0.5).transpose(-1, -2).softmax(-1) @ v


@spelling(PLAIN)
def values_times_weights(q, k, v, pad):
    return (v.mT @ scores(q, k).softmax(-1).mT).mT


@spelling(PLAIN)
def bmm(q, k, v, pad):
    fq, fk, fv = flat(q, k, v)
    return torch.bmm((torch.bmm(fq, fk.transpose(1, 2)) * 0.5).softmax(-1), fv).view(q.shape)


@spelling(PADDED)
def bmm_with_a_mask_on_a_view(q, k, v, pad):
    n, _, m, _ = q.shape
    fq, fk, fv = flat(q, k, v)
    mask = torch.zeros(n, 1, m, m, dtype=q.dtype).masked_fill(~keys(pad), LOWEST)
    score = (torch.bmm(fq, fk.transpose(1, 2)) * 0.5).view(n, H, m, m) + mask
    return torch.bmm(F.softmax(score.view(n * H, m, m), dim=-1), fv).view(q.shape)


@spelling(
    "softmax( s + (cumsum[b, k] - 1)·tensor_constant0[h]·(1 if pad[b, k] else 0) | k ≤ q ) · v"
    ", s = q·k/2"
)
def baddbmm_adds_alibi(q, k, v, pad):
    n, _, m, _ = q.shape
    fq, fk = flat(q, k)
    slopes = torch.tensor([0.5, 0.25], dtype=q.dtype)
    position = ((pad.cumsum(-1) - 1) * pad)[:, None, :]
    alibi = (slopes[..., None] * position).reshape(n * H, 1, m)
    score = alibi.baddbmm(batch1=fq, batch2=fk.transpose(1, 2), beta=1.0, alpha=0.5).view(
        n, H, m, m
    )
    return (score + torch.full((m, m), LOWEST, dtype=q.dtype).triu(1)).softmax(-1) @ v


@spelling(PLAIN)
def baddbmm_ignores_its_input(q, k, v, pad):
    fq, fk, fv = flat(q, k, v)
    unset = torch.empty(fq.shape[0], fq.shape[1], fk.shape[1], dtype=q.dtype)
    score = torch.baddbmm(unset, fq, fk.transpose(-1, -2), beta=0, alpha=0.5)
    return torch.bmm(score.softmax(-1), fv).view(q.shape)


@spelling(PLAIN)
def einsum(q, k, v, pad):
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.5).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@spelling(PLAIN)
def einsum_with_heads_third(q, k, v, pad):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (torch.einsum("blhd,bshd->bhls", q, k) * 0.5).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", weights, v).transpose(1, 2)


@spelling(PLAIN)
def einsum_with_rows_before_heads(q, k, v, pad):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (torch.einsum("blhd,bshd->blhs", q, k) * 0.5).softmax(-1)
    return torch.einsum("blhs,bshd->blhd", weights, v).transpose(1, 2)


@spelling(PLAIN)
def einsum_with_spaces(q, k, v, pad):
    weights = (torch.einsum("b h l d, b h s d -> b h l s", q, k) * 0.5).softmax(-1)
    return torch.einsum("b h l s, b h s d -> b l h d", weights, v).transpose(1, 2)


@spelling(PLAIN)
def einsum_with_an_ellipsis(q, k, v, pad):
    weights = (torch.einsum("...id,...jd->...ij", q, k) * 0.5).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


@spelling("softmax( s + matmul[b, h, q, k]/4 ) · v, s = q·k/2")
def a_second_product_in_the_scores(q, k, v, pad):
    return (scores(q, k) + k @ q.mT * 0.25).softmax(-1) @ v


# --- how the softmax is spelled -------------------------------------------------------------------


@spelling(PLAIN)
def softmax_in_float32(q, k, v, pad):
    return F.softmax(scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(PLAIN)
def softmax_method_in_float32(q, k, v, pad):
    return scores(q, k).softmax(-1, dtype=torch.float32).type_as(q) @ v


@spelling(PLAIN)
def softmax_of_cast_scores(q, k, v, pad):
    return F.softmax(scores(q, k).float(), dim=-1).type_as(q) @ v


@spelling(PLAIN)
def special_softmax(q, k, v, pad):
    return torch.special.softmax(scores(q, k), -1) @ v


@spelling(PLAIN)
def inner_softmax(q, k, v, pad):
    return torch._softmax(scores(q, k), -1, False) @ v


@spelling(PLAIN)
def softmax_of_a_positive_dim(q, k, v, pad):
    return F.softmax(scores(q, k), dim=3) @ v


@spelling(PLAIN)
def softmax_less_the_row_maximum(q, k, v, pad):
    score = scores(q, k)
    return (score - score.max(-1, keepdim=True).values).softmax(-1) @ v


@spelling(PLAIN)
def softmax_less_the_detached_row_maximum(q, k, v, pad):
    score = scores(q, k)
    return (score - score.amax(-1, keepdim=True).detach()).softmax(-1) @ v


@spelling(PLAIN)
def dropout_of_zero(q, k, v, pad):
    return F.dropout(scores(q, k).softmax(-1), 0.0, True) @ v


@spelling(PLAIN)
def dropout_while_evaluating(q, k, v, pad):
    return F.dropout(scores(q, k).softmax(-1), 0.5, False) @ v


@spelling("softmax( 5·tanh(s/5) ) · v, s = q·k/2")
def soft_cap(q, k, v, pad):
    return (torch.tanh(scores(q, k) / 5.0) * 5.0).softmax(-1) @ v


@spelling("softmax( min(max(s, -1), 1) ) · v, s = q·k/2")
def clamped_scores(q, k, v, pad):
    return scores(q, k).clamp(-1, 1).softmax(-1) @ v


# --- how keys are hidden --------------------------------------------------------------------------


@spelling(PADDED)
def mask_added(q, k, v, pad):
    return (scores(q, k) + (1.0 - keys(pad).to(q.dtype)) * LOWEST).softmax(-1) @ v


@spelling(PADDED)
def mask_subtracted(q, k, v, pad):
    return (scores(q, k) - 1e30 * (~keys(pad)).to(q.dtype)).softmax(-1) @ v


@spelling(PADDED)
def infinite_mask_added(q, k, v, pad):
    return (scores(q, k) + torch.zeros(1).to(q.dtype).masked_fill(~keys(pad), -math.inf)).softmax(
        -1
    ) @ v


@spelling("softmax( s + (0 if pad[b, k] else -10000) ) · v, s = q·k/2")
def soft_mask_added(q, k, v, pad):
    return (scores(q, k) + (1.0 - keys(pad).to(q.dtype)) * -10000.0).softmax(-1) @ v


@spelling(PADDED)
def mask_by_where(q, k, v, pad):
    return torch.where(keys(pad), scores(q, k), LOWEST).softmax(-1) @ v


@spelling(PADDED)
def mask_by_where_with_a_tensor(q, k, v, pad):
    lowest = torch.full([], LOWEST, dtype=q.dtype)
    return torch.where(keys(pad), scores(q, k), lowest).softmax(-1) @ v


@spelling(PADDED)
def mask_filled(q, k, v, pad):
    return scores(q, k).masked_fill(~keys(pad), -torch.inf).softmax(-1) @ v


@spelling(PADDED)
def mask_filled_where_zero(q, k, v, pad):
    return scores(q, k).masked_fill(keys(pad).long() == 0, LOWEST).softmax(-1) @ v


@spelling(PADDED)
def mask_filled_in_place(q, k, v, pad):
    score = scores(q, k)
    score.masked_fill_(~keys(pad), -torch.inf)
    return score.softmax(-1) @ v


@spelling(PADDED)
def mask_assigned(q, k, v, pad):
    score = scores(q, k)
    score[~keys(pad).expand_as(score)] = -torch.inf
    return score.softmax(-1) @ v


@spelling(PADDED)
def scores_changed_in_place(q, k, v, pad):
    score = q @ k.mT
    score.div_(2.0)
    score += torch.where(keys(pad), 0.0, -torch.inf)
    return score.softmax(-1) @ v


@spelling(PADDED)
def mask_by_an_einsum_of_one_tensor(q, k, v, pad):
    hidden = (~keys(pad)).expand(-1, q.shape[2], -1, -1).permute(1, 3, 0, 2).to(q.dtype)
    return (scores(q, k) - 1e30 * torch.einsum("qkbh->bhqk", hidden)).softmax(-1) @ v


@spelling("softmax( s | ¬(q ≠ k ∧ ¬pad[b, k]) ) · v, s = q·k/2")
def mask_by_a_sum_of_truths(q, k, v, pad):
    hidden = (~keys(pad)).to(q.dtype) - torch.eye(q.shape[2], k.shape[2]).to(q.dtype)
    return scores(q, k).masked_fill(hidden > 0, LOWEST).softmax(-1) @ v


@spelling("softmax( s | q - 2 < 0 ∨ pad[b, k] ) · v, s = q·k/2")
def mask_with_rows_before_it(q, k, v, pad):
    seen = keys(pad).expand(-1, 1, q.shape[2] - 2, -1)
    return scores(q, k).masked_fill(~F.pad(seen, (0, 0, 2, 0), value=True), LOWEST).softmax(-1) @ v


@spelling("softmax( s | k < 2 ∨ pad[b, max(k - 2, 0)] ) · v, s = q·k/2")
def mask_with_keys_before_it(q, k, v, pad):
    seen = torch.cat([torch.ones_like(pad[:, :2]), pad[:, :-2]], 1)
    return scores(q, k).masked_fill(~keys(seen), LOWEST).softmax(-1) @ v


@spelling(PADDED)
def hidden_weights_set_to_zero(q, k, v, pad):
    weights = scores(q, k).masked_fill(~keys(pad), LOWEST).softmax(-1)
    return weights.masked_fill(~keys(pad), 0.0) @ v


@left_alone(
    "attention",
    "its weights are changed before they meet the values: (0 if k > q else weight)",
)
def other_weights_set_to_zero(q, k, v, pad):
    weights = scores(q, k).masked_fill(~keys(pad), LOWEST).softmax(-1)
    return weights.masked_fill(~bool_causal(q, k), 0.0) @ v


@spelling("softmax( s | k ≤ q ∧ pad[b, k] ) · v, s = q·k/2")
def mask_by_vmap(q, k, v, pad):
    def one(b, i, j):
        return (j <= i) & pad[b, j]

    for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
        one = torch.vmap(one, in_dims=axes)
    seen = one(*(torch.arange(n) for n in (q.shape[0], q.shape[2], k.shape[2])))
    return scores(q, k).masked_fill(~seen[:, None], LOWEST).softmax(-1) @ v


@spelling(CAUSAL)
def lower_triangle(q, k, v, pad):
    return scores(q, k).masked_fill(~bool_causal(q, k), -torch.inf).softmax(-1) @ v


@spelling(CAUSAL)
def lower_triangle_of_ones(q, k, v, pad):
    mask = torch.ones(q.shape[2], k.shape[2]).tril().view(1, 1, q.shape[2], k.shape[2])
    return scores(q, k).masked_fill(mask == 0, -torch.inf).softmax(-1) @ v


@spelling(CAUSAL)
def upper_triangle_added(q, k, v, pad):
    mask = torch.full((q.shape[2], k.shape[2]), -torch.inf, dtype=q.dtype).triu(diagonal=1)
    return (scores(q, k) + mask).softmax(-1) @ v


@spelling("softmax( s | k ≤ q ∧ q - k < 3 ) · v, s = q·k/2")
def window_of_positions(q, k, v, pad):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return scores(q, k).masked_fill(~((j <= i) & (i - j < 3)), -torch.inf).softmax(-1) @ v


@spelling("softmax( s | k ≤ L + q - 5 ) · v, s = q·k/2")
def positions_behind_an_offset(q, k, v, pad):
    i, j = torch.arange(q.shape[2])[:, None] + pad.shape[1] - 2, torch.arange(k.shape[2])[None]
    return scores(q, k).masked_fill(j > i - 3, -1e30).softmax(-1) @ v


@spelling("softmax( s | k ≤ q ∧ pad[b, k] ) · v, s = q·k/2")
def two_masks_filled(q, k, v, pad):
    score = scores(q, k).masked_fill(~bool_causal(q, k), LOWEST)
    return score.masked_fill(~keys(pad), LOWEST).softmax(-1) @ v


@spelling(
    "softmax( s + (-1.79769e+308 if q - k < 0 else 0) + (0 if pad[b, k] else -1.79769e+308) ) · v"
    ", s = q·k/2"
)
def two_masks_added(q, k, v, pad):
    """A row without keys takes the mean of those that one mask hides: twice the lowest is -inf."""
    causal = torch.full((q.shape[2], k.shape[2]), LOWEST, dtype=q.dtype).triu(1)
    return (scores(q, k) + causal + (1 - keys(pad).to(q.dtype)) * LOWEST).softmax(-1) @ v


@spelling("softmax( s | pad[b, k] ∧ pad[b, q] ) · v, s = q·k/2")
def mask_is_a_product_of_truth_values(q, k, v, pad):
    return scores(q, k).masked_fill(~(pad[:, None, :, None] * keys(pad)), LOWEST).softmax(-1) @ v


@spelling("softmax( s | pad[b, k] ∧ cumsum[b, q] - 1 ≥ cumsum[b, k] - 1 ) · v, s = q·k/2")
def mask_from_counted_positions(q, k, v, pad):
    position = pad.long().cumsum(-1) - 1
    mask = (position[:, None, :, None] >= position[:, None, None, :]) & keys(pad)
    return scores(q, k).masked_fill(~mask, LOWEST).softmax(-1) @ v


@spelling("softmax( s + tensor_constant0[h]·(k - q) ) · v, s = q·k/2")
def bias_by_distance(q, k, v, pad):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    slopes = torch.tensor([0.5, 0.25], dtype=q.dtype)[:, None, None]
    return (scores(q, k) + slopes * (j - i)).softmax(-1) @ v


@spelling(
    "softmax( s + (-1.79769e+308 if ¬pad[b, q] else mean[b, h, k]) ) · v, s = q·k/2",
)
def bias_filled(q, k, v, pad):
    """In a row without keys, a gradient goes to the scores and none to the bias."""
    bias = k.mean(-1).unsqueeze(-2).masked_fill(~pad[:, None, :, None], LOWEST)
    return (scores(q, k) + bias).softmax(-1) @ v


@spelling("softmax( (-1.79769e+308 if ¬pad[b, q] else s) + mean[b, h, k] ) · v, s = q·k/2")
def bias_added_to_filled_scores(q, k, v, pad):
    """In a row without keys, a gradient goes to the bias and none to the scores."""
    score = scores(q, k).masked_fill(~pad[:, None, :, None], LOWEST)
    return (score + k.mean(-1).unsqueeze(-2)).softmax(-1) @ v


@spelling("softmax( s + mean[b, h, k] | k ≤ q ) · v, s = q·k/2")
def bias_added_where_each_row_sees_a_key(q, k, v, pad):
    score = scores(q, k).masked_fill(~bool_causal(q, k), LOWEST)
    return (score + k.mean(-1).unsqueeze(-2)).softmax(-1) @ v


@spelling("softmax( s | pad[b, q] ) · v, s = q·k/2")
def rows_without_keys_filled(q, k, v, pad):
    return scores(q, k).masked_fill(~pad[:, None, :, None], LOWEST).softmax(-1) @ v


@spelling("softmax( s | pad[b, q] ) · v, s = q·k/2")
def rows_without_keys_nan(q, k, v, pad):
    return scores(q, k).masked_fill(~pad[:, None, :, None], -torch.inf).softmax(-1) @ v


@spelling("softmax( s | pad[b, q] ) · v, s = q·k/2")
def rows_without_keys_added(q, k, v, pad):
    mask = torch.zeros(1, dtype=q.dtype).masked_fill(~pad[:, None, :, None], LOWEST)
    return (scores(q, k) + mask).softmax(-1) @ v


# --- scaled_dot_product_attention -----------------------------------------------------------------


@spelling(PADDED)
def sdpa_with_a_boolean_mask(q, k, v, pad):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys(pad))


@spelling(PADDED)
def sdpa_with_a_float_mask(q, k, v, pad):
    mask = torch.zeros_like(keys(pad), dtype=q.dtype).masked_fill(~keys(pad), LOWEST)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling("softmax( s | pad[b, q] ) · v, s = q·k/2")
def sdpa_with_rows_without_keys(q, k, v, pad):
    mask = pad[:, None, :, None].expand(-1, -1, -1, k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(CAUSAL)
def sdpa_causal(q, k, v, pad):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling("softmax( s ) · v, s = 0.6·q·k")
def sdpa_with_a_scale_and_scaled_queries(q, k, v, pad):
    return F.scaled_dot_product_attention(q * 2, k, v, scale=0.3)


@spelling(PLAIN)
def sdpa_with_grouped_heads(q, k, v, pad):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


@spelling(PLAIN)
def sdpa_with_broadcast_keys_and_values(q, k, v, pad):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:1])


# --- heads, sinks, operands -----------------------------------------------------------------------


@spelling(PLAIN)
def one_key_head_broadcast(q, k, v, pad):
    return scores(q, k[:, :1]).softmax(-1) @ v[:, :1]


@spelling(PLAIN)
def key_heads_repeated(q, k, v, pad):
    k, v = (x[:, :1].repeat_interleave(H, 1) for x in (k, v))
    return scores(q, k).softmax(-1) @ v


@spelling(PLAIN)
def key_heads_expanded(q, k, v, pad):
    n, _, m, _ = k.shape
    k, v = (x[:, :1][:, :, None].expand(n, 1, H, m, D).reshape(n, H, m, D) for x in (k, v))
    return scores(q, k).softmax(-1) @ v


@spelling(PLAIN)
def groups_of_one_sequence(q, k, v, pad):
    """With one sequence, the batch of the five dimensions is the key heads."""
    q, k, v = q[:1].unflatten(1, (2, 1)), k[:1, :, None], v[:1, :, None]
    return (q @ k.mT * 0.5).softmax(-1) @ v


@spelling(PLAIN)
def one_key_head_and_many_value_heads(q, k, v, pad):
    return scores(q, k[:, :1]).softmax(-1) @ v


@spelling(PLAIN)
def many_key_heads_and_one_value_head(q, k, v, pad):
    return scores(q, k).softmax(-1) @ v[:, :1]


@spelling("softmax( s ; sink tensor_constant0[h] ) · v, s = q·k/2")
def sink_behind_the_keys(q, k, v, pad):
    return torch.cat([scores(q, k), sink_column(q)], -1).softmax(-1)[..., :-1] @ v


@spelling("softmax( s ; sink tensor_constant0[h] ) · v, s = q·k/2")
def sink_before_the_keys(q, k, v, pad):
    return torch.cat([sink_column(q), scores(q, k)], -1).softmax(-1)[..., 1:] @ v


@spelling("softmax( s | pad[b, k] ; sink tensor_constant0[h] ) · v, s = q·k/2")
def sink_less_the_row_maximum(q, k, v, pad):
    score = torch.cat([scores(q, k).masked_fill(~keys(pad), LOWEST), sink_column(q)], -1)
    score = score - score.max(dim=-1, keepdim=True).values
    return F.softmax(score, -1, dtype=score.dtype)[..., :-1].contiguous() @ v


@spelling("softmax( s | pad[b, q] ; sink tensor_constant0[h] ) · v, s = q·k/2")
def sink_of_rows_without_keys(q, k, v, pad):
    score = scores(q, k).masked_fill(~pad[:, None, :, None], LOWEST)
    return torch.cat([score, sink_column(q)], -1).softmax(-1)[..., :-1] @ v


@spelling("softmax( s ; sink tensor_constant0[h] ) · v, s = q·k/2")
def sink_of_cast_scores(q, k, v, pad):
    score = torch.cat([scores(q, k), sink_column(q)], -1)
    return score.double().softmax(-1)[..., :-1] @ v


@spelling("softmax( s ) · v")
def first_of_scaled_queries(q, k, v, pad):
    return ((q * 0.5)[:, :, :5] @ k.mT).softmax(-1) @ v


@spelling("softmax( s ) · v")
def first_of_scaled_keys(q, k, v, pad):
    return (q @ (k * 0.5)[:, :, :5].mT).softmax(-1) @ v[:, :, :5]


@spelling("softmax( s ) · v")
def first_of_scaled_channels(q, k, v, pad):
    return ((q * 0.5)[..., :2] @ (k * 0.5)[..., :2].mT).softmax(-1) @ v


@spelling("softmax( s ) · v")
def first_of_scaled_sequences(q, k, v, pad):
    return ((q * 0.5)[:1] @ k[:1].mT).softmax(-1) @ v[:1]


@spelling(PLAIN)
def first_of_repeated_keys(q, k, v, pad):
    k, v = (x[:, :1].repeat_interleave(H, 1)[:, :, :5] for x in (k, v))
    return scores(q, k).softmax(-1) @ v


@spelling(PLAIN)
def last_keys_only(q, k, v, pad):
    return scores(q, k[:, :, -3:]).softmax(-1) @ v[:, :, -3:]


@spelling(PLAIN)
def keys_are_the_values(q, k, v, pad):
    return scores(q, k).softmax(-1) @ k


@spelling(PLAIN)
def keys_are_the_queries(q, k, v, pad):
    return scores(q, q).softmax(-1) @ v


@spelling(PLAIN)
def values_wider_than_keys(q, k, v, pad):
    return (scores(q, k).softmax(-1) @ torch.cat([v, v * 2], -1))[..., :D]


# --- what is left alone ---------------------------------------------------------------------------


@left_alone("attention", "its weights are changed by aten.nan_to_num before they meet the values")
def weights_without_nan(q, k, v, pad):
    return torch.nan_to_num(scores(q, k).softmax(-1)) @ v


@left_alone(
    "attention",
    "its weights are changed before they meet the values: (0 if pad[b, k] = 0 else weight)",
)
def weights_filled(q, k, v, pad):
    return scores(q, k).softmax(-1).masked_fill(~keys(pad), 0.0) @ v


@left_alone("attention", "its weights are changed before they meet the values: 2·weight")
def weights_scaled(q, k, v, pad):
    return (scores(q, k).softmax(-1) * 2.0) @ v


@left_alone("attention", "its weights are changed by aten.linear before they meet the values")
def weights_mixed_across_heads(q, k, v, pad):
    mixing = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=q.dtype)
    weights = F.linear(scores(q, k).softmax(-1).permute(0, 2, 3, 1), mixing)
    return weights.permute(0, 3, 1, 2) @ v


@left_alone(
    "attention", "the softmax runs over another axis than the product with the values sums over"
)
def softmax_over_queries(q, k, v, pad):
    return scores(q, k).softmax(-2) @ v


@left_alone("attention", "the scores are changed by what is computed from them (aten.amax)")
def scores_less_the_maximum_of_other_rows(q, k, v, pad):
    score = k @ q.mT * 0.5
    return (score - score.amax(-1, keepdim=True)).softmax(-2).mT @ v


@left_alone("attention", "which keys are seen depends on the scores")
def positive_scores_only(q, k, v, pad):
    score = scores(q, k)
    return score.masked_fill(score < 0, LOWEST).softmax(-1) @ v


@left_alone(
    "attention",
    "an operand of the product is read at (b, q, d), not as [batch, heads, rows, columns]",
)
def weights_of_the_first_head(q, k, v, pad):
    return scores(q, k)[:, :1].softmax(-1) @ v


@left_alone(
    "attention", "its weights are also used by aten.mean, so they have to be computed anyway"
)
def weights_used_elsewhere(q, k, v, pad):
    weights = scores(q, k).softmax(-1)
    return weights @ v + weights.mean(-1, keepdim=True)


@left_alone("attention", "its scores are written in place, in a way that is not understood")
def scores_written_in_part(q, k, v, pad):
    score = scores(q, k)
    score[:, :, 1:, 1:] = score[:, :, 1:, 1:] + 1.0
    return score.softmax(-1) @ v


@left_alone("attention", "view is written in place while the attention is computed")
def queries_written_after_their_product(q, k, v, pad):
    own = q.tanh()
    score = scores(own.view(own.shape), k)
    own.add_(5.0)
    return score.softmax(-1) @ v + own


@left_alone("channel", "attention over channels, not over tokens")
def channels(q, k, v, pad):
    return ((q.mT @ k).softmax(-1) @ v.mT).mT


@left_alone("pooling", "pooling or a feature map: its scores are not products of queries and keys")
def softmax_of_keys(q, k, v, pad):
    return q @ (k.softmax(-1).mT @ v)


# --- the table ------------------------------------------------------------------------------------


class Spelling(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, *args: Tensor) -> Tensor:
        return self.attend(*args)


class AllSpellings(nn.Module):
    """Every spelling on the same projections of x."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(H * D, H * D) for _ in range(3))
        table = {n: x[0] for n, x in (*SPELLINGS.items(), *LEFT_ALONE.items())}
        self.all = nn.ModuleDict({name: Spelling(attend) for name, attend in table.items()})

    def forward(self, x: Tensor, pad: Tensor) -> dict[str, Tensor]:
        q, k, v = (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in self.projections)
        return {name: spelled(q, k, v, pad) for name, spelled in self.all.items()}


@dataclass(frozen=True)
class Outcome:
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    report: Report

    def site(self, name: str) -> SiteReport:
        (site,) = (s for s in self.report.sites if s.site.path == f"all.{name}")
        return site

    def difference(self, name: str) -> float:
        before, after = self.before[name], self.after[name]
        assert before.dtype == after.dtype
        assert torch.equal(before.isnan(), after.isnan())
        return float((before - after).nan_to_num().abs().max())


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    torch.manual_seed(0)
    model = AllSpellings().double()
    x = torch.randn(B, L, H * D, dtype=torch.float64) * 2
    pad = torch.ones(B, L, dtype=torch.bool)
    pad[1, :2] = False
    with torch.no_grad():
        before = model(x, pad)
        rewriter.optimize(model, "fuse(from_scores=0)")
        after = model(x, pad)
    report = rewriter.report_of(model)
    assert report.graphs == 1, report.notes
    assert report.notes == ()
    return Outcome(before, after, report)


def test_heads_that_lie_in_two_dimensions_are_not_counted(outcome: Outcome) -> None:
    site = outcome.site("groups_of_one_sequence").site
    assert (site.heads, site.kv_heads) == (0, 0)
    with pytest.raises(Declined, match="how many heads this site has is not known"):
        HeadScale(heads=(0,), by=0.0).rewrite(site, site.spec)


SINGLE = {"softmax_in_float32", "softmax_method_in_float32", "softmax_of_cast_scores"}
"""Their softmax rounds to float32, ours to float64."""


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_read_as_its_formula_and_gives_the_same_numbers(
    name: str, outcome: Outcome
) -> None:
    site = outcome.site(name)
    assert site.decision == "rewritten", site.reason
    formula = str(site.site.spec)
    for number in range(30):  # constants of the graph are numbered through
        formula = formula.replace(f"tensor_constant{number}[", "tensor_constant0[")
    assert formula == SPELLINGS[name][1]
    assert outcome.difference(name) < (2e-7 if name in SINGLE else 2e-14)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_understood_is_left_alone_for_a_reason(name: str, outcome: Outcome) -> None:
    site = outcome.site(name)
    _, kind, reason = LEFT_ALONE[name]
    assert str(site.site.spec) == (PLAIN if "also used" in reason else "None")
    assert (site.site.kind, site.reason) == (kind, reason)
    assert site.decision == {"attention": "kept", "channel": "named"}.get(kind, "not attention")
    assert outcome.difference(name) == 0.0


@pytest.mark.parametrize(
    ("name", "kv_heads"),
    [
        ("sdpa_with_grouped_heads", 1),
        ("one_key_head_broadcast", 1),
        ("key_heads_repeated", 1),
        ("key_heads_expanded", 1),
        ("one_key_head_and_many_value_heads", 2),
        ("bmm", 2),
    ],
)
def test_repeated_key_heads_are_looked_through(name: str, kv_heads: int, outcome: Outcome) -> None:
    site = outcome.site(name).site
    assert (site.heads, site.kv_heads) == (H, kv_heads)


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("rows_without_keys_filled", "mean"),
        ("rows_without_keys_added", "add"),
        ("rows_without_keys_nan", "nan"),
        ("sdpa_with_rows_without_keys", "zero"),
        ("sink_of_rows_without_keys", "zero"),
    ],
)
def test_what_a_row_without_keys_gives_is_recorded(
    name: str, masked: str, outcome: Outcome
) -> None:
    spec = outcome.site(name).site.spec
    assert spec is not None
    assert spec.masked == masked
