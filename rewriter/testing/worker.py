"""Cases in a process of their own, for Triton's interpreter.

Triton decides at its import whether it interprets, so the interpreter does not fit into the process
of a test. `python -m rewriter.testing.worker` reads cases as JSON and prints outcomes as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
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
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "rewriter.testing.worker"],
            input=json.dumps(given),
            env={**os.environ, "TRITON_INTERPRET": "1", "REWRITER_CACHE": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        reason = f"the process of Triton's interpreter ended: {last}"
        return (Outcome("output", "all cases", "failed", reason),)
    return tuple(Outcome(**row) for row in json.loads(done.stdout.splitlines()[-1]))


def _rows(found: Sequence[Case] | None, *, full: bool) -> Iterator[Outcome]:
    from rewriter.testing import conformance, grid

    if found is None:
        return conformance.lowering_rows(TRITON, grid.plan("interpreter", full=full))
    return conformance.spec_rows(TRITON, found, gradients=False)


def main() -> None:
    """Reads `{"cases": [...] or null, "full": false}` and prints the rows."""
    given: dict[str, Any] = json.load(sys.stdin)
    found = given["cases"]
    cases = None if found is None else [Case.from_dict(data) for data in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of divisions by zero that are masked
        rows = [row.to_dict() for row in _rows(cases, full=given["full"])]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
