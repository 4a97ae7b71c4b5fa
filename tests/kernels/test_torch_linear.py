"""Chunkwise linear attention against the dense reference, closed forms, and the laws it obeys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from sympy import Float, Symbol
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter import symbols as sym
from rewriter.beside import beside
from rewriter.kernels import torch_linear, torch_linear_call
from rewriter.kernels.torch_linear_call import Call
from rewriter.linear import Features, LinearSpec, Near
from rewriter.lowering import Shapes
from rewriter.op import attention
from rewriter.reference import reference
from rewriter.spec import TensorArg

F64 = torch.float64
POSITION = sym.q + sym.M - sym.L
PLAIN = LinearSpec(position=POSITION)


def read(name: str, *index: Any) -> sym.Read:
    return sym.Read(Symbol(name), *index)


def tensor(name: str, rank: int, dtype: str = "float32") -> TensorArg:
    return TensorArg(name, dtype, rank)


def decaying(s: float, **more: Any) -> LinearSpec:
    return LinearSpec(position=POSITION, decay=Float(-s) if s else sympy.Integer(0), **more)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(
    heads: int = 4, kv_heads: int = 2, n: int = 65, dim: int = 8, value_dim: int = 6, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        drawn(batch, heads, n, dim, seed=1),
        drawn(batch, kv_heads, n, dim, seed=2),
        drawn(batch, kv_heads, n, value_dim, seed=3),
    )


def run(
    spec: LinearSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor] = ()
) -> Tensor:
    return torch_linear.forward(spec, q, k, v, list(tensors), [])


def same(x: Tensor, y: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[1, 16, 32, 64, 128])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch_linear_call, "CHUNK", request.param)
    return int(request.param)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many steps in a short sequence."""
    monkeypatch.setattr(torch_linear_call, "CHUNK", 4)
    monkeypatch.setattr(torch_linear_call, "_APART", 7)


# --- closed forms and lengths ---------------------------------------------------------------------


@pytest.mark.parametrize("s", [0, 0.004, 0.5, 2])
def test_ones_give_the_geometric_series(s: float) -> None:
    one = torch.ones(1, 1, 913, 1, dtype=F64)
    got = run(decaying(s), one, one, one).flatten()
    count = torch.arange(1, 914, dtype=F64)
    want = (1 - math.exp(-s) ** count) / (1 - math.exp(-s)) if s else count
    same(got, want, 1e-9)


def test_two_keys_give_one_and_one_plus_lambda() -> None:
    one = torch.ones(1, 1, 2, 1, dtype=F64)
    same(
        run(decaying(0.5), one, one, one).flatten(),
        torch.tensor([1, 1 + math.exp(-0.5)], dtype=F64),
    )


