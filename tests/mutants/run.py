"""Every mutant and every honest control through the harness: `python tests/mutants/run.py`.

    run.py [KIND ...]       only these kinds: spec, pass, lowering, ...

Prints who caught what. Exits with 1 if a mutant is missed or an honest subject is not found right.
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
from mutants.seams import CONTROLS, first, rows_of
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
    start, missed, total = time.perf_counter(), 0, 0
    for kind in kinds:
        for mutant in (m for m in catalogue() if m.kind == kind):
            begun = time.perf_counter()
            found = caught(mutant)
            total, missed = total + 1, missed + (found is None)
            by = "MISSED" if found is None else found.check
            _line(kind, mutant.name, by, time.perf_counter() - begun, found)
    controls = [(kind, name, rows) for name, (kind, rows) in CONTROLS.items() if kind in kinds]
    alarms = sum(_alarms(*control) for control in controls)
    seconds = time.perf_counter() - start
    print(f"\n{total - missed} of {total} mutants caught, {missed} missed, in {seconds:.0f} s")
    print(f"{alarms} false alarms on honest subjects")
    return int(bool(missed or alarms or not total))


def caught(mutant: Mutant) -> Outcome | None:
    """The first row that fails. A check that breaks down has caught nothing."""
    try:
        return first(rows_of(mutant))
    except Exception:
        traceback.print_exc()
        return None


def _line(kind: str, name: str, by: str, seconds: float, found: Outcome | None) -> None:
    where = "" if found is None else f"  {found.case[:44]}"
    print(f"{kind:10}  {name:52.52}  {by:34.34}  {seconds:5.1f} s{where}", flush=True)


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
    print(f"{kind:10}  {name} (honest): {passed} rows passed" + ("" if passed else ": NOTHING"))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
