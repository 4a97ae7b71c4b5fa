"""From the text of a generated kernel to a function: a file in a cache folder, imported.

The files lie in `$REWRITER_CACHE/kernels`, else in `~/.cache/rewriter/kernels`, one a kernel, named
by its text. They are for reading; what runs is always the text that this process generated.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewriter.errors import LoweringError
from rewriter.kernels.triton_codegen import KERNEL, KernelSpec, codegen

__all__ = ["cache_folder", "import_kernel", "write_atomically", "write_kernel"]


def write_kernel(kernel: KernelSpec, folder: Path | None = None) -> Path:
    """The file with the source of the kernel, written if it is not there yet.

    Raises:
        LoweringError: if the folder cannot be written.
    """
    folder = folder or cache_folder()
    path, text = folder / f"softmax_fwd_{kernel.digest}.py", codegen(kernel)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
    except OSError as error:
        raise LoweringError(
            f"the kernel could not be written to {folder} ({error.strerror}); "
            "set REWRITER_CACHE to a folder that can be written"
        ) from error
    return path


def write_atomically(path: Path, text: str) -> None:
    """Others see the old file or the whole new one, and nothing is left behind by a full disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    root = os.environ.get("REWRITER_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "rewriter") / "kernels"


@lru_cache(maxsize=1024)
def import_kernel(kernel: KernelSpec, folder: Path | None = None) -> Any:
    """The generated kernel as a Triton function."""
    path = write_kernel(kernel, folder)
    module_spec = importlib.util.spec_from_file_location(f"rewriter_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return getattr(module, KERNEL)
