"""Numbers that the papers on chosen blocks of keys give to test by: MoBA (arXiv 2502.13189, with
the tolerances of its own tests), BiFormer (arXiv 2303.08810), and what every executor owes to a
dense mask, short inputs included.

Rules are applied literally, in float64, to a boolean map; the map is expanded to a dense mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from sympy import Float
from torch import Tensor
from torch.nn.functional import conv2d

from rewriter import symbols as sym
from rewriter.op import attention
from rewriter.passes.routed import BiFormer, MoBA
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec

F64 = torch.float64
SITE = Site("layers.0.attn", 0, heads=4, kv_heads=2, head_dim=8, value_dim=8)
CAUSAL = SoftmaxSpec(Float(8**-0.5), mask=sym.k <= sym.q + sym.M - sym.L)


def run(spec: SoftmaxSpec, *x: Tensor, tensors: Sequence[Tensor] = ()) -> Tensor:
    return attention(*x, tensors, [], spec, "torch")


def qkv(length: int, dtype: torch.dtype = F64, batch: int = 2) -> list[Tensor]:
    """Four query heads, two key heads, eight features, of unit scale."""
    return [torch.randn(batch, n, length, 8, dtype=F64).to(dtype) for n in (4, 2, 2)]


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float = 8**-0.5) -> Tensor:
    """Softmax attention under a mask `[B, H, N, N]`."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, dim=1).mT * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, dim=1)


# --- MoBA -----------------------------------------------------------------------------------------


def moba(block: int, topk: int, dense_below: int = 0) -> SoftmaxSpec:
    return MoBA(block=block, topk=topk, dense_below=dense_below).rewrite(SITE, CAUSAL)


