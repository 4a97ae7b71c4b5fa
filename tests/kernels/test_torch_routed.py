"""Routed attention against rules applied literally, its limits, its memory, and generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewriter import symbols as sym
from rewriter.beside import Beside
from rewriter.kernels import (
    torch_routed,
    torch_routed_work,
    torch_routing,
    torch_tiles,
    triton_routed,
)
from rewriter.kernels.torch_routed import backward, forward
from rewriter.lowering import Shapes
from rewriter.op import attention
from rewriter.reference import reference
from rewriter.spec import Masked, SoftmaxSpec, TensorArg
from rewriter.stages import Edit, Route
from rewriter.verify.memory import peak_of

CAUSAL = sym.k <= sym.q + sym.M - sym.L
PAD = sympy.Ne(sym.Read(sympy.Symbol("pad"), sym.b, sym.k), 0)
PAD_ARG = TensorArg("pad", "bool", 2)
SCALE = sympy.Float(8**-0.5)


def moba(block: int, topk: int, dense_below: int = 0, **more: Any) -> SoftmaxSpec:
    route = Route("query", topk, block, dense_below=dense_below)
    return SoftmaxSpec(**{"scale": SCALE, "mask": CAUSAL, "route": route, **more})


def regions(grid: tuple[int, int], count: int, topk: int, extra: int = 0) -> SoftmaxSpec:
    route = Route("region", topk, grid=grid, regions=count, extra=extra)
    return SoftmaxSpec(scale=SCALE, route=route)


def qkv(
    length: int, *, heads: int = 4, kv_heads: int = 2, batch: int = 2, dtype: Any = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads, length, 8, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, length, 8, dtype=dtype) for _ in range(2))
    return q, k, v


def close(found: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["whole", "in small parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with limits so small that every loop goes round more than once."""
    if request.param != "whole":
        monkeypatch.setattr(torch_routed_work, "LEAST", 2**9)
        monkeypatch.setattr(torch_tiles, "AT_ONCE", 2**9)
        monkeypatch.setattr(torch_routed_work, "AT_ONCE", 2**9)


# --- mixture of block attention -------------------------------------------------------------------


