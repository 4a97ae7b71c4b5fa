"""The variants beside plain attention and eager attention with weights: time, memory, growth.

    python benchmarks/variants.py [--quick] [--lengths 512,2048,8192,32768] [--check] [--json FILE]

One process, one thread (`--threads`), forward alone. In each round every row runs once, and a ratio
is that of the fastest runs; a clock that counts the time of this process alone is used with one
thread, so that other work matters less. Routers and labels are ready before the clock starts.

Peak memory is the high-water mark of the resident memory of a second process, above what it had
with the inputs ready; the output counts. The allocator gives large blocks back there, so that one
row does not live on the memory of another.

Growth is the exponent of the time between the two largest lengths: 1 is linear, 2 is quadratic, 0
is flat. `--check` exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from variants_rows import DECODES, EAGER, HEADS, ROWS, Row
from variants_targets import Found, table_of_targets

LENGTHS = (512, 2048, 8192, 32768)
ROUNDS = ((512, 15), (2048, 9), (4096, 5))
"""How often every row runs, up to a length; beyond, twice."""
LONGEST_EAGER = 8192


def rounds_of(n: int) -> int:
    return next((count for most, count in ROUNDS if n <= most), 2)


def wanted(only: str, row: Row) -> bool:
    return any(part in row.name for part in only.split(","))


def too_large(row: Row, n: int) -> str | None:
    """Why a row is left out at a length."""
    if not row.is_eager or n <= LONGEST_EAGER:
        return None
    return f"would need {2 * HEADS * n * n * 4 / 2**30:.0f} GiB"


# --- time -----------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def times_of(rows: Iterable[Row], n: int, *, count: int, again: int = 1) -> dict[str, list[float]]:
    """The time of each row in each round; a run is `again` calls."""
    runs = {row.name: row.build(n) for row in rows}
    if count > 2:
        for run in runs.values():
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            spent = seconds(lambda run=run: [run() for _ in range(again)][-1])  # type: ignore[misc]
            found[name].append(spent / again)
    return found


def measure(lengths: tuple[int, ...], only: str, extra: bool) -> Found:
    """All rows at all lengths; rows with a target at a further length also there."""
    found: Found = {}
    more = {n for row in ROWS for n in row.extra if extra}
    for n in sorted({*lengths, *more}):
        rows = [r for r in ROWS if n in (*lengths, *(r.extra if extra else ())) and wanted(only, r)]
        for row in rows:
            found.setdefault(row.name, {})[n] = {"beside": row.beside, "skipped": too_large(row, n)}
        taken = [r for r in rows if too_large(r, n) is None]
        for name, values in times_of(taken, n, count=rounds_of(n)).items():
            found[name][n] |= _summary(values)
        _print_length(found, n)
    for n in lengths:
        steps = [r for r in DECODES if wanted(only, r)]
        for row in steps:
            found.setdefault(row.name, {})[n] = {"beside": row.beside, "skipped": None}
        for name, values in times_of(steps, n, count=9, again=20).items():
            found[name][n] |= _summary(values)
    return found


def _summary(values: list[float]) -> dict[str, float]:
    return {"min_s": min(values), "median_s": statistics.median(values), "runs": len(values)}


# --- memory ---------------------------------------------------------------------------------------


def memory(lengths: tuple[int, ...], only: str) -> dict[str, dict[int, float]]:
    """Peak memory of each row in MiB, from a second process."""
    command = [sys.executable, __file__, "--memory", ",".join(map(str, lengths)), "--only", only]
    threads = str(torch.get_num_threads())
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, "--threads", threads],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, dict[int, float]] = json.loads(done.stdout)
    return {name: {int(n): x for n, x in row.items()} for name, row in found.items()}


def _memory_here(lengths: tuple[int, ...], only: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in ROWS:
        if not wanted(only, row):
            continue
        row.build(64)()  # what is compiled once
        for n in lengths:
            if too_large(row, n) is None:
                found.setdefault(row.name, {})[n] = _peak(row.build(n))
    return found


def _peak(run: Callable[[], Any]) -> float:
    """How far resident memory rises above what it is, in MiB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what there is now
    before = _status("VmRSS")
    out = run()
    peak = _status("VmHWM") - before
    del out
    return peak


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(x.split()[1] for x in lines if x.startswith(f"{name}:"))) / 1024


