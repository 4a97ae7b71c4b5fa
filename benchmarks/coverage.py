"""Every attention of every model: what is found, read and rewritten in the architectures of
transformers and diffusers, beside what torch's own pattern matcher fuses.

    python benchmarks/coverage.py                        all; writes docs/coverage.md and .json
    python benchmarks/coverage.py bert gemma2 --print    single architectures, to look at
    python benchmarks/coverage.py bert gemma2            the same, into the JSON and the page
    python benchmarks/coverage.py --again                those of the JSON with a problem, and those
                                                         that were not built

Each architecture is measured in a process of its own, with a time limit: a crash of one stops
nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"
PRELOADED = [
    "torch",
    "torch._dynamo",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "rewriter",
    "coverage_measure",
]


@dataclass(frozen=True)
class Job:
    """One architecture in one implementation and dtype."""

    name: str
    library: str
    implementation: str
    dtype: str
    verify: bool = True
    inductor: bool = False


def main() -> int:
    options = _options()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    from coverage_page import page, summary, trouble_of

    file = Path(options.json)
    more = (options.again or options.names) and not options.print and file.exists()
    rows = json.loads(file.read_text())["rows"] if more else []
    wrong = {_key(r) for r in rows if trouble_of(r) or r["status"] == "not built"}
    jobs = _jobs(options, wrong if options.again else None)
    done = {_key(r): r for r in rows}
    numbers = itertools.count(1)
    started = time.perf_counter()

    def keep(row: dict[str, Any]) -> None:
        done[_key(row)] = {name: value for name, value in row.items() if name != "trace"}
        problem = trouble_of(row)
        count = f"{next(numbers)}/{len(jobs)}"
        print(f"{count:>10}  {' '.join(_key(row)):60} {problem or 'fine'}", flush=True)
        if options.print:
            print(json.dumps(row, indent=1, ensure_ascii=False), flush=True)
        if not options.print:
            file.write_text(json.dumps(_result(done), indent=1, ensure_ascii=False) + "\n")

    run(jobs, keep, processes=options.jobs, limit=options.limit)
    result = _result(done)
    print(f"\n{summary(result['rows'])}\n{time.perf_counter() - started:.0f} s")
    if not options.print:
        Path(options.page).write_text(page(result))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="model types; all if left out")
    parser.add_argument("--again", action="store_true", help="only rows of the JSON with a problem")
    parser.add_argument("--print", action="store_true", help="print rows, write nothing")
    parser.add_argument("--quick", action="store_true", help="do not compare, nor ask inductor")
    parser.add_argument("--implementation", action="append", choices=["eager", "sdpa"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds an architecture")
    parser.add_argument("--every", type=int, default=8, help="every n-th also in bfloat16")
    parser.add_argument("--json", default=str(DOCS / "coverage.json"))
    parser.add_argument("--page", default=str(DOCS / "coverage.md"))
    return parser.parse_args()


def _jobs(options: argparse.Namespace, only: set[tuple[str, ...]] | None) -> list[Job]:
    from coverage_zoo import architectures

    jobs = []
    chosen = [a for a in architectures() if not a.left_out]
    for number, a in enumerate(chosen):
        for form in options.implementation or ("eager", "sdpa"):
            dtypes = ["float32"]
            if number % options.every == 0 and not options.quick:
                dtypes.append("bfloat16")
            for dtype in dtypes:
                inductor = form == "eager" and dtype == "float32" and not options.quick
                job = Job(a.name, a.library, form, dtype, not options.quick, inductor)
                if options.names and a.name not in options.names:
                    continue
                if only is None or (a.name, form, dtype) in only:
                    jobs.append(job)
    return jobs


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["name"], row["implementation"], row["dtype"]


def _result(done: dict[tuple[str, ...], dict[str, Any]]) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "diffusers")
    return {
        "versions": {name: version(name) for name in packages},
        "rows": [done[key] for key in sorted(done)],
    }


# --- processes ------------------------------------------------------------------------------------


def run(
    jobs: Sequence[Job],
    keep: Callable[[dict[str, Any]], None],
    *,
    processes: int,
    limit: float,
    preload: Sequence[str] = PRELOADED,
) -> None:
    """Measures every job in a process of its own, and hands over its row."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    todo, running = list(jobs), {}
    while todo or running:
        while todo and len(running) < processes:
            job = todo.pop(0)
            results = context.SimpleQueue()
            process = context.Process(target=_work, args=(job, results), daemon=True)
            process.start()
            running[job] = process, results, time.monotonic()
        for job, (process, results, start) in list(running.items()):
            row = None
            if not results.empty():
                row = results.get()
            elif not process.is_alive():
                row = _lost(job, "crash", f"the process ended with code {process.exitcode}")
            elif time.monotonic() - start > limit:
                process.kill()
                row = _lost(job, "timeout", f"more than {limit:.0f} s")
            if row is not None:
                process.join(10)
                del running[job]
                keep(row)
        time.sleep(0.05)


def _work(job: Job, results: Any) -> None:
    """In the process: measures, and hands the row over."""
    import torch
    import transformers
    from coverage_measure import measure

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    results.put(
        measure(
            job.name,
            job.library,
            job.implementation,
            job.dtype,
            verify=job.verify,
            inductor=job.inductor,
        )
    )


def _lost(job: Job, status: str, why: str) -> dict[str, Any]:
    from coverage_measure import Row

    return Row(job.name, job.implementation, job.dtype, status, why).to_dict()


if __name__ == "__main__":
    sys.exit(main())
