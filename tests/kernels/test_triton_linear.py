"""Generated kernels of linear attention: numbers in Triton's interpreter, resources, text.

Bars: twice the error of the reference in the same dtype plus one unit in the last place of the
largest output; and flash-linear-attention's own, a root mean square of 0.5 % of the output.

`REWRITER_UPDATE_GOLDEN=1 pytest tests/kernels/test_triton_linear.py` rewrites the golden file.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families_worker import SHARED_BYTES, collect
from linear_cases import BUILDS, CASES, PAD, SEEN, SPECS, Build, Case, both
from rewriter.kernels.triton_linear_code import linear_source
from rewriter.kernels.triton_linear_kernel import LinearKernel, LinearTile
from rewriter.linear import Features, LinearSpec, Near
from rewriter.lowering import TRITON, Shapes, explain
from rewriter.passes.decay import decay_of
from rewriter.symbols import Trunc, k

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("triton-families")]

GOLDEN = Path(__file__).parents[1] / "golden" / "linear_fwd_lightning_padding.py"


# --- numbers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What the kernels gave, from one process for all cases of both families."""
    return dict(collect("interpret")["linear"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_kernels_agree_with_the_reference(case: Case, results: dict[str, Any]) -> None:
    result = results[case.name]
    assert "failed" not in result, result["failed"]
    assert result["error"] <= 2 * result["reference_error"] + result["floor"]
    assert result["rms"] <= 5e-3
    assert result["dtype"] == f"torch.{case.dtype}"
    assert result["size"] > 0.05, "there is something to agree on"


def test_a_prompt_leaves_the_state_that_the_next_tokens_go_on_from(results: dict[str, Any]) -> None:
    for name, found in results["remembered"].items():
        assert found["keys"] == [1, 1, 2], f"{name}: keys that each call of torch read"
        assert found["error"] <= 2e-6


# --- resources ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    return dict(collect("compile")["linear"])


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.name)
def test_the_kernels_fit_and_do_not_spill(build: Build, resources: dict[str, Any]) -> None:
    found = resources[build.name]
    assert "failed" not in found, found["failed"]
    assert len(found) == 3
    for name, result in found.items():
        assert result["stack_bytes"] == 0, name
        assert 16 <= result["registers"] <= 255
        assert result["shared_bytes"] <= SHARED_BYTES[build.capability]


# --- text -----------------------------------------------------------------------------------------


def kernel_of(spec: LinearSpec, dim: int = 64, dtype: Any = "bfloat16") -> LinearKernel:
    return LinearKernel(spec, dim, dim, dtype, LinearTile(64, 32, 64, 256, 4, 2))


def test_the_source_is_that_of_the_golden_file() -> None:
    decay = decay_of("minimax", 8, 1, 4)
    spec = both("silu", decay=decay, seen=SEEN, norm="sum", tensors=PAD)
    text = linear_source(kernel_of(spec, 60)).text
    if os.environ.get("REWRITER_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_a_plain_spec_gives_plain_kernels() -> None:
    text = linear_source(kernel_of(SPECS["plain"])).text
    for absent in ("tl.exp", "number", "b_w", "b_l", "m_d", "m_e", "LEAST", "EPS"):
        assert absent not in text, absent
    assert text.count("tl.dot") == 4


def test_heads_of_one_key_head_share_a_state_unless_something_tells_them_apart() -> None:
    assert kernel_of(SPECS["map-elu"]).is_shared
    assert kernel_of(SPECS["shared-padding"]).is_shared
    assert not kernel_of(SPECS["rule-supra"]).is_shared
    assert not kernel_of(SPECS["everything"]).is_shared


# --- the table ------------------------------------------------------------------------------------


def shapes(**more: Any) -> Shapes:
    size = {"q_len": 40, "kv_len": 40, "head_dim": 16, "value_dim": 16, "grad": False, **more}
    return Shapes("cuda", torch.float32, 1, 4, 2, **size)


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel runs here: the guard is asked as if a GPU were there."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("name", SPECS)
def test_linear_attention_on_a_gpu_is_computed_by_kernels(name: str, interpreting: None) -> None:
    spec = SPECS[name]
    assert explain(spec, shapes(sizes=(0,) * len(spec.sizes)), "auto") == ("triton", "")
    assert explain(spec, shapes(grad=True), "auto")[0] == "triton"


REFUSED = {
    "softmax weights of near keys": (both("elu", norm="sum", near=Near(8)), {}),
    "up to 16 queries go on from a state": (both("silu"), {"q_len": 1}),
    "4 query heads are not a multiple": (both("silu"), {"kv_heads": 3}),
    "head dim 320 is above 256": (both("silu"), {"value_dim": 320}),
    "a map in two halves is for both": (replace(both("exp"), q_map=Features("silu")), {}),
    "a value is rounded to an integer": (both("silu", key_weight=Trunc(0.3 * k)), {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernels_cannot_do_is_said(reason: str, interpreting: None) -> None:
    spec, more = REFUSED[reason]
    size = {"heads": 4, "kv_heads": 2, "batch": 1, **more}
    call = replace(shapes(), **size)
    found = TRITON.supports(spec, call)
    assert found is not None
    assert reason in found
    assert explain(spec, call, "auto")[0] in ("torch.linear", None)
