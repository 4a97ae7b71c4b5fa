"""The edit stage of torch.blocked: equal to the reference, with its closed-form gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from sympy import Expr, Float, Integer, Symbol
from torch import Tensor

from rewriter import symbols as sym
from rewriter.kernels import torch_blocked
from rewriter.kernels.torch_blocked import blocked
from rewriter.op import attention
from rewriter.reference import reference, reference_weights
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit
from rewriter.symbols import Read, Where

M0, M1, M2, M3 = sym.masses
LABEL = Read(Symbol("label"), sym.b, sym.k)
W = Read(Symbol("w"), sym.h)
IMAGE = M2 + M3
SELECTED = (IMAGE >= 0.2) & (M3 >= 0.3 * IMAGE)
FEW = Float(1e-12)


def over(mass: Expr) -> Expr:
    return 1 / sym.Maximum(mass, FEW)


Z = M0 + W * M1 + M2  # GIFT's normaliser
TABLE: dict[str, tuple[Expr, ...]] = {
    "remove": (Where(M0 > FEW, over(M0), 1), Where(M0 > FEW, Integer(0), 1)),
    "act": ((1 - W * M1) * over(1 - M1), W),
    "var": (
        Integer(1),
        Where(SELECTED, W, 1),
        Where(SELECTED, W, 1),
        Where(SELECTED, 1 + (1 - W) * (M1 + M2) * over(M3), 1),
    ),
    "redirect": (Integer(1), Integer(0), 1 + M1 * over(M2)),
    "gift": (over(Z), W * over(Z), over(Z)),
}
"""Grouped edits that occur in papers on sinks, W a number that is learned."""
TENSORS = (TensorArg("label", "int64", 2), TensorArg("w", "float32", 1))


def spec_of(name: str, mask: object = sympy.true) -> SoftmaxSpec:
    return SoftmaxSpec(
        scale=Float(0.3),
        mask=mask,  # type: ignore[arg-type]
        edit=Edit(LABEL, TABLE[name]),
        tensors=TENSORS,
    )


def everything(spec: SoftmaxSpec) -> SoftmaxSpec:
    """The spec with a soft cap, a window, padding and a sink as well."""
    pad = sympy.Ne(Read(Symbol("pad"), sym.b, sym.k), 0)
    return replace(
        spec,
        score=5 * sympy.tanh(sym.s / 5),
        mask=(sym.k <= sym.q) & (sym.q - sym.k < 9) & pad,
        sink=Read(Symbol("sink"), sym.h),
        tensors=(*TENSORS, TensorArg("pad", "bool", 2), TensorArg("sink", "float32", 1)),
    )


def operands(length: int = 13, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, length, 6, dtype=dtype)
    k, v = torch.randn(2, 2, length, 6, dtype=dtype), torch.randn(2, 2, length, 5, dtype=dtype)
    return [q, k, v]


def read_by(length: int = 13, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """label, w, pad, sink; some labels are no group, and the last two keys are the second's pad."""
    torch.manual_seed(1)
    label = torch.randint(0, 4, (2, length))
    pad = torch.ones(2, length, dtype=torch.bool)
    pad[1, -2:] = pad[1, :1] = False
    return [label, torch.rand(4, dtype=dtype), pad, torch.randn(4, dtype=dtype)]


