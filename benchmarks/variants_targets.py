"""What the variants have to reach, and whether they do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Found", "table_of_targets"]

Found = dict[str, dict[int, dict[str, Any]]]
"""For each row and length: the seconds of its fastest run, and more."""

GROWTHS = (
    ("linear.lightning", 1.1),
    ("linear.features", 1.1),
    ("linear.window_tail", 1.1),
    ("sparse.moba", 1.2),
    ("decode linear.lightning", 0.1),
    ("decode linear.features", 0.1),
    ("decode linear.window_tail", 0.1),
)
"""The largest exponents, between the two largest lengths."""
RATIOS = (
    ("sparse.moba of sdpa", "sparse.moba", "sdpa", 16384, 1 / 3),
    ("heads.moh, half of the heads on, of sdpa", "heads.moh", "sdpa", 2048, 0.7),
    ("sinks.var of sdpa", "sinks.var", "sdpa", 4096, 1.5),
    ("sinks.var of the eager edit", "sinks.var", "eager edit", 4096, 0.25),
)
"""The largest ratio of the time of a row to that of another one, at a length."""


def table_of_targets(found: Found, growths: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each target: its name, what is wanted, what was measured, and whether it is met."""
    lengths = [n for row in found.values() for n in row]
    rows = []
    for name, most in GROWTHS:
        growth = growths.get(name, math.nan)
        known = None if math.isnan(growth) or max(lengths) < 8192 else growth
        rows.append(_target(f"growth of {name}", known, most))
    for name, row, other, n, most in RATIOS:
        times = [found.get(x, {}).get(n, {}).get("min_s") for x in (row, other)]
        ratio = None if None in times else times[0] / times[1]
        rows.append(_target(f"{name}, {n} tokens", ratio, most))
    return rows


def _target(name: str, measured: float | None, most: float) -> dict[str, Any]:
    met = "not measured" if measured is None else "met" if measured <= most else "MISSED"
    return {"name": name, "wanted": f"<= {most:.2f}", "measured": measured, "met": met}
