"""`python -m rewriter.testing`: every implementation and every pass through everything, as tables.

python -m rewriter.testing                          the whole grid, minutes
python -m rewriter.testing --fast                   the choice of the tests
python -m rewriter.testing torch.blocked fuse       only these
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console

from rewriter.lowering import LOWERINGS
from rewriter.registry import PASSES
from rewriter.testing import Outcomes, check, check_backward, check_lowering
from rewriter.testing.onnx_runtime import ONNX

__all__ = ["main"]


def suites(*, full: bool) -> dict[str, Callable[[], Outcomes]]:
    """Every suite by the name of what it checks."""
    found: dict[str, Callable[[], Outcomes]] = {
        lowering.name: partial(check_lowering, lowering, full=full)
        for lowering in (*LOWERINGS, ONNX)
    }
    found["backward"] = partial(check_backward, full=full)
    return found | {kind.name: partial(check, kind, full=full) for kind in PASSES}


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for and prints it; 1 if anything failed, or if a suite checked nothing."""
    parser = argparse.ArgumentParser(prog="python -m rewriter.testing")
    parser.add_argument("names", nargs="*", help="implementations and passes; all by default")
    parser.add_argument("--fast", action="store_true", help="the choice that the tests run")
    given = parser.parse_args(arguments)
    found = suites(full=not given.fast)
    unknown = [name for name in given.names if name not in found]
    if unknown:
        parser.error(f"there is no {unknown[0]!r}; one of {', '.join(found)}")
    torch.set_num_threads(1)  # the tensors are tiny
    console, failed = Console(), []
    for name in given.names or found:
        start = time.perf_counter()
        outcomes = found[name]()
        console.print(outcomes)
        console.print(f"{len(outcomes.rows)} rows in {time.perf_counter() - start:.0f} s\n")
        if not outcomes.ok:
            failed.append(outcomes.title)
    console.print(f"FAILED: {', '.join(failed)}" if failed else "everything passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
