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
from sympy import Symbol
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from families_worker import SHARED_BYTES, collect
from rewriter.kernels import triton_routed
from rewriter.kernels.block_lists import BlockList
from rewriter.kernels.triton_codegen import KernelSpec, Tile
from rewriter.kernels.triton_routed import _pairs, _tiles_of
from rewriter.kernels.triton_routed_code import RoutedKernel, routed_source
from rewriter.lowering import Shapes, explain
from rewriter.spec import TensorArg
from rewriter.symbols import Read, h, s
from routed_cases import BUILDS, CASES, PAD, SPECS, Build, Case, moba, regions

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
    assert found["spilled_bytes"] == 0
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
    names = ("pair", "place")
    score = s + sum(Read(Symbol(n), h) for n in names)
    tensors = (*PAD, *(TensorArg(n, "float32", 1) for n in names))
    spec = replace(SPECS["padding"], score=score, tensors=tensors)
    lines = [line.strip() for line in text_of(spec).splitlines()]
    for name in names:
        assert sum(line.startswith(f"b_{name}_ = tl.load(p_{name}_)") for line in lines) == 1
        assert sum(line.startswith(f"p_{name} = ") for line in lines) == 1


def test_the_queries_of_a_region_have_tiles_of_their_own() -> None:
    places = torch.tensor([[1, 2, 5], [3, 4, -1]])
    assert _tiles_of(places, 2).tolist() == [[1, 2], [5, -1], [3, 4], [-1, -1]]
    assert _tiles_of(places, 4).tolist() == [[1, 2, 5, -1], [3, 4, -1, -1]]


def test_each_pair_of_a_tile_and_a_block_has_a_bit_for_each_query() -> None:
    seen = torch.zeros(2, 70, 3, dtype=torch.bool)  # two heads, 70 queries
    for query, block in ((0, 2), (31, 2), (32, 2), (63, 0), (69, 1)):
        seen[1, query, block] = True
    found = BlockList.from_chosen(seen.flatten(0, 1), seen.new_zeros(1, 1))
    (heads, tiles), entries = _pairs(found, 70, 64)
    assert heads.tolist() == [1, 1, 1]
    assert tiles.tolist() == [0, 0, 1]
    assert entries.tolist() == [[0, 0, -(2**31)], [2, 1 - 2**31, 1], [1, 1 << 5, 0]]
    (_, tiles), entries = _pairs(found, 70, 16)
    assert tiles.tolist() == [0, 1, 2, 3, 4]
    assert entries.tolist() == [[2, 1], [2, 1 << 15], [2, 1], [0, 1 << 15], [1, 1 << 5]]


class _Largest(TorchDispatchMode):
    """The most bytes that one tensor takes of those that are made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def test_memory_grows_with_the_tokens_not_with_tokens_times_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handed: dict[str, Tensor] = {}
    monkeypatch.setattr(triton_routed, "launch", lambda s, n, p, x, sizes: handed.update(x))
    monkeypatch.setattr(triton_routed, "_PRODUCTS", 2**12)
    sizes, most = [], []
    for length in (1024, 2048):
        torch.manual_seed(0)
        x = [torch.randn(1, heads, length, 8) for heads in (2, 1, 1)]
        with _Largest() as largest:
            triton_routed.forward(moba(2, 16), *x)
        lists = [t for name, t in handed.items() if name not in "qkvo"]
        sizes.append(sum(t.untyped_storage().nbytes() for t in lists))
        most.append(largest.bytes)
    assert sizes[1] <= 2.5 * sizes[0]  # a byte a query and block would be four times as many
    assert most[1] <= 2.5 * most[0]
    assert most[1] < 2 * 2048 * 128, "a byte a query and block"


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
