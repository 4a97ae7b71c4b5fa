"""What the Triton lowering takes and refuses, and where its files go. Nothing runs here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from sympy import Integer

from rewriter.errors import LoweringError, ShapeError
from rewriter.kernels import triton_launch
from rewriter.kernels.triton_cache import written
from rewriter.kernels.triton_codegen import KernelSpec, Tile, codegen
from rewriter.kernels.triton_launch import forward, supports
from rewriter.kernels.triton_source import Source
from rewriter.lowering import Shapes
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit
from rewriter.symbols import Trunc, k, q, s
from triton_specs import SPECS

SHAPES = Shapes("cuda", torch.float16, 2, 4, 2, 33, 33, 64, 64, grad=False)


@pytest.fixture
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard asks for the compute capability only."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_launch, "capability_of", lambda device: 90)


@pytest.mark.usefixtures("_a_gpu")
@pytest.mark.parametrize("name", SPECS)
def test_every_named_spec_is_taken(name: str) -> None:
    assert supports(SPECS[name], SHAPES) is None


@dataclass(frozen=True)
class Refused:
    reason: str
    spec: SoftmaxSpec = SPECS["plain"]
    shapes: Shapes = SHAPES


REFUSALS = [
    Refused(
        "Triton kernels need a GPU, and the tensors are on cpu",
        shapes=replace(SHAPES, device="cpu"),
    ),
    Refused(
        "float64 has no kernel; float16, bfloat16 and float32 have",
        shapes=replace(SHAPES, dtype=torch.float64),
    ),
    Refused("head dim 320 is above 256", shapes=replace(SHAPES, value_dim=320)),
    Refused("there are no keys", shapes=replace(SHAPES, kv_len=0)),
    Refused(
        "x is float64, which the kernels do not read",
        SoftmaxSpec(tensors=(TensorArg("x", "float64", 1),)),
    ),
    Refused(
        "the factor of a group depends on the key: k",
        SoftmaxSpec(edit=Edit(Integer(0), (k,))),
    ),
    Refused(
        "a value is rounded to an integer that depends on more than q, k or k - q alone, "
        "so that a kernel and torch may round it differently",
        SoftmaxSpec(score=s + Trunc(0.5 * k * q)),
    ),
]


@pytest.mark.usefixtures("_a_gpu")
@pytest.mark.parametrize("case", REFUSALS, ids=lambda c: c.reason[:40])
def test_what_it_cannot_do_is_refused_with_the_reason(case: Refused) -> None:
    assert supports(case.spec, case.shapes) == case.reason


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_launch, "capability_of", lambda device: 75)
    reason = supports(SPECS["plain"], SHAPES)
    assert reason == "the GPU has compute capability 7.5, the kernels need 8.0"


def test_a_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: None)
    assert supports(SPECS["plain"], SHAPES) == "triton is not installed"


def test_the_interpreter_takes_cpu_tensors_but_not_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on_cpu = replace(SHAPES, device="cpu")
    assert supports(SPECS["plain"], on_cpu) is None
    reason = supports(SPECS["plain"], replace(on_cpu, dtype=torch.bfloat16))
    assert reason == "Triton's interpreter cannot multiply bfloat16"


# --- tensors that do not fit ----------------------------------------------------------------------


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


def test_q_k_and_v_have_to_fit() -> None:
    with pytest.raises(ShapeError, match=r"expected k of shape \[B, Hkv, M, D\], got \(2, 5, 8\)"):
        forward(SPECS["plain"], *tensors((1, 2, 5, 8), (2, 5, 8), (1, 2, 5, 8)))
    with pytest.raises(ShapeError, match="do not fit together"):
        forward(SPECS["plain"], *tensors((1, 3, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)))
    wide = torch.zeros(1, 2, 5, 8, dtype=torch.float64)
    with pytest.raises(ShapeError, match="they have to agree"):
        forward(SPECS["plain"], *tensors((1, 2, 5, 8), (1, 2, 5, 8)), wide)


@pytest.mark.parametrize(
    ("pad", "reason"),
    [
        (torch.ones(2, 4, dtype=torch.bool), r"pad of shape \(2, 4\) is read at 5 places"),
        (torch.ones(2, 5), "pad: expected bool of rank 2 on cpu, got torch.float32 of rank 2"),
        (torch.ones(5, dtype=torch.bool), "got torch.bool of rank 1"),
    ],
)
def test_a_tensor_that_a_formula_reads_has_to_fit(pad: torch.Tensor, reason: str) -> None:
    qkv = tensors((2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    with pytest.raises(ShapeError, match=reason):
        forward(SPECS["padding"], *qkv, [pad])


def test_no_queries_give_an_empty_output() -> None:
    out = forward(SPECS["plain"], *tensors((2, 2, 0, 8), (2, 2, 5, 8), (2, 2, 5, 3)))
    assert out.shape == (2, 2, 0, 3)


# --- files ----------------------------------------------------------------------------------------


def source() -> Source:
    return codegen(KernelSpec(SPECS["causal"], 64, 64, "bfloat16", Tile(64, 64, 4, 2)))


def test_the_file_is_written_whole_and_mended(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    path = written(source(), folder)
    assert path.read_text(encoding="utf-8") == source().text
    path.write_text("something else")
    assert written(source(), folder).read_text(encoding="utf-8") == source().text
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LoweringError, match=r"No space left on device.*set REWRITER_CACHE"):
        written(source(), tmp_path)
    assert list(tmp_path.iterdir()) == []