@pytest.fixture(params=["one block", "many blocks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows see different ranges of keys."""
    if request.param == "many blocks":
        monkeypatch.setattr(torch_blocked, "SCORES", {"cpu": (40, 40, 80)})
        monkeypatch.setattr(torch_blocked, "_FEWEST_ROWS", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", TABLE)
def test_edit_equals_the_reference(name: str, dtype: torch.dtype, cut: None) -> None:
    q, k, v = operands(dtype=dtype)
    spec, tensors = spec_of(name, sym.k <= sym.q), read_by(dtype=dtype)[:2]
    tolerance = 1e-5 if dtype is torch.float32 else 1e-13
    want = reference(spec, q, k, v, tensors)
    got = blocked(spec, q, k, v, tensors, [])
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", TABLE)
def test_edit_composes_with_soft_cap_window_padding_gqa_and_sink(name: str, cut: None) -> None:
    q, k, v = operands()
    spec, tensors = everything(spec_of(name)), read_by()
    want = reference(spec, q, k, v, tensors)
    assert want.isfinite().all()
    torch.testing.assert_close(blocked(spec, q, k, v, tensors, []), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", TABLE)
def test_gradients_of_every_edit_equal_those_of_the_reference(name: str, cut: None) -> None:
    spec, (label, w, pad, sink) = everything(spec_of(name)), read_by()
    leaves = [x.requires_grad_() for x in (*operands(), w, sink)]
    q, k, v = leaves[:3]
    want = reference(spec, q, k, v, (label, w, pad, sink))
    got = attention(q, k, v, (label, w, pad, sink), [], spec, "torch.blocked")
    grad = torch.randn(want.shape, dtype=want.dtype)
    for x, y in zip(_gradients(got, leaves, grad), _gradients(want, leaves, grad), strict=True):
        torch.testing.assert_close(x, y)


def _gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """0 for a tensor that the spec does not read."""
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("name", TABLE)
def test_the_closed_form_passes_gradcheck(name: str) -> None:
    label, w, pad, sink = read_by(5)
    spec = everything(spec_of(name))
    used = "w" in {str(r.args[0]) for a in TABLE[name] for r in sym.reads(a)}
    q, k, v = (x.requires_grad_() for x in operands(5))
    w.requires_grad_(used)
    sink.requires_grad_()

    def f(q: Tensor, k: Tensor, v: Tensor, w: Tensor, sink: Tensor) -> Tensor:
        return attention(q, k, v, (label, w, pad, sink), [], spec, "torch.blocked")

    assert torch.autograd.gradcheck(f, (q, k, v, w, sink), fast_mode=True)


def test_edit_stands_before_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping nothing by a probability of almost 0 leaves the edited output."""
    q, k, v = operands()
    tensors = read_by()[:2]
    spec = spec_of("var", sym.k <= sym.q)
    kept = torch.rand(2, 4, 13, 13) > 0.4

    def keep(call: object, number: int, shape: torch.Size) -> Tensor:
        return kept.view(shape).double()

    monkeypatch.setattr(torch_blocked.Call, "kept", keep)
    weights = reference_weights(spec, q, k, tensors) * kept / 0.6
    want = weights @ v.repeat_interleave(2, dim=1)
    got = blocked(replace(spec, dropout=0.4), q, k, v, tensors, [])
    torch.testing.assert_close(got, want)


def test_gradient_under_dropout_is_that_of_the_kept_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaves = [x.requires_grad_() for x in operands()]
    q, k, v = leaves
    tensors = read_by()[:2]
    spec = spec_of("act", sym.k <= sym.q)
    kept = torch.rand(2, 4, 13, 13) > 0.4
    monkeypatch.setattr(
        torch_blocked.Call, "kept", lambda call, number, shape: kept.view(shape).double()
    )
    want = (reference_weights(spec, q, k, tensors) * kept / 0.6) @ v.repeat_interleave(2, dim=1)
    got = attention(q, k, v, tensors, [], replace(spec, dropout=0.4), "torch.blocked")
    grad = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad)
    )


def test_rows_that_are_not_selected_are_bitwise_those_without_the_edit() -> None:
    q, k, v = operands(dtype=torch.float32)
    never = Edit(LABEL, tuple(Where(M3 > 2, a, 1) for a in TABLE["var"]))
    spec = replace(spec_of("var", sym.k <= sym.q), edit=never)
    plain = replace(spec, edit=None, tensors=())
    got = blocked(spec, q, k, v, read_by(dtype=torch.float32)[:2], [])
    assert torch.equal(got, blocked(plain, q, k, v, [], []))


def test_masses_leave_the_sink_out() -> None:
    """Two scores of 0 and a sink of ln 2: each key has a quarter of the weight."""
    spec = SoftmaxSpec(sink=Float(0) + sympy.log(2), edit=Edit(sym.k, (M0 * 4, M1 * 8)))
    q = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    k, v = (
        torch.zeros(1, 1, 2, 1, dtype=torch.float64),
        torch.eye(2, dtype=torch.float64)[None, None],
    )
    want = torch.tensor([0.25, 0.5], dtype=torch.float64)
    torch.testing.assert_close(blocked(spec, q, k, v, [], []).flatten(), want)
    torch.testing.assert_close(reference(spec, q, k, v).flatten(), want)


def test_a_key_without_a_group_gets_no_weight() -> None:
    q, k, v = operands()
    spec = SoftmaxSpec(edit=Edit(sym.k - 2, (Integer(1), Integer(1))))
    want = reference(spec, q, k, v)
    torch.testing.assert_close(blocked(spec, q, k, v, [], []), want)
    assert not reference_weights(spec, q, k)[..., [0, 1, 4, 12]].any()


def test_groups_may_differ_between_heads(cut: None) -> None:
    q, k, v = operands()
    spec = replace(spec_of("redirect"), edit=Edit(sym.IMod(sym.k + sym.h, 3), TABLE["redirect"]))
    want = reference(spec, q, k, v, read_by()[:2])
    torch.testing.assert_close(blocked(spec, q, k, v, read_by()[:2], []), want)


@pytest.mark.parametrize("masked", ["zero", "mean", "add", "nan"])
def test_rows_without_a_key_are_those_of_the_reference(masked: str) -> None:
    leaves = [x.requires_grad_() for x in operands()]
    q, k, v = leaves
    spec = replace(spec_of("var", (sym.k <= sym.q) & (sym.k > 1)), masked=masked)  # type: ignore
    tensors = read_by()[:2]
    want = reference(spec, q, k, v, tensors)
    got = attention(q, k, v, tensors, [], spec, "torch.blocked")
    torch.testing.assert_close(got, want, equal_nan=True)
    if masked != "nan":
        grad = torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad)
        )


@pytest.mark.parametrize("name", TABLE)
def test_bfloat16_is_computed_in_float32(name: str, cut: None) -> None:
    """The output is that of the same operands in float32, rounded once."""
    q, k, v = (x.bfloat16() for x in operands(dtype=torch.float32))
    spec, tensors = everything(spec_of(name)), read_by(dtype=torch.float32)
    got = blocked(spec, q, k, v, tensors, [])
    wide = blocked(spec, q.float(), k.float(), v.float(), tensors, [])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wide.bfloat16(), rtol=2**-7, atol=1e-6)


def test_no_tensor_of_all_weights_is_kept() -> None:
    """Each call of an op in forward and backward makes less than half of the L x M weights."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                x.numel()
                for x in (out if isinstance(out, list | tuple) else (out,))
                if isinstance(x, Tensor)
            )
            return out

    q, k, v = (torch.randn(1, 4, 1024, 8, requires_grad=True) for _ in range(3))
    spec = spec_of("var", sym.k <= sym.q)
    label, w = torch.randint(0, 4, (1, 1024)), torch.rand(4)
    with Watch():
        attention(q, k, v, (label, w), [], spec, "torch.blocked").sum().backward()
    assert max(sizes) < 4 * 1024 * 1024 / 2


@pytest.mark.parametrize("sizes", [(0, 13, 13), (2, 0, 13), (2, 13, 0), (2, 0, 0)])
@pytest.mark.parametrize("name", TABLE)
def test_without_rows_or_keys_everything_is_zero(name: str, sizes: tuple[int, int, int]) -> None:
    batch, q_len, kv_len = sizes
    spec, (q, k, v) = everything(spec_of(name)), operands()
    label, w, pad, sink = read_by()
    x = [q[:batch, :, :q_len], k[:batch, :, :kv_len], v[:batch, :, :kv_len], w, sink]
    x = [y.clone().requires_grad_() for y in x]
    pad, label = pad[:batch, :kv_len], label[:batch, :kv_len]
    out = attention(*x[:3], [label, x[3], pad, x[4]], [], spec)
    assert out.shape == (batch, 4, q_len, 5)
    assert not out.any()
    for y, g in zip(x, torch.autograd.grad(out.sum(), x), strict=True):
        assert g.shape == y.shape
        assert not g.any()


@pytest.mark.parametrize("name", TABLE)
def test_the_reference_edits_half_precision_in_float32(name: str) -> None:
    """1e-12 and 1 / 1e-12 are no float16, and a group of little weight has a factor beyond it."""
    spec, (q, k, v) = spec_of(name, sym.k <= sym.q), operands(dtype=torch.float16)
    label, w = read_by(dtype=torch.float16)[:2]
    x = [y.requires_grad_() for y in (q, k, v, w)]
    out = reference(spec, *x[:3], [label, w])
    assert out.dtype == torch.float16
    wide = [y.detach().double().requires_grad_() for y in x]
    want = reference(spec, *wide[:3], [label, wide[3]])
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
    out.sum().backward()
    want.sum().backward()
    for y, z in zip(x, wide, strict=True):
        found, grad = (torch.zeros_like(z) if t.grad is None else t.grad.double() for t in (y, z))
        torch.testing.assert_close(found, grad, rtol=2e-2, atol=5e-2)
