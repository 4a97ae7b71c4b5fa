"""What `verify` found: one row a compared tensor, as a table, as JSON, as a page, as an
exception."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from rich.console import Console, ConsoleOptions, RenderResult

from rewriter.errors import NotEquivalent
from rewriter.report import Report, SiteReport
from rewriter.report.saving import save_report
from rewriter.verify.continuations import GenerationReport
from rewriter.verify.memory import MemoryUse
from rewriter.verify.rows import Errors, Kind, VerifyRow, counted
from rewriter.verify.structure import Structure

__all__ = ["Errors", "VerifyReport", "VerifyRow"]

_NEXT = "`rewriter.bisect(original, model, inputs)` names the site and the stage that differ"


@dataclass(frozen=True)
class VerifyReport:
    """The comparison of a model with its original. `print(report)` shows it, `save` writes it."""

    rows: tuple[VerifyRow, ...]
    """Outputs, sites, gradients."""
    gold: str
    """What the errors are measured against."""
    notes: tuple[str, ...] = ()
    generation: GenerationReport | None = None
    structure: Structure | None = None
    """Of a model that `optimize` returned."""
    memory: MemoryUse | None = None
    """If it was asked for."""
    attention: Report | None = None
    """What `optimize` found and did in the call that was compared."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if something was compared and every row, and generation and memory if asked for,
        are fine."""
        parts = (self.generation, self.memory)
        return (
            self.compared > 0
            and all(row.ok for row in self.rows)
            and all(part is None or part.ok for part in parts)
        )

    @property
    def compared(self) -> int:
        """How many outputs have a value that was compared."""
        return sum(row.kind == "output" and (row.count > 0 or not row.ok) for row in self.rows)

    @property
    def failures(self) -> tuple[VerifyRow, ...]:
        return tuple(row for row in self.rows if not row.ok)

    @property
    def worst(self) -> VerifyRow | None:
        """The row that takes the largest share of its allowance."""
        return max(self.rows, key=lambda row: row.used, default=None)

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        kinds = [row.kind for row in self.rows]
        words: list[Kind] = [w for w in get_args(Kind) if w != "site" or "site" in kinds]
        *first, last = [counted(kinds.count(w), w) for w in words]
        compared = f"{', '.join(first)} and {last} against {self.gold}"
        if self.ok:
            return f"equivalent: {compared}"
        if not self.compared:
            return f"NOT SHOWN: no output was compared: {compared}"
        if not self.failures:
            return f"FAILED: {compared} agree, {' and '.join(self._other_failures())}"
        return f"NOT EQUIVALENT: {len(self.failures)} differ of {compared}"

    def raise_if_failed(self) -> None:
        """Raises:
        NotEquivalent: with the first failing row, if the report is not `ok`.
        """
        if not self.ok:
            raise NotEquivalent(self._failure(), self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite is None."""
        worst = self.worst
        sites = () if self.attention is None else self.attention.sites
        return {
            "ok": self.ok,
            "gold": self.gold,
            "compared": len(self.rows),
            "failed": len(self.failures),
            "worst": worst.name if worst else None,
            "rows": [row.to_dict() for row in self.rows],
            "generation": self.generation.to_dict() if self.generation else None,
            "structure": self.structure.to_dict() if self.structure else None,
            "memory": self.memory.to_dict() if self.memory else None,
            "sites": [_site(line) for line in sites],
            "environment": dict(self.environment),
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to `path`, whole or not at all: `.json`, or `.html`, one page."""
        from rewriter.verify.page import page_of

        save_report(path, self.to_dict, lambda: page_of(self))

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rewriter.verify.table import table_of

        yield table_of(self)

    def _failure(self) -> str:
        if not self.compared:
            return (
                "nothing was compared: the model returns no tensor with a value and no number; "
                "verify a module that returns one"
            )
        if not self.failures:
            return "; ".join(self._other_failures())
        row = self.failures[0]
        count = f"{len(self.failures)} of {len(self.rows)} tensors differ"
        text = f"{count}, first the {row.kind} `{row.name}`: {row.reason}. "
        sites = [r.name for r in self.failures if r.kind == "site"]
        if sites and row.kind != "site":
            text += f"The first site that differs is `{sites[0]}`. "
        return f"{text}See report.rows{f'; {_NEXT}' if self._bisect_sees_it() else ''}"

    def _bisect_sees_it(self) -> bool:
        """It looks at outputs and gradients, of a model that `optimize` returned."""
        kinds = {row.kind for row in self.failures}
        return self.structure is not None and bool(kinds & {"output", "gradient"})

    def _other_failures(self) -> list[str]:
        """What fails besides the rows."""
        text = self.generation is not None and not self.generation.ok
        found = [str(self.generation)] if text else []
        return found + list(self.memory.failures if self.memory else ())


def _site(line: SiteReport) -> dict[str, Any]:
    """A site in short; `rewriter.inspect` has all of it."""
    before, after = line.site.spec, line.after
    return {
        "name": line.site.name,
        "layer": line.site.layer,
        "graph": line.graph,
        "formula": None if before is None else str(before),
        "after_formula": None if after is None else str(after),
        "decision": line.decision,
        "lowering": line.lowering,
        "passes": list(line.passes),
        "why": line.reason,
    }