def gate_map(q: Tensor, k: Tensor, block: int, topk: int) -> Tensor:
    """True at `[b, h, i, c]` if query i sees block c: its own one, and of those before it the
    `topk - 1` with the largest `q . mean(k)`, unscaled, each head by itself."""
    batch, heads, length, _ = q.shape
    count = -(-length // block)
    means = torch.stack([x.mean(2) for x in k.double().split(block, dim=2)], dim=2)
    gates = q.double() @ means.repeat_interleave(heads // k.shape[1], dim=1).mT
    found = torch.zeros(batch, heads, length, count, dtype=torch.bool)
    for i in range(length):
        own = i // block
        best = gates[:, :, i, :own].topk(min(topk - 1, own)).indices
        found[:, :, i].scatter_(-1, best, True)
        found[:, :, i, own] = True
    return found


def expanded(blocks: Tensor, block: int) -> Tensor:
    """The map as a mask `[B, H, N, N]`, causal inside the own block."""
    length = blocks.shape[2]
    return blocks.repeat_interleave(block, dim=-1)[..., :length].tril()


CASES = [(300, 16, 1), (300, 16, 2), (300, 16, 3), (300, 16, 19), (70, 128, 1), (5, 16, 3)]
"""Length, block and topk: 1, 2 and n blocks of a length that is no multiple; one block; a length
below a block."""


@pytest.mark.parametrize(("length", "block", "topk"), CASES)
def test_outputs_and_gradients_are_those_of_the_rules_to_1e_5(
    length: int, block: int, topk: int
) -> None:
    x = [y.requires_grad_() for y in qkv(length, torch.float32)]
    wide = [y.detach().double().requires_grad_() for y in x]
    seen = expanded(gate_map(*wide[:2], block, topk), block)
    found, want = run(moba(block, topk), *x), dense(*wide, seen)
    grad = torch.randn_like(want)
    pairs = zip(
        (found, *torch.autograd.grad(found, x, grad.float())),
        (want, *torch.autograd.grad(want, wide, grad)),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "block", "topk"), [(1000, 64, 2), (1000, 64, 3), (1000, 64, 4)])
def test_bfloat16_has_the_bounds_of_the_authors_test(length: int, block: int, topk: int) -> None:
    """2e-2 of each number, 4e-2 at most, 4e-4 on average, for outputs and gradients."""
    x = [y.requires_grad_() for y in qkv(length, torch.bfloat16, batch=1)]
    wide = [y.detach().double().requires_grad_() for y in x]
    seen = expanded(gate_map(*wide[:2], block, topk), block)
    found, want = run(moba(block, topk), *x), dense(*wide, seen)
    grad = torch.randn_like(want).bfloat16()
    pairs = zip(
        (found, *torch.autograd.grad(found, x, grad)),
        (want, *torch.autograd.grad(want, wide, grad.double())),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)
        error = (one.double() - other).abs()
        assert error.max() < 4e-2
        assert error.mean() < 4e-4


@pytest.mark.parametrize("topk", [1, 2, 3, 6])
def test_a_query_sees_topk_blocks_its_own_counted_or_all_there_are(topk: int) -> None:
    """Six blocks; with values of the unit matrix the output is the weights themselves."""
    q, k, _ = qkv(48)
    unit = torch.eye(48, dtype=F64).expand(2, 2, 48, 48)
    blocks = (run(moba(8, topk), q, k, unit) > 0).unflatten(-1, (6, 8)).any(-1)
    own = torch.arange(48) // 8
    assert torch.equal(blocks.sum(-1), (own + 1).clamp(max=topk).expand(2, 4, 48))
    assert blocks.gather(-1, own.view(1, 1, 48, 1).expand(2, 4, -1, 1)).all()


def test_a_planted_block_is_seen_by_every_later_query() -> None:
    """All keys of the third block look along every query of two heads."""
    q, k, _ = qkv(80)
    towards = torch.randn(8, dtype=F64)
    q, k[:, 0, 16:24] = q + 4 * towards, 4 * towards
    unit = torch.eye(80, dtype=F64).expand(2, 2, 80, 80)
    weights = run(moba(8, 2), q, k, unit)
    assert (weights[:, :2, 24:, 16:24] > 0).all()
    assert (weights[:, :2, 24:, 16:24].sum(-1) > 0.9).all()


# --- where routing does not pay, or selects everything --------------------------------------------


@pytest.mark.parametrize(
    "spec", [moba(16, 1, dense_below=64), moba(16, 4), moba(64, 1)], ids=["floor", "top", "one"]
)
def test_below_the_floor_and_with_all_blocks_it_is_the_dense_model_bit_for_bit(
    spec: SoftmaxSpec,
) -> None:
    """An explicit branch: no sum of 1.0 decides about the last block."""
    x = qkv(64, torch.float32)
    assert torch.equal(run(spec, *x), run(CAUSAL, *x))


def test_one_key_above_the_floor_the_last_query_chooses() -> None:
    x = qkv(65, torch.float32)
    found, want = run(moba(16, 1, dense_below=64), *x), run(CAUSAL, *x)
    torch.testing.assert_close(found[:, :, :64], want[:, :, :64], rtol=1e-5, atol=1e-5)
    assert (found - want)[:, :, 64].abs().amax() > 1e-2


# --- BiFormer -------------------------------------------------------------------------------------


def vision(rows: int, columns: int) -> Site:
    return replace(SITE, q_len=rows * columns, kv_len=rows * columns)


def region_mask(
    q: Tensor, k: Tensor, grid: tuple[int, int], regions: int, topk: int
) -> tuple[Tensor, Tensor]:
    """The dense mask `[B, 1, N, N]`, and by how much the last chosen region is ahead of the first
    one that is not, `[B, R]`. Regions are of `ceil` size, means are over real tokens."""
    (rows, columns), (high, wide) = grid, (-(-n // regions) for n in grid)
    place = torch.arange(rows * columns)
    region = place // columns // high * (-(-columns // wide)) + place % columns // wide
    count = int(region.max()) + 1
    merged = [  # all heads together: the affinity is of the whole width
        x.double().repeat_interleave(4 // x.shape[1], dim=1).transpose(1, 2).flatten(2)
        for x in (q, k)
    ]
    means = [torch.stack([x[:, region == r].mean(1) for r in range(count)], dim=1) for x in merged]
    affinity = means[0] @ means[1].mT
    order = affinity.sort(dim=-1, descending=True)
    chosen = torch.zeros_like(affinity).scatter_(-1, order.indices[..., :topk], 1.0).bool()
    ahead = order.values[..., topk - 1] - order.values[..., min(topk, count - 1)]
    return chosen[:, region][:, :, region][:, None], ahead


def local_context(v: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """The 5 x 5 depthwise convolution of the values, on the whole map."""
    batch, _, length, dim = v.shape
    image = v.repeat_interleave(2, dim=1).mT.reshape(batch, 4 * dim, *grid)
    out = conv2d(image, weight, bias, padding=2, groups=4 * dim)
    return out.view(batch, 4, dim, length).mT


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("grid", [(17, 13), (15, 15)])
def test_outputs_and_gradients_are_those_of_a_dense_mask_and_a_convolution(
    grid: tuple[int, int], dtype: torch.dtype, allowed: float
) -> None:
    """S = 4 and maps that it does not divide; the choice is a constant of the gradient."""
    spec = BiFormer(regions=4, topk=3, grid=grid, local=True).rewrite(
        vision(*grid), SoftmaxSpec(Float(8**-0.5))
    )
    x = qkv(grid[0] * grid[1], dtype)
    x += [(torch.randn(s) / 5).to(dtype) for s in ((32, 1, 5, 5), (32,))]
    leaves = [y.requires_grad_() for y in x]
    wide = [y.detach().double().requires_grad_() for y in x]
    seen, ahead = region_mask(*wide[:2], grid, 4, 3)
    assert ahead.min() > 1e-4  # else rounding may choose
    found = run(spec, *leaves[:3], tensors=leaves[3:])
    want = dense(*wide[:3], seen) + local_context(*wide[2:], grid)
    torch.testing.assert_close(found.double(), want, rtol=allowed, atol=allowed)
    grad = torch.randn_like(want).to(dtype)
    got = torch.autograd.grad(found, leaves, grad)
    for one, other in zip(got, torch.autograd.grad(want, wide, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=allowed, atol=allowed)


@pytest.mark.parametrize(
    ("side", "topk", "keys"), [(56, 1, 64), (28, 4, 64), (14, 16, 64), (7, 49, 49)]
)
def test_at_224_pixels_a_query_sees_64_keys_in_three_stages_and_all_49_in_the_last(
    side: int, topk: int, keys: int
) -> None:
    """S = 7; regions of 64, 16, 4 and 1 tokens. Scores that are all 0 give the mean of the values
    that are seen."""
    spec = BiFormer(regions=7, topk=topk).rewrite(vision(side, side), SoftmaxSpec(Float(0.0)))
    q, k = (torch.randn(1, 1, side * side, 2, dtype=F64) for _ in range(2))
    v = torch.randn(1, 1, side * side, 1, dtype=F64)
    four = (x.expand(-1, 4, -1, -1) for x in (q, k))
    seen, _ = region_mask(*four, (side, side), 7, topk)
    assert (seen.sum(-1) == keys).all()
    want = (seen.double() @ v) / keys
    torch.testing.assert_close(run(spec, q, k, v), want, rtol=1e-12, atol=1e-12)


def test_the_scale_is_that_of_the_layer_the_width_of_all_heads_where_it_says_so() -> None:
    """`C^-0.5` and `d^-0.5` differ visibly: the scale is read from the graph, never assumed."""
    x = qkv(36)
    site = vision(6, 6)
    spec = BiFormer(regions=3, topk=9).rewrite(site, SoftmaxSpec(Float(32**-0.5)))
    everything = torch.ones(1, 1, 36, 36, dtype=torch.bool)
    found = run(spec, *x)
    torch.testing.assert_close(found, dense(*x, everything, 32**-0.5), rtol=1e-7, atol=1e-7)
    assert (found - dense(*x, everything)).abs().amax() > 0.05
