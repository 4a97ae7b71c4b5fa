"""Cases in a process of their own, for Triton's interpreter.

Triton decides at its import whether it interprets, so the interpreter does not fit into the process
of a test. `python -m rewriter.testing.worker` reads cases as JSON, a line a question, and prints
outcomes as JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewriter.lowering import TRITON
from rewriter.testing.cases import Case
from rewriter.testing.outcome import Outcome

__all__ = ["interpreted", "main"]


def interpreted(found: Sequence[Case] | None, *, full: bool = False) -> tuple[Outcome, ...]:
    """The rows of Triton kernels in the interpreter, on a CPU.

    Args:
        found: cases whose outputs are compared; None for everything that `check_lowering` does.
        full: more cases, where they are not given.
    """
    if importlib.util.find_spec("triton") is None:
        return (Outcome("output", "all cases", "skipped", "NOT RUN: triton is not installed"),)
    given = {"cases": None if found is None else [case.to_dict() for case in found], "full": full}
    worker = _worker()
    try:
        answer = worker.asked(json.dumps(given))
    except _Ended as error:
        _worker.cache_clear()
        reason = f"the process of Triton's interpreter ended: {error}"
        return (Outcome("output", "all cases", "failed", reason),)
    return tuple(Outcome(**row) for row in json.loads(answer))


class _Ended(Exception):
    """The process is no more; the text is the last that it said."""


class _Worker:
    """A process that answers line by line until this one ends: its start takes seconds."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "stderr"
        environment = {"TRITON_INTERPRET": "1", "REWRITER_CACHE": self._folder.name}
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rewriter.testing.worker"],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        atexit.register(self.close)

    def asked(self, line: str) -> str:
        """The answer to a line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            for answer in self._process.stdout:
                if answer.startswith(_MARK):
                    return answer.removeprefix(_MARK)
        except BrokenPipeError:
            pass
        self._process.wait()
        said = self._errors.read_text().strip().splitlines()
        self.close()
        raise _Ended(said[-1] if said else "it said nothing")

    def close(self) -> None:
        """Ends the process; harmless when it has ended."""
        atexit.unregister(self.close)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


_MARK = "rows: "


@lru_cache(maxsize=1)
def _worker() -> _Worker:
    return _Worker()


def _rows(found: Sequence[Case] | None, *, full: bool) -> Iterator[Outcome]:
    from rewriter.testing import conformance, grid

    if found is None:
        return conformance.lowering_rows(TRITON, grid.plan("interpreter", full=full))
    return conformance.spec_rows(TRITON, found, gradients=False)


def main() -> None:
    """Reads lines of `{"cases": [...] or null, "full": false}` and prints the rows of each."""
    for line in sys.stdin:
        given: dict[str, Any] = json.loads(line)
        found = given["cases"]
        cases = None if found is None else [Case.from_dict(data) for data in found]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of divisions by zero that are masked
            rows = [row.to_dict() for row in _rows(cases, full=given["full"])]
        print(_MARK + json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
