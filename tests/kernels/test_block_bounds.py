"""The ranges of keys read off a mask: never an allowed pair left out, nothing idle kept."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Abs, And, Ne, Not, Or, Symbol
from sympy.logic.boolalg import Boolean
from torch import Tensor

from rewriter.kernels.block_bounds import Queries, Segments, causal_offset, key_ranges
from rewriter.reference import mask_of
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.symbols import IDiv, IMod, L, M, Maximum, Minimum, Read, Where, b, h, k, q
from rewriter.symbols import size_symbol as size

PAST = size("past")
PAD = Ne(Read(Symbol("pad"), b, k), 0)

AFFINE: dict[str, Boolean] = {
    "causal": k <= q,
    "causal with a cache": k <= q + M - L,
    "causal from a size": k <= q + PAST,
    "strictly causal": k < q,
    "window": And(k <= q, k > q - 3),
    "window on both sides": Abs(q - k) < 3,
    "window with a cache": And(k <= q + PAST, q + PAST - k < 4),
    "prefix": k < 5,
    "chunks": Abs(IDiv(k, 4) - IDiv(q, 4)) <= 0,
    "same chunk": sympy.Eq(IDiv(k, 4), IDiv(q, 4)),
    "this chunk and the one before": And(IDiv(k, 4) <= IDiv(q, 4), IDiv(k, 4) >= IDiv(q, 4) - 1),
    "every other query": 2 * k <= q,
    "to the end of the chunk": k < Minimum(M, 4 * IDiv(q, 4) + 4),
    "after two bounds": k >= Maximum(q - 2, 3),
    "nothing": And(k < 2, k > 4),
}
UNIONS: dict[str, Boolean] = {
    "window and first keys": And(k <= q, Or(k > q - 3, k < 2)),
    "not the window": Not(Abs(q - k) < 3),
    "two windows": Or(Abs(q - k) < 2, Abs(q + 6 - k) < 2),
    "heads differ": Or(And(h < 1, k <= q), And(h >= 1, Abs(q - k) < 2)),
    "below either": k <= Maximum(q, 5),
    "not one key": Ne(k, 3),
}


def seen(mask: Boolean, q_len: int, kv_len: int, heads: int = 2, past: int = 2) -> Tensor:
    spec = SoftmaxSpec(mask=mask, sizes=("past",))
    dense = mask_of(spec, q_len=q_len, kv_len=kv_len, heads=heads, sizes=(past,))
    return dense.any(1)[0] if dense.dim() == 4 else dense


def ranges(
    mask: Boolean, rows: tuple[int, int], q_len: int, kv_len: int, past: int = 2
) -> Segments:
    sizes = {"B": 1, "H": 2, "L": q_len, "M": kv_len, "past": past}
    found = key_ranges(mask)
    return found(Queries((0, 0), (0, 1), rows, sizes)) if found else ((0, kv_len),)


def as_row(segments: Segments, kv_len: int) -> Tensor:
    row = torch.zeros(kv_len, dtype=torch.bool)
    for start, stop in segments:
        row[start:stop] = True
    return row


@pytest.mark.parametrize("name", [*AFFINE, *UNIONS])
@pytest.mark.parametrize(("q_len", "kv_len"), [(13, 13), (5, 12), (12, 5), (1, 9)])
def test_no_allowed_pair_is_left_out(name: str, q_len: int, kv_len: int) -> None:
    mask = {**AFFINE, **UNIONS}[name]
    for wanted in (mask, Not(mask)):
        dense = seen(wanted, q_len, kv_len)
        for first in range(0, q_len, 4):
            last = min(first + 4, q_len) - 1
            kept = as_row(ranges(wanted, (first, last), q_len, kv_len), kv_len)
            missing = dense[first : last + 1].any(0) & ~kept
            assert not missing.any(), (wanted, first, missing.nonzero().flatten().tolist())


@pytest.mark.parametrize("name", AFFINE)
def test_affine_masks_keep_exactly_the_keys_that_some_query_sees(name: str) -> None:
    dense = seen(AFFINE[name], 13, 17)
    for first in range(0, 13, 4):
        last = min(first + 4, 13) - 1
        kept = as_row(ranges(AFFINE[name], (first, last), 13, 17), 17)
        assert kept.tolist() == dense[first : last + 1].any(0).tolist()


def test_first_keys_and_a_window_are_two_ranges() -> None:
    mask = UNIONS["window and first keys"]
    assert ranges(mask, (64, 127), 4096, 4096) == ((0, 2), (62, 128))
    assert ranges(mask, (0, 63), 4096, 4096) == ((0, 64),)


def test_what_is_hidden_of_a_causal_block_is_its_diagonal() -> None:
    assert ranges(Not(k <= q), (64, 127), 128, 128) == ((65, 128),)


@pytest.mark.parametrize(
    "mask",
    [
        sympy.true,
        PAD,
        Or(k <= q, PAD),
        k <= Read(Symbol("length"), b),
        k <= q * 0.5,
        Where(k < 3, k, 0) <= q,
        sympy.Eq(IMod(k, 3), IMod(q, 3)),
        k * k <= q,
        k <= q * k,
    ],
    ids=str,
)
def test_what_is_not_understood_bounds_nothing(mask: Boolean) -> None:
    assert key_ranges(mask) is None


def test_a_term_that_is_not_understood_leaves_the_others_their_bounds() -> None:
    assert ranges(And(k <= q, PAD), (0, 3), 16, 16) == ((0, 4),)
    assert key_ranges(Not(And(k <= q, PAD))) is None


def test_a_window_of_a_whole_float_is_a_window() -> None:
    assert ranges(And(k <= q, q - k < 4.0), (8, 9), 16, 16) == ((5, 10),)


@pytest.mark.parametrize(
    ("mask", "offset"),
    [
        (k <= q, 0),
        (q >= k, 0),
        (k < q + 1, 0),
        (k <= q + M - L, 4),
        (k <= q + PAST, 2),
        (k - q <= PAST - 2, 0),
    ],
    ids=str,
)
def test_a_causal_mask_is_known_by_its_offset(mask: Boolean, offset: int) -> None:
    found = causal_offset(mask)
    sizes = {"B": 1, "H": 1, "L": 5, "M": 9, "past": 2}
    assert found is not None
    assert found(Queries((0, 0), (0, 0), (0, 4), sizes)) == offset


@pytest.mark.parametrize("mask", [k > q, k <= 2 * q, PAD, k <= h, Abs(k - q) < 2, k < 5], ids=str)
def test_other_masks_are_not_causal(mask: Boolean) -> None:
    assert causal_offset(mask) is None


# --- any mask -------------------------------------------------------------------------------------

NUMBERS = st.integers(-6, 9)
POSITIVE = st.integers(1, 5)


@st.composite
def sides(draw: st.DrawFn, depth: int = 2) -> sympy.Expr:
    """An expression in k, q, sizes and integers."""
    if depth == 0:
        leaves = st.sampled_from((k, k, q, PAST, M, L, h, sympy.Integer(draw(NUMBERS))))
        return draw(leaves)
    inner = draw(sides(depth - 1))
    kind = draw(st.sampled_from(("+", "-", "*", "//", "%", "abs", "min", "max", "leaf")))
    other = draw(sides(depth - 1))
    table = {
        "+": lambda: inner + other,
        "-": lambda: inner - other,
        "*": lambda: draw(NUMBERS) * inner,
        "//": lambda: IDiv(inner, sympy.Integer(draw(POSITIVE))),
        "%": lambda: IMod(inner, sympy.Integer(draw(POSITIVE))),
        "abs": lambda: Abs(inner),
        "min": lambda: Minimum(inner, other),
        "max": lambda: Maximum(inner, other),
        "leaf": lambda: inner,
    }
    return table[kind]()


@st.composite
def masks(draw: st.DrawFn, depth: int = 2) -> Boolean:
    if depth == 0:
        kinds = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne)
        return draw(st.sampled_from(kinds))(draw(sides()), draw(sides()))
    kind = draw(st.sampled_from((And, Or, Not, None)))
    if kind is None or kind is Not:
        inner = draw(masks(depth - 1))
        return Not(inner) if kind is Not else inner
    return kind(draw(masks(depth - 1)), draw(masks(depth - 1)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(masks(), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4))
def test_no_mask_at_all_loses_an_allowed_pair(
    mask: Boolean, q_len: int, kv_len: int, past: int
) -> None:
    dense = seen(mask, q_len, kv_len, past=past)
    for first in range(0, q_len, 3):
        last = min(first + 3, q_len) - 1
        kept = as_row(ranges(mask, (first, last), q_len, kv_len, past), kv_len)
        assert not (dense[first : last + 1].any(0) & ~kept).any()


def test_reads_of_other_tensors_may_stand_beside_bounds() -> None:
    spec = SoftmaxSpec(mask=And(k <= q, PAD), tensors=(TensorArg("pad", "bool", 2),))
    pad = torch.tensor([[False, True, True, True]])
    dense = mask_of(spec, q_len=4, kv_len=4, tensors=(pad,))
    for row in range(4):
        kept = as_row(ranges(spec.mask, (row, row), 4, 4), 4)
        assert not (dense[row] & ~kept).any()
