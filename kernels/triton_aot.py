"""Compiles generated kernels ahead of time, with no GPU, and reads what they need of one.

Triton must have been imported without TRITON_INTERPRET: a process either interprets or compiles.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.errors import LoweringError
from rewriter.kernels.triton_cache import import_kernel
from rewriter.kernels.triton_codegen import Argument, KernelSpec, arguments

__all__ = ["ALIGNED", "POINTERS", "Resources", "compile_kernel", "usage_of"]

POINTERS = {
    "float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "bool": "*i1",
    "int8": "*i8", "uint8": "*u8", "int16": "*i16", "int32": "*i32", "int64": "*i64",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes."""

    registers: int
    """32-bit registers a thread."""
    stack_bytes: int
    """Local memory a thread: not 0 if registers spill."""
    shared_bytes: int
    """Shared memory of a program."""


def compile_kernel(kernel: KernelSpec, capability: int, folder: Path | None = None) -> Resources:
    """Compiles the kernel as a call with contiguous, aligned tensors would.

    Args:
        kernel: what to compile.
        capability: compute capability times ten: 80, 90, ...
        folder: where the source is written; default the cache folder.

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

    function, args = import_kernel(kernel, folder), arguments(kernel)
    signature: dict[str, str] = {a.name: _type(a, kernel) for a in args}
    constants: dict[str, Any] = {a.name: 1 for a in args if signature[a.name] == "constexpr"}
    for parameter in function.params[len(args) :]:
        signature[parameter.name] = "constexpr"
        constants[parameter.name] = parameter.default
    aligned = [
        i for i, a in enumerate(args) if a.kind in ("tensor", "stride") and a.name not in constants
    ]
    source = ASTSource(
        function, signature, constexprs=constants, attrs={(i,): ALIGNED for i in aligned}
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": kernel.tile.warps,
            "num_stages": kernel.tile.stages,
            "enable_fp_fusion": True,
        },
    )
    registers, stack = usage_of(compiled.asm["cubin"])
    return Resources(registers, stack, compiled.metadata.shared)


def _type(argument: Argument, kernel: KernelSpec) -> str:
    """The type of an argument in Triton's signature."""
    if argument.kind != "tensor":
        contiguous = argument.kind == "stride" and argument.of in "qkvo" and argument.dim == 3
        return "constexpr" if contiguous else "i32"
    if argument.of.startswith("t:"):
        return POINTERS[kernel.lowered[0].tensor(argument.of[2:]).dtype]
    return "*fp32" if argument.of == "lse" else POINTERS[kernel.dtype]


def usage_of(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of the kernel in a compiled file, read by cuobjdump."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise LoweringError(f"cuobjdump reported no usage: {text.strip()}")
    return int(found[1]), int(found[2])
