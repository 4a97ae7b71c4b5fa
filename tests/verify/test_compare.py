"""The error-ratio rule on single tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewriter.verify.compare import RATIO, STORED, SUMMED, baseline_of, compare, floor_of
from rewriter.verify.rows import Errors, Kind, VerifyRow


def judged(new: object, ref: object, gold: object, kind: Kind = "output") -> VerifyRow:
    dtype = ref.dtype if isinstance(ref, Tensor) and ref.is_floating_point() else torch.float32
    return compare("x", kind, baseline_of(ref, gold), new, dtype)


def gold_values(count: int = 1000) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_allowance_is_twice_the_error_of_the_original_plus_the_floor() -> None:
    gold = gold_values()
    ref = (gold + 1e-3).float()
    row = judged(ref, ref, gold)
    floor = floor_of(
        "output", torch.float32, Errors(float(gold.abs().mean()), float(gold.abs().max()))
    )
    assert row.err_ref is not None
    assert row.allowed is not None
    assert row.allowed.mean == pytest.approx(RATIO * row.err_ref.mean + floor.mean)
    assert row.allowed.max == pytest.approx(RATIO * row.err_ref.max + floor.max)
    assert row.ratio == 1.0


@pytest.mark.parametrize(("times", "ok"), [(1.9, True), (2.2, False)])
def test_an_error_of_more_than_twice_the_original_fails(times: float, ok: bool) -> None:
    gold = gold_values()
    row = judged((gold + times * 1e-3).float(), (gold + 1e-3).float(), gold)
    assert row.ok == ok
    assert ("is allowed" in row.reason) == (not ok)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["output", "gradient"])
def test_the_floor_forgives_one_rounding_where_the_original_is_exact(
    dtype: torch.dtype, kind: Kind
) -> None:
    ref = gold_values().to(dtype)
    new = ref + torch.finfo(dtype).eps * ref.abs() * 0.9
    assert not torch.equal(new, ref)
    assert judged(new, ref, ref.double(), kind).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_floor_does_not_forgive_what_arithmetic_does_not_explain(dtype: torch.dtype) -> None:
    ref = gold_values().to(dtype)
    eps = (
        STORED["output"] * torch.finfo(dtype).eps
        + SUMMED["output"] * torch.finfo(torch.float32).eps
    )
    assert not judged(ref * (1 + 3 * eps), ref, ref.double()).ok


def test_one_wrong_element_in_a_million_fails_by_the_largest_error() -> None:
    gold = gold_values(1_000_000)
    new = gold.float()
    new[77] += 0.1
    row = judged(new, gold.float(), gold)
    assert not row.ok
    assert row.reason.startswith("max error")


def test_a_small_error_everywhere_fails_by_the_mean_error() -> None:
    gold = gold_values()
    ref = gold.float()
    ref[0] += 1e-2  # the largest error of the original is large, its mean error is not
    row = judged((gold + 1e-3).float(), ref, gold)
    assert not row.ok
    assert row.reason.startswith("mean error")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_fail_where_the_original_is_finite(bad: float) -> None:
    gold = gold_values()
    new = gold.float()
    new[3] = bad
    row = judged(new, gold.float(), gold)
    assert not row.ok
    assert f"1 of 1000 values are like {bad:g} where the original is finite" in row.reason


@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), torch.finfo(torch.float32).min])
def test_what_is_no_number_in_the_original_has_to_stay_so(bad: float) -> None:
    gold = gold_values()
    gold[3] = bad
    ref = gold.float()
    assert judged(ref.clone(), ref, gold).ok
    new = ref.clone()
    new[3] = 0.0
    assert not judged(new, ref, gold).ok


def test_masked_extremes_do_not_widen_the_bound_of_the_rest() -> None:
    gold = gold_values()
    gold[3] = torch.finfo(torch.float64).min
    ref = gold.float().clamp(min=torch.finfo(torch.float32).min)
    new = ref.clone()
    new[4] += 0.01
    assert not judged(new, ref, gold).ok


def test_a_model_may_be_finite_where_half_precision_of_the_original_overflows() -> None:
    gold = gold_values() * 100
    ref = gold.half()
    ref[3] = torch.inf  # overflowed inside the original; gold is finite there
    assert judged(gold.half(), ref, gold).ok
    assert judged(ref.clone(), ref, gold).ok


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("own", "exact", "found", "ok"),
    [
        (NAN, 5.0, INF, False),
        (INF, 5.0, NAN, False),
        (INF, 5.0, -INF, False),
        (NAN, 5.0, NAN, True),
        (NAN, 5.0, 5.0, True),
        (NAN, 5.0, 6.0, False),
        (NAN, INF, NAN, True),
        (NAN, INF, INF, True),
        (NAN, INF, -INF, False),
        (NAN, INF, 5.0, False),
    ],
)
def test_a_non_number_has_to_be_of_a_kind_that_the_original_or_gold_has(
    own: float, exact: float, found: float, ok: bool
) -> None:
    gold = gold_values()
    ref, new = gold.float(), gold.float()
    gold[3], ref[3], new[3] = exact, own, found
    row = judged(new, ref, gold)
    assert row.ok == ok
    if not abs(found) < INF and not ok:
        assert f"like {found:g} where the original has {own:g}" in row.reason


def test_a_tensor_without_a_finite_value_shows_nothing_and_fails() -> None:
    ref = torch.full((4,), torch.nan)
    row = judged(ref.clone(), ref, ref.double())
    assert not row.ok
    assert "nothing could be compared" in row.reason


def test_dtype_and_shape_have_to_be_those_of_the_original() -> None:
    gold = gold_values()
    ref = gold.bfloat16()
    assert "it is float32, the original gives bfloat16" in judged(gold.float(), ref, gold).reason
    assert "its shape is [500, 2]" in judged(ref.view(500, 2), ref, gold).reason


def test_integers_have_to_be_equal_except_at_ties_of_the_original() -> None:
    ref, gold = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    assert judged(torch.tensor([1, 2, 3]), ref, gold).ok
    assert judged(torch.tensor([1, 2, 4]), ref, gold).ok  # gold decides otherwise than the original
    assert not judged(torch.tensor([1, 3, 3]), ref, gold).ok
    assert not judged(torch.tensor([1, 2, 5]), ref, gold).ok


def test_plain_values_have_to_be_equal() -> None:
    assert judged("a", "a", "a").ok
    assert not judged(3, 2, 2).ok
    assert not judged(None, 2, 2).ok
    assert judged(0.1 + 1e-9, 0.1, 0.1).ok
    assert not judged(0.2, 0.1, 0.1).ok


def test_complex_values_are_compared_by_both_parts() -> None:
    ref = torch.view_as_complex(gold_values().float().view(-1, 2))
    assert judged(ref.clone(), ref, ref.to(torch.complex128)).ok
    assert not judged(ref.conj().resolve_conj(), ref, ref.to(torch.complex128)).ok
