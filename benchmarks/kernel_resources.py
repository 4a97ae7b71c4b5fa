"""Registers, spills and shared memory of generated kernels, compiled with no GPU at hand.

    python benchmarks/kernel_resources.py                    all; writes docs/kernels.md and .json
    python benchmarks/kernel_resources.py plain --print      single specs, to look at

The specs are those that the tests of the kernels share, `tests/triton_specs.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"

NAMES = (
    "plain", "causal", "window-sinks", "two-sided-window", "soft-cap", "alibi", "relative-bias",
    "buckets", "causal-padding", "learned-sink", "row-sink", "grid-bias", "disentangled",
    "opaque-bias", "documents", "chunks", "head-scales", "remove", "redistribute",
    "edit-everything",
)  # fmt: skip
DIMS, DTYPES = (64, 128), ("float16", "bfloat16")
GPUS = {80: "A100", 90: "H100, H200", 100: "B200"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one program may have."""


@dataclass(frozen=True)
class Job:
    """One spec, compiled for one GPU."""

    spec: str
    dim: int
    dtype: str
    capability: int


def main() -> int:
    options = _options()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth of the time; the code is the same
    jobs = [Job(*x) for x in itertools.product(options.names or NAMES, DIMS, DTYPES, GPUS)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REWRITER_CACHE"] = folder
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for number, found in enumerate(pool.imap(measure, jobs), 1):
                rows += found
                print(f"{number}/{len(jobs)}  {found[0]['spec']}", file=sys.stderr, flush=True)
    result = {"versions": _versions(), "rows": rows}
    if options.print:
        print(page(result))
        return 0
    DOCS.mkdir(exist_ok=True)
    (DOCS / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    (DOCS / "kernels.md").write_text(page(result))
    return int(any(r["spilled_bytes"] for r in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="specs; all if left out")
    parser.add_argument("--print", action="store_true", help="print the page, write nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "triton")}


def measure(job: Job) -> list[dict[str, Any]]:
    """What each kernel of a job takes: the forward, and those for the gradients of all inputs."""
    sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent / "tests")]
    import torch

    from rewriter.kernels import triton_backward, triton_launch
    from rewriter.kernels.triton_source import compile_function
    from rewriter.kernels.triton_tables import tabulate
    from triton_specs import SPECS

    spec = SPECS[job.spec]
    dtype = getattr(torch, job.dtype)
    wanted = [t.name for t in spec.tensors if "float" in t.dtype]
    dims = (spec, job.dim, job.dim, dtype)
    sources = [
        triton_launch.source_of(*dims, job.capability),
        triton_backward.source_of(*dims, wanted, job.capability),
    ]
    dtypes = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), job.dtype)
    plain = ("lse", "delta", "masses", "totals", "factors", "offsets")
    dtypes |= dict.fromkeys((*plain, *(f"g:{n}" for n in range(16))), "float32")
    dtypes |= {f"t:{t.name}": t.dtype for t in tabulate(spec)[0].tensors}
    rows = []
    for source in sources:
        for function in source.functions:
            found = compile_function(source, function.name, dtypes, job.capability)
            name = function.name.removeprefix("softmax_").removesuffix("_kernel")
            rows.append(asdict(job) | {"kernel": name} | vars(found))
    return rows


# --- the page -------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    rows = result["rows"]
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    spills = [r for r in rows if r["spilled_bytes"]]
    large = [r for r in rows if r["shared_bytes"] > SHARED_BYTES[r["capability"]]]
    text = [
        "# Generated kernels",
        "What one program of each kernel takes, compiled ahead of time; nothing here was timed. "
        "`python benchmarks/kernel_resources.py` writes this page and `kernels.json`. "
        f"{versions}. The specs are those of `tests/triton_specs.py`.",
        f"{len(rows)} kernels: {len(spills)} spill registers, {len(large)} ask for more shared "
        "memory than the GPU has. `fwd` is the forward; `bwd_queries` and `bwd_keys` give the "
        "gradients, of all that the formulas read too; `bwd_rows` goes before them where weights "
        "are edited, or where a bias of 16 bits wants a gradient. A cell has the registers of a "
        "thread and the KiB of shared memory of a program, the larger of float16 and bfloat16; "
        "registers that spill have their bytes behind a plus.",
    ]
    for dim in sorted({r["dim"] for r in rows}):
        text += [f"## Head dim {dim}", _table([r for r in rows if r["dim"] == dim])]
    return "\n\n".join(text) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    gpus = sorted({r["capability"] for r in rows})
    lines = [
        "| spec | kernel | " + " | ".join(f"sm_{c} ({GPUS[c]})" for c in gpus) + " |",
        "| --- | --- |" + " ---: |" * len(gpus),
    ]
    keys = dict.fromkeys((r["spec"], r["kernel"]) for r in rows)
    for spec, kernel in keys:
        own = [r for r in rows if (r["spec"], r["kernel"]) == (spec, kernel)]
        cells = [_cell(r for r in own if r["capability"] == c) for c in gpus]
        lines.append(f"| {spec} | {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: Iterable[dict[str, Any]]) -> str:
    found = list(rows)
    registers, spilled, shared = (
        max(r[name] for r in found) for name in ("registers", "spilled_bytes", "shared_bytes")
    )
    more = f" + {spilled}" if spilled else ""
    return f"{registers}{more}, {shared / 1024:.0f}"


if __name__ == "__main__":
    sys.exit(main())
