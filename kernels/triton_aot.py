"""What Triton's compiler is told of the arguments of a kernel, and what it says that one takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from rewriter.errors import LoweringError

__all__ = ["ALIGNED", "POINTERS", "Resources", "usage_of"]

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