def recurrent(q: Tensor, k: Tensor, v: Tensor, s: float) -> Tensor:
    """The definition, a key at a time."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    state, rows = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None]), []
    for t in range(q.shape[2]):
        state = math.exp(-s) * state + k[:, :, t, :, None] * v[:, :, t, None]
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 913, 1213])
@pytest.mark.parametrize("s", [0, 0.004, 0.5, 2])
def test_chunks_equal_the_recurrence(n: int, s: float) -> None:
    x = qkv(2, 1, n, 4, 3, batch=1)
    same(run(decaying(s), *x), recurrent(*x, s), 1e-9)


@pytest.mark.parametrize("s", [0, 0.5])
def test_every_chunk_size_gives_the_same(chunk: int, s: float) -> None:
    x = qkv(n=127)
    same(run(decaying(s), *x), reference(decaying(s), *x))


@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128, 192, 256])
def test_every_head_dim(dim: int) -> None:
    x = qkv(2, 1, 130, dim, dim // 2, batch=1)
    same(run(decaying(0.1), *x), reference(decaying(0.1), *x))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype, allowed: float) -> None:
    x = [y.to(dtype) for y in qkv(n=300, dim=16)]
    got = run(decaying(0.02), *x)
    want = reference(decaying(0.02), *(y.double() for y in x))
    assert got.dtype is dtype
    assert (
        float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()) < allowed
    )


def test_a_strong_decay_neither_overflows_nor_underflows_to_nan() -> None:
    x = [y.float() for y in qkv(n=1213)]
    got = run(decaying(50.0), *x)
    same(got, reference(decaying(50.0), *x), 1e-5)


# --- every stage, forward and backward ------------------------------------------------------------

B, HQ, HKV, N, D = 2, 4, 2, 23, 5
PAD = torch.rand(B, N, generator=torch.Generator().manual_seed(5)) > 0.3
PAD_H = torch.rand(B, HQ, N, generator=torch.Generator().manual_seed(6)) > 0.3
SEEN = sympy.Ne(read("pad", sym.b, sym.k), 0)
SEEN_H = sympy.Ne(read("pad", sym.b, sym.h, sym.k), 0)
SCORE = 2 * sympy.tanh(sym.s / 2) + read("slope", sym.h) * (sym.k - POSITION) / 10
MAPS = (tensor("wq", 3), tensor("bq", 2), tensor("wk", 3))
LEARNED = {"q_map": Features("exp", "wq", "bq"), "k_map": Features("exp", "wk")}
LEARNED_X = (drawn(HQ, D, 3, seed=7), drawn(HQ, 3, seed=8), drawn(HKV, D, 3, seed=9))
BY_HEAD = read("decay", sym.h)
SLOPES = -drawn(HQ, seed=10).abs()
NEAR = Near(5, Float(0.4), SCORE, read("factor", sym.h))
NEAR_T = (tensor("slope", 1), tensor("factor", 1))
NEAR_X = (drawn(HQ, seed=11), drawn(HQ, seed=12).sigmoid())
PADDED, PADDED_H = (tensor("pad", 2, "bool"),), (tensor("pad", 3, "bool"),)
BY_HEAD_T, FACTOR_T = (tensor("decay", 1),), (tensor("factor", 1),)
ELU: dict[str, Any] = {"q_map": Features("elu"), "k_map": Features("elu")}
WEIGHTS = {
    "query_weight": read("a", sym.b, sym.h, sym.q),
    "key_weight": read("c", sym.b, sym.k),
    "heads": read("g", sym.b, sym.h, sym.q),
}
WEIGHTS_T = (tensor("a", 3), tensor("c", 2), tensor("g", 3))
WEIGHTS_X = (drawn(B, HQ, N, seed=13), drawn(B, N, seed=14).abs(), drawn(B, HQ, N, seed=15))

SPECS: dict[str, tuple[LinearSpec, tuple[Tensor, ...]]] = {
    "noncausal": (LinearSpec(**ELU, norm="sum"), ()),
    "noncausal, padding": (
        LinearSpec(Features("relu"), Features("relu"), norm="sum", seen=SEEN, tensors=PADDED),
        (PAD,),
    ),
    "decay of each head, rms": (
        LinearSpec(
            Features("silu"),
            Features("silu"),
            position=POSITION,
            decay=BY_HEAD,
            norm="rms",
            tensors=BY_HEAD_T,
        ),
        (SLOPES,),
    ),
    "learned maps": (LinearSpec(**LEARNED, position=POSITION, norm="sum", tensors=MAPS), LEARNED_X),
    "weights": (LinearSpec(position=POSITION, **WEIGHTS, tensors=WEIGHTS_T), WEIGHTS_X),
    "padding of each head, decay": (
        decaying(0.3, seen=SEEN_H, tensors=PADDED_H),
        (PAD_H,),
    ),
    "near": (
        LinearSpec(**LEARNED, position=POSITION, norm="sum", near=NEAR, tensors=(*MAPS, *NEAR_T)),
        (*LEARNED_X, *NEAR_X),
    ),
    "near, padding, decay, weights": (
        LinearSpec(
            **LEARNED,
            **WEIGHTS,
            position=POSITION,
            norm="sum",
            near=NEAR,
            seen=SEEN,
            decay=BY_HEAD,
            tensors=(*MAPS, *WEIGHTS_T, *NEAR_T, *PADDED, *BY_HEAD_T),
        ),
        (*LEARNED_X, *WEIGHTS_X, *NEAR_X, PAD, SLOPES),
    ),
    "near, padding of each head": (
        LinearSpec(
            **ELU,
            position=POSITION,
            norm="sum",
            near=replace(NEAR, window=2),
            seen=SEEN_H,
            key_weight=read("c", sym.b, sym.h, sym.k),
            tensors=(*NEAR_T, *PADDED_H, tensor("c", 3)),
        ),
        (*NEAR_X, PAD_H, drawn(B, HQ, N, seed=16).abs()),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_outputs_and_gradients_equal_the_reference(name: str, small_chunks: None) -> None:
    spec, tensors = SPECS[name]
    x = (*qkv(HQ, HKV, N, D, 6, B), *tensors)
    leaves = [y.clone().requires_grad_(y.is_floating_point()) for y in x]
    out = reference(spec, *leaves[:3], leaves[3:])
    same(run(spec, *x[:3], x[3:]), out.detach())
    grad = drawn(*out.shape, seed=20)
    wanted = [y.requires_grad for y in leaves]
    want = torch.autograd.grad(out, [y for y in leaves if y.requires_grad], grad)
    got = torch_linear.backward(spec, grad, *x[:3], x[3:], [], wanted)
    for g, w in zip([g for g in got if g is not None], want, strict=True):
        same(g, w, 1e-9)


def test_only_wanted_gradients_are_given() -> None:
    spec, tensors = SPECS["weights"]
    x = qkv(HQ, HKV, N, D, 6, B)
    grad = torch.ones(B, HQ, N, 6, dtype=F64)
    wanted = [True, False, False, False, True, False]
    got = torch_linear.backward(spec, grad, *x, list(tensors), [], wanted)
    assert [g is not None for g in got] == wanted


@pytest.mark.parametrize("position", [sym.q, sym.q - 3, sym.q + 2, sym.q + 40, POSITION])
@pytest.mark.parametrize("q_len", [1, 5, 23, 30])
def test_queries_may_stand_before_and_behind_the_keys(
    position: sympy.Expr, q_len: int, small_chunks: None
) -> None:
    for spec, tensors in (SPECS["near"], (decaying(0.2), ())):
        q, (_, k, v) = drawn(B, HQ, q_len, D), qkv(HQ, HKV, N, D, 6, B)
        spec = replace(spec, position=position)
        same(run(spec, q, k, v, tensors), reference(spec, q, k, v, tensors))


@pytest.mark.parametrize("sizes", [(0, N, N), (B, 0, N), (B, N, 0), (B, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("name", SPECS)
def test_without_rows_or_keys_everything_is_zero(name: str, sizes: tuple[int, int, int]) -> None:
    spec, tensors = SPECS[name]
    batch, q_len, kv_len = sizes
    parts = {sym.b: slice(batch), sym.q: slice(q_len), sym.k: slice(kv_len)}
    index = {r.tensor: r.index for f in spec.formulas for r in sym.reads(f)}
    q, k, v = (x[:batch] for x in qkv(HQ, HKV, N, D, 6, B))
    x = [q[:, :, :q_len], k[:, :, :kv_len], v[:, :, :kv_len]]
    for arg, y in zip(spec.tensors, tensors, strict=True):
        x.append(y[tuple(parts.get(i, slice(None)) for i in index.get(arg.name, ()))])
    out = run(spec, *x[:3], x[3:])
    assert out.shape == (batch, HQ, q_len, 6)
    assert not out.any()
    same(out, reference(spec, *x[:3], x[3:]))
    wanted = [y.is_floating_point() for y in x]
    found = torch_linear.backward(spec, torch.ones_like(out), *x[:3], x[3:], [], wanted)
    for y, g in zip(x, found, strict=True):
        assert g is None or (g.shape == y.shape and not g.any())


def test_a_position_that_is_not_consecutive_is_refused_with_the_reason() -> None:
    shapes = Shapes("cpu", F64, 1, 4, 2, 8, 8, 8, 8, False)
    spec = LinearSpec(position=2 * sym.q)
    assert torch_linear.supports(spec, shapes) == (
        "query q stands at 2*q of the keys, not at q plus one number"
    )
    assert torch_linear.supports(PLAIN, shapes) is None
    assert torch_linear.supports(LinearSpec(), shapes) is None


# --- laws -----------------------------------------------------------------------------------------


def test_linear_in_each_of_q_k_and_v() -> None:
    for place in range(3):
        x = list(qkv())
        other = drawn(*x[place].shape, seed=9)
        parts = [[y if i != place else z for i, y in enumerate(x)] for z in (x[place], other)]
        x[place] = 2 * x[place] - 3 * other
        one, two = (run(decaying(0.1), *p) for p in parts)
        same(run(decaying(0.1), *x), 2 * one - 3 * two)


def test_slices_of_the_head_dim_add() -> None:
    q, k, v = qkv()
    parts = (run(decaying(0.1), q[..., p], k[..., p], v) for p in (slice(0, 3), slice(3, 8)))
    same(run(decaying(0.1), q, k, v), sum(parts))  # type: ignore[arg-type]


def test_heads_in_another_order_with_their_decays() -> None:
    spec = LinearSpec(position=POSITION, decay=BY_HEAD, tensors=BY_HEAD_T)
    order = torch.tensor([2, 0, 3, 1])
    q, k, v = qkv(4, 4)
    got = run(spec, q[:, order], k[:, order], v[:, order], [SLOPES[order]])
    same(got, run(spec, q, k, v, [SLOPES])[:, order])


def test_rms_forgets_the_size_of_values() -> None:
    spec = decaying(0.1, norm="rms")
    q, k, v = (1e3 * x for x in qkv())
    same(run(spec, q, k, 7 * v), run(spec, q, k, v), 1e-6)


def test_rows_of_positive_maps_sum_to_one() -> None:
    spec = LinearSpec(**ELU, position=POSITION, norm="sum")
    q, k, v = qkv()
    same(run(spec, q, k, torch.ones_like(v)), torch.ones(2, 4, 65, 6, dtype=F64))


def test_a_later_key_changes_nothing() -> None:
    spec, tensors = SPECS["near"]
    q, k, v = qkv(HQ, HKV, N, D, 6, B)
    late = k.clone()
    late[:, :, 12:] = 9.0
    same(run(spec, q, late, v, tensors)[:, :, :12], run(spec, q, k, v, tensors)[:, :, :12])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("near", [None, Near(4, Float(0.3))], ids=["linear", "window"])
def test_a_padded_row_equals_the_row_alone(
    side: str, near: Near | None, small_chunks: None
) -> None:
    """Padding adds nothing and decays nothing, so that the state is that of the tokens."""
    norm: Any = "none" if near is None else "sum"
    spec = decaying(0.5, norm=norm, near=near, seen=SEEN, tensors=PADDED, **ELU)
    q, k, v = qkv(n=20, batch=1)
    pad = torch.ones(1, 29, dtype=torch.bool)
    at = slice(9, None) if side == "left" else slice(0, 20)
    pad[:, slice(0, 9) if side == "left" else slice(20, None)] = False
    wide = [torch.full((1, y.shape[1], 29, y.shape[3]), 7.0, dtype=F64) for y in (q, k, v)]
    for y, z in zip(wide, (q, k, v), strict=True):
        y[:, :, at] = z
    alone = run(replace(spec, seen=sympy.true, tensors=()), q, k, v)
    same(run(spec, *wide, [pad])[:, :, at], alone)


# --- the window -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [23, 24, 10**9])
def test_a_window_over_all_keys_is_softmax(window: int) -> None:
    near = Near(window, Float(D**-0.5), factor=read("factor", sym.h))
    spec = LinearSpec(**ELU, position=POSITION, norm="sum", near=near, tensors=FACTOR_T)
    q, k, v = qkv(HQ, HKV, N, D, 6, B)
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    same(run(spec, q, k, v, [NEAR_X[1]]), want, 1e-9)


@pytest.mark.parametrize("window", range(1, 13))
def test_the_first_outputs_are_softmax_and_decoding_equals_the_whole(
    window: int, small_chunks: None
) -> None:
    near = Near(window, Float(D**-0.5), factor=Float(0.1))
    spec = LinearSpec(Features("exp"), Features("exp"), position=POSITION, norm="sum", near=near)
    q, k, v = qkv(HQ, HKV, 12, D, 6, B)
    whole = run(spec, q, k, v)
    same(whole, reference(spec, q, k, v))
    softmax = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    same(whole[:, :, :window], softmax[:, :, :window], 1e-9)
    same(torch.cat(list(steps(spec, q, k, v, [5, *range(6, 13)])), dim=2), whole)


# --- decoding -------------------------------------------------------------------------------------


def steps(
    spec: LinearSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Sequence[int],
    forget: bool = False,
    pad: Tensor | None = None,
) -> Iterator[Tensor]:
    """Calls that go on from each other; old keys beyond the window are NaN, so that reading one
    shows."""
    past, start = None, 0
    window = 0 if spec.near is None else spec.near.window
    for end in ends:
        full, values = k[:, :, :end].clone(), v[:, :, :end].clone()
        if past is not None and not forget:
            full[:, :, : max(0, start - window)] = math.nan
            values[:, :, : max(0, start - window)] = math.nan
        with torch.no_grad():
            memory = None if forget else beside(full, past, ("site",))
            tensors = [] if pad is None else [pad[:, :end]]
            yield torch_linear.forward(spec, q[:, :, start:end], full, values, tensors, [], memory)
        past, start = full, end


@pytest.mark.parametrize("n", [65, 127, 128, 129, 300])
@pytest.mark.parametrize("s", [0.5, 2])
def test_a_step_after_a_prompt_reads_its_new_key_only(n: int, s: float) -> None:
    """The two conventions of decay differ by exp(s) in every term of the state."""
    x = qkv(n=n + 6)
    ends = [n, n + 1, n + 2, n + 5, n + 6]
    got = torch.cat(list(steps(decaying(s), *x, ends)), dim=2)
    same(got, run(decaying(s), *x))
    same(torch.cat(list(steps(decaying(s), *x, ends, forget=True)), dim=2), got)


def test_noncausal_keys_that_were_seen_are_not_read_again() -> None:
    spec = LinearSpec(**ELU, norm="sum")
    q, k, v = qkv(n=12)
    parts = list(steps(spec, q, k, v, [8, 12]))
    same(parts[1], reference(spec, q[:, :, 8:], k, v))


def test_decoding_with_padding_on_the_left() -> None:
    spec = decaying(0.5, seen=SEEN, tensors=PADDED)
    q, k, v = qkv(n=20)
    pad = torch.ones(2, 20, dtype=torch.bool)
    pad[1, :6] = False
    got = torch.cat(list(steps(spec, q, k, v, [15, 16, 18, 20], pad=pad)), dim=2)
    same(got, run(spec, q, k, v, [pad]))


def test_a_state_under_another_mask_is_not_used() -> None:
    spec = decaying(0.5, seen=SEEN, tensors=PADDED)
    q, k, v = qkv(n=10)
    pad = torch.ones(2, 10, dtype=torch.bool)
    full = k[:, :, :9].clone()
    with torch.no_grad():
        memory = beside(full, None, ("s",))
        torch_linear.forward(spec, q[:, :, :9], full, v[:, :, :9], [pad[:, :9]], [], memory)
        pad[0, 3] = False
        got = torch_linear.forward(spec, q[:, :, 9:], k, v, [pad], [], beside(k, full, ("s",)))
    same(got, reference(spec, q[:, :, 9:], k, v, [pad]))


def test_a_cache_that_was_written_to_is_read_again() -> None:
    q, k, v = qkv(n=10)
    full = k[:, :, :9].clone()
    with torch.no_grad():
        memory = beside(full, None, ("s",))
        torch_linear.forward(PLAIN, q[:, :, :9], full, v[:, :, :9], [], [], memory)
        full[:, :, 2] = 1.0
        new = torch.cat([full, k[:, :, 9:]], dim=2)
        got = torch_linear.forward(PLAIN, q[:, :, 9:], new, v, [], [], beside(new, full, ("s",)))
    same(got, reference(PLAIN, q[:, :, 9:], new, v))


def test_values_that_were_written_to_are_read_again() -> None:
    q, k, v = qkv(n=10)
    keys, values = k[:, :, :9].clone(), v[:, :, :9].clone()
    with torch.no_grad():
        memory = beside(keys, None, ("s",), values=(values, None))
        torch_linear.forward(PLAIN, q[:, :, :9], keys, values, [], [], memory)
        known = beside(k, keys, ("s",), values=(v, values))
        assert known is not None
        assert known.recall() is not None
        values *= -3.0
        new = torch.cat([values, v[:, :, 9:]], dim=2)
        memory = beside(k, keys, ("s",), values=(new, values))
        got = torch_linear.forward(PLAIN, q[:, :, 9:], k, new, [], [], memory)
    same(got, reference(PLAIN, q[:, :, 9:], k, new))


def test_key_weights_under_padding_and_a_window_have_their_gradient() -> None:
    weight = sym.Read(Symbol("weight"), sym.b, sym.k)
    tensors = (TensorArg("pad", "bool", 2), TensorArg("weight", "float32", 2))
    spec = LinearSpec(
        q_map=Features("exp"),
        k_map=Features("exp"),
        position=sym.q,
        seen=SEEN,
        key_weight=weight,
        norm="sum",
        near=Near(5),
        tensors=tensors,
    )
    q, k, v = qkv(n=37)
    pad = (torch.arange(37) % 5 != 2).expand(q.shape[0], -1)
    weights = torch.rand(q.shape[0], 37, dtype=q.dtype).requires_grad_()
    grad = torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype)
    found = []
    for target in ("reference", "torch.linear"):
        out = attention(q, k, v, [pad, weights], [], spec, target)
        found += torch.autograd.grad(out, weights, grad)
    same(found[1], found[0])


# --- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside has."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, Tensor) and x.numel():
                used = math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s)
                self.count = max(self.count, used)
        return found


@pytest.mark.parametrize("name", ["linear", "near"])
def test_no_tensor_grows_with_the_square_of_the_length(name: str) -> None:
    near = Near(16, Float(0.3)) if name == "near" else None
    spec = LinearSpec(**ELU, position=POSITION, norm="sum", near=near)
    n = 4096
    x = [y.float() for y in qkv(4, 1, n, 8, 8, batch=1)]
    with Largest() as forward:
        run(spec, *x)
    with Largest() as backward:
        torch_linear.backward(spec, torch.ones_like(x[0]), *x, [], [], [True] * 3)
    assert max(forward.count, backward.count) <= 4 * max(n * 8, 128 * 2 * 128)


def test_query_heads_share_the_state_of_their_key_head_unless_the_decay_tells_them_apart() -> None:
    by_head = LinearSpec(position=POSITION, decay=BY_HEAD, tensors=BY_HEAD_T)
    q, k, v = qkv(n=10)
    for spec, tensors, group in ((decaying(0.5), [], 1), (by_head, [SLOPES], 2)):
        full = k.clone()
        with torch.no_grad():
            torch_linear.forward(spec, q, full, v, tensors, [], beside(full, None, ("s",)))
            kept = beside(k, full, ("s",))
            assert kept is not None
            assert kept.recall().state.shape == (2, 2, group, 8, 6)


def test_steps_cover_every_query_and_key_once() -> None:
    for offset in (-3, 0, 4, 9, 12):
        spec = LinearSpec(position=sym.q + offset)
        q, k = torch.zeros(1, 1, 9, 1), torch.zeros(1, 1, 10, 1)
        steps_ = list(Call(spec, q, k, [], []).steps())
        queries = [i for s in steps_ for i in range(s.q0, s.q1)]
        assert queries == list(range(max(0, -offset), 9))
        keys = [i for s in steps_ for i in range(s.k0, s.k1)]
        assert keys == list(range(min(10, 9 + offset)))
