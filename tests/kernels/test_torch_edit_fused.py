"""Edits by fused calls: a correction at few keys, or ranges of keys, is the edited softmax."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from sympy import Float, Integer, Symbol
from torch import Tensor

from rewriter import symbols as sym
from rewriter.kernels import torch_edit_few, torch_edit_fused
from rewriter.kernels.torch_blocked import Call, blocked
from rewriter.kernels.torch_edit_few import edited_at_few_keys
from rewriter.kernels.torch_edit_fused import fused_edit_of
from rewriter.kernels.torch_edit_spans import edited_in_spans
from rewriter.op import attention
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit
from rewriter.symbols import Read, Where

M0, M1, M2, M3 = sym.masses
LABEL = Read(Symbol("label"), sym.b, sym.k)
W = Read(Symbol("w"), sym.h)
SELECTED = (M3 >= 0.3 * (M2 + M3)) & (sym.q >= 9)
FEW: dict[str, tuple[sympy.Expr, ...]] = {
    "var": (
        Integer(1),
        Where(SELECTED, W, 1),
        Where(SELECTED, W, 1),
        Where(SELECTED, 1 + (1 - W) * (M1 + M2) / sym.Maximum(M3, Float(1e-12)), 1),
    ),
    "ablated": (Integer(1), Integer(0), W),
    "redirect": (Integer(1), W, 1 + (1 - W) * M1 / sym.Maximum(M2, Float(1e-12))),
}
TENSORS = (TensorArg("label", "int64", 2), TensorArg("w", "float32", 1))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls take this way too, in several parts."""
    monkeypatch.setattr(torch_edit_fused, "FEWEST_SCORES", 1)
    monkeypatch.setattr(torch_edit_few, "ROWS", 7)


def few_edited(
    spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor]
) -> Tensor | None:
    call = fused_edit_of(spec, q, k, v, tensors, [])
    return None if call is None else edited_at_few_keys(call)


def in_spans(spec: SoftmaxSpec, x: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """By ranges of keys, which has to take the spec."""
    call = fused_edit_of(spec, *x, tensors, [])
    assert call is not None
    found = edited_in_spans(call)
    assert found is not None
    return found


def spec_of(name: str, mask: object = sym.k <= sym.q) -> SoftmaxSpec:
    edit = Edit(LABEL, FEW[name])
    return SoftmaxSpec(scale=Float(0.4), mask=mask, edit=edit, tensors=TENSORS)  # type: ignore


def operands(length: int = 23, keys: int = 23, kv_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, length, 6, dtype=torch.float64)
    return [q, *(torch.randn(2, kv_heads, keys, 6, dtype=torch.float64) for _ in range(2))]


def read_by(keys: int = 23) -> list[Tensor]:
    """Labels, other ones for each batch, 5 of which is no group; and a number a head."""
    label = torch.zeros(2, keys, dtype=torch.int64)
    label[0, :10] = torch.tensor([1, 0, 3, 3, 2, 3, 0, 0, 3, 5])
    label[1, 12:17] = torch.tensor([3, 1, 3, 2, 0])
    return [label, torch.tensor([0.2, 0.6, 1.0, 0.0], dtype=torch.float64)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", [sympy.true, sym.k <= sym.q], ids=["no mask", "causal"])
@pytest.mark.parametrize("name", FEW)
def test_the_correction_gives_the_edited_softmax(
    name: str, mask: sympy.Basic, kv_heads: int
) -> None:
    x, tensors, spec = operands(kv_heads=kv_heads), read_by(), spec_of(name, mask)
    got = few_edited(spec, *x, tensors)
    assert got is not None
    torch.testing.assert_close(got, reference(spec, *x, tensors), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("lengths", [(9, 30), (30, 17), (1, 23)])
def test_there_may_be_more_keys_than_queries_and_fewer(lengths: tuple[int, int]) -> None:
    x, tensors, spec = operands(*lengths), read_by(lengths[1]), spec_of("var")
    got = few_edited(spec, *x, tensors)
    assert got is not None
    torch.testing.assert_close(got, reference(spec, *x, tensors), rtol=1e-12, atol=1e-13)


def test_sinks_take_part_and_heads_are_scaled() -> None:
    sink = TensorArg("sink", "float32", 1)
    spec = replace(
        spec_of("var"),
        sink=Read(Symbol("sink"), sym.h),
        heads=W + sym.q,
        tensors=(*TENSORS, sink),
    )
    x, tensors = operands(), [*read_by(), torch.randn(4, dtype=torch.float64)]
    got = few_edited(spec, *x, tensors)
    assert got is not None
    torch.testing.assert_close(got, reference(spec, *x, tensors), rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_selected_are_bitwise_those_without_the_edit() -> None:
    x, tensors, spec = [t.float() for t in operands()], read_by(), spec_of("var")
    got = few_edited(spec, *x, tensors)
    assert got is not None
    plain = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, scale=0.4)
    assert torch.equal(got[:, :, :9], plain[:, :, :9])
    assert not torch.equal(got[:, :, 9:], plain[:, :, 9:])


def test_weights_that_sinks_hold_almost_whole_lose_no_digits() -> None:
    """Moving 0.9999 of the weight away from a key leaves rows as exact as before."""
    q, k, v = (t.float() for t in operands())
    k[:, :, 0] = q.mean(2) * 40
    spec, tensors = spec_of("redirect"), read_by()
    tensors[1].zero_()
    want = reference(spec, q.double(), k.double(), v.double(), tensors)
    got = few_edited(spec, q, k, v, tensors)
    assert got is not None
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


def test_gradients_are_those_of_the_reference() -> None:
    x, (label, w), spec = operands(kv_heads=2), read_by(), spec_of("redirect")
    leaves = [t.requires_grad_() for t in (*x, w)]
    grad = torch.randn(2, 4, 23, 6, dtype=torch.float64)
    got = attention(*x, (label, w), [], spec, "torch.blocked")
    want = reference(spec, *x, (label, w))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"score": 5 * sympy.tanh(sym.s / 5)},
        {"mask": (sym.k <= sym.q) & (sym.k > sym.q - 9)},
        {"mask": sym.k < sym.q},
        {"dropout": 0.1},
        {"edit": Edit(LABEL, (W, Integer(0)))},
        {"edit": Edit(sym.IMod(sym.k + sym.h, 2), (Integer(1), W))},
        {"edit": Edit(sym.IMod(sym.k, 7), (Integer(0), Integer(1)))},
    ],
    ids=["cap", "window", "strict", "dropout", "all groups", "heads differ", "many keys"],
)
def test_other_specs_are_not_corrected_at_few_keys(change: dict[str, object]) -> None:
    spec = replace(spec_of("var"), **change)  # type: ignore[arg-type]
    assert few_edited(spec, *operands(), read_by()) is None


