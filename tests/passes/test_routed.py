"""sparse.moba and sparse.biformer: the routes that they write, their limits, their refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention

from rewriter import symbols as sym
from rewriter.errors import Declined, PassError
from rewriter.passes.routed import BiFormer, MoBA
from rewriter.passes.sparse import SlidingWindow
from rewriter.reference import reference
from rewriter.registry import read_requests
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit, Route

SITE = Site("layers.0.attn", 0, heads=4, kv_heads=2, head_dim=8, value_dim=8)
CAUSAL = SoftmaxSpec(mask=sym.k <= sym.q + sym.M - sym.L)
PAD = sympy.Ne(sym.Read(sympy.Symbol("pad"), sym.b, sym.k), 0)
PAD_ARG = TensorArg("pad", "bool", 2)


def vision(length: int) -> Site:
    return replace(SITE, q_len=length, kv_len=length)


# --- mixture of block attention -------------------------------------------------------------------


def test_moba_stands_where_the_causal_mask_ends() -> None:
    spec = MoBA(block=64, topk=4, dense_below=0).rewrite(SITE, CAUSAL)
    assert spec == replace(CAUSAL, route=Route("query", 4, 64))
    position = sym.Read(sympy.Symbol("position"), sym.q)
    static = SoftmaxSpec(mask=sym.k <= position, tensors=(TensorArg("position", "int64", 1),))
    route = MoBA(block=64, topk=4).rewrite(SITE, static).route
    assert route is not None
    assert route.position == position


def test_moba_keeps_score_sink_gates_and_padding() -> None:
    tensors = (PAD_ARG, *(TensorArg(n, "float32", 1) for n in ("sink", "gate")))
    sink, gate = (sym.Read(sympy.Symbol(n), sym.h) for n in ("sink", "gate"))
    score = 30 * sympy.tanh(sym.s / 30)
    before = SoftmaxSpec(
        score=score, mask=CAUSAL.mask & PAD, sink=sink, heads=gate, tensors=tensors
    )
    after = MoBA(block=4, topk=2).rewrite(SITE, before)
    assert replace(after, route=None) == before


def test_moba_prints_as_a_formula() -> None:
    spec = MoBA(block=64, topk=4).rewrite(SITE, CAUSAL)
    assert "top 4 blocks of 64, dense up to 2048 keys" in str(spec)


def test_moba_of_all_blocks_is_causal_attention() -> None:
    q, k, v = (torch.randn(1, n, 63, 8, dtype=torch.float64) for n in (4, 2, 2))
    spec = replace(CAUSAL, scale=sympy.Float(8**-0.5))
    spec = MoBA(block=4, topk=16, dense_below=0).rewrite(SITE, spec)
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(reference(spec, q, k, v), want, rtol=1e-12, atol=1e-12)


WINDOW = SlidingWindow(window=8).rewrite(SITE, CAUSAL)
EDIT = Edit(sympy.Integer(0), (sympy.Integer(1),))


@pytest.mark.parametrize(
    ("site", "spec", "reason"),
    [
        (replace(SITE, is_cross=True), CAUSAL, "this site is cross-attention"),
        (SITE, SoftmaxSpec(), "the site is not causal, so no block comes before the query"),
        (SITE, WINDOW, "its mask hides keys by .* < 8 too, as a sliding window does"),
        (SITE, replace(CAUSAL, route=Route("query", 2, 8)), "its keys are chosen already: top 2"),
        (SITE, replace(CAUSAL, edit=EDIT), "its weights are edited by groups of keys"),
        (SITE, replace(CAUSAL, dropout=0.1), "its weights are dropped at random"),
    ],
    ids=["cross", "noncausal", "window", "route", "edit", "dropout"],
)
def test_moba_declines(site: Site, spec: SoftmaxSpec, reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        MoBA(block=4, topk=2).rewrite(site, spec)


@pytest.mark.parametrize("option", ["block", "topk"])
def test_moba_has_at_least_one_key_in_a_block_and_one_block(option: str) -> None:
    with pytest.raises(PassError, match=f"option {option} is 0; it has to be at least 1"):
        read_requests([f"sparse.moba({option}=0)"])


# --- bi-level routing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "options", "grid", "extra"),
    [
        (49, "", (7, 7), 0),
        (50, "", (7, 7), 1),
        (54, ", extra=5", (7, 7), 5),
        (12, ", grid=[3, 4]", (3, 4), 0),
        (14, ", grid=[3, 4]", (3, 4), 2),
        (0, ", grid=[3, 4]", (3, 4), 0),
    ],
)
def test_biformer_finds_its_grid(
    length: int, options: str, grid: tuple[int, int], extra: int
) -> None:
    (request,) = read_requests([f"sparse.biformer(regions=2, topk=1{options})"])
    spec = request.action.rewrite(vision(length), SoftmaxSpec())
    assert spec == SoftmaxSpec(route=Route("region", 1, grid=grid, regions=2, extra=extra))


@pytest.mark.parametrize(
    ("site", "options", "spec", "reason"),
    [
        (vision(0), "", SoftmaxSpec(), "known only when it runs; give grid="),
        (vision(51), "", SoftmaxSpec(), "its 51 tokens are no square grid; give grid="),
        (vision(9), "grid=[3, 4]", SoftmaxSpec(), "it has 9 tokens, and a grid of 3 x 4 has 12"),
        (vision(13), "grid=[3, 4], extra=0", SoftmaxSpec(), "it has 13 tokens"),
        (replace(SITE, q_len=1, kv_len=9), "", SoftmaxSpec(), "it has 1 queries and 9 keys"),
        (replace(vision(9), is_cross=True), "", SoftmaxSpec(), "this site is cross-attention"),
        (vision(9), "", CAUSAL, "its mask depends on the query"),
        (vision(9), "", SoftmaxSpec(dropout=0.1), "its weights are dropped at random"),
        (vision(6), "grid=[6, 1]", SoftmaxSpec(), "topk is 3, and a grid of 6 x 1 has 2 regions"),
    ],
)
def test_biformer_declines(site: Site, options: str, spec: SoftmaxSpec, reason: str) -> None:
    text = f"sparse.biformer(regions=2, topk=3{', ' + options if options else ''})"
    (request,) = read_requests([text])
    with pytest.raises(Declined, match=reason):
        request.action.rewrite(site, spec)


def test_biformer_says_how_many_regions_there_are() -> None:
    with pytest.raises(PassError, match="topk is 5, and 2 x 2 regions are 4"):
        BiFormer(regions=2, topk=5)
    with pytest.raises(PassError, match=r"grid is rows and columns, got \[7\]"):
        BiFormer(regions=2, topk=1, grid=(7,))


def test_biformer_takes_padding() -> None:
    before = SoftmaxSpec(mask=PAD, tensors=(PAD_ARG,))
    after = BiFormer(regions=2, topk=1).rewrite(vision(16), before)
    assert replace(after, route=None) == before


def test_biformer_of_all_regions_is_full_attention() -> None:
    q, k, v = (torch.randn(2, n, 17, 8, dtype=torch.float64) for n in (4, 2, 2))
    spec = SoftmaxSpec(scale=sympy.Float(8**-0.5))
    spec = BiFormer(regions=2, topk=4).rewrite(vision(17), spec)
    want = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(reference(spec, q, k, v), want, rtol=1e-12, atol=1e-12)


def test_the_local_term_is_a_depthwise_convolution_that_begins_at_zero() -> None:
    q, k, v = (torch.randn(2, 4, 1 + 9, 8) for _ in range(3))
    plain = BiFormer(regions=3, topk=2).rewrite(vision(10), SoftmaxSpec())
    spec = BiFormer(regions=3, topk=2, local=True).rewrite(vision(10), SoftmaxSpec())
    start = []
    for arg in spec.tensors:
        assert arg.source is not None
        (parameter,) = arg.source.parameters
        assert parameter.initial == 0.0
        start.append(arg.source.compute(torch.zeros(parameter.shape)))
    assert [x.shape for x in start] == [(32, 1, 5, 5), (32,)]
    assert torch.equal(reference(spec, q, k, v, start), reference(plain, q, k, v))
    weight, bias = torch.randn(32, 1, 5, 5), torch.randn(32)
    image = v[:, :, 1:].transpose(2, 3).reshape(2, 32, 3, 3)
    added = conv2d(image, weight, bias, padding=2, groups=32).view(2, 4, 8, 9).transpose(2, 3)
    found = reference(spec, q, k, v, [weight, bias]) - reference(plain, q, k, v)
    torch.testing.assert_close(found[:, :, 1:], added, rtol=1e-4, atol=1e-4)
    assert not found[:, :, :1].any()


def test_the_local_term_needs_to_know_the_heads() -> None:
    site = replace(vision(9), heads=0)
    with pytest.raises(Declined, match="how many heads it has, and how wide, is not known"):
        BiFormer(regions=3, topk=2, local=True).rewrite(site, SoftmaxSpec())