def literal_moba(q: Tensor, k: Tensor, v: Tensor, block: int, topk: int) -> Tensor:
    """The rules of arXiv 2502.13189 one query at a time, in float64."""
    batch, heads, length, _ = q.shape
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = (x[b, h * k.shape[1] // heads].double() for x in (k, v))
            for i in range(length):
                own = i // block
                gates = [
                    float(q[b, h, i].double() @ keys[c * block :][:block].mean(0))
                    for c in range(own)
                ]
                best = sorted(range(own), key=lambda c: -gates[c])[: topk - 1]
                seen = [j for j in range(i + 1) if j // block in (*best, own)]
                weights = (keys[seen] @ q[b, h, i].double() * 8**-0.5).softmax(0)
                out[b, h, i] = weights @ values[seen]
    return out


@pytest.mark.parametrize("topk", [1, 2, 3, 9])
@pytest.mark.parametrize("length", [37, 48])
def test_equals_the_rules_applied_literally(length: int, topk: int, parts: None) -> None:
    q, k, v = qkv(length)
    close(forward(moba(5, topk), q, k, v, (), ()), literal_moba(q, k, v, 5, topk))


def test_float32_is_within_1e_5_and_bfloat16_within_2e_2() -> None:
    q, k, v = qkv(75, dtype=torch.float32)
    close(forward(moba(16, 2), q, k, v, (), ()).double(), literal_moba(q, k, v, 16, 2), 1e-5)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    close(forward(moba(16, 2), q, k, v, (), ()).double(), literal_moba(q, k, v, 16, 2), 2e-2)


@pytest.mark.parametrize(("block", "topk"), [(5, 8), (5, 100), (37, 1), (64, 1)])
def test_all_blocks_or_a_single_block_is_causal_attention(
    block: int, topk: int, parts: None
) -> None:
    q, k, v = qkv(37)
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    close(forward(moba(block, topk), q, k, v, (), ()), want, 1e-12)


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"), [(1.0, "float32", 1e-6), (99.0, "float64", 1e-11)]
)
def test_parts_joined_by_their_sums_are_one_softmax(
    size: float, dtype: str, tolerance: float
) -> None:
    q, k, v = qkv(96)
    q = q * size  # large ones make sums of very different size
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    q, k, v = (x.to(getattr(torch, dtype)) for x in (q, k, v))
    close(forward(moba(8, 100), q, k, v, (), ()).double(), want, tolerance)


def test_one_block_is_block_diagonal() -> None:
    q, k, v = qkv(20)
    cut = [x.reshape(2, -1, 4, 5, 8).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    want = scaled_dot_product_attention(*cut, is_causal=True, enable_gqa=True)
    want = want.view(2, 4, 4, 5, 8).transpose(1, 2).flatten(2, 3)
    close(forward(moba(5, 1), q, k, v, (), ()), want)


def test_later_tokens_change_no_earlier_row() -> None:
    q, k, v = qkv(41)
    old = forward(moba(4, 3), q, k, v, (), ())
    changed = [torch.cat([x[:, :, :22], torch.randn_like(x[:, :, 22:])], dim=2) for x in (q, k, v)]
    new = forward(moba(4, 3), *changed, (), ())
    close(new[:, :, :22], old[:, :, :22], 1e-14)
    assert (new[:, :, 22:] - old[:, :, 22:]).abs().amin(-1).gt(0).all()


def test_tokens_of_a_past_block_may_change_places() -> None:
    q, k, v = qkv(24)
    order = torch.tensor([*range(8), 11, 8, 10, 9, *range(12, 24)])
    old = forward(moba(4, 3), q, k, v, (), ())
    new = forward(moba(4, 3), q, k[:, :, order], v[:, :, order], (), ())
    close(new[:, :, 12:], old[:, :, 12:])


def test_of_equal_blocks_the_earlier_ones_are_seen() -> None:
    q, k, v = qkv(32)
    found = forward(moba(4, 3), q, torch.zeros_like(k), v, (), ())
    wide = v.repeat_interleave(2, dim=1)
    close(found[:, :, 31], torch.cat([wide[:, :, :8], wide[:, :, 28:]], dim=2).mean(2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str, parts: None) -> None:
    q, k, v = qkv(30)
    want = forward(moba(4, 3, 6), q, k, v, (), ())
    place = (5, 0) if side == "left" else (0, 5)
    wide = [torch.nn.functional.pad(x, (0, 0, *place), value=7.0) for x in (q, k, v)]
    pad = torch.ones(2, 35, dtype=torch.bool)
    pad[:, slice(0, 5) if side == "left" else slice(30, 35)] = False
    spec = moba(4, 3, 6, mask=CAUSAL & PAD, tensors=(PAD_ARG,))
    found = forward(spec, *wide, (pad,), ())
    close(found[:, :, place[0] : place[0] + 30], want)


def test_sequences_of_one_batch_may_be_padded_differently(parts: None) -> None:
    q, k, v = qkv(33)
    pad = torch.ones(2, 33, dtype=torch.bool)
    pad[0, :9], pad[1, 25:] = False, False
    spec = moba(4, 3, 10, mask=CAUSAL & PAD, tensors=(PAD_ARG,))
    close(forward(spec, q, k, v, (pad,), ()), reference(spec, q, k, v, (pad,)))


def test_short_rows_are_dense() -> None:
    q, k, v = qkv(40)
    found = forward(moba(4, 2, dense_below=24), q, k, v, (), ())
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    close(found[:, :, :24], want[:, :, :24])
    close(found[:, :, 24:], forward(moba(4, 2), q, k, v, (), ())[:, :, 24:])


def test_queries_without_a_causal_mask_see_their_whole_own_block() -> None:
    q, k, v = qkv(30)
    spec = moba(4, 2, mask=sympy.true)
    close(forward(spec, q, k, v, (), ()), reference(spec, q, k, v))


# --- formulas and gradients -----------------------------------------------------------------------

SLOPE, SINK, GATE = (sym.Read(sympy.Symbol(n), sym.h) for n in ("slope", "sink", "gate"))
FORMULAS = SoftmaxSpec(
    scale=SCALE,
    score=5 * sympy.tanh(sym.s / 5) + SLOPE * (sym.k - sym.q),
    sink=SINK,
    heads=GATE,
    tensors=tuple(TensorArg(n, "float64", 1) for n in ("slope", "sink", "gate")),
)


def agree(spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor]) -> None:
    """Output and every gradient are those of the reference, whose choice is constant too."""
    inputs = [x.requires_grad_(x.is_floating_point()) for x in (q, k, v, *tensors)]
    want = reference(spec, q, k, v, tensors)
    close(forward(spec, q, k, v, tensors, ()), want)
    grad = torch.randn_like(want)
    wanted = [x.requires_grad for x in inputs]
    found = backward(spec, grad, q, k, v, tensors, (), wanted)
    expected = iter(torch.autograd.grad(want, [x for x in inputs if x.requires_grad], grad))
    for g, x in zip(found, inputs, strict=True):
        if x.requires_grad:
            assert g is not None
            close(g, next(expected), 1e-8)
        else:
            assert g is None


@pytest.mark.parametrize("masked", ["zero", "mean", "add"])
@pytest.mark.parametrize("formulas", [False, True])
def test_gradients_are_those_of_the_dense_mask(masked: Masked, formulas: bool, parts: None) -> None:
    q, k, v = qkv(29)
    spec = FORMULAS if formulas else SoftmaxSpec(scale=SCALE)
    spec = replace(
        spec,
        mask=CAUSAL & PAD,
        masked=masked,
        route=Route("query", 3, 4, dense_below=6),
        tensors=(PAD_ARG, *spec.tensors),
    )
    pad = torch.ones(2, 29, dtype=torch.bool)
    pad[0, :6], pad[1, 25:] = False, False
    more = [torch.rand(4, dtype=torch.float64) for _ in range(3 * formulas)]
    agree(spec, q, k, v, [pad, *more])


@pytest.mark.parametrize("formulas", [False, True])
def test_gradients_of_regions_are_those_of_the_dense_mask(formulas: bool, parts: None) -> None:
    q, k, v = qkv(2 + 7 * 6)
    spec = FORMULAS if formulas else SoftmaxSpec(scale=SCALE)
    spec = replace(spec, route=Route("region", 3, grid=(7, 6), regions=3, extra=2))
    agree(spec, q, k, v, [torch.rand(4, dtype=torch.float64) for _ in range(3 * formulas)])


def test_a_scale_that_is_learned_has_a_gradient() -> None:
    q, k, v = qkv(23)
    scale = sympy.exp(sym.Read(sympy.Symbol("t"), sym.h))
    spec = moba(4, 2, scale=scale, tensors=(TensorArg("t", "float64", 1),))
    agree(spec, q, k, v, [torch.randn(4, dtype=torch.float64)])


def test_a_sink_without_a_parameter_adds_nothing_to_the_gradient_of_the_gate() -> None:
    q, k, v = qkv(23)
    spec = moba(4, 2, sink=sympy.Integer(0), heads=GATE, tensors=FORMULAS.tensors[-1:])
    agree(spec, q, k, v, [torch.rand(4, dtype=torch.float64)])


def test_rows_without_a_key_may_be_nan() -> None:
    q, k, v = qkv(20)
    pad = torch.ones(2, 20, dtype=torch.bool)
    pad[0, :6] = False
    spec = moba(4, 2, mask=CAUSAL & PAD, tensors=(PAD_ARG,), masked="nan")
    found, want = forward(spec, q, k, v, (pad,), ()), reference(spec, q, k, v, (pad,))
    torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-10, atol=1e-10)
    assert found.isnan().any()


def test_key_heads_may_hide_different_keys() -> None:
    q, k, v = qkv(26)
    hidden = sympy.Ne(sym.Read(sympy.Symbol("pad"), sym.h, sym.k), 0)
    spec = moba(4, 2, mask=CAUSAL & hidden, tensors=(PAD_ARG,))
    agree(spec, q, k, v, [torch.rand(4, 26) > 0.3])


# --- regions --------------------------------------------------------------------------------------


def test_a_region_attends_to_the_region_that_fits_it() -> None:
    """Keys of region i are e_i, queries of region r are 10 e_j: the mean of v over region j."""
    region = torch.arange(16).view(4, 4) // 2 % 2 + torch.arange(4)[:, None] // 2 * 2
    region, to = region.flatten(), torch.tensor([2, 0, 3, 1])
    unit = torch.eye(8, dtype=torch.float64)
    q, k = 10 * unit[to[region]][None, None], unit[region][None, None]
    v = torch.randn(1, 1, 16, 8, dtype=torch.float64)
    found = forward(regions((4, 4), 2, 1), q, k, v, (), ())
    want = torch.stack([v[:, :, region == to[r]].mean(2) for r in region], dim=2)
    close(found, want)


def dense_regions(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, topk: int) -> Tensor:
    """Four regions a side, by a dense mask over the real tokens."""
    high, wide = -(-rows // 4), -(-columns // 4)
    place = torch.arange(rows * columns)
    region = place // columns // high * 4 + place % columns // wide
    means = [torch.stack([x[:, :, region == r].mean(2) for r in range(16)], dim=2) for x in (q, k)]
    affinity = torch.einsum("bhrd,bhsd->brs", means[0], means[1].repeat_interleave(2, 1))
    chosen = torch.zeros_like(affinity).scatter_(-1, affinity.topk(topk).indices, 1.0).bool()
    mask = chosen[:, region][:, :, region][:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("grid", [(17, 13), (15, 15), (16, 12)])
@pytest.mark.parametrize("topk", [1, 3])
def test_maps_that_regions_do_not_divide(grid: tuple[int, int], topk: int, parts: None) -> None:
    q, k, v = qkv(grid[0] * grid[1])
    found = forward(regions(grid, 4, topk), q, k, v, (), ())
    close(found, dense_regions(q, k, v, *grid, topk))


def test_regions_in_float32_and_bfloat16() -> None:
    q, k, v = qkv(17 * 13, dtype=torch.float32)
    want = dense_regions(*(x.double() for x in (q, k, v)), 17, 13, 3)
    close(forward(regions((17, 13), 4, 3), q, k, v, (), ()).double(), want, 1e-5)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    want = dense_regions(*(x.double() for x in (q, k, v)), 17, 13, 3)
    close(forward(regions((17, 13), 4, 3), q, k, v, (), ()).double(), want, 2e-2)


@pytest.mark.parametrize("count", [1, 3])
def test_all_regions_are_full_attention(count: int) -> None:
    q, k, v = qkv(30)
    found = forward(regions((5, 6), count, count**2), q, k, v, (), ())
    close(found, scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_the_same_vector_added_to_every_key_changes_nothing() -> None:
    q, k, v = qkv(36)
    spec = regions((6, 6), 3, 2)
    moved = k + 3 * torch.randn(2, 2, 1, 8, dtype=torch.float64)
    close(forward(spec, q, moved, v, (), ()), forward(spec, q, k, v, (), ()))


def test_tokens_of_a_region_change_places_together_with_their_rows() -> None:
    q, k, v = qkv(16)
    order = torch.arange(16)
    order[[0, 1, 4, 5]] = torch.tensor([5, 0, 1, 4])
    spec = regions((4, 4), 2, 1)
    found = forward(spec, *(x[:, :, order] for x in (q, k, v)), (), ())
    close(found, forward(spec, q, k, v, (), ())[:, :, order])


def test_extra_tokens_see_everything_and_are_seen() -> None:
    q, k, v = qkv(2 + 16)
    found = forward(regions((4, 4), 2, 1, extra=2), q, k, v, (), ())
    want = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    close(found[:, :, :2], want[:, :, :2])
    changed = v.clone()
    changed[:, :, 1] += 1.0
    moved = forward(regions((4, 4), 2, 1, extra=2), q, k, changed, (), ())
    assert (moved - found).abs().amin(-1).gt(0).all()


@pytest.mark.parametrize("dense_below", [41, 42])
def test_few_tokens_without_padding_are_dense(dense_below: int) -> None:
    q, k, v = qkv(42)
    route = Route("region", 1, grid=(7, 6), regions=3, dense_below=dense_below)
    spec = SoftmaxSpec(scale=SCALE, route=route)
    agree(spec, q, k, v, [])
    dense = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.allclose(forward(spec, q, k, v, (), ()), dense) == (dense_below == 42)
    lists = triton_routed._sees_all(torch_tiles.Operands(spec, q, k, v, (), ()), route)
    assert lists.tolist() == [[dense_below == 42]]


def test_hidden_keys_of_regions_count_for_nothing(parts: None) -> None:
    q, k, v = qkv(42)
    pad = torch.rand(2, 42) > 0.4
    pad[0, :18], pad[1, 6:] = False, False  # a region without keys; few keys
    route = Route("region", 2, grid=(7, 6), regions=3, dense_below=6)
    agree(SoftmaxSpec(scale=SCALE, mask=PAD, route=route, tensors=(PAD_ARG,)), q, k, v, [pad])


# --- generation -----------------------------------------------------------------------------------


class Memory:
    """A growing cache, with what is kept beside it."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def step(self, keys: Tensor) -> Beside:
        self.keys, past = keys.clone(), self.keys
        return Beside(("site",), self.keys, past)


@pytest.mark.parametrize("padded", [False, True])
def test_steps_of_generation_give_the_rows_of_the_whole(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(45)
    spec, pad = moba(4, 3, 9), torch.ones(2, 45, dtype=torch.bool)
    if padded:
        spec, pad[0, :7] = moba(4, 3, 9, mask=CAUSAL & PAD, tensors=(PAD_ARG,)), False
    whole = forward(spec, q, k, v, [pad] * padded, ())
    first: list[int] = []
    sums: Callable[..., Tensor] = torch_routing._sums
    monkeypatch.setattr(
        torch_routing, "_sums", lambda ops, layout, n: (first.append(n), sums(ops, layout, n))[1]
    )
    memory = Memory()
    for stop in (20, *range(21, 46)):
        start = 0 if stop == 20 else stop - 1
        three = (q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
        tensors = [pad[:, :stop]] * padded
        found = forward(spec, *three, tensors, (), memory.step(three[1]))
        close(found, whole[:, :, start:stop])
        close(forward(spec, *three, tensors, ()), found, 1e-13)
    remembered = first[0::2][1:]
    lost = 7 * padded
    assert remembered == [(stop - 1 - lost) // 4 for stop in range(21, 46)], "keys are read again"


def test_sums_are_forgotten_when_the_earlier_keys_are_others() -> None:
    q, k, v = qkv(33)
    memory = Memory()
    spec = moba(4, 2, mask=CAUSAL & PAD, tensors=(PAD_ARG,))
    pad = torch.ones(2, 33, dtype=torch.bool)
    forward(
        spec,
        q[:, :, :32],
        k[:, :, :32],
        v[:, :, :32],
        (pad[:, :32],),
        (),
        memory.step(k[:, :, :32]),
    )
    pad[:, 2] = False
    found = forward(spec, q[:, :, 32:], k, v, (pad,), (), memory.step(k))
    close(found, reference(spec, q[:, :, 32:], k, v, (pad,)))


def test_several_queries_go_on_from_a_cache() -> None:
    q, k, v = qkv(64)
    whole = forward(moba(4, 3), q, k, v, (), ())
    close(forward(moba(4, 3), q[:, :, 40:], k, v, (), ()), whole[:, :, 40:])


# --- what it takes, and memory --------------------------------------------------------------------

SHAPES = Shapes("cpu", torch.float32, 1, 4, 2, 64, 64, 8, 8, False)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (moba(4, 2, dropout=0.1), "dropout is not drawn over chosen blocks"),
        (
            moba(4, 2, edit=Edit(sympy.Integer(0), (sympy.Integer(1),))),
            "weights are not edited over chosen blocks",
        ),
        (regions((5, 5), 2, 1), "64 queries and 64 keys are not 0 and a grid of 5 x 5"),
    ],
)
def test_refuses_with_a_reason(spec: SoftmaxSpec, reason: str) -> None:
    assert torch_routed.supports(spec, SHAPES) == reason


def test_takes_a_score_with_formulas() -> None:
    assert torch_routed.supports(replace(FORMULAS, route=Route("query", 2, 4)), SHAPES) is None


@pytest.mark.parametrize(
    ("spec", "length"),
    [(moba(64, 3, dense_below=300), 2048), (regions((48, 48), 8, 4), 2304)],
    ids=["by query", "by region"],
)
def test_no_tensor_is_as_large_as_the_scores_of_a_head(spec: SoftmaxSpec, length: int) -> None:
    q, k, v = qkv(length, batch=1, dtype=torch.float32)
    grad, wanted = torch.randn_like(q), [True] * 3
    found = peak_of(lambda: forward(spec, q, k, v, (), ()), q.device)
    assert found.largest < length**2 * 4 / 2
    found = peak_of(lambda: backward(spec, grad, q, k, v, (), (), wanted), q.device)
    assert found.largest < length**2 * 4 / 2


EMPTY = [(0, 9, 9), (1, 0, 9), (0, 0, 9), (1, 3, 0), (1, 0, 0)]
"""Batches, queries and keys; regions have all tokens of a grid, so only the batch may be empty."""
OF_QUERIES = [
    moba(4, 2),
    moba(4, 2, masked="mean"),
    moba(4, 2, masked="nan"),
    moba(4, 2, masked="add", sink=SINK, heads=GATE, tensors=FORMULAS.tensors[1:]),
]


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [*product(OF_QUERIES, EMPTY), (regions((3, 3), 2, 1), EMPTY[0])],
)
def test_without_rows_or_keys_everything_is_zero(
    spec: SoftmaxSpec, sizes: tuple[int, int, int]
) -> None:
    batch, q_len, kv_len = sizes
    q = torch.randn(batch, 4, q_len, 8)
    k, v = (torch.randn(batch, 2, kv_len, 8) for _ in range(2))
    inputs = [q, k, v, *(torch.rand(4) for _ in spec.tensors)]
    out = forward(spec, q, k, v, inputs[3:], ())
    assert out.shape == q.shape
    assert not out.any()
    found = backward(spec, torch.ones_like(q), q, k, v, inputs[3:], (), [True] * len(inputs))
    for x, g in zip(inputs, found, strict=True):
        assert g is not None
        assert g.shape == x.shape
        assert not g.any()


def test_flat_rows_are_copied_when_they_are_read() -> None:
    """The Triton kernel reads q, k and v where they lie."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(20))
    ops = torch_tiles.Operands(moba(4, 2), q, k, v, (), ())
    assert not {"flat_q", "flat_k", "flat_v"} & vars(ops).keys()
    assert torch.equal(ops.flat_k, k.flatten(0, 2))
    assert ops.flat_k is ops.flat_k


def test_values_of_any_strides_are_read() -> None:
    place = sym.q + sym.M - sym.L
    spec = SoftmaxSpec(mask=sym.k <= place, route=Route("query", 2, 8, place))
    q, k, v = (torch.randn(1, h, 40, 8, dtype=torch.float64) for h in (2, 1, 1))
    v = v.mT.contiguous().mT
    got = attention(q, k, v, [], [], spec, "torch.routed")
    torch.testing.assert_close(got, reference(spec, q, k, v))
