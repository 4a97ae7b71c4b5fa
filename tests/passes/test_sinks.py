"""sinks.remove, sinks.redirect, sinks.learned: the numbers of the card, laws and refusals."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from sympy import Float, Integer, Symbol
from torch import Tensor
from torch.nn.functional import pad

from rewriter import symbols as sym
from rewriter.errors import Declined, NotAppliedWarning, PassError
from rewriter.op import attention
from rewriter.passbase import Pass
from rewriter.passes.sinks import LearnedSinks, RedirectSinks, RemoveSinks, massive_dimensions
from rewriter.passes.sinks_visual import RedistributeVisual
from rewriter.reference import reference, reference_weights
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Route
from rewriter.symbols import Read

SITE = Site("layers.3.attn", 3, heads=4, kv_heads=2, head_dim=8, value_dim=8)
CAUSAL = SoftmaxSpec(Float(8**-0.5), mask=sym.k <= sym.q + sym.M - sym.L)
SIGMA = Read(Symbol("sink"), sym.h)


def weights_of(spec: SoftmaxSpec, p: list[float], tensors: Any = ()) -> list[float]:
    """What the spec makes of a row with these weights."""
    k = torch.tensor(p, dtype=torch.float64).log().view(1, 1, -1, 1)
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    found = reference_weights(replace(spec, scale=Integer(1)), q, k, tensors)
    return [float(x) for x in found.flatten()]


def operands(length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, length, 8, dtype=torch.float64) for n in (4, 2, 2))
    return q, k, v


# --- remove and redirect --------------------------------------------------------------------------


def test_removing_a_key_divides_the_rest_by_what_it_had() -> None:
    spec = RemoveSinks(first=1).rewrite(SITE, SoftmaxSpec())
    assert weights_of(spec, [0.6, 0.1, 0.3]) == pytest.approx([0.0, 0.25, 0.75])


def test_removing_equals_hiding_the_keys() -> None:
    q, k, v = operands()
    got = reference(RemoveSinks(first=2).rewrite(SITE, CAUSAL), q, k, v)
    want = reference(replace(CAUSAL, mask=CAUSAL.mask & (sym.k >= 2)), q, k, v)
    torch.testing.assert_close(got[:, :, 2:], want[:, :, 2:])


def test_removing_equals_hiding_the_keys_beside_a_learned_sink() -> None:
    q, k, v = operands()
    before = replace(CAUSAL, sink=Float(0.5))
    got = reference(RemoveSinks(first=2).rewrite(SITE, before), q, k, v)
    want = reference(replace(before, mask=before.mask & (sym.k >= 2)), q, k, v)
    torch.testing.assert_close(got[:, :, 2:], want[:, :, 2:])


def test_a_key_with_almost_all_the_weight_is_removed_without_cancellation() -> None:
    q, k, v = operands()
    k[:, :, 0] *= 40.0
    spec = RemoveSinks(first=1).rewrite(SITE, replace(CAUSAL, sink=Float(0.5)))
    gold = reference(spec, q.double(), k.double(), v.double())
    got = attention(q.float(), k.float(), v.float(), [], [], spec)
    torch.testing.assert_close(got[:, :, 1:].double(), gold[:, :, 1:], rtol=1e-5, atol=1e-5)


def test_a_row_that_sees_nothing_else_stays_as_it_was() -> None:
    q, k, v = operands()
    for action in (RemoveSinks(first=2), RedirectSinks(first=2)):
        got = reference(action.rewrite(SITE, CAUSAL), q, k, v)
        assert torch.equal(got[:, :, :2], reference(CAUSAL, q, k, v)[:, :, :2])


def test_removing_by_label_follows_the_labels() -> None:
    spec = RemoveSinks(label=1).rewrite(SITE, SoftmaxSpec())
    tensors = [torch.tensor([[0, 1, 0]])]
    assert weights_of(spec, [0.6, 0.2, 0.2], tensors) == pytest.approx([0.75, 0.0, 0.25])


def test_labels_belong_to_the_prompt_and_later_keys_have_none() -> None:
    spec = RemoveSinks(label=1).rewrite(SITE, SoftmaxSpec())
    (arg,) = spec.tensors
    assert arg.source is not None
    assert (arg.source.taps, arg.source.later) == (("labels",), 0)


def test_redirecting_to_a_label_gives_it_the_mass_in_proportion() -> None:
    spec = RedirectSinks(first=1, to=2).rewrite(SITE, SoftmaxSpec())
    tensors = [torch.tensor([[0, 2, 2, 0]])]
    got = weights_of(spec, [0.4, 0.1, 0.3, 0.2], tensors)
    assert got == pytest.approx([0.0, 0.2, 0.6, 0.2])


def test_redirecting_to_all_others_keeps_the_sum_beside_a_learned_sink() -> None:
    spec = RedirectSinks(first=1).rewrite(SITE, SoftmaxSpec(sink=Integer(0)))
    got = weights_of(spec, [0.5, 0.25, 0.25])
    assert got == pytest.approx([0.0, 0.25, 0.25])


def test_redirecting_a_part_leaves_the_rest() -> None:
    spec = RedirectSinks(first=1, keep_fraction=0.5).rewrite(SITE, SoftmaxSpec())
    assert weights_of(spec, [0.4, 0.6]) == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize(
    "action", [RemoveSinks(first=0), RedirectSinks(first=3, keep_fraction=1.0)], ids=str
)
def test_the_identity_is_the_spec_itself(action: Any) -> None:
    assert action.rewrite(SITE, CAUSAL) is CAUSAL


def test_decoding_equals_the_last_row_of_the_whole() -> None:
    q, k, v = operands()
    for action in (RemoveSinks(first=2), RedirectSinks(first=1)):
        spec = action.rewrite(SITE, CAUSAL)
        whole = attention(q, k, v, [], [], spec, "torch.blocked")
        step = attention(q[:, :, -1:], k, v, [], [], spec, "torch.blocked")
        torch.testing.assert_close(step, whole[:, :, -1:])


def test_a_second_edit_and_a_routed_site_are_declined() -> None:
    once = RemoveSinks(first=1).rewrite(SITE, CAUSAL)
    with pytest.raises(Declined, match="edited already"):
        RedirectSinks(first=1).rewrite(SITE, once)
    with pytest.raises(Declined, match="chosen at run time"):
        RemoveSinks(first=1).rewrite(SITE, replace(CAUSAL, route=Route("query", 2, 4)))


def test_a_group_is_named_in_one_way() -> None:
    with pytest.raises(PassError, match="needs first= or label=, and not both"):
        RemoveSinks()
    with pytest.raises(PassError, match="needs first= or label=, and not both"):
        RedirectSinks(first=1, label=1)
    with pytest.raises(PassError, match="to=1 is not another group"):
        RedirectSinks(label=1, to=1)
    with pytest.raises(PassError, match="to"):
        RedirectSinks(label=1, to=0)


def test_a_group_that_nobody_has_is_a_warning() -> None:
    spec = RedirectSinks(label=1, to=3).rewrite(SITE, SoftmaxSpec())
    source = spec.tensors[-1].source
    assert source is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.compute(torch.tensor([[0, 1, 3]]), **dict(source.options))
    with pytest.warns(NotAppliedWarning, match="no token has label 3; the labels given are 0, 1"):
        source.compute(torch.tensor([[0, 1, 1]]), **dict(source.options))


# --- learned sinks --------------------------------------------------------------------------------


def test_a_logit_of_ln_2_beside_two_scores_of_0_takes_half() -> None:
    spec = SoftmaxSpec(sink=Float(math.log(2)))
    assert weights_of(spec, [1.0, 1.0]) == pytest.approx([0.25, 0.25])


def test_off_by_one_is_a_logit_of_0() -> None:
    spec = LearnedSinks(off_by_one=True).rewrite(SITE, SoftmaxSpec())
    assert spec.tensors == ()
    assert weights_of(spec, [1.0, 1.0]) == pytest.approx([1 / 3, 1 / 3])


def test_a_learned_sink_is_one_parameter_a_query_head() -> None:
    spec = LearnedSinks(initial=0.5).rewrite(SITE, SoftmaxSpec())
    (arg,) = spec.tensors
    assert arg.source is not None
    (parameter,) = arg.source.parameters
    assert (parameter.shape, parameter.initial, parameter.trained) == ((4,), 0.5, True)
    assert spec.sink == SIGMA


def test_output_is_the_plain_one_times_a_sigmoid_of_the_logsumexp() -> None:
    q, k, v = operands()
    spec = LearnedSinks().rewrite(SITE, CAUSAL)
    sigma = torch.randn(4, dtype=torch.float64)
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    share = (scores.logsumexp(-1, keepdim=True) - sigma.view(4, 1, 1)).sigmoid()
    want = scores.softmax(-1) @ v.repeat_interleave(2, 1) * share
    for target in ("reference", "torch.blocked"):
        got = attention(q, k, v, [sigma], [], spec, target)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_encodings_of_a_sink_agree() -> None:
    """A zero key whose score is sigma, as a mask column, and as one more head dimension."""
    q, k, v = operands()
    sigma, scale = torch.randn(4, dtype=torch.float64), 8**-0.5
    want = reference(
        replace(CAUSAL, mask=sympy.true, sink=SIGMA, tensors=_sink()), q, k, v, [sigma]
    )
    k4, v4 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    zero = torch.zeros(2, 4, 1, 8, dtype=torch.float64)
    column = pad(torch.zeros(4, 9, 9, dtype=torch.float64), (0, 1))
    column[..., -1] = sigma.view(4, 1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    keys, values = torch.cat([k4, zero], 2), torch.cat([v4, zero], 2)
    by_mask = sdpa(q, keys, values, attn_mask=column, scale=scale)
    wide = pad(keys, (0, 1))
    wide[:, :, -1, -1] = sigma / scale
    by_dimension = sdpa(pad(q, (0, 1), value=1.0), wide, values, scale=scale)
    torch.testing.assert_close(by_mask, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_dimension, want, rtol=1e-12, atol=1e-12)


def _sink() -> Any:
    return LearnedSinks().rewrite(SITE, CAUSAL).tensors


def test_gradient_of_the_sink_is_minus_what_it_takes_times_delta() -> None:
    q, k, v = operands()
    spec = LearnedSinks().rewrite(SITE, CAUSAL)
    sigma = torch.randn(4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 4, 9, 8, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (attention(q, k, v, [x], [], spec, "torch.blocked") * grad).sum()

    (got,) = torch.autograd.grad(loss(sigma), sigma)
    with torch.no_grad():
        taken = 1 - reference_weights(spec, q, k, [sigma]).sum(-1)
        delta = (reference(spec, q, k, v, [sigma]) * grad).sum(-1)
        steps = 1e-5 * torch.eye(4, dtype=torch.float64)
        slope = torch.stack([(loss(sigma + e) - loss(sigma - e)) / 2e-5 for e in steps])
    torch.testing.assert_close(got, -(taken * delta).sum((0, 2)))
    torch.testing.assert_close(got, slope, rtol=1e-7, atol=1e-7)


def test_a_window_of_128_with_sinks_counts_the_query_itself() -> None:
    spec = replace(CAUSAL, mask=CAUSAL.mask & (sym.q - sym.k < 128), sink=Integer(0))
    q, k = torch.randn(1, 1, 129, 8), torch.randn(1, 1, 129, 8)
    seen = reference_weights(spec, q, k)[0, 0] > 0
    assert seen[127].nonzero().flatten().tolist() == list(range(128))
    assert seen[128].nonzero().flatten().tolist() == list(range(1, 129))


def test_a_logit_far_below_the_scores_is_the_identity() -> None:
    q, k, v = operands()
    spec = LearnedSinks(initial=-1e9).rewrite(SITE, CAUSAL)
    sigma = torch.full((4,), -1e9, dtype=torch.float64)
    want = attention(q, k, v, [], [], CAUSAL, "torch.blocked")
    assert torch.equal(attention(q, k, v, [sigma], [], spec, "torch.blocked"), want)


def test_padding_hidden_by_finite_numbers_is_taken_and_its_rows_give_0() -> None:
    """Rows that see a key are those of a boolean mask; of the rest, only padding may change."""
    seen = sympy.Ne(Read(Symbol("pad"), sym.b, sym.k), 0)
    padded = replace(
        CAUSAL, mask=CAUSAL.mask & seen, tensors=(TensorArg("pad", "bool", 2),), masked="add"
    )
    q, k, v = operands()
    pad_mask = torch.ones(2, 9, dtype=torch.bool)
    pad_mask[1, :3] = False
    spec = LearnedSinks(initial=-1e9).rewrite(SITE, padded)
    sigma = torch.full((4,), -1e9, dtype=torch.float64)
    got, before = (
        reference(spec, q, k, v, [pad_mask, sigma]),
        reference(padded, q, k, v, [pad_mask]),
    )
    there = pad_mask[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(got[there], before[there])
    assert not got[~there].any()
    assert before[~there].any()


@pytest.mark.parametrize(
    "mask",
    [sym.k < sym.q, (sym.k <= sym.q) & (sym.k >= 2 * sym.q)],
    ids=["only earlier keys", "far from the start none"],
)
def test_queries_that_are_no_padding_keep_what_they_give_without_a_key(mask: Any) -> None:
    spec = replace(CAUSAL, mask=mask, masked="mean")
    with pytest.raises(Declined, match="leaves other queries than padding without a key"):
        LearnedSinks().rewrite(SITE, spec)
    assert LearnedSinks().rewrite(SITE, replace(spec, masked="zero")).sink is not None


def test_sinks_of_the_model_are_kept() -> None:
    with pytest.raises(Declined, match="sinks of its own, which are kept"):
        LearnedSinks().rewrite(SITE, replace(CAUSAL, sink=Integer(0)))


def test_off_by_one_takes_no_initial_value() -> None:
    with pytest.raises(PassError, match="off_by_one is the logit 0"):
        LearnedSinks(off_by_one=True, initial=1.0)


# --- massive activations --------------------------------------------------------------------------


def test_massive_dimensions_stand_out_at_the_first_token() -> None:
    states = 0.1 * torch.ones(2, 5, 16)
    states[:, 0, [3, 11]] = torch.tensor([-250.0, 180.0])
    states[:, 2, 7] = 900.0  # not the first token
    states[0, 0, 5] = 500.0  # in one of two texts only
    assert massive_dimensions(states) == [3, 11]
    assert massive_dimensions(states[0]) == [3, 5, 11]
    assert massive_dimensions(states * 10, times_median=2000.0) == [3]
    assert massive_dimensions(states / 2) == [3]


# --- a sink and an edit ---------------------------------------------------------------------------

VISUAL = RedistributeVisual(
    dims=(0,), tau=0.5, min_nonsink_ratio=0.1, first_layer=0, last_layer=True
)
BESIDE = {
    "labels": torch.tensor([[0, 1, 2, 2, 0, 1, 2, 0, 0]]).expand(2, -1),
    "sink": torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64),
    "sink_group": torch.tensor([[1, 0, 2, 3, 3, 0, 0, 0, 0]]).expand(2, -1),
    "first_row": torch.tensor([5, 6]),
}


@pytest.mark.parametrize(
    "redirect",
    [
        RedirectSinks(first=2, keep_fraction=0.3),
        RedirectSinks(first=1, to=2),
        RedirectSinks(label=1),
        VISUAL,
    ],
    ids=str,
)
def test_a_sink_before_moved_weight_is_a_sink_after_it(redirect: Pass) -> None:
    site, found = replace(SITE, residual_dim=8), []
    for first, then in ((redirect, LearnedSinks()), (LearnedSinks(), redirect)):
        spec = then.rewrite(site, first.rewrite(site, CAUSAL))
        found.append(reference(spec, *operands(), [BESIDE[t.name] for t in spec.tensors]))
    assert torch.equal(*found)
    alone = redirect.rewrite(site, CAUSAL)
    without = reference(alone, *operands(), [BESIDE[t.name] for t in alone.tensors])
    assert not torch.allclose(found[0], without)


@pytest.mark.parametrize("remove", [RemoveSinks(first=2), RemoveSinks(label=1)], ids=str)
def test_a_sink_whose_share_is_divided_out_is_declined(remove: Pass) -> None:
    edited = remove.rewrite(SITE, CAUSAL)
    with pytest.raises(Declined, match=r"divided out again.* name sinks.learned before sinks"):
        LearnedSinks().rewrite(SITE, edited)
    kept = RemoveSinks(first=0).rewrite(SITE, CAUSAL)
    assert LearnedSinks().rewrite(SITE, kept).sink is not None
