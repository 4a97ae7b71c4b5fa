"""torch.compact: the same numbers as the dense form, rows that are off are 0, and what it refuses.

Chunks are made small, so that a few rows are several of them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import sympy
import torch
from torch import Tensor

from rewriter import lowering
from rewriter import symbols as sym
from rewriter.kernels import torch_compact, torch_compact_causal, torch_compact_chunks
from rewriter.kernels.torch_compact import compact_forward, compact_supports
from rewriter.kernels.torch_compact_blocks import Chunked
from rewriter.kernels.torch_compact_causal import causal, causal_offset_of
from rewriter.kernels.torch_compact_rows import Packed
from rewriter.lowering import Shapes
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.testing.cases import BASES, Case, Dims
from rewriter.testing.operands import operands

CAUSAL = sym.k <= sym.q
GATE = TensorArg("on", "float32", 3)
DENSE = [
    name
    for name, spec in BASES.items()
    if isinstance(spec, SoftmaxSpec)
    and all(x is None for x in (spec.route, spec.edit, spec.local, spec.patch))
]
"""What has none of the stages that others compute."""
GATES = ("half", "an empty head and a full one", "none", "all", "one row")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compact_chunks, "ROWS", 16)
    monkeypatch.setattr(torch_compact_chunks, "SCORES", 2**12)
    monkeypatch.setattr(torch_compact_causal, "BLOCK", 8)
    monkeypatch.setattr(torch_compact_causal, "FEWEST_ROWS", 2)


def gated(spec: SoftmaxSpec, active: int = 2) -> SoftmaxSpec:
    factor = sym.Read(sympy.Symbol("on"), sym.b, sym.h, sym.q)
    tensors = (*spec.tensors, GATE)
    return replace(spec, heads=spec.heads * factor, tensors=tensors, active=active)


def gate(kind: str, batch: int, heads: int, q_len: int) -> Tensor:
    torch.manual_seed(5)
    factor = torch.rand(batch, heads, q_len, dtype=torch.float64) + 0.5
    on = torch.rand(batch, heads, q_len) < 0.5
    match kind:
        case "an empty head and a full one":
            on[:, 0], on[:, -1] = False, True
        case "none":
            on[:] = False
        case "all":
            on[:] = True
        case "one row":
            on[:] = False
            on[-1, 1, q_len // 2] = True
    return factor * on


def compared(case: Case, kind: str = "half") -> tuple[Tensor, Tensor, Tensor]:
    """What is computed, what the reference gives in float64, and the gate."""
    x = operands(case)
    d = case.dims
    on = gate(kind, d.batch, d.heads, d.q_len)
    spec = gated(case.softmax)
    tensors = [*x.tensors, on.float()]
    out = compact_forward(spec, x.q, x.k, x.v, tensors, case.sizes)
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    want = reference(spec, x.q.double(), x.k.double(), x.v.double(), wide, case.sizes)
    return out, want, on


@pytest.mark.parametrize("name", DENSE)
def test_packed_rows_have_the_numbers_of_the_dense_form(name: str) -> None:
    for dims in (Dims(), Dims(heads=4, kv_heads=4, q_len=33, kv_len=70, value_dim=24)):
        out, want, on = compared(Case.of(name, dims))
        torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)
        assert not out[on == 0].any()


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("name", ["plain", "causal", "soft cap", "sink", "window"])
def test_heads_may_be_empty_and_full(name: str, kind: str) -> None:
    for kv_heads in (1, 2, 4):
        out, want, on = compared(Case.of(name, Dims(kv_heads=kv_heads)), kind)
        torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)
        assert not out[on == 0].any()


@pytest.mark.parametrize("masked", ["zero", "mean", "add"])
@pytest.mark.parametrize("name", ["padding", "causal padding", "causal", "sink, padding"])
def test_rows_that_see_no_key_are_those_of_the_reference(name: str, masked: str) -> None:
    for dims in (Dims(q_len=33, kv_len=33), Dims(q_len=40, kv_len=17)):
        out, want, _ = compared(Case.of(name, dims, masked=masked, hidden="all"))
        torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)


def test_a_sink_of_minus_infinity_leaves_the_mean_of_the_values() -> None:
    spec = SoftmaxSpec(mask=sym.k < 0, masked="mean", sink=-sympy.oo)
    q, k, v = (torch.randn(1, 4, 9, 6) for _ in range(3))
    out = compact_forward(gated(spec), q, k, v, [torch.ones(1, 4, 9)], [])
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(1, 4, 9, 6))


@pytest.mark.parametrize("layout", ["BLHD", "BHDL", "gaps", "expanded"])
def test_operands_may_lie_anyhow_in_memory(layout: str) -> None:
    out, want, _ = compared(Case.of("causal", layout=layout))  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "soft cap", "plain"])
def test_half_dtypes_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """The output is that of the same operands in float32, rounded once."""
    case = Case.of(name, dtype=dtype)
    x, d = operands(case), case.dims
    spec, on = gated(case.softmax), gate("half", d.batch, d.heads, d.q_len).float()
    out = compact_forward(spec, x.q, x.k, x.v, [on], [])
    wide = compact_forward(spec, x.q.float(), x.k.float(), x.v.float(), [on], [])
    assert out.dtype == dtype
    torch.testing.assert_close(out, wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", ["causal", "soft cap", "plain"])
def test_float64_is_computed_in_float64(name: str) -> None:
    out, want, _ = compared(Case.of(name, dtype=torch.float64))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_a_head_that_is_ablated_for_good_is_left_out() -> None:
    spec = SoftmaxSpec(mask=CAUSAL, heads=sym.Where(sympy.Eq(sym.h, 2), 0, 1), active=3)
    q, k, v = (torch.randn(2, 4, 40, 8) for _ in range(3))
    out = compact_forward(spec, q, k, v, [], [])
    torch.testing.assert_close(out, reference(spec, q, k, v))
    assert not out[:, 2].any()


def scores_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many scores are computed, in the buffer of the chunks and in the fused kernel."""
    counted = []
    buffer, fused = Chunked._buffer, torch_compact_causal.flash

    def counting(self: Chunked, *shape: int) -> Tensor:
        counted.append(math.prod(shape))
        return buffer(self, *shape)

    def counting_too(q: Tensor, k: Tensor, v: Tensor, **more: object) -> tuple[Tensor, Tensor]:
        counted.append(q.shape[1] * q.shape[2] * k.shape[2])
        return fused(q, k, v, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Chunked, "_buffer", counting)
    monkeypatch.setattr(torch_compact_causal, "flash", counting_too)
    compared(case)
    return sum(counted)