# --- the tables -----------------------------------------------------------------------------------


def _print_length(found: Found, n: int) -> None:
    """The rows of one length, as they are done."""
    print(
        f"\n{n} tokens{'':22s}{'ms':>10s}{'median':>10s}{'it / beside it':>26s}{'eager / it':>12s}"
    )
    for name, row in found.items():
        if n not in row:
            continue
        cell = row[n]
        if cell["skipped"]:
            print(f"  {name:28s}{cell['skipped']:>20s}")
            continue
        base, eager = (found.get(x, {}).get(n, {}).get("min_s") for x in (cell["beside"], EAGER))
        ratio = f"{cell['min_s'] / base:.2f} x {cell['beside']}" if base else ""
        gain = f"{eager / cell['min_s']:.1f}" if eager else ""
        print(
            f"  {name:28s}{1e3 * cell['min_s']:10.1f}{1e3 * cell['median_s']:10.1f}{ratio:>26s}"
            f"{gain:>12s}",
            flush=True,
        )


def _print_over_lengths(title: str, found: dict[str, dict[int, float]], unit: str) -> None:
    lengths = sorted({n for row in found.values() for n in row})
    print(f"\n{title:30s}" + "".join(f"{n:>10d}" for n in lengths) + f"{'growth':>10s}")
    for name, row in found.items():
        cells = "".join(f"{row[n]:10{unit}}" if n in row else f"{'':10s}" for n in lengths)
        print(f"  {name:28s}{cells}{growth(row):10.2f}")


def growth(row: dict[int, float]) -> float:
    """The exponent between the two largest lengths; NaN if there is one only."""
    if len(row) < 2 or min(row.values()) <= 0:
        return math.nan
    a, z = sorted(row)[-2:]
    return math.log(row[z] / row[a]) / math.log(z / a)


def report(
    found: Found, peaks: dict[str, dict[int, float]], lengths: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Prints what goes over all lengths, and the targets; the targets as they were met."""
    times = {
        name: {n: 1e3 * x["min_s"] for n, x in row.items() if "min_s" in x and n in lengths}
        for name, row in found.items()
    }
    whole = {name: row for name, row in times.items() if not name.startswith("decode")}
    steps = {name: row for name, row in times.items() if name.startswith("decode")}
    _print_over_lengths("time, ms", whole, ".1f")
    _print_over_lengths("a token after so many, ms", steps, ".3f")
    if peaks:
        _print_over_lengths("peak memory, MiB", peaks, ".1f")
    targets = table_of_targets(found, {name: growth(row) for name, row in times.items()})
    print(f"\n{'target':58s}{'wanted':>10s}{'measured':>10s}")
    for target in targets:
        measured = "" if target["measured"] is None else f"{target['measured']:.2f}"
        print(f"{target['name']:58s}{target['wanted']:>10s}{measured:>10s}  {target['met']}")
    return targets


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--quick", action="store_true", help="512 and 2048 tokens, and no others")
    parser.add_argument("--only", default="", help="rows whose name contains one of these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.memory:
        wanted = tuple(int(n) for n in options.memory.split(","))
        json.dump(_memory_here(wanted, options.only), sys.stdout)
        return 0
    lengths = tuple(int(n) for n in options.lengths.split(","))
    if options.quick:
        lengths = tuple(n for n in lengths if n <= 2048)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {HEADS} heads of 64, float32")
    found = measure(lengths, options.only, extra=not options.quick)
    targets = report(found, memory(lengths, options.only), lengths)
    if options.json:
        Path(options.json).write_text(
            json.dumps({"torch": torch.__version__, "rows": found, "targets": targets}, indent=1)
        )
    return int(options.check and any(t["met"] == "MISSED" for t in targets))


if __name__ == "__main__":
    sys.exit(main())
