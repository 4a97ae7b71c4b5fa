"""The cost formulas, against counts by torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rewriter.cost import cost_of
from rewriter.sites import Site
from rewriter.symbols import B, L, M


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