@pytest.mark.parametrize("name", ["causal", "soft cap"])
def test_work_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rows are off, and later keys are not seen."""
    found = scores_of(Case.of(name, Dims(q_len=256, kv_len=256)), monkeypatch)
    assert 0 < found < 0.5 * 0.65 * 2 * 4 * 256 * 256


@pytest.mark.parametrize("lengths", [(1, 1), (5, 3), (8, 8), (40, 17), (33, 70)])
@pytest.mark.parametrize("offset", [0, 3])
def test_a_causal_mask_may_end_anywhere(lengths: tuple[int, int], offset: int) -> None:
    q_len, kv_len = lengths
    torch.manual_seed(0)
    q = torch.randn(2, 4, q_len, 6, dtype=torch.float64)
    k, v = (torch.randn(2, 2, kv_len, 6, dtype=torch.float64) for _ in range(2))
    spec = gated(SoftmaxSpec(scale=sympy.Float(0.4), mask=sym.k <= sym.q + offset))
    for kind in GATES:
        on = gate(kind, 2, 4, q_len)
        call = Packed(spec, q, k, v, [on], [])
        assert causal_offset_of(call) == offset
        out = causal(call, offset)
        torch.testing.assert_close(out, reference(spec, q, k, v, [on]))
        assert not out[on == 0].any()


def test_a_mask_that_hides_all_keys_of_a_query_is_not_for_the_fused_kernel() -> None:
    q = torch.randn(1, 4, 9, 6)
    on = gate("half", 1, 4, 9).float()
    spec = gated(SoftmaxSpec(mask=sym.k < sym.q))
    assert causal_offset_of(Packed(spec, q, q, q, [on], [])) is None
    torch.testing.assert_close(
        compact_forward(spec, q, q, q, [on], []), reference(spec, q, q, q, [on])
    )


def test_gradients_are_those_of_the_dense_form(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.op import attention

    monkeypatch.setattr(torch_compact, "FEWEST_SCORES", 1)
    spec = gated(SoftmaxSpec(score=5 * sympy.tanh(sym.s / 5), mask=CAUSAL))
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 21, 6, dtype=torch.float64) for _ in range(3)]
    inputs.append(gate("half", 1, 4, 21))
    found = []
    for target in ("torch.compact", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attention(*leaves[:3], leaves[3:], [], spec, target)
        (out * torch.arange(6.0)).sum().backward()
        found.append([out.detach(), *(x.grad for x in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# --- what it takes --------------------------------------------------------------------------------

LONG = Shapes("cpu", torch.float32, 1, 8, 8, 2048, 2048, 64, 64, False)
CAPPED = SoftmaxSpec(score=5 * sympy.tanh(sym.s / 5), mask=CAUSAL, active=4)


@pytest.mark.parametrize(
    ("spec", "shapes", "reason"),
    [
        (replace(CAPPED, active=None), LONG, "how many heads are off is not known"),
        (replace(CAPPED, active=7), LONG, "7 of 8 heads may be on"),
        (replace(CAPPED, dropout=0.1), LONG, "dropout"),
        (replace(CAPPED, masked="nan", mask=sym.k < sym.q), LONG, "would be NaN"),
        (CAPPED, replace(LONG, q_len=1), "too few scores"),
        (CAPPED, replace(LONG, batch=0), "too few scores"),
        (CAPPED, replace(LONG, device="cuda"), "measured on CPUs only"),
        (CAPPED, replace(LONG, kv_heads=3), "not a multiple"),
        (CAPPED, replace(LONG, dtype=torch.int64), "not a floating dtype"),
        (SoftmaxSpec(mask=CAUSAL, active=5), LONG, "too many for packing to pay"),
        (SoftmaxSpec(mask=CAUSAL, active=4), replace(LONG, grad=True), "the gradients of all"),
        (SoftmaxSpec(mask=CAUSAL, active=4), replace(LONG, q_len=512, kv_len=512), "too few"),
        (SoftmaxSpec(active=4), replace(LONG, grad=True), "the gradients of all heads"),
    ],
)
def test_it_refuses_what_does_not_pay_with_a_reason(
    spec: SoftmaxSpec, shapes: Shapes, reason: str
) -> None:
    assert reason in str(compact_supports(spec, shapes))


@pytest.mark.parametrize(
    "spec",
    [
        CAPPED,
        replace(CAPPED, masked="nan"),
        SoftmaxSpec(mask=CAUSAL, active=4),
        SoftmaxSpec(active=4),
        SoftmaxSpec(mask=CAUSAL & (sym.q - sym.k < 64), active=2),
    ],
)
def test_it_takes_what_pays(spec: SoftmaxSpec) -> None:
    assert compact_supports(spec, LONG) is None


def test_it_stands_in_the_table() -> None:
    name, refusals = lowering.explain(CAPPED, LONG, "torch")
    assert name == "torch.compact", refusals
