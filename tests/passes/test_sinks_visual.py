"""sinks.var: the five keys of the card in both modes, what is selected, the groups, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from sympy import Float, Integer, Symbol
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import Declined, PassError
from rewriter.op import attention
from rewriter.passes.sinks_visual import RedistributeVisual, first_row, groups_of, sink_value
from rewriter.reference import reference, reference_weights
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import Read

SITE = Site(
    "layers.3.attn", 3, heads=4, kv_heads=2, head_dim=8, value_dim=8, residual_dim=16, layers=8
)
CAUSAL = SoftmaxSpec(mask=sym.k <= sym.q + sym.M - sym.L)
GROUP = torch.tensor([[1, 2, 3, 3, 0]])
"""Text sink, visual sink, two of the image, text."""
WEIGHTS = torch.tensor([0.4, 0.1, 0.2, 0.1, 0.2], dtype=torch.float64)
BEFORE = WEIGHTS.tolist()


def var(**options: Any) -> RedistributeVisual:
    return RedistributeVisual(**{"dims": [1], **options})


def edited(spec: SoftmaxSpec, weights: Tensor = WEIGHTS, *, row: int = 4) -> list[float]:
    """What becomes of the weights of the last row, by the reference and by torch.blocked."""
    k = weights.log().view(1, 1, -1, 1)
    q, v = torch.ones(1, 1, 1, 1, dtype=k.dtype), torch.eye(5, dtype=k.dtype)[None, None]
    tensors = [GROUP, torch.tensor([row])][: len(spec.tensors)]
    got = attention(q, k, v, tensors, [], spec, "torch.blocked").flatten()
    torch.testing.assert_close(got, reference_weights(spec, q, k, tensors).flatten())
    return [float(x) for x in got]


# --- the five keys --------------------------------------------------------------------------------


def test_paper_takes_the_fraction_p() -> None:
    spec = var(min_nonsink_ratio=0.5).rewrite(SITE, CAUSAL)
    assert edited(spec) == pytest.approx([0.16, 0.04, 0.40, 0.20, 0.20])


def test_released_code_keeps_the_fraction_p() -> None:
    spec = var(mode="released").rewrite(SITE, CAUSAL)
    assert edited(spec) == pytest.approx([0.24, 0.06, 1 / 3, 1 / 6, 0.20])


def test_a_row_with_too_many_sinks_among_the_image_is_not_selected() -> None:
    assert edited(var().rewrite(SITE, CAUSAL)) == pytest.approx(BEFORE, abs=1e-15)  # .75 < .8


def test_a_row_with_little_weight_on_the_image_is_not_selected() -> None:
    spec = var(min_nonsink_ratio=0.5, min_mass=0.41).rewrite(SITE, CAUSAL)
    assert edited(spec) == pytest.approx(BEFORE, abs=1e-15)
    spec = var(min_nonsink_ratio=0.5, min_mass=1.1).rewrite(SITE, CAUSAL)
    assert edited(spec) == pytest.approx(BEFORE, abs=1e-15)


def test_rows_before_the_end_of_the_image_are_not_selected() -> None:
    spec = var(min_nonsink_ratio=0.5).rewrite(SITE, CAUSAL)
    assert edited(spec, row=5) == pytest.approx(BEFORE, abs=1e-15)


def test_an_image_of_sinks_alone_keeps_its_weight() -> None:
    weights = torch.tensor([0.4, 0.4, 0.0, 0.0, 0.2], dtype=torch.float64)
    spec = var(min_nonsink_ratio=0.0).rewrite(SITE, CAUSAL)
    assert edited(spec, weights) == pytest.approx(weights.tolist(), abs=1e-15)


def test_keeping_everything_is_the_identity() -> None:
    assert var(keep_fraction=1).rewrite(SITE, CAUSAL) is CAUSAL


def test_a_virtual_sink_is_one_of_the_others() -> None:
    spec = var(min_nonsink_ratio=0.5).rewrite(SITE, replace(CAUSAL, sink=Integer(0)))
    half = [x / 2 for x in (0.16, 0.04, 0.40, 0.20, 0.20)]
    assert edited(spec) == pytest.approx(half)  # .2 on the image is still enough


# --- whole sequences ------------------------------------------------------------------------------


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, 8, dtype=dtype) for n in (4, 2, 2))
    return q, k, v


GROUPS = torch.tensor([[1, 0, 3, 3, 2, 3, 0, 0, 0, 0, 0, 0], [1, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
ROWS = torch.tensor([6, 3])
SPEC = var(min_nonsink_ratio=0.3, min_mass=0.1).rewrite(
    SITE, replace(CAUSAL, scale=Float(0.3), score=5 * sympy.tanh(sym.s / 5))
)


def test_selection_is_by_query_head_and_labels_by_key() -> None:
    """Two query heads share the keys; only the one that looks at the image is changed."""
    q = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    q[0, 0] = 1.0
    k = torch.tensor([0.0, 3.0, 4.0, 4.0, 0.0], dtype=torch.float64).view(1, 1, 5, 1)
    spec = var(min_mass=0.65, min_nonsink_ratio=0.5).rewrite(SITE, CAUSAL)
    tensors = [GROUP, torch.tensor([4])]
    plain, got = reference_weights(CAUSAL, q, k), reference_weights(spec, q, k, tensors)
    assert not torch.allclose(got[0, 0], plain[0, 0])
    assert torch.equal(got[0, 1], plain[0, 1])


def test_rows_sum_to_one_and_rows_before_the_end_are_bitwise_plain() -> None:
    q, k, v = operands(torch.float32)
    got = attention(q, k, v, [GROUPS, ROWS], [], SPEC, "torch.blocked")
    plain = replace(SPEC, edit=None, tensors=())
    want = attention(q, k, v, [], [], plain, "torch.blocked")
    assert torch.equal(got[0, :, :6], want[0, :, :6])
    assert torch.equal(got[1, :, :3], want[1, :, :3])
    assert not torch.equal(got, want)
    sums = reference_weights(SPEC, q.double(), k.double(), [GROUPS, ROWS]).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_the_order_of_image_tokens_does_not_matter_if_labels_move_along() -> None:
    q, k, v = operands()
    order = torch.tensor([0, 1, 5, 2, 4, 3, 6, 7, 8, 9, 10, 11])
    want = reference(SPEC, q, k, v, [GROUPS, ROWS])[:, :, 6:]
    got = reference(SPEC, q, k[:, :, order], v[:, :, order], [GROUPS[:, order], ROWS])
    torch.testing.assert_close(got[:, :, 6:], want)


def test_decoding_equals_the_whole_with_the_labels_of_the_prompt() -> None:
    q, k, v = operands()
    whole = attention(q, k, v, [GROUPS, ROWS], [], SPEC, "torch.blocked")
    step = attention(q[:, :, -1:], k, v, [GROUPS, ROWS], [], SPEC, "torch.blocked")
    torch.testing.assert_close(step, whole[:, :, -1:])


def test_gradients_pass_gradcheck_with_the_selection_as_it_is() -> None:
    q, k, v = (x.requires_grad_() for x in operands())

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, [GROUPS, ROWS], [], SPEC, "torch.blocked")

    assert torch.autograd.gradcheck(f, (q, k, v), fast_mode=True)


# --- groups ---------------------------------------------------------------------------------------


def states(channels: int, *sinks: int) -> Tensor:
    """Six tokens with dimension 1 fifty times the rest at the sinks."""
    x = torch.ones(1, 6, channels)
    x[:, list(sinks), 1] = -50.0
    return x


def test_sink_value_needs_many_channels_to_pass_20() -> None:
    assert sink_value(states(16, 0), (1,))[0, 0] < 4.0  # at most the square root of 16
    phi = sink_value(states(4096, 0), (1, 7))
    assert phi[0, 0] == pytest.approx(50 / (4095 / 4096 + 2500 / 4096) ** 0.5, rel=1e-5)
    assert phi[0, 0] > 20 > phi[0, 1]


def test_groups_are_text_sinks_visual_sinks_and_the_rest_of_the_image() -> None:
    labels = torch.tensor([[0, 1, 1, 1, 0]])
    got = groups_of(states(4096, 0, 2), labels, dims=(1,), tau=20.0)
    assert got.tolist() == [[1, 3, 2, 3, 0, 0]]  # the last key lies beyond the labels


def test_tokens_after_the_prompt_are_never_sinks() -> None:
    """A full run sees the states of generated tokens, and a step of decoding does not ask them."""
    labels = torch.tensor([[0, 1, 1, 1, 0]])
    got = groups_of(states(4096, 0, 2, 5), labels, dims=(1,), tau=20.0)
    assert got.tolist() == [[1, 3, 2, 3, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "tau"), [([0, 1, 0, 1, 0, 0], 20.0), ([0] * 6, 20.0), ([0, 1, 1, 0, 0, 0], 1e9)]
)
def test_without_a_visual_sink_there_are_no_groups(labels: list[int], tau: float) -> None:
    got = groups_of(states(4096, 0, 2), torch.tensor([labels]), dims=(1,), tau=tau)
    assert not got.any()


def test_first_row_is_the_one_after_the_last_image_token() -> None:
    labels = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    assert first_row(labels).tolist() == [5, 6]


def test_a_step_of_decoding_needs_no_causal_mask() -> None:
    one = replace(SITE, q_len=1)
    assert var().rewrite(one, SoftmaxSpec()).edit is not None
    with pytest.raises(Declined, match="this site is not causal"):
        var().rewrite(SITE, SoftmaxSpec())


def test_groups_are_decided_by_the_prompt() -> None:
    group, row = SPEC.tensors
    assert group.source is not None
    assert row.source is not None
    assert (group.source.taps, group.source.later) == (("residual", "labels"), 0)
    assert (row.source.taps, row.source.later) == (("labels",), None)
    assert SPEC.edit is not None
    assert SPEC.edit.group == Read(Symbol("sink_group"), sym.b, sym.k)


# --- layers and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "site", "reason"),
    [
        ({}, {"layer": 1}, "layers before 2 are left alone"),
        ({"mode": "released"}, {"layer": 0}, "layers before 2 are left alone"),
        ({}, {"layer": 7}, "the last layer is left alone"),
        ({"mode": "released", "last_layer": False}, {"layer": 7}, "the last layer is left alone"),
        ({}, {"layers": 0}, "which layer is the last is not known"),
        ({}, {"layer": None}, "the number of the layer is not known"),
        ({}, {"is_cross": True}, "this site is cross-attention"),
        ({}, {"residual_dim": 0}, "was not found in the graph"),
        ({"dims": [16]}, {}, "dimensions 0 to 15, not 16"),
    ],
)
def test_sites_that_are_left_alone(options: Any, site: Any, reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        var(**options).rewrite(replace(SITE, **site), CAUSAL)


@pytest.mark.parametrize(
    ("options", "site"),
    [
        ({"mode": "released"}, {"layer": 7}),
        ({"last_layer": True}, {"layer": 7}),
        ({"first_layer": 0}, {"layer": 0}),
    ],
)
def test_layers_that_are_edited(options: Any, site: Any) -> None:
    assert var(**options).rewrite(replace(SITE, **site), CAUSAL).edit is not None


def test_attention_that_is_not_causal_or_edited_already_is_declined() -> None:
    with pytest.raises(Declined, match="this site is not causal"):
        var().rewrite(SITE, SoftmaxSpec())
    with pytest.raises(Declined, match="edited already"):
        var().rewrite(SITE, SPEC)


def test_dims_have_to_be_given() -> None:
    with pytest.raises(PassError, match=r"D_sink is unknown for the base model: give dims=\["):
        RedistributeVisual()
    with pytest.raises(PassError, match="dims are counted from 0"):
        var(dims=[-1])
