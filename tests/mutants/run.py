"""Every mutant and every honest control through the harness: `python tests/mutants/run.py`.

    run.py [KIND ...]       only these kinds: spec, pass, lowering, ...

Prints who caught what. Exits with 1 if a mutant is missed, also if only by the check that it names,
or an honest subject is not found right.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from mutants.catalogue import KINDS, Kind, Mutant, catalogue
from mutants.seams import CONTROLS, caught_by
from rewriter.testing.outcome import Outcome


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    given = parser.parse_args(arguments)
    unknown = [k for k in given.kinds if k not in KINDS]
    if unknown:
        parser.error(f"there is no kind {unknown[0]!r}; one of {', '.join(KINDS)}")
    torch.set_num_threads(1)
    kinds: list[Kind] = [k for k in KINDS if k in given.kinds or not given.kinds]
    start, cpu = time.perf_counter(), time.process_time()
    counts = {kind: _caught(kind) for kind in kinds}
    controls = {kind: _honest(kind) for kind in kinds}
    print(f"\n{'kind':10}  {'mutants':>7}  {'caught':>6}  {'missed':>6}  {'controls':>8}  alarms")
    rows = {kind: (*counts[kind], *controls[kind]) for kind in kinds}
    rows["all"] = tuple(map(sum, zip(*rows.values(), strict=True)))
    for kind, (total, missed, honest, alarms) in rows.items():
        print(f"{kind:10}  {total:7}  {total - missed:6}  {missed:6}  {honest:8}  {alarms:6}")
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{seconds:.0f} s, {cpu:.0f} s of CPU")
    total, missed, honest, alarms = rows["all"]
    return int(bool(missed or alarms or not total or not honest))


def _caught(kind: Kind) -> tuple[int, int]:
    """How many mutants there are, and how many are missed by the check that has to see them."""
    total = missed = 0
    for mutant in (m for m in catalogue() if m.kind == kind):
        begun = time.perf_counter()
        found, earliest = _rows_of(mutant)
        by = "MISSED" if found is None else found.check
        if found is None and earliest is not None:
            by = f"MISSED BY {mutant.expected}: {earliest.check}"
        total, missed = total + 1, missed + (found is None)
        _line(kind, mutant.name, by, time.perf_counter() - begun, found)
    return total, missed


def _rows_of(mutant: Mutant) -> tuple[Outcome | None, Outcome | None]:
    """As `caught_by`. A check that breaks down has caught nothing."""
    try:
        return caught_by(mutant)
    except Exception:
        traceback.print_exc()
        return None, None


def _line(kind: str, name: str, by: str, seconds: float, found: Outcome | None) -> None:
    where = "" if found is None else f"  {found.case[:44]}"
    print(f"{kind:10}  {name:52.52}  {by:34}  {seconds:5.1f} s{where}", flush=True)


def _honest(kind: Kind) -> tuple[int, int]:
    """How many honest subjects there are, and how many raise an alarm."""
    controls = {name: rows for name, (of, rows) in CONTROLS.items() if of == kind}
    return len(controls), sum(_alarms(kind, name, rows) for name, rows in controls.items())


def _alarms(kind: str, name: str, rows: Callable[[], Iterator[Outcome]]) -> int:
    """1 if an honest subject fails, or if nothing was checked."""
    passed = 0
    try:
        for row in rows():
            passed += row.verdict == "passed"
            if row.verdict == "failed":
                print(f"{kind:10}  FALSE ALARM on {name}: {row.check}, {row.case}: {row.reason}")
                return 1
    except Exception:
        traceback.print_exc()
        return 1
    done = f"{passed} rows passed" if passed else "NOTHING passed"
    print(f"{kind:10}  {name} (honest): {done}", flush=True)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
