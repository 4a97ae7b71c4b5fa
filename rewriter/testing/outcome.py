"""What checks found: one row a check and case, as a table, as JSON, as an exception."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from rewriter.errors import CheckFailed

__all__ = ["Outcome", "Outcomes", "Verdict"]

Verdict = Literal["passed", "failed", "skipped"]

_EXPLAINED = 8  # failures whose reason the text gives


@dataclass(frozen=True)
class Outcome:
    """One check of one case."""

    check: str
    """`"identity"`, `"torch.blocked = reference"`, `"law: causality"`."""
    case: str
    """What it was checked on, `"causal self, GQA 4/2, L 65, float32"`."""
    verdict: Verdict
    reason: str = ""
    """Why it failed, or why it was skipped; empty if it passed."""
    used: float | None = None
    """Share of the allowed error, where an error was measured."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Outcomes:
    """The rows of a suite of checks."""

    title: str
    rows: tuple[Outcome, ...]

    @property
    def failures(self) -> tuple[Outcome, ...]:
        return tuple(row for row in self.rows if row.verdict == "failed")

    @property
    def ok(self) -> bool:
        """Something passed and nothing failed: what compared nothing is not fine."""
        return not self.failures and any(row.verdict == "passed" for row in self.rows)

    def __bool__(self) -> bool:
        """`ok`, so that `assert testing.check(MyPass)` says what it seems to say."""
        return self.ok

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(self.title, (*self.rows, *other.rows))

    def raise_if_failed(self) -> None:
        """Raises:
        CheckFailed: with the first failure, if the outcomes are not `ok`.
        """
        if not self.ok:
            raise CheckFailed(self._failure())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [row.to_dict() for row in self.rows]
        return {"title": self.title, "ok": self.ok, **self._counts(self.rows), "rows": rows}

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self._lines())

    def _lines(self) -> Iterator[Table | Text]:
        verdict = "passed" if self.ok else "FAILED" if self.failures else "NOTHING WAS CHECKED"
        table = Table(
            title=f"{self.title}: {verdict}",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("check", overflow="fold")
        for name in ("passed", "failed", "skipped", "used"):
            table.add_column(name, justify="right")
        table.add_column("skipped because", overflow="fold")
        for check in dict.fromkeys(row.check for row in self.rows):
            rows = [row for row in self.rows if row.check == check]
            counts = self._counts(rows)
            used = max((row.used for row in rows if row.used is not None), default=None)
            reasons = dict.fromkeys(row.reason for row in rows if row.verdict == "skipped")
            cells = [str(counts[v] or "") for v in ("passed", "failed", "skipped")]
            share = "" if used is None else f"{used:.0%}" if used < 10 else f"{used:.2g}x"
            table.add_row(check, *cells, share, "; ".join(reasons))
        yield table
        for row in self.failures[:_EXPLAINED]:
            yield Text(f"FAIL {row.check}, {row.case}: {row.reason}")
        more = len(self.failures) - _EXPLAINED
        if more > 0:
            yield Text(f"and {more} more failures; see `.failures`")

    def _failure(self) -> str:
        if not self.failures:
            return f"{self.title}: nothing was checked; all {len(self.rows)} rows were skipped"
        row = self.failures[0]
        count = f"{len(self.failures)} of {len(self.rows)} checks failed"
        return f"{self.title}: {count}, first {row.check}, {row.case}: {row.reason}"

    @staticmethod
    def _counts(rows: tuple[Outcome, ...] | list[Outcome]) -> dict[str, int]:
        found = Counter(row.verdict for row in rows)
        return {v: found[v] for v in ("passed", "failed", "skipped")}
