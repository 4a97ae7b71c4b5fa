"""What Triton's compiler is told of the arguments of a kernel, and what it says that one takes."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rewriter.errors import LoweringError

__all__ = ["ALIGNED", "POINTERS", "Resources", "assembler_log", "usage_of"]

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
    spilled_bytes: int
    """What a thread stores to local memory because registers do not suffice."""
    shared_bytes: int
    """Shared memory of a program."""


@contextlib.contextmanager
def assembler_log() -> Iterator[io.StringIO]:
    """What ptxas says while Triton compiles inside; Triton's cache is not asked."""
    from triton import knobs

    text = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(text):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        yield text


def usage_of(log: str) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills, from the log of the assembler.

    The stack that a finished file names is no measure: it may have some where nothing spills.
    """
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores", log)
    if used is None or spilled is None:
        raise LoweringError(f"ptxas reported no usage: {log.strip()}")
    return int(used[1]), int(spilled[1])
