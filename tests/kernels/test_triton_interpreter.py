"""Generated kernels against the reference, run in Triton's interpreter: numbers only, no speed.

Error ratio: a kernel may err at most twice as much as the reference does in the same dtype, plus
one unit in the last place of the largest output. Outputs are NaN before the kernel runs.
"""

from __future__ import annotations

from typing import Any

import pytest

from triton_worker import CASES, GRADIENTS, Case, collect

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


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda c: c.name)
def test_gradients_behind_an_edit_are_those_of_the_reference(
    case: Case, results: dict[str, Any]
) -> None:
    result = results[f"gradients-{case.name}"]
    assert "failed" not in result, result["failed"]
    assert {"q", "k", "v"} <= set(result)
    for name, found in result.items():
        assert found["size"] > 1e-2, name
        assert found["error"] <= 1e-5 * found["size"], name


def test_nan_rows_are_among_the_cases(results: dict[str, Any]) -> None:
    """The comparison of NaN with NaN above is not vacuous, and most cases have none."""
    with_nans = [case.name for case in CASES if results[case.name].get("nans", [0, 0])[1]]
    assert 3 <= len(with_nans) <= len(CASES) // 4


def test_every_case_has_its_own_name() -> None:
    assert len({c.name for c in CASES}) == len(CASES)
