"""From a generated file to a module: written to a cache folder, imported.

The files lie in `$REWRITER_CACHE/kernels`, else in `~/.cache/rewriter/kernels`, named by their
text. They are for reading; what runs is always the text that this process generated.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.cache import cache_folder, write_atomically
from rewriter.errors import LoweringError

if TYPE_CHECKING:
    from rewriter.kernels.triton_source import Source

__all__ = ["imported", "written"]


@lru_cache(maxsize=1024)
def imported(source: Source, folder: Path | None = None) -> Any:
    """The file as a module; its attributes are Triton functions."""
    path = written(source, folder)
    found = importlib.util.spec_from_file_location(f"rewriter_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def written(source: Source, folder: Path | None = None) -> Path:
    """The file, written if it is not there yet.

    Args:
        folder: where; default the cache folder.

    Raises:
        LoweringError: if the folder cannot be written.
    """
    folder = folder or cache_folder("kernels")
    path = folder / f"{source.stem}_{source.digest}.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != source.text:
            write_atomically(path, source.text)
    except OSError as error:
        raise LoweringError(
            f"the kernel could not be written to {folder} ({error.strerror}); "
            "set REWRITER_CACHE to a folder that can be written"
        ) from error
    return path
