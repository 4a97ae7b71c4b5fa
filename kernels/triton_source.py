"""Generated Triton files, of one kernel or several: their text, launched, compiled ahead of time.

Text needs no Triton: it is imported where a kernel is launched or compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.kernels.triton_aot import ALIGNED, POINTERS, Resources, assembler_log, usage_of
from rewriter.kernels.triton_cache import imported
from rewriter.kernels.triton_code import HELPERS
from rewriter.kernels.triton_lines import constant_lines
from rewriter.kernels.triton_loads import Loads, Place, identifiers
from rewriter.spec import Spec
from rewriter.symbols import Formula

__all__ = [
    "Argument",
    "Formulas",
    "Function",
    "Source",
    "Written",
    "arguments_of",
    "compile_function",
    "file_of",
    "file_text",
    "function_text",
    "launch",
]


@dataclass(frozen=True)
class Argument:
    """One run-time argument of a generated kernel."""

    name: str
    kind: Literal["tensor", "stride", "extent", "size"]
    of: str
    """What a call knows the tensor or the size by; `t:` and the name for a tensor of the spec."""
    dim: int = 0


@dataclass(frozen=True)
class Function:
    """One kernel of a file."""

    name: str
    arguments: tuple[Argument, ...]
    constants: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    registers: int = 0
    """What a thread may have; 0 leaves that to the assembler, which rather spills a few than keep
    another program from the processor."""

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True)
class Source:
    """A generated file."""

    stem: str
    """What the file is called, before its digest."""
    text: str
    functions: tuple[Function, ...]

    def __hash__(self) -> int:
        return hash(self.text)  # which Python keeps: a file is looked up at every call

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that name the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def function(self, name: str) -> Function:
        return next(f for f in self.functions if f.name == name)


# --- text -----------------------------------------------------------------------------------------


class Formulas:
    """Prints the formulas of one kernel, and knows what has to be handed over for them.

    Attributes:
        loads: the lines that load what the formulas read.
    """

    def __init__(self, spec: Spec, taken: Sequence[str] = ()) -> None:
        """`taken`: what the kernel writes behind `b_` or `n_` besides what every kernel does."""
        self.spec = spec
        self.sizes = {n: f"n_{ident}" for n, ident in identifiers(spec.sizes, taken).items()}
        self.loads = Loads({t.name: t.dtype for t in spec.tensors}, self.sizes, taken)
        self._printed: list[Formula] = []

    def text(self, formula: Formula, place: Place = "tile") -> str:
        """The formula as a Triton expression."""
        self._printed.append(formula)
        return self.loads.text(formula, place)

    @property
    def once(self) -> list[str]:
        """The lines that stand before a loop over keys."""
        return ["# what the formulas read", *self.loads.once, ""] if self.loads.once else []

    def arguments(self, own: Sequence[Argument], numbers: str) -> tuple[Argument, ...]:
        """The arguments of the kernel, given those of its own; see `arguments_of`."""
        return arguments_of(self.spec, self._printed, self.loads, own, numbers)


def arguments_of(
    spec: Spec, formulas: Iterable[Formula], loads: Loads, own: Sequence[Argument], numbers: str
) -> tuple[Argument, ...]:
    """The arguments of a kernel: its own tensors, those of the formulas, strides, extents that
    bound an index, sizes.

    Args:
        formulas: those that the kernel computes.
        loads: what their printing asked for.
        own: tensors and strides of the kernel itself.
        numbers: the sizes that it uses itself, a letter each.
    """
    formulas = list(formulas)
    names = {r.tensor for f in formulas for r in sym.reads(f)}
    read = [(t, loads.idents[t.name]) for t in spec.tensors if t.name in names]
    args = [a for a in own if a.kind == "tensor"]
    args += [Argument(f"t_{ident}", "tensor", f"t:{t.name}") for t, ident in read]
    args += [a for a in own if a.kind != "tensor"]
    for t, ident in read:
        used = [dim for dim in range(t.rank) if (t.name, dim) in loads.strides]
        args += [Argument(f"stride_{ident}_{d}", "stride", f"t:{t.name}", d) for d in used]
    for name, dim in loads.extents:
        args.append(Argument(f"size_{loads.idents[name]}_{dim}", "extent", f"t:{name}", dim))
    symbols = {str(x) for f in formulas for x in f.free_symbols}
    wanted = [n for n in "BHGLM" if n in numbers or n in symbols]
    wanted += [n for n in numbers if n not in "BHGLM"]
    args += [Argument(n, "size", n) for n in wanted]
    return (*args, *(Argument(loads.sizes[n], "size", n) for n in loads.sizes if n in symbols))


def function_text(function: Function, body: Sequence[str], *, helpers: Iterable[str] = ()) -> str:
    """The definition of a kernel, with the helpers that it calls in front."""
    changing = ", ".join(f'"{a.name}"' for a in function.arguments if a.kind in ("size", "extent"))
    parameters = [f"{a.name}," for a in function.arguments]
    parameters += [f"{name}: tl.constexpr = {value}," for name, value in function.constants]
    lines = [
        *(HELPERS[name] + "\n" for name in sorted(helpers)),
        f"@triton.jit(do_not_specialize=[{changing}])",
        f"def {function.name}(",
        *(f"    {line}" for line in parameters),
        "):",
        *(f"    {line}".rstrip() for line in body),
    ]
    return "\n".join(lines) + "\n"


def file_text(header: Sequence[str], constants: Sequence[str], kernels: Sequence[str]) -> str:
    """The whole file: what it computes, imports, constants, kernels."""
    imports = ["import triton", "import triton.language as tl"]
    top = [*imports, "", *constants] if constants else imports
    docstring = "\n".join(header).replace("\\", "/").replace('"', "'")  # names come from models
    return "\n".join([f'"""{docstring}\n"""\n', "\n".join(top) + "\n\n", "\n\n".join(kernels)])


@dataclass(frozen=True)
class Written:
    """A kernel of a file, with its lines and the helpers that these call."""

    function: Function
    body: Sequence[str]
    helpers: Iterable[str]


def file_of(stem: str, header: Sequence[str], written: Sequence[Written]) -> Source:
    """The file of some kernels; helpers and constants stand in it once."""
    helpers = sorted({name for w in written for name in w.helpers})
    texts = [
        function_text(w.function, w.body, helpers=() if n else helpers)
        for n, w in enumerate(written)
    ]
    constants = constant_lines(line for w in written for line in w.body)
    text = file_text(header, constants, texts)
    return Source(stem, text, tuple(w.function for w in written))


# --- running --------------------------------------------------------------------------------------


def launch(
    source: Source,
    name: str,
    programs: int,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int],
) -> None:
    """Runs one kernel of a file.

    Args:
        tensors: by `Argument.of`.
        numbers: the sizes, by name.
    """
    function = source.function(name)
    values = [_value(a, tensors, numbers) for a in function.arguments]
    first = next(iter(tensors.values()))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        getattr(imported(source), name)[(programs,)](*values, **function.options)


def _value(
    argument: Argument, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]
) -> Tensor | int:
    match argument.kind:
        case "tensor":
            return tensors[argument.of]
        case "stride":
            return tensors[argument.of].stride(argument.dim)
        case "extent":
            return tensors[argument.of].shape[argument.dim]
        case "size":
            return numbers[argument.of]


# --- compiling ahead of time ----------------------------------------------------------------------


def compile_function(
    source: Source,
    name: str,
    dtypes: Mapping[str, str],
    capability: int,
    folder: Path | None = None,
) -> Resources:
    """Compiles one kernel as a call with contiguous, aligned tensors would.

    Args:
        dtypes: of each tensor, by `Argument.of`; the last dimension of the tensors with four is
            contiguous.
        capability: compute capability times ten: 80, 90, ...

    Raises:
        LoweringError: if Triton is interpreting in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise LoweringError(
            "Triton interprets in this process (TRITON_INTERPRET=1) and cannot compile"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = source.function(name)
    kernel = getattr(imported(source, folder), name)
    signature, constants, aligned = {}, {}, []
    for i, a in enumerate(function.arguments):
        signature[a.name] = POINTERS[dtypes[a.of]] if a.kind == "tensor" else "i32"
        if a.kind == "stride" and a.name.endswith(("_d", "_e")):
            signature[a.name], constants[a.name] = "constexpr", 1
        elif a.kind in ("tensor", "stride"):
            aligned.append(i)
    for constant, value in function.constants:
        signature[constant], constants[constant] = "constexpr", value
    hints = {(i,): ALIGNED for i in aligned}
    code = ASTSource(kernel, signature, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", capability, 32)
    with assembler_log() as log:
        compiled = triton.compile(code, target=target, options=function.options)
    return Resources(*usage_of(log.getvalue()), compiled.metadata.shared)
