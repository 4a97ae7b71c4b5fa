"""What was found of two models that continue the same texts: values, as a line of text and as
JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rewriter.verify.rows import VerifyRow

__all__ = ["GenerationReport", "Parting", "Step"]


@dataclass(frozen=True)
class Parting:
    """The first token at which one row of the two continuations differs."""

    row: int
    step: int
    expected: int
    """Token of the original."""
    found: int
    """Token of the model."""
    margin: float
    """By how much the original's logit of `expected` is above that of `found`."""
    tie: bool
    """The margin is within rounding: either token is right."""


@dataclass(frozen=True)
class Step:
    """The logits of one step, over the rows that have not parted before it."""

    step: int
    rows: int
    kl: float
    """KL(original || model) in nats, the mean over rows."""
    difference: float
    """The largest difference of a logit."""


@dataclass(frozen=True)
class GenerationReport:
    """Greedy continuations of a model compared with those of its original."""

    rows: int
    new_tokens: int
    partings: tuple[Parting, ...]
    steps: tuple[Step, ...] = ()
    checks: tuple[VerifyRow, ...] = ()
    """The logits of all steps against gold, and steps with a cache against one call over the text;
    by the error-ratio rule."""
    padded: tuple[GenerationReport, ...] = ()
    """The same for one prompt alone, and padded on the left and on the right."""
    notes: tuple[str, ...] = ()
    """What was not compared, and why."""
    name: str = "as given"

    @property
    def ok(self) -> bool:
        """True if every row is equal, or parts at a tie, and every check is fine."""
        return (
            self.rows * self.new_tokens > 0
            and all(p.tie for p in self.partings)
            and all(check.ok for check in self.checks)
            and all(report.ok for report in self.padded)
        )

    @property
    def agreement(self) -> float:
        """Share of the tokens before the first difference of their row; none if the model wrote
        no text."""
        if any(check.name == "generate" for check in self.checks):
            return 0.0
        lost = sum(self.new_tokens - p.step for p in self.partings)
        return 1 - lost / max(1, self.rows * self.new_tokens)

    @property
    def failures(self) -> tuple[str, ...]:
        """What differs, one sentence each."""
        wrong = [_sentence(p) for p in self.partings if not p.tie]
        wrong += [f"{check.name}: {check.reason}" for check in self.checks if not check.ok]
        return (*wrong, *(f"{r.name}: {text}" for r in self.padded for text in r.failures))

    def __str__(self) -> str:
        count = f"{self.rows} x {self.new_tokens} greedy tokens"
        parts = [f"generation: {self.agreement:.1%} of {count} agree"]
        if self.failures:
            parts.append(f"the model differs: {self.failures[0]}")
            if len(self.failures) > 1:
                parts.append(f"and {len(self.failures) - 1} more differences")
        elif self.partings:
            parts.append(f"a tie: {_sentence(self.partings[0])}")
        if self.steps:
            parts.append(f"KL of a step up to {max(s.kl for s in self.steps):.1e} nats")
        shown = [*(c.name for c in self.checks if c.ok), *(r.name for r in self.padded if r.ok)]
        if shown:
            parts.append(f"as in the original: {', '.join(shown)}")
        notes = [*self.notes, *(f"{r.name}: {note}" for r in self.padded for note in r.notes)]
        return "; ".join([*parts, *(f"note: {note}" for note in notes)])

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; what is not finite is None."""
        return {
            "ok": self.ok,
            "name": self.name,
            "agreement": self.agreement,
            "rows": self.rows,
            "new_tokens": self.new_tokens,
            "partings": [_plain(p) for p in self.partings],
            "steps": [_plain(s) for s in self.steps],
            "checks": [check.to_dict() for check in self.checks],
            "padded": [report.to_dict() for report in self.padded],
            "notes": list(self.notes),
        }


def _sentence(p: Parting) -> str:
    return (
        f"row {p.row}, token {p.step} is {p.found} where the original has {p.expected}, "
        f"whose logit is higher by {p.margin:.2e}"
    )


def _plain(value: Any) -> dict[str, Any]:
    return {
        n: None if isinstance(x, float) and not abs(x) < float("inf") else x
        for n, x in asdict(value).items()
    }
