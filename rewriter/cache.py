"""Files that outlive a process: in `$REWRITER_CACHE`, else in `~/.cache/rewriter`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "write_atomically"]


def cache_folder(name: str) -> Path:
    root = os.environ.get("REWRITER_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "rewriter") / name


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
