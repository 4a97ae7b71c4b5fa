"""Models to ONNX files with dynamic batch and length.

A file that ONNX Runtime did not run, or on which it does not agree with torch, is not exported.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture import from_exported, uncompiled
from rewriter.errors import ExportError, InputError, RewriterError
from rewriter.export_given import GivenCall, given_nodes, without_unused
from rewriter.export_state import (
    StateCall,
    check_in_pieces,
    states_of,
    without_caches,
)
from rewriter.isolation import kept_buffers
from rewriter.kernels.onnx_attention import inline_attention
from rewriter.kernels.onnx_state import States
from rewriter.optimize import report_of, requests_of, rewrite_graph
from rewriter.program import (
    Call,
    axis_names,
    broken_guard,
    inference,
    program_of,
    quiet,
    shapes_of,
    widened,
)
from rewriter.registry import read_requests
from rewriter.runtime import Check, compare, free_symbols, other_shapes, reason_of, run_file
from rewriter.trees import Tree

__all__ = ["ExportReport", "export_onnx"]

OPSET = 20
"""The default: the first with `Gelu`. From 23 on torch writes `Attention`, which ONNX Runtime 1.32
runs more slowly on a CPU than the operations that it stands for."""

INLINE_BYTES = 1 << 30
"""Weights above this size go into a second file, `<name>.data`, beside the first."""

OTHER_SHAPES = 2
"""How many shapes besides the example's are tried."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how well it agrees with torch."""

    path: str
    opset: int
    inputs: dict[str, tuple[int | str, ...]]
    """Shape of each input; a name stands for a size that may change."""
    outputs: dict[str, tuple[int | str, ...]]
    sites: int
    """Attentions that were understood, and written in primitive operations."""
    rewritten: int
    """Those of them that passes made compute something else."""
    nodes: int
    bytes: int
    """Size of the file, its weights included."""
    checks: tuple[Check, ...]
    """On the given inputs first, then at shapes that were not used for the export."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: opset {self.opset}, {self.nodes} nodes, {self.bytes / 1e6:.1f} MB, "
            f"{self.sites} attentions, {self.rewritten} of them rewritten"
        ]
        lines += [f"  input  {name} {_shape_text(dims)}" for name, dims in self.inputs.items()]
        lines += [f"  output {name} {_shape_text(dims)}" for name, dims in self.outputs.items()]
        for check in self.checks:
            where = _where(check.shapes)
            lines.append(f"  ONNX Runtime differs from torch by {check.error:.1e} at {where}")
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


def export_onnx(
    model: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    dynamic: bool = True,
    opset: int | None = None,
    check_inputs: Sequence[Any] | None = None,
    overwrite: bool = False,
    tolerance: float | None = None,
    state: bool = False,
) -> ExportReport:
    """Writes the model to an ONNX file that has run in ONNX Runtime and agreed with torch.

    The model is exported in evaluation mode, with its passes applied. Tensors inside the inputs,
    those of a key-value cache included, become inputs of the file. A dimension that the model does
    not fix is dynamic: batch, length, and the length of a cache.

    Args:
        model: a module, optimized or not.
        inputs: what one call takes: a mapping of keyword arguments, a tuple of positional ones, or
            one tensor.
        path: the file to write. Weights of more than 1 GiB go into `<path>.data` beside it.
        dynamic: let dimensions change; else the file takes the shapes of `inputs` alone.
        opset: version of the ONNX operators; default 20.
        check_inputs: further inputs to compare at. If not given, the example is resized to other
            batches and lengths.
        overwrite: replace a file that exists.
        tolerance: largest difference from torch, as a part of the largest value of an output.
            Default 1e-4, in float16 2e-2.
        state: the file hands states on, as input `past_state.<site>` and output
            `present_state.<site>`. That of causal linear attention (0 before the first token)
            stands in the place of cached keys and values. A model that numbers its tokens has to be
            told where they stand: by a cache of other sites, an attention mask, or positions among
            the inputs. Of attention that chooses blocks of cached keys by query, it is the sum of
            the keys of each block (of no block before the first token). What passes decide of keys
            by the labels of a prompt is `past_state.<site>.<tensor>`; `labels`, those of the whole
            prompt, are an input of every call, and the prompt is the first one.

    Raises:
        InputError: if the path exists or cannot be written to, or inputs do not fit the model.
        ExportError: if torch cannot export the model, or if ONNX Runtime cannot run the file or
            does not agree with torch. Nothing is left behind.
    """
    path = _checked_path(Path(path), overwrite)
    _check_dtypes(model)
    with inference(model):
        if requests_of(model) and not report_of(model).graphs:  # passes add parameters in a call
            first = Call(model, inputs)
            with kept_buffers(model), suppress(InputError):  # a cache may be nobody's, for example
                first(first.tree.tensors)
        call, others = _calls(model, inputs, check_inputs or (), state, dynamic)
        example = widened(call) if dynamic else call.tree.tensors
        program, outputs = program_of(call, example, dynamic)
        work = _Work(call, outputs, tolerance)
        trials: list[Sequence[Tensor]] = [x.tree.tensors for x in (call, *others)]
        notes = _fixed_rows(call, shapes_of(program)) if dynamic else ()
        if dynamic and check_inputs is None:
            more, broken = _trials(call, example, program)
            trials, notes = [*trials, *more], (*notes, *broken)
        written = _rewrite(call, program, outputs, state)
        onnx = _translated(call, program, outputs, opset or OPSET, written.states)
        with _directory(path) as directory:
            file = directory / path.name
            _save(onnx, file)
            checks = tuple(work.check(file, tensors) for tensors in trials)
            size = sum(f.stat().st_size for f in directory.iterdir())
            _move(directory, path)
    return ExportReport(
        path=str(path),
        opset=int(onnx.model.opset_imports[""]),
        inputs={x.name: _dims(x) for x in onnx.model.graph.inputs},
        outputs={x.name: _dims(x) for x in onnx.model.graph.outputs},
        sites=written.sites,
        rewritten=written.changed,
        nodes=len(onnx.model.graph),
        bytes=size,
        checks=checks,
        notes=(*notes, *written.kept),
    )


def _calls(
    model: nn.Module, inputs: Any, check_inputs: Sequence[Any], state: bool, dynamic: bool
) -> tuple[GivenCall, list[GivenCall]]:
    """The call to export and those to compare at, with the states that they take."""
    left: dict[str, Tensor] = {}
    if state:  # a first export says which there are
        first = StateCall(model, inputs, {})
        example = widened(first) if dynamic else first.tree.tensors
        program, outputs = program_of(first, example, dynamic)
        found = _rewrite(first, program, outputs, state).states.present
        left = {name: node.meta["val"] for name, node in found.items()}
        if not left:
            raise InputError(
                "state=True, and no site of this model has a state to hand on: causal linear "
                "attention has one, and attention that chooses among blocks of cached keys, if the "
                "inputs hold a cache; leave it out, or rewrite sites with such a pass"
            )

    def made(given: Any, like: GivenCall | None = None) -> GivenCall:
        return StateCall(model, given, left, like) if state else GivenCall(model, given, like)

    call = made(inputs)
    others = [made(x, call) for x in check_inputs]
    _check_alike(call, others)
    return call, others


@dataclass(frozen=True)
class _Written:
    """What was done to the attentions of a program."""

    sites: int
    """Those that are written in operations of ONNX."""
    changed: int
    """Those of them that compute something else than before."""
    kept: tuple[str, ...]
    """Why the others stay as they were."""
    states: States


def _rewrite(call: GivenCall, program: Any, outputs: Sequence[str], state: bool) -> _Written:
    """Writes each attention in operations of ONNX, the passes of an optimized model applied.

    Sites that no pass selects get the exact form too: below opset 23 torch's own form of a boolean
    mask gives the mean of v where a query sees no key, and torch gives 0.
    """
    requests = (*requests_of(call.model), *read_requests(["fuse(from_scores=0)"]))
    captured = from_exported(program)
    captured.given |= given_nodes(call, program)
    states = states_of(captured.given, program, outputs)
    if state:
        captured.past, captured.present = states.past, {}
    # the dense form takes every spec, whatever the kernels of this machine take
    reports = rewrite_graph(captured, call.model, requests, "reference")
    for name, node in (captured.present or {}).items():
        states.hand_on(name, node)
    count = inline_attention(program.graph_module, states if state else None)
    for node in program.graph.nodes:
        value = getattr(program.graph_module, str(node.target), None)
        if node.op == "get_attr" and isinstance(value, Tensor):  # of programs that passes add
            program.constants[node.target] = value
        if node.target is torch.ops.aten._is_all_true.default:  # has no ONNX form, and this has
            node.target = torch.ops.aten.all.default
    changed = sum(r.after not in (None, r.site.spec) for r in reports)
    kept = [r for r in reports if r.decision == "kept"]
    why = tuple(f"{r.site.name} is as torch exports it: {r.reason}" for r in kept)
    return _Written(count, changed, why, states)


# --- agreement ---


@dataclass(frozen=True)
class _Work:
    """What each check of a file needs."""

    call: GivenCall
    outputs: tuple[str, ...]
    tolerance: float | None

    def check(self, file: Path, tensors: Sequence[Tensor]) -> Check:
        given = dict(zip(self.call.tree.names, tensors, strict=True))
        shapes = {name: tuple(x.shape) for name, x in given.items()}
        where = _where(shapes)
        try:
            if isinstance(self.call, StateCall):
                rest = (self.outputs, file, tensors, self.tolerance, where)
                return Check(shapes, check_in_pieces(self.call, *rest))
            expected = self.call(tensors)
        except RewriterError:
            raise
        except Exception as error:
            raise ExportError(
                f"torch cannot run the model at {where}: {reason_of(error)}"
            ) from error
        wanted = dict(zip(self.outputs, expected.tensors, strict=True))
        return Check(shapes, compare(run_file(file, given), wanted, self.tolerance, where))


def _trials(
    call: Call, example: Sequence[Tensor], program: Any
) -> tuple[list[Sequence[Tensor]], tuple[str, ...]]:
    """Inputs of other shapes that the model takes, and at which sizes the graph does not hold."""
    shapes = shapes_of(program)
    trials: list[Sequence[Tensor]] = []
    broken: dict[str, None] = {}
    refused = ""
    for tensors in other_shapes(example, shapes):
        try:
            with uncompiled(call.model):
                call(tensors)
        except Exception as error:  # the model alone knows what it takes
            refused = reason_of(error)
            continue
        guard = broken_guard(program, tensors)
        if guard:
            refused = f"torch.export took it for granted that {guard}"
            broken[f"the file holds only at sizes where {guard}"] = None
            continue
        trials.append(tensors)
        if len(trials) == OTHER_SHAPES:
            break
    if free_symbols(shapes) and not trials:
        raise ExportError(
            f"no other shape was found to check at: {refused}; give check_inputs, or dynamic=False"
        )
    return trials, tuple(broken)


def _check_alike(call: Call, others: Sequence[Call]) -> None:
    for other in others:
        if other.tree.names != call.tree.names:
            raise InputError(
                f"check_inputs hold {', '.join(other.tree.names)}; "
                f"the inputs hold {', '.join(call.tree.names)}"
            )


def _fixed_rows(call: Call, shapes: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    return tuple(
        f"{name} is fixed at {shape[0]} rows: the model gave torch.export no other choice"
        for name, shape in zip(call.tree.names, shapes, strict=True)
        if len(shape) > 1 and isinstance(shape[0], int)
    )


def _where(shapes: dict[str, tuple[int, ...]]) -> str:
    text = ", ".join(f"{name} {_shape_text(dims)}" for name, dims in list(shapes.items())[:3])
    return text if len(shapes) <= 3 else f"{text}, ..."


def _shape_text(dims: Sequence[int | str]) -> str:
    return f"[{', '.join(str(d) for d in dims)}]"


# --- the file ---


def _translated(
    call: GivenCall, program: Any, outputs: Sequence[str], opset: int, states: States
) -> Any:
    """The ONNX form of the program, with the inputs and outputs that are needed."""
    onnx = _translate(program, call.tree, outputs, opset)
    without_caches(call, program, states, onnx)
    without_unused(call, onnx)
    return onnx


def _translate(program: Any, tree: Tree, outputs: Sequence[str], opset: int) -> Any:
    """The ONNX form of the program, its inputs, outputs and axes named."""
    import onnx_ir

    with quiet():
        try:
            onnx: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(tree.names),
                output_names=list(outputs),
                verbose=False,
            )
        except Exception as error:
            raise ExportError(
                f"torch has no ONNX form of this model: {reason_of(error)}"
            ) from error
    onnx.rename_axes(axis_names(tree, shapes_of(program)))
    for value in (*onnx.model.graph.inputs, *onnx.model.graph.outputs):
        value.shape = onnx_ir.Shape(_dims(value))
    return onnx


def _dims(value: Any) -> tuple[int | str, ...]:
    """The shape as numbers and names; torch writes a size that it fixed itself as a name, "3"."""
    names = (str(getattr(d, "value", d)) for d in value.shape or ())
    return tuple(int(d) if d.isdigit() else d for d in names)


def _check_dtypes(model: nn.Module) -> None:
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.is_floating_point() and x.dtype not in (torch.float32, torch.float64, torch.float16):
            raise ExportError(
                f"{name} is {x.dtype}, which ONNX Runtime does not run on a CPU; "
                "call model.float() before the export"
            )


def _checked_path(path: Path, overwrite: bool) -> Path:
    for existing in (path, _data(path)):
        if existing.is_dir():
            raise InputError(f"{existing} is a directory; give the path of a file")
        if existing.exists() and not overwrite:
            raise InputError(f"{existing} exists; give another path, or overwrite=True")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a directory; make it first")
    return path


def _data(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


@contextmanager
def _directory(path: Path) -> Iterator[Path]:
    """A directory beside the path that is gone afterwards, whatever happens."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
            yield Path(name)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error


def _save(onnx: Any, file: Path) -> None:
    weights = (x.const_value for x in onnx.model.graph.initializers.values())
    size = sum(w.nbytes for w in weights if w is not None)
    with quiet():
        onnx.save(file, external_data=size > INLINE_BYTES)


def _move(directory: Path, path: Path) -> None:
    """Puts checked files in their place; the model last, so that it never lacks its weights."""
    data = _data(directory / path.name)
    if data.exists():
        os.replace(data, _data(path))
    else:
        _data(path).unlink(missing_ok=True)  # weights of the file that is replaced
    os.replace(directory / path.name, path)
