"""Head scaling and ablation: "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sympy import Float, Integer

from rewriter import symbols as sym
from rewriter.errors import Declined
from rewriter.passbase import PATTERNS, Pass, head_condition, heads_text, option
from rewriter.spec import SoftmaxSpec

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.sites import Site


@dataclass(frozen=True)
class HeadScale(Pass):
    """The output of the query heads in `heads` is multiplied by `by`; 0 ablates them.

    Head -1 is the last one. The product stands after the values and before the output projection.

    Contract: limit; `by=1` is the identity. Patterns: all.
    Declines when: the site has no such head, or its number of heads is unknown.
    """

    name = "heads.scale"
    contract = "limit"
    stage = "heads"
    identity = "heads.scale(heads=[0], by=1)"
    patterns = PATTERNS
    laws = ("future", "past", "decode", "queries", "keys", "batch", "values", "shift")
    examples = (
        "heads.scale(heads=[0, -1], by=0.5)",
        "heads.scale(heads=[2], by=0)",
        "heads.scale(heads=[1, 2, 3], by=-2)",
    )
    heads: tuple[int, ...] = option("query heads that are scaled")
    by: float = option("factor of their output")

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if not site.heads:
            raise Declined("how many heads this site has is not known")
        for head in self.heads:
            if not -site.heads <= head < site.heads:
                raise Declined(f"head {head} does not exist; {heads_text(site.heads)}")
        here = head_condition(sorted({head % site.heads for head in self.heads}))
        factor = Integer(int(self.by)) if self.by.is_integer() else Float(self.by)
        return replace(spec, heads=spec.heads * sym.Where(here, factor, 1))

    def meaning(self, weights: Tensor) -> Tensor:
        factor = weights.new_ones(weights.shape[1], 1, 1)
        for head in self.heads:
            factor[head] = self.by
        return weights * factor
