"""Generated kernels against the reference, run in Triton's interpreter: numbers only, no speed.

Error ratio: a kernel may err at most twice as much as the reference does in the same dtype, plus
one unit in the last place of the largest output. Outputs are NaN before the kernel runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewriter.kernels.triton_backward import refusal
from rewriter.kernels.triton_decode import runs_of
from rewriter.lowering import Shapes
from triton_specs import SPECS
from triton_worker import (
    CASES,
    DECODES,
    DROPOUT,
    GRADIENTS,
    PAIRED,
    RATE,
    Case,
    DropoutCase,
    collect,
)

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("triton-interpreter")]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels gave, from one process for all cases."""
    return collect("interpret", tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_kernel_agrees_with_the_reference(case: Case, results: dict[str, Any]) -> None:
    result = results[case.name]
    assert "failed" not in result, result["failed"]
    assert result["nans"][0] == result["nans"][1]
    assert result["error"] <= 2 * result["reference_error"] + result["floor"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_logsumexp_is_that_of_the_reference(case: Case, results: dict[str, Any]) -> None:
    assert results[case.name]["lse_error"] <= 1e-5


IN_ONE_RUN = ("window-sinks", "two-sided-window", "neighbours", "two-blocks", "sizes")
"""Specs with a window or what looks like one: its keys are found by their bounds."""


@pytest.mark.parametrize("case", DECODES, ids=lambda c: c.name)
def test_a_step_of_decoding_agrees_with_the_reference(case: Case, results: dict[str, Any]) -> None:
    result = results[f"decode-{case.name}"]
    assert "failed" not in result, result["failed"]
    single = case.spec in (*IN_ONE_RUN, "edit-everything")
    kernels = ["softmax_decode_kernel", "softmax_combine_kernel"]
    assert result["ran"] == (kernels[:1] if single else kernels)
    assert result["nans"][0] == result["nans"][1]
    assert result["error"] <= 2 * result["reference_error"] + result["floor"]


@pytest.mark.parametrize(
    ("programs", "kv_len", "run"),
    [(8, 400, 448), (8, 8192, 512), (8, 131072, 4032), (264, 131072, 131072), (1000, 8192, 8192)],
)
def test_keys_are_split_into_as_many_runs_as_keep_the_gpu_busy(
    programs: int, kv_len: int, run: int
) -> None:
    assert runs_of(programs, kv_len, 64, 132) == run


REFUSED = {
    "clamped-twice-masked": "constants so large",
    "disentangled": "rows without a visible key see their scores",
    "redirect-add": "rows without a visible key see their scores",
}
"""Cases whose gradients are torch's, by how their names begin or end, and why."""


@pytest.mark.parametrize("case", [*GRADIENTS, *PAIRED], ids=lambda c: c.name)
def test_gradients_are_those_of_the_reference(case: Case, results: dict[str, Any]) -> None:
    result = results[f"gradients-{case.name}"]
    assert "failed" not in result, result["failed"]
    why = REFUSED.get(case.spec) or REFUSED.get(f"{case.spec}-{case.masked}")
    assert (why is None) == (result["refused"] is None), result["refused"]
    assert why is None or why in result["refused"]
    errors = result["errors"]
    assert {"q", "k", "v"} <= set(errors)
    for name, found in errors.items():
        assert found["nans"][0] == found["nans"][1], name
        bound = 1e-5 * found["size"] + 1e-6 if case.dtype == "float32" else 0.0
        # the interpreter cuts float32 down to bfloat16, which errs twice as much as rounding
        times = 4 if case.dtype == "bfloat16" else 2
        assert found["error"] <= times * found["reference_error"] + bound, name


def test_gradients_that_are_compared_are_not_zero(results: dict[str, Any]) -> None:
    small = [
        (case.name, name)
        for case in (*GRADIENTS, *PAIRED)
        for name, found in results[f"gradients-{case.name}"]["errors"].items()
        if found["size"] < 1e-2 and not found["nans"][1] and case.shape[3] > 1
    ]
    assert small == []


@pytest.mark.parametrize("case", DROPOUT, ids=lambda c: c.name)
def test_dropout_keeps_what_the_seed_says_and_gradients_know_it(
    case: DropoutCase, results: dict[str, Any]
) -> None:
    result = results[case.name]
    assert "failed" not in result, result["failed"]
    assert abs(result["kept"] - (1 - RATE)) < 0.04
    assert result["same"]
    for changed in ("other", "heads", "rows"):  # independent draws differ at 2 · 0.7 · 0.3
        assert abs(result[changed] - 2 * RATE * (1 - RATE)) < 0.1, changed
    assert result["error"] <= 1e-5
    assert all(error <= 1e-5 for error in result.get("gradients", ()))
    assert ("gradients" in result) == (case.masked == "zero")
    assert result.get("by the op", True)


def test_gradients_in_no_fixed_order_are_refused_where_torch_asks_for_one() -> None:
    assert "no fixed order" in str(_refusal(deterministic=True))
    assert _refusal(deterministic=False) is None


def _refusal(*, deterministic: bool) -> str | None:
    shapes = Shapes("cuda", torch.float16, 1, 2, 2, 8, 8, 16, 16, grad=True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        return refusal(SPECS["opaque-bias"], shapes, [True])
    finally:
        torch.use_deterministic_algorithms(before)


def test_nan_rows_are_among_the_cases(results: dict[str, Any]) -> None:
    """The comparison of NaN with NaN above is not vacuous, and most cases have none."""
    with_nans = [case.name for case in CASES if results[case.name].get("nans", [0, 0])[1]]
    assert 3 <= len(with_nans) <= len(CASES) // 4


def test_every_case_has_its_own_name() -> None:
    assert len({c.name for c in CASES}) == len(CASES)
