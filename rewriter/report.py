"""What was found, what was done about it and why: one line a site."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewriter.cost import cost_of
from rewriter.sites import Site
from rewriter.spec import Spec

__all__ = ["Decision", "Report", "SiteReport"]

Decision = Literal["rewritten", "kept", "not attention"]


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
    """Every softmax of a model's captured graphs."""

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
        return tuple(s for s in self.sites if s.decision != "not attention")

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
            "opaque_reads": self.opaque,
            "softmaxes": self.softmaxes,
            "graph_breaks": self.breaks,
            "recompiles": self.recompiles,
            "notes": list(self.notes),
            "sites": [s.to_dict() for s in self.sites],
        }

    def __rich__(self) -> Table:
        table = Table(
            title=self._title(), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        many = self.graphs > 1
        for name in (*(("graph",) if many else ()), "layer", "site", "kind"):
            table.add_column(name, no_wrap=name != "site")
        table.add_column("formula", overflow="fold")
        table.add_column("decision", overflow="fold")
        for s in self.sites:
            layer = "" if s.site.layer is None else str(s.site.layer)
            row = [layer, s.site.name, _kind(s), _formula(s), _decision(s)]
            table.add_row(*(Text(x) for x in ([str(s.graph)] if many else []) + row))
        if self.notes:
            table.caption = Text("\n".join(self.notes))
            table.caption_justify = "left"
        return table

    def _title(self) -> str:
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        found = f"{len(self.attention)} attention sites in {graphs}"
        return f"{found}, {len(self.rewritten)} rewritten, {self.opaque} opaque reads"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160, force_terminal=False)
        console.print(self)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in str(text).splitlines()).strip("\n")


def _cost(site: Site) -> dict[str, str] | None:
    cost = cost_of(site)
    return None if cost is None else {name: str(value) for name, value in vars(cost).items()}


def _kind(s: SiteReport) -> str:
    site = s.site
    if site.spec is None:
        return site.kind
    cost = cost_of(site)
    heads = f"{site.heads or '?'}"
    if site.heads != site.kv_heads:
        heads = f"GQA {site.heads or '?'}/{site.kv_heads or '?'}"
    dims = (
        f"{site.head_dim}"
        if site.head_dim == site.value_dim
        else f"{site.head_dim}/{site.value_dim}"
    )
    text = f"{'cross' if site.is_cross else 'self'}, {heads} heads, D {dims}"
    return f"{text}\n{cost}" if cost is not None else text


def _formula(s: SiteReport) -> str:
    if s.site.spec is None:
        return "-"
    if s.after is None or s.after == s.site.spec:
        return str(s.site.spec)
    return f"{s.after}\n  was: {s.site.spec}"


def _decision(s: SiteReport) -> str:
    text: str = s.decision
    if s.passes:
        text += f" by {', '.join(s.passes)}"
    if s.lowering:
        text += f" ({s.lowering})"
    if s.reason:
        text += f": {s.reason}"
    return "\n".join([text, *s.site.notes])
