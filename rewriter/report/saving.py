"""Reports on disk: whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewriter.errors import InputError

__all__ = ["check_target", "save_report"]

_SUFFIXES = (".json", ".html")


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path, if a report can be saved there.

    Raises:
        InputError: another suffix than `.json` and `.html`, or no directory to write into.
    """
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise InputError(
            f"{target.name}: a report is saved as .json or .html; give the file that suffix"
        )
    if not target.parent.is_dir():
        raise InputError(f"{target}: the directory {target.parent} does not exist; make it")
    if target.is_dir():
        raise InputError(f"{target} is a directory; give the name of a file")
    return target


def save_report(
    path: str | os.PathLike[str], data: Callable[[], dict[str, Any]], page: Callable[[], str]
) -> None:
    """Write `data()` to a `.json`, or `page()` to a `.html`.

    Raises:
        InputError: the path cannot be written.
    """
    target = check_target(path)
    if target.suffix == ".json":
        text = json.dumps(data(), indent=2, allow_nan=False) + "\n"
    else:
        text = page()
    try:
        _write_whole(target, text)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error


def _write_whole(target: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:64]}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
