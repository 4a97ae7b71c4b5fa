"""What became of a model's graphs, as counts that a test can assert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rewriter.errors import CheckFailed, InputError
from rewriter.optimize import report_of
from rewriter.report import Report
from rewriter.verify.rows import counted

__all__ = ["Structure", "structure_of"]


@dataclass(frozen=True)
class Structure:
    """Counts over the captured graphs of an optimized model."""

    sites: int
    """Attention sites by name: one that occurs in several graphs counts once."""
    rewritten: int
    """Sites that no graph computes by the model's own code."""
    softmaxes: int
    """Softmax and `scaled_dot_product_attention` nodes that are left in the graphs."""
    graphs: int
    recompiles: int
    """Graphs of code that had one already: for other shapes, or another mode."""
    breaks: int
    """Places in the source where torch could not go on with a graph."""

    @classmethod
    def of(cls, report: Report, rewritten: Mapping[str, bool] | None = None) -> Structure:
        """The counts of a report.

        Args:
            report: of the graphs.
            rewritten: for each site that ran, whether new code computed it; left out, the decision
                of the report counts, which may say "where it pays".
        """
        decided: dict[str, bool] = {}
        for line in report.attention:
            name, new = line.site.name, line.decision == "rewritten"
            if rewritten is not None:
                new = rewritten.get(name, False)
            decided[name] = decided.get(name, True) and new
        counts = report.softmaxes, report.graphs, report.recompiles, report.breaks
        return cls(len(decided), sum(decided.values()), *counts)

    def expect(self, **counts: int) -> None:
        """Nothing, if the counts are as expected: `structure.expect(rewritten=12, graphs=1)`.

        Raises:
            CheckFailed: with both numbers of every count that differs.
            InputError: a count that there is not.
        """
        found = asdict(self)
        unknown = sorted(counts.keys() - found.keys())
        if unknown or not counts:
            what = f"there is no count {unknown[0]!r}" if unknown else "no count is given"
            raise InputError(f"{what}; the counts are {', '.join(found)}")
        wrong = [f"{n} is {found[n]}, expected {x}" for n, x in counts.items() if found[n] != x]
        if wrong:
            raise CheckFailed(f"{self}; {'; '.join(wrong)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        found = f"structure: {self.rewritten} of {counted(self.sites, 'site')} rewritten"
        counts = {
            "graph": self.graphs,
            "graph break": self.breaks,
            "recompile": self.recompiles,
            "softmax node": self.softmaxes,
        }
        return ", ".join([found, *(counted(n, word) for word, n in counts.items())]) + " left"


def structure_of(model: nn.Module) -> Structure:
    """The counts of every graph that an optimized model has captured so far.

    Raises:
        InputError: if it has captured none.
    """
    report = report_of(model)
    if not report.graphs:
        raise InputError(
            f"{type(model).__name__} has no captured graph: call rewriter.optimize(model), then "
            "the model"
        )
    return Structure.of(report)
