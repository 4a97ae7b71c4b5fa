"""heads.scale, and that the passes compose in any order."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from rewriter import registry
from rewriter import symbols as sym
from rewriter.errors import Declined
from rewriter.passbase import apply, parse_request
from rewriter.passes.heads import HeadScale
from rewriter.reference import mask_of, reference
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec

SITE = Site("layers.0.attn", 0, heads=4, kv_heads=2, head_dim=8, value_dim=8)
CAUSAL = SoftmaxSpec(mask=sym.k <= sym.q)


def example() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, n, 7, 8, dtype=torch.float64) for n in (4, 2, 2))


def test_scaled_heads_are_multiplied_and_others_are_not() -> None:
    q, k, v = example()
    spec = HeadScale(heads=(0, -1), by=0.5).rewrite(SITE, CAUSAL)
    factors = torch.tensor([0.5, 1, 1, 0.5], dtype=torch.float64).view(4, 1, 1)
    assert torch.equal(reference(spec, q, k, v), reference(CAUSAL, q, k, v) * factors)


def test_zero_ablates() -> None:
    out = reference(HeadScale(heads=(2,), by=0).rewrite(SITE, CAUSAL), *example())
    assert not out[:, 2].any()
    assert out[:, [0, 1, 3]].all()


def test_scaling_by_one_is_the_same_spec() -> None:
    assert HeadScale(heads=(1,), by=1).rewrite(SITE, CAUSAL) == CAUSAL


def test_head_that_does_not_exist_is_declined_with_the_count() -> None:
    for head in (4, -5):
        with pytest.raises(
            Declined, match=f"head {head} does not exist; this site has 4 heads, 0 to 3"
        ):
            HeadScale(heads=(head,), by=0).rewrite(SITE, CAUSAL)
    with pytest.raises(Declined, match="how many heads this site has is not known"):
        HeadScale(heads=(0,), by=0).rewrite(Site("x", 0), CAUSAL)


def test_passes_compose_in_any_order() -> None:
    """Window, scale and fuse in all six orders: one spec, and it means the product of the two."""
    texts = ["sparse.window(window=3, sinks=1)", "heads.scale(heads=[1, 3], by=0.25)", "fuse"]
    found = {
        apply([parse_request(t, registry) for t in order], SITE, CAUSAL, 1)[0]
        for order in permutations(texts)
    }
    (spec,) = found
    q, k, v = example()
    seen = torch.tensor([[j <= i and (i - j < 3 or j < 1) for j in range(7)] for i in range(7)])
    weights = (q @ k.repeat_interleave(2, 1).mT).masked_fill(~seen, -torch.inf).softmax(-1)
    want = weights @ v.repeat_interleave(2, 1)
    want[:, [1, 3]] *= 0.25
    torch.testing.assert_close(reference(spec, q, k, v), want, rtol=1e-12, atol=1e-12)


def test_passes_limited_to_heads_compose_in_any_order() -> None:
    texts = ["sparse.window(window=1) @ heads=0-1", "heads.scale(heads=[0], by=2)"]
    forward, backward = (
        apply([parse_request(t, registry) for t in order], SITE, CAUSAL, 1)[0]
        for order in (texts, texts[::-1])
    )
    assert torch.equal(
        mask_of(forward, q_len=5, kv_len=5, heads=4), mask_of(backward, q_len=5, kv_len=5, heads=4)
    )
    assert torch.equal(reference(forward, *example()), reference(backward, *example()))


@pytest.mark.parametrize("kind", registry.PASSES, ids=lambda kind: kind.name)
def test_identity_setting_changes_no_function(kind: type) -> None:
    q, k, v = example()
    for before in (CAUSAL, SoftmaxSpec()):
        request = parse_request(kind.identity, registry)  # type: ignore[attr-defined]
        spec, applied, refusals = apply([request], SITE, before, 1)
        assert applied == (request.text,)
        assert refusals == ()
        assert torch.equal(reference(spec, q, k, v), reference(before, q, k, v))
