"""Generated kernels, compiled with no GPU for an A100 and an H100: none spills, all fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewriter.errors import LoweringError
from rewriter.kernels.triton_source import Source, compile_function
from triton_specs import MERGED
from triton_worker import BUILDS, GRADIENTS_BUILDS, Build, GradientsBuild, collect

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("triton-aot")]

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What one program may have of an A100 and of an H100."""


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the compiled kernels take, from one process for all."""
    return collect("compile", tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
def test_the_kernel_fits_and_does_not_spill(build: Build, results: dict[str, Any]) -> None:
    result = results[build.name]
    assert "failed" not in result, result["failed"]
    assert result["spilled_bytes"] == 0 or build.spec in MERGED  # which no model has
    assert 16 <= result["registers"] <= 255
    assert result["shared_bytes"] <= SHARED_BYTES[build.capability]


@pytest.mark.parametrize("build", GRADIENTS_BUILDS, ids=lambda b: b.name)
def test_the_kernels_for_gradients_fit_and_do_not_spill(
    build: GradientsBuild, results: dict[str, Any]
) -> None:
    result = results[f"gradients-{build.name}"]
    assert "failed" not in result, result["failed"]
    assert len(result) >= 2
    for found in result.values():
        assert found["spilled_bytes"] == 0 or build.spec in MERGED  # which no model has
        assert 16 <= found["registers"] <= 255
        assert found["shared_bytes"] <= SHARED_BYTES[build.capability]


def test_no_kernel_of_the_table_in_the_docs_spills() -> None:
    """`python benchmarks/kernel_resources.py` writes it; the tests above compile some of it."""
    found = json.loads((Path(__file__).parents[2] / "docs" / "kernels.json").read_text())
    rows = found["rows"]
    assert len({(r["spec"], r["dim"], r["dtype"], r["capability"]) for r in rows}) == 20 * 2 * 2 * 3
    assert [r for r in rows if r["spilled_bytes"]] == []
    assert [r for r in rows if r["shared_bytes"] > SHARED_BYTES.get(r["capability"], 2**20)] == []


def test_a_process_that_interprets_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(LoweringError, match="cannot compile"):
        compile_function(Source("no", "", ()), "no", {}, 90)
