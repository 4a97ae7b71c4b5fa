"""Runs the generated kernels of linear and of routed attention in a process of its own, and prints
what came out as JSON; see `triton_worker`.

    python tests/families_worker.py interpret      numbers of every case, against the reference
    python tests/families_worker.py compile        registers, stack and shared memory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

import linear_cases
import routed_cases

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What one program may have of an A100 and of an H100."""


@lru_cache(maxsize=2)
def collect(mode: str) -> dict[str, Any]:
    """The results of a worker process, by family and name; an error is `{"failed": text}`."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    if mode == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"REWRITER_CACHE": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        done = subprocess.run(
            [sys.executable, __file__, mode],
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"the worker failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _attempts(function: Callable[[Any], dict[str, Any]], cases: Sequence[Any]) -> dict[str, Any]:
    found = {}
    for case in cases:
        try:
            found[case.name] = function(case)
        except Exception:
            found[case.name] = {"failed": traceback.format_exc()}
    return found


def main(mode: str) -> None:
    # What torch.empty gives is NaN from here on: what a kernel does not write cannot pass.
    torch.use_deterministic_algorithms(True)
    families: dict[str, Any] = {"linear": linear_cases, "routed": routed_cases}
    found: dict[str, Any] = {}
    for name, family in families.items():
        if mode == "compile":
            found[name] = _attempts(family.build, family.BUILDS)
        else:
            found[name] = _attempts(family.run, family.CASES)
            found[name]["remembered"] = family.remembered()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