# --- ranges of keys -------------------------------------------------------------------------------

FIRST = Where(sym.k < 3, Integer(1), 0)
REMOVED = Edit(FIRST, (1 / sym.Maximum(M0, Float(1e-12)), Where(M0 > 1e-12, Integer(0), 1)))
BETWEEN = Where(sym.k < 4, Integer(1), Where(sym.k < 15, Integer(2), 1))
SCALED = Edit(BETWEEN, (Integer(2), W, 1 + M1))
GAPS = Edit(sym.k // 4 - 1, (W, 1 - M0))
"""Keys of three groups, a group of two ranges with one that has no key, and keys of no group."""


@pytest.mark.parametrize("lengths", [(23, 23), (9, 30), (30, 17)])
@pytest.mark.parametrize("mask", [sympy.true, sym.k <= sym.q], ids=["no mask", "causal"])
@pytest.mark.parametrize("edit", [REMOVED, SCALED, GAPS], ids=["removed", "scaled", "gaps"])
def test_ranges_of_keys_give_the_edited_softmax(
    edit: Edit, mask: sympy.Basic, lengths: tuple[int, int]
) -> None:
    x, tensors = operands(*lengths, kv_heads=2), read_by(lengths[1])
    spec = replace(spec_of("var", mask), edit=edit)
    want = reference(spec, *x, tensors)
    torch.testing.assert_close(in_spans(spec, x, tensors), want, rtol=1e-12, atol=1e-13)


def test_ranges_of_keys_may_differ_between_batches_and_meet_a_sink() -> None:
    tensors = [*read_by(), torch.randn(2, 4, dtype=torch.float64)]
    tensors[0] = (torch.arange(23) > torch.tensor([[4], [11]])).long()
    spec = replace(
        spec_of("var"),
        edit=Edit(LABEL, (W, 1 + M0)),
        sink=Read(Symbol("sink"), sym.b, sym.h),
        tensors=(*TENSORS, TensorArg("sink", "float32", 2)),
    )
    x = operands()
    want = reference(spec, *x, tensors)
    torch.testing.assert_close(in_spans(spec, x, tensors), want, rtol=1e-12, atol=1e-13)


def test_a_sink_is_evaluated_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was evaluated for all batches, for each of them."""
    edit = Edit(Where(sym.k < 4, Integer(1), 0), (1 + M0, Float(0.5)))
    spec = replace(
        SoftmaxSpec(mask=sym.k <= sym.q, edit=edit),
        sink=Read(Symbol("sink"), sym.h),
        tensors=(TensorArg("sink", "float32", 1),),
    )
    call = fused_edit_of(spec, *operands(), [torch.zeros(4)], [])
    assert call is not None
    assert call.groups is not None
    batches, block = [], call.block
    monkeypatch.setattr(call, "block", lambda x: batches.append(x["b"]) or block(x))
    assert edited_in_spans(call) is not None
    assert set(batches) == {(0, 1), (1, 2)}


def test_a_removed_sink_with_almost_all_the_weight_leaves_exact_rows() -> None:
    """The rest is never a difference of two large numbers."""
    q, k, v = (t.float() for t in operands())
    k[:, :, 0] = q.mean(2) * 60
    edit = Edit(Where(sym.k < 1, Integer(1), 0), REMOVED.factors)
    spec = replace(spec_of("var"), edit=edit)
    wide = [t.double() for t in (q, k, v)]
    plain = reference(replace(spec, edit=None), *wide, read_by())
    assert (plain - v[:, :, :1]).abs().amin() < 1e-3
    want = reference(spec, *wide, read_by())
    got = in_spans(spec, [q, k, v], read_by())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_many_ranges_of_keys_are_left_to_the_softmax_in_blocks() -> None:
    spec = replace(spec_of("var"), edit=Edit(sym.IMod(sym.k, 2), (W, W)))
    call = fused_edit_of(spec, *operands(), read_by(), [])
    assert call is not None
    assert edited_in_spans(call) is None


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [Edit(LABEL, FEW["var"]), REMOVED], ids=["few keys", "ranges"])
def test_long_calls_are_fused_ones(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Call) -> Tensor:
        raise AssertionError("the softmax in blocks was asked")

    monkeypatch.setattr(Call, "forward", never)
    x, tensors, spec = operands(), read_by(), replace(spec_of("var"), edit=edit)
    torch.testing.assert_close(blocked(spec, *x, tensors, []), reference(spec, *x, tensors))
