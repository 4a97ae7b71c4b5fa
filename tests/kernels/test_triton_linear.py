"""Generated kernels of linear attention: numbers in Triton's interpreter, resources, text.

Bars: twice the error of the reference in the same dtype plus one unit in the last place of the
largest output; and flash-linear-attention's own, a root mean square of 0.5 % of the output.

`REWRITER_UPDATE_GOLDEN=1 pytest tests/kernels/test_triton_linear.py` rewrites the golden file.
"""

from __future__ import annotations

import ast
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sympy import Float, Symbol

import triton_wide
from families_worker import SHARED_BYTES, collect
from linear_cases import BUILDS, CASES, PAD, SEEN, SPECS, Build, Case, both
from rewriter.errors import ShapeError
from rewriter.kernels.triton_linear import forward
from rewriter.kernels.triton_linear_code import linear_source
from rewriter.kernels.triton_linear_kernel import LinearKernel, LinearTile
from rewriter.linear import Features, LinearSpec, Near
from rewriter.lowering import TRITON, Shapes, explain
from rewriter.passes.decay import decay_of
from rewriter.spec import TensorArg
from rewriter.symbols import Read, Trunc, b, k, size_symbol
from triton_worker import collect as run_worker

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


# --- more features than a tile holds --------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("wide")
    return run_worker("interpret", folder, triton_wide.__file__)


@pytest.mark.parametrize("name", [*triton_wide.SPECS, "plain-float16", "exp-sum-float16"])
def test_no_number_of_features_is_left_to_torch(name: str, wide: dict[str, Any]) -> None:
    result = wide[name]
    assert result["error"] <= 2 * result["reference_error"] + result["floor"]
    assert result["dtype"] == ("torch.float16" if "float16" in name else "torch.float32")
    assert result["size"] > 0.05, "there is something to agree on"


def test_the_parts_of_many_features_leave_one_state(wide: dict[str, Any]) -> None:
    assert wide["remembered"]["exp-sum"] <= 2e-6
    assert wide["remembered"]["silu-rms"] <= 5e-6  # numbers around 1.5, divided by a norm


def test_a_part_of_many_features_fits_and_does_not_spill(tmp_path: Path) -> None:
    for name, result in run_worker("compile", tmp_path, triton_wide.__file__).items():
        assert result["spilled_bytes"] == 0, name
        assert result["shared_bytes"] <= SHARED_BYTES[80]


def test_maps_to_different_numbers_of_features_are_refused() -> None:
    x = [torch.zeros(1, heads, 5, 16) for heads in (2, 1, 1)]
    matrices = [torch.zeros(2, 16, 20), torch.zeros(1, 16, 24)]
    with pytest.raises(ShapeError, match="20 features of a query and 24 of a key"):
        forward(triton_wide.SPECS["plain"], *x, matrices)


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
        assert result["spilled_bytes"] == 0, name
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


def test_tensors_and_sizes_may_be_called_like_what_the_kernels_use_themselves() -> None:
    names, sizes = ("d", "d_", "number", "h", "k_up"), ("e", "last", "next", "s", "t")
    weight = sum(Read(Symbol(n), b, k) for n in names) + sum(map(size_symbol, sizes))
    tensors = tuple(TensorArg(n, "float32", 2) for n in names)
    decay = Float(-0.1)
    spec = both("exp", norm="sum", decay=decay, seen=SEEN, key_weight=weight, sizes=sizes,
                tensors=(*PAD, *tensors))  # fmt: skip
    for node in ast.parse(linear_source(kernel_of(spec)).text).body:
        if isinstance(node, ast.FunctionDef):
            given = [a.arg for a in node.args.args]
            stored = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and _is_stored(n)]
            assert len(set(given)) == len(given)
            assert not set(stored) & set(given), "an argument is overwritten"
            assert stored.count("p_number") <= 1


def _is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


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
