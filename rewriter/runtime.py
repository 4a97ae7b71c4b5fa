"""ONNX files in ONNX Runtime on the CPU: running, inputs of other shapes, agreement with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import ExportError

__all__ = [
    "TOLERANCE",
    "Check",
    "compare",
    "free_symbols",
    "other_shapes",
    "reason_of",
    "resized",
    "run_file",
]

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2}
"""Largest difference that is allowed, as a part of the largest value of the output."""


@dataclass(frozen=True)
class Check:
    """One comparison of the file in ONNX Runtime with the model in torch."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of each input."""
    error: float
    """Largest difference of any output, as a part of that output's largest value."""


def run_file(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of an ONNX file by name. Inputs that the file does not take are left out.

    Raises:
        ExportError: if ONNX Runtime cannot load the file or run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        names = [x.name for x in session.get_outputs()]
        feed = {x.name: inputs[x.name].detach().cpu().numpy() for x in session.get_inputs()}
        return {
            n: torch.from_numpy(x) for n, x in zip(names, session.run(names, feed), strict=True)
        }
    except Exception as error:
        # ONNX Runtime raises many classes of its own
        raise ExportError(
            f"ONNX Runtime cannot run the exported file: {reason_of(error)}"
        ) from error


def compare(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float | None, where: str
) -> float:
    """The largest relative difference of any output.

    Raises:
        ExportError: if it is larger than the tolerance, or if shapes, NaN or infinities differ.
    """
    worst = 0.0
    for name, want in expected.items():
        got, want = found[name], want.detach().cpu()
        if got.shape != want.shape:
            raise ExportError(
                f"{name} has shape {tuple(got.shape)} in ONNX Runtime "
                f"and {tuple(want.shape)} in torch, at {where}"
            )
        error = _difference(got, want)
        allowed = tolerance if tolerance is not None else TOLERANCE.get(want.dtype, 0.0)
        if not error <= allowed:
            raise ExportError(
                f"ONNX Runtime and torch differ by {error:.1e} of the largest value of {name}, "
                f"at {where}; "
                f"{allowed:.1e} is allowed"
            )
        worst = max(worst, error)
    return worst


def _difference(got: Tensor, want: Tensor) -> float:
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else torch.inf
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(
        got[~finite].isnan(), want[~finite].isnan()
    ):
        return torch.inf
    if not finite.any():
        return 0.0
    scale = float(want[finite].abs().max()) or 1.0
    return float((got[finite] - want[finite]).abs().max()) / scale


def resized(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor in another shape: repeated from its start where it grows, cut where it shrinks."""
    for axis, size in enumerate(shape):
        if size != x.shape[axis]:
            x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x


def other_shapes(
    tensors: Sequence[Tensor], shapes: Sequence[Sequence[Any]]
) -> Iterator[list[Tensor]]:
    """The tensors in other shapes that the graph claims to take; a model may still refuse some.

    Args:
        tensors: the example inputs.
        shapes: their shapes in the graph, with symbolic integers where a dimension may change.
    """
    hints = free_symbols(shapes)
    rows = {s[0].node.expr for s in shapes if len(s) and isinstance(s[0], torch.SymInt)}
    rules: list[Callable[[Any, int], int]] = [
        # doubling keeps every relation between lengths that is a sum or a multiple
        lambda symbol, n: 2 * n,
        lambda symbol, n: n + 1,
        lambda symbol, n: 2 * n if symbol in rows else n,
        lambda symbol, n: n if symbol in rows else 2 * n,
    ]
    for rule in rules:
        sizes = {symbol: rule(symbol, n) for symbol, n in hints.items()}
        if sizes == hints:
            continue
        yield [
            resized(x, [_evaluated(n, sizes) for n in shape])
            for x, shape in zip(tensors, shapes, strict=True)
        ]


def free_symbols(shapes: Sequence[Sequence[Any]]) -> dict[Any, int]:
    """Each symbol in the shapes, and its value at the example."""
    hints: dict[Any, int] = {}
    for size in (n for shape in shapes for n in shape if isinstance(n, torch.SymInt)):
        values = size.node.shape_env.backed_var_to_val
        hints |= {symbol: int(values[symbol]) for symbol in size.node.expr.free_symbols}
    return hints


def _evaluated(size: Any, sizes: Mapping[Any, int]) -> int:
    return int(size.node.expr.xreplace(sizes)) if isinstance(size, torch.SymInt) else int(size)


def reason_of(error: BaseException) -> str:
    """The first sentence or two of what went wrong at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
