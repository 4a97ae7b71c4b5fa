"""sparse.window: masks drawn as matrices, the law that ties it to attention, its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from torch.nn.functional import scaled_dot_product_attention

from rewriter import symbols as sym
from rewriter.errors import Declined
from rewriter.passes.sparse import SlidingWindow
from rewriter.reference import mask_of, reference
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg

SITE = Site("layers.0.attn", 0, heads=8, kv_heads=2, head_dim=8, value_dim=8)
CAUSAL = SoftmaxSpec(mask=sym.k <= sym.q)
CACHED = SoftmaxSpec(mask=sym.k <= sym.q + sym.M - sym.L)


def drawn(spec: SoftmaxSpec, q_len: int, kv_len: int, **more: object) -> list[list[int]]:
    return mask_of(spec, q_len=q_len, kv_len=kv_len, **more).int().tolist()  # type: ignore


def test_window_counts_the_query_itself() -> None:
    spec = SlidingWindow(window=2).rewrite(SITE, CAUSAL)
    assert drawn(spec, 4, 4) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_sinks_stay_visible_behind_the_causal_mask() -> None:
    spec = SlidingWindow(window=1, sinks=2).rewrite(SITE, CAUSAL)
    assert drawn(spec, 4, 4) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_window_is_open_to_both_sides_without_a_causal_mask() -> None:
    spec = SlidingWindow(window=2).rewrite(SITE, SoftmaxSpec())
    assert drawn(spec, 4, 4) == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("before", [CACHED, SoftmaxSpec()], ids=["masked", "unmasked"])
def test_cached_queries_are_the_last_keys(before: SoftmaxSpec) -> None:
    spec = SlidingWindow(window=2).rewrite(SITE, before)
    assert drawn(spec, 1, 5) == [[0, 0, 0, 1, 1]]


def test_decoding_sees_the_rows_of_the_whole_sequence() -> None:
    spec = SlidingWindow(window=3, sinks=1).rewrite(SITE, CACHED)
    whole = drawn(spec, 6, 6)
    assert [drawn(spec, 1, n + 1)[0] for n in range(6)] == [whole[n][: n + 1] for n in range(6)]


def test_a_cache_with_free_room_is_read_through_the_causal_mask() -> None:
    """A static cache: 3 tokens so far in room for 6, so the query is not at the last key."""
    position = sym.Read(sympy.Symbol("position"), sym.q)
    before = SoftmaxSpec(mask=sym.k <= position, tensors=(TensorArg("position", "int64", 1),))
    spec = SlidingWindow(window=2).rewrite(SITE, before)
    assert drawn(spec, 1, 6, tensors=[torch.tensor([2])]) == [[0, 1, 1, 0, 0, 0]]


def test_strict_causal_mask_ends_one_key_earlier() -> None:
    spec = SlidingWindow(window=1).rewrite(SITE, SoftmaxSpec(mask=sym.k < sym.q + 1))
    assert drawn(spec, 3, 3) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_padding_stays_hidden() -> None:
    pad = sympy.Ne(sym.Read(sympy.Symbol("pad"), sym.b, sym.k), 0)
    before = SoftmaxSpec(mask=CAUSAL.mask & pad, tensors=(TensorArg("pad", "bool", 2),))
    spec = SlidingWindow(window=2, sinks=1).rewrite(SITE, before)
    assert drawn(spec, 3, 3, tensors=[torch.tensor([[False, True, True]])]) == [
        [0, 0, 0],
        [0, 1, 0],
        [0, 1, 1],
    ]


def test_window_as_wide_as_the_sequence_equals_causal_sdpa() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 63, 8, dtype=torch.float64) for n in (8, 2, 2))
    spec = SlidingWindow(window=63).rewrite(
        SITE, SoftmaxSpec(sympy.Float(8**-0.5), mask=CAUSAL.mask)
    )
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(reference(spec, q, k, v), want, rtol=1e-12, atol=1e-12)


def test_window_prints_as_a_formula() -> None:
    spec = SlidingWindow(window=4096, sinks=4).rewrite(SITE, CAUSAL)
    assert str(spec) == "softmax( s | k ≤ q ∧ (k < 4 ∨ q - k < 4096) ) · v"


def test_window_declines_cross_attention() -> None:
    with pytest.raises(Declined, match="this site is cross-attention"):
        SlidingWindow(window=2).rewrite(Site("x", 0, is_cross=True), CAUSAL)


def test_window_declines_a_mask_with_two_ends() -> None:
    two = SoftmaxSpec(mask=(sym.k <= sym.q) & (sym.k <= 2 * sym.q))
    with pytest.raises(Declined, match="the mask ends at two places"):
        SlidingWindow(window=2).rewrite(SITE, two)


def test_a_single_query_stands_where_its_mask_ends() -> None:
    at = sym.Read(sympy.Symbol("at"), sympy.Integer(0))
    spec = SoftmaxSpec(mask=sym.k <= at, tensors=(TensorArg("at", "int64", 1),))
    site = replace(SITE, q_len=1)
    assert SlidingWindow(window=3).rewrite(site, spec).mask == (sym.k <= at) & (at - sym.k < 3)
