"""What an attention costs, as formulas in the sizes of a call: B batch, L queries, M keys.

Counts are those of the dense computation: what a mask hides is counted, because whether it is
skipped depends on the implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Expr, Integer

from rewriter.sites import Site
from rewriter.symbols import B, L, M, formula_text

__all__ = ["Cost", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """Formulas in B, L and M."""

    flops: Expr
    """Floating-point operations of the two products, a multiplication and an addition each."""
    elements: Expr
    """Elements of q, k, v and the output: what has to move through memory in any case."""
    scores: Expr
    """Elements of the scores: what moves several times more where they are materialised."""

    def __str__(self) -> str:
        return f"{formula_text(self.flops)} FLOP"


def cost_of(site: Site) -> Cost | None:
    """The cost of a site; None if its heads or dimensions are not known."""
    if not (site.heads and site.kv_heads and site.head_dim and site.value_dim):
        return None
    heads, dims = Integer(site.heads), site.head_dim + site.value_dim
    return Cost(
        flops=2 * heads * dims * B * L * M,
        elements=B * dims * (heads * L + site.kv_heads * M),
        scores=heads * B * L * M,
    )
