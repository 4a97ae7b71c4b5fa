"""What `verify` found: one row a compared tensor, as a table, as JSON, as a page, as an
exception."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from rewriter.errors import InputError, NotEquivalent
from rewriter.verify.generation import GenerationReport

__all__ = ["Errors", "VerifyReport", "VerifyRow"]

Kind = Literal["output", "gradient"]

_NEXT = "rewrite fewer layers (`@ 0-3`) to find the one that differs"
_SHOWN = 12  # gradients in the text table, the worst ones; to_dict and save have all
_EXPLAINED = 4  # failures whose reason the text gives


class Errors(NamedTuple):
    """Absolute errors of one tensor against the gold tensor."""

    mean: float
    max: float


@dataclass(frozen=True)
class VerifyRow:
    """One tensor of the outputs, or one gradient."""

    name: str
    """Path in the outputs (`logits`), or name of a parameter, or `inputs.<path>`."""
    kind: Kind
    dtype: str
    """Of the tensor in the original, or the type of a plain value."""
    ok: bool
    reason: str = ""
    """Why the row failed; empty if it did not."""
    err_ref: Errors | None = None
    """Error of the original against gold. None where there is no error to measure (integers,
    another shape)."""
    err_new: Errors | None = None
    allowed: Errors | None = None

    @property
    def ratio(self) -> float:
        """Error of the model over the error of the original, the larger of mean and max; 1 if both
        are exact."""
        if self.err_ref is None or self.err_new is None:
            return 1.0 if self.ok else float("inf")
        return max(_quotient(n, r) for n, r in zip(self.err_new, self.err_ref, strict=True))

    @property
    def used(self) -> float:
        """Share of the allowance that the error takes: above 1 it fails."""
        if self.allowed is None or self.err_new is None:
            return 0.0 if self.ok else float("inf")
        share = max(_quotient(n, a, 0.0) for n, a in zip(self.err_new, self.allowed, strict=True))
        return share if self.ok or share > 1 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; what is not finite is None."""
        row: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "ok": self.ok,
        }
        row["reason"] = self.reason
        for name in ("err_ref", "err_new", "allowed"):
            errors: Errors | None = getattr(self, name)
            row[name] = (
                None if errors is None else {k: _finite(v) for k, v in errors._asdict().items()}
            )
        return row | {"ratio": _finite(self.ratio), "used": _finite(self.used)}


@dataclass(frozen=True)
class VerifyReport:
    """The comparison of a model with its original. `print(report)` shows it, `save` writes it."""

    rows: tuple[VerifyRow, ...]
    gold: str
    """What the errors are measured against."""
    notes: tuple[str, ...] = ()
    generation: GenerationReport | None = None

    @property
    def ok(self) -> bool:
        """True if something was compared and every row, and the generation if asked for, is
        fine."""
        compared = any(row.kind == "output" for row in self.rows)
        return (
            compared
            and all(row.ok for row in self.rows)
            and (self.generation is None or self.generation.ok)
        )

    @property
    def failures(self) -> tuple[VerifyRow, ...]:
        return tuple(row for row in self.rows if not row.ok)

    @property
    def worst(self) -> VerifyRow | None:
        """The row that takes the largest share of its allowance."""
        return max(self.rows, key=lambda row: row.used, default=None)

    def raise_if_failed(self) -> None:
        """Raises:
        NotEquivalent: with the first failing row, if the report is not `ok`.
        """
        if not self.ok:
            raise NotEquivalent(self._failure(), self)

    def to_dict(self) -> dict[str, Any]:
        worst = self.worst
        return {
            "ok": self.ok,
            "gold": self.gold,
            "compared": len(self.rows),
            "failed": len(self.failures),
            "worst": worst.name if worst else None,
            "rows": [row.to_dict() for row in self.rows],
            "generation": self.generation.to_dict() if self.generation else None,
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to `path`, whole or not at all: `.json`, or `.html`, one page."""
        target = Path(path)
        if target.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        elif target.suffix == ".html":
            from rewriter.verify.page import page_of

            text = page_of(self)
        else:
            raise InputError(
                f"{target.name}: a report is saved as .json or .html; give the file that suffix"
            )
        _write_whole(target, text)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self._lines())

    def _lines(self) -> Iterator[Table | Text]:
        table = Table(
            title="verify: " + self.headline,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            expand=False,
        )
        table.add_column("tensor", overflow="fold")
        table.add_column("kind")
        table.add_column("dtype")
        for column in ("original mean", "max", "model mean", "max", "ratio", "used", ""):
            table.add_column(column, justify="right", no_wrap=True)
        shown = self._shown()
        for row in shown:
            errors = [
                *(_number(e) for e in row.err_ref or (None, None)),
                *(_number(e) for e in row.err_new or (None, None)),
            ]
            ratio = "" if row.err_new is None or row.ratio == float("inf") else f"{row.ratio:.2g}"
            used = f"{row.used:.0%}" if row.used < 10 else f"{row.used:.2g}x"
            used = "" if row.allowed is None else used
            verdict = Text("ok", "green") if row.ok else Text("FAIL", "bold red")
            table.add_row(row.name, row.kind, row.dtype, *errors, ratio, used, verdict)
        yield table
        kept = {id(row) for row in shown}
        hidden = [row for row in self.rows if id(row) not in kept]
        if hidden:
            wrong = sum(not row.ok for row in hidden)
            found = f"{wrong} of them FAIL" if wrong else "all within what is allowed"
            yield Text(f"and {len(hidden)} more gradients, {found}")
        for row in self.failures[:_EXPLAINED]:
            yield Text(f"FAIL {row.name}: {row.reason}")
        if self.generation is not None:
            yield Text(str(self.generation))
        for note in self.notes:
            yield Text(f"note: {note}")

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        outputs = sum(row.kind == "output" for row in self.rows)
        compared = f"{outputs} outputs and {len(self.rows) - outputs} gradients against {self.gold}"
        if self.ok:
            return f"equivalent: {compared}"
        if not outputs:
            return f"NOT SHOWN: no output was compared: {compared}"
        return f"NOT EQUIVALENT: {len(self.failures)} differ of {compared}"

    def _shown(self) -> list[VerifyRow]:
        gradients = sorted((r for r in self.rows if r.kind == "gradient"), key=lambda r: -r.used)
        keep = {id(r) for r in gradients[:_SHOWN]}
        return [r for r in self.rows if r.kind == "output" or id(r) in keep]

    def _failure(self) -> str:
        if not any(row.kind == "output" for row in self.rows):
            return (
                "nothing was compared: the model returns no tensor and no number; "
                "verify a module that returns one"
            )
        if not self.failures and self.generation is not None:
            return f"{self.generation}; {_NEXT}"
        row = self.failures[0]
        count = f"{len(self.failures)} of {len(self.rows)} tensors differ"
        return f"{count}, first the {row.kind} `{row.name}`: {row.reason}. See report.rows; {_NEXT}"


def _quotient(x: float, y: float, both_zero: float = 1.0) -> float:
    if y == 0:
        return both_zero if x == 0 else float("inf")
    return x / y


def _finite(x: float) -> float | None:
    return x if x == x and abs(x) != float("inf") else None


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}" if x else "0"


def _write_whole(target: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent or ".", prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
