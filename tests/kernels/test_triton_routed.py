"""The generated kernel of routed attention: numbers in Triton's interpreter, resources, text.

Bar: twice the error of the reference in the same dtype, plus one unit in the last place of the
largest output. `REWRITER_UPDATE_GOLDEN=1` rewrites the golden file.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families_worker import SHARED_BYTES, collect
from rewriter.kernels.triton_codegen import KernelSpec, Tile
from rewriter.kernels.triton_routed import _tiles_of
from rewriter.kernels.triton_routed_code import RoutedKernel, routed_source
from rewriter.lowering import Shapes, explain
from routed_cases import BUILDS, CASES, SPECS, Build, Case, moba, regions

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("triton-families")]

GOLDEN = Path(__file__).parents[1] / "golden" / "routed_fwd_moba.py"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What the kernel gave, from one process for all cases of both families."""
    return dict(collect("interpret")["routed"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_kernel_agrees_with_the_reference(case: Case, results: dict[str, Any]) -> None:
    result = results[case.name]
    assert "failed" not in result, result["failed"]
    assert result["nans"][0] == result["nans"][1]
    assert result["error"] <= 2 * result["reference_error"] + result["floor"]
    assert result["routed"] > 0.1, "the route hides something"


def test_tokens_after_a_prompt_are_those_of_one_call(results: dict[str, Any]) -> None:
    assert results["remembered"] <= 2e-6


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    return dict(collect("compile")["routed"])


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
def test_the_kernel_fits_and_does_not_spill(build: Build, resources: dict[str, Any]) -> None:
    found = resources[build.name]
    assert "failed" not in found, found["failed"]
    assert found["stack_bytes"] == 0
    assert 16 <= found["registers"] <= 255
    assert found["shared_bytes"] <= SHARED_BYTES[build.capability]


# --- text and lists -------------------------------------------------------------------------------


def text_of(spec: Any) -> str:
    kernel = RoutedKernel(KernelSpec(spec, 64, 64, "bfloat16", Tile(64, 64, 4, 2)))
    return routed_source(kernel).text


def test_the_source_is_that_of_the_golden_file() -> None:
    text = text_of(moba(3, 512))
    if os.environ.get("REWRITER_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_a_table_of_places_stands_only_where_keys_are_no_neighbours() -> None:
    assert "place" not in text_of(SPECS["top-3"])
    assert "p_place" in text_of(SPECS["padding"])
    region = text_of(SPECS["grid"])
    assert "p_place" in region
    assert "chosen" not in region
    assert "m_s" not in region


def test_a_tensor_may_be_called_like_a_list_of_the_kernel() -> None:
    text = text_of(SPECS["bias"])
    assert "b_chosen_ = tl.load(p_chosen_)" in text
    assert "m_c = tl.load(p_chosen + i_c" in text


def test_the_queries_of_a_region_have_tiles_of_their_own() -> None:
    places = torch.tensor([[1, 2, 5], [3, 4, -1]])
    assert _tiles_of(places, 2).tolist() == [[1, 2], [5, -1], [3, 4], [-1, -1]]
    assert _tiles_of(places, 4).tolist() == [[1, 2, 5, -1], [3, 4, -1, -1]]


# --- the table ------------------------------------------------------------------------------------


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel runs here: the guard is asked as if a GPU were there."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def shapes(length: int, **more: Any) -> Shapes:
    size = {"head_dim": 16, "value_dim": 16, "grad": False, **more}
    return Shapes("cuda", torch.float32, 1, 4, 2, length, length, **size)


@pytest.mark.parametrize("name", ["top-1", "padding", "cap-sink-gate", "bias", "grid"])
def test_routed_attention_on_a_gpu_is_computed_by_the_kernel(name: str, interpreting: None) -> None:
    for grad in (False, True):
        assert explain(SPECS[name], shapes(37, grad=grad), "auto") == ("triton", "")


def test_what_the_kernel_cannot_do_is_said(interpreting: None) -> None:
    found = explain(replace(moba(2, 5), dropout=0.5), shapes(37), "triton")
    assert found == (None, "triton: dropout is not drawn over chosen blocks")
    found = explain(regions((6, 6), 3, 1), shapes(40), "triton")
    assert found == (None, "triton: 40 queries and 40 keys are not 1 and a grid of 6 x 6")
