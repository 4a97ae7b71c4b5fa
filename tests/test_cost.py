"""The cost formulas, against counts by torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rewriter.cost import cost_of
from rewriter.linear import Features, LinearSpec
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.stages import Route
from rewriter.symbols import B, L, M
from rewriter.testing.cases import BASES


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"),
    [(4, 4, 8, 8), (6, 2, 16, 24)],
    ids=["mha", "gqa"],
)
def test_flops_are_what_torch_counts(
    heads: int, kv_heads: int, head_dim: int, value_dim: int
) -> None:
    site = Site("a", 0, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim)
    cost = cost_of(site)
    assert cost is not None
    q, k = torch.zeros(2, heads, 5, head_dim), torch.zeros(2, heads, 7, head_dim)
    v = torch.zeros(2, heads, 7, value_dim)
    with FlopCounterMode(display=False) as counter:
        _ = (q @ k.mT).softmax(-1) @ v
    sizes = {B: 2, L: 5, M: 7}
    assert int(cost.flops.xreplace(sizes)) == counter.get_total_flops()
    out_and_q = 2 * heads * 5 * (head_dim + value_dim)
    assert int(cost.elements.xreplace(sizes)) == out_and_q + 2 * kv_heads * 7 * (
        head_dim + value_dim
    )
    assert int(cost.scores.xreplace(sizes)) == 2 * heads * 5 * 7


def test_a_site_of_unknown_dimensions_has_no_cost() -> None:
    assert cost_of(Site("a", 0)) is None


SITE = Site("a", 0, heads=4, kv_heads=4, head_dim=8, value_dim=8)
SIZES = {B: 2, L: 64, M: 64}


def flops(spec: Spec | None) -> int:
    cost = cost_of(SITE, spec)
    assert cost is not None
    return int(cost.flops.xreplace(SIZES))


def test_heads_that_are_off_cost_nothing() -> None:
    assert BASES["gated heads"].active == 2
    assert 2 * flops(BASES["gated heads"]) == flops(None) == flops(SoftmaxSpec())


def test_routed_attention_costs_its_chosen_blocks_and_the_choice() -> None:
    route = Route("query", topk=2, block=8)  # 16 of 64 keys, by the means of 8 blocks
    assert flops(SoftmaxSpec(route=route)) == flops(None) // 4 + 2 * 2 * 4 * 8 * 64 * 8


def test_regions_cost_the_keys_of_the_chosen_regions() -> None:
    route = Route("region", topk=4, grid=(8, 8), regions=4)  # 4 of 16 regions of 4 tokens
    assert flops(SoftmaxSpec(route=route)) == flops(None) // 4 + 2 * 2 * 4 * 8 * 16**2


def test_linear_attention_costs_what_torch_counts_and_has_no_scores() -> None:
    q = k = v = torch.zeros(2, 4, 64, 8)
    with FlopCounterMode(display=False) as counter:
        _ = q @ (k.mT @ v)
    assert flops(LinearSpec()) == counter.get_total_flops()
    cost = cost_of(SITE, LinearSpec())
    assert cost is not None
    assert cost.scores == 0
    assert flops(BASES["linear"]) > flops(LinearSpec())  # the sums beside the values
    assert flops(LinearSpec(Features("exp"), Features("exp"))) == 2 * flops(LinearSpec())


def test_keys_that_are_near_have_scores() -> None:
    cost = cost_of(SITE, BASES["window tail"])
    assert cost is not None
    assert int(cost.scores.xreplace(SIZES)) == 2 * 4 * 64 * 8
