"""The report of a model: every softmax, every relative of attention, what was done and why."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from rewriter.cost import cost_of
from rewriter.report.groups import SiteGroup, groups_of
from rewriter.report.saving import save_report
from rewriter.sites import Site
from rewriter.spec import Spec

__all__ = ["Decision", "Report", "SiteReport"]

Decision = Literal["rewritten", "kept", "named", "not attention"]
"""`named`: a relative of attention, such as linear attention, that is left alone."""


@dataclass(frozen=True)
class SiteReport:
    """One site of one captured graph."""

    site: Site
    graph: int
    """The number of the graph, in the order of capture: a model that generates has one for prefill
    and one for decode."""
    after: Spec | None
    """What the site computes now; None where it was not understood."""
    decision: Decision
    lowering: str = ""
    """What computes it for the shapes seen at capture: `"torch.blocked"`, `"triton"`, ... or
    `"original"`."""
    reason: str = ""
    """Why it was kept, or why an implementation was not taken."""
    passes: tuple[str, ...] = ()
    """The requests that were applied."""

    @property
    def is_attention(self) -> bool:
        return self.decision in ("rewritten", "kept")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.site.to_dict(),
            "graph": self.graph,
            "cost": _cost(self.site),
            "decision": self.decision,
            "lowering": self.lowering,
            "why": self.reason,
            "passes": list(self.passes),
            "after": self.after.to_dict() if self.after is not None else None,
            "after_formula": str(self.after) if self.after is not None else None,
            "digest_before": self.site.spec.digest() if self.site.spec is not None else None,
            "digest_after": self.after.digest() if self.after is not None else None,
        }


@dataclass(frozen=True)
class Report:
    """Every softmax of a model's captured graphs, and every relative of attention."""

    sites: tuple[SiteReport, ...] = ()
    graphs: int = 0
    notes: tuple[str, ...] = ()
    softmaxes: int = 0
    """Softmax and `scaled_dot_product_attention` nodes that are left in the graphs."""
    breaks: int = 0
    """Places where torch could not go on with a graph."""
    recompiles: int = 0
    """Graphs of code that had one already: for other shapes, or another mode."""

    @property
    def attention(self) -> tuple[SiteReport, ...]:
        """The sites that are attention."""
        return tuple(s for s in self.sites if s.is_attention)

    @property
    def relatives(self) -> tuple[SiteReport, ...]:
        """Relatives of attention: linear attention, recurrences, gates, and so on."""
        return tuple(s for s in self.sites if s.decision == "named")

    @property
    def rewritten(self) -> tuple[SiteReport, ...]:
        return tuple(s for s in self.sites if s.decision == "rewritten")

    @property
    def opaque(self) -> int:
        """Reads that keep an L x M tensor alive, over all sites."""
        return sum(len(s.site.spec.opaque_reads()) for s in self.sites if s.site.spec is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "graphs": self.graphs,
            "attention": len(self.attention),
            "rewritten": len(self.rewritten),
            "relatives": len(self.relatives),
            "opaque_reads": self.opaque,
            "softmaxes": self.softmaxes,
            "graph_breaks": self.breaks,
            "recompiles": self.recompiles,
            "notes": list(self.notes),
            "sites": [s.to_dict() for s in self.sites],
        }

    @property
    def groups(self) -> tuple[SiteGroup, ...]:
        """The sites, those that are alike as one: the rows of the table and of the page."""
        return groups_of(self.sites)

    @property
    def headline(self) -> str:
        """What was found, in one line."""
        found = f"{_count(len(self.attention), 'attention site')} in {_count(self.graphs, 'graph')}"
        texts = [found, f"{len(self.rewritten)} rewritten", _count(self.opaque, "opaque read")]
        more = [_count(len(self.relatives), "relative")] if self.relatives else []
        return ", ".join([*texts, *more])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to `path`, whole or not at all: `.json`, or `.html`, one page with the
        masks as pictures.

        Raises:
            InputError: the path cannot be written.
        """
        from rewriter.report.page import page_of

        save_report(path, self.to_dict, lambda: page_of(self))

    def table(self, *, every: bool = False) -> Table:
        """The report for a terminal: a row for the sites that are alike, or for every site."""
        from rewriter.report.table import table_of

        return table_of(self, every=every)

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160, force_terminal=False)
        console.print(self)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in str(text).splitlines()).strip("\n")


def _cost(site: Site) -> dict[str, str] | None:
    cost = cost_of(site)
    return None if cost is None else {name: str(value) for name, value in vars(cost).items()}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
