"""What an attention costs, as formulas in the sizes of a call: B batch, L queries, M keys.

Counts are those of the dense computation: what a mask hides is counted, because whether it is
skipped depends on the implementation. What a spec itself leaves out is not counted: blocks of keys
that a route does not choose, heads that are off; and linear attention has no scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Expr, Integer

from rewriter.linear import Features, LinearSpec
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.stages import Route
from rewriter.symbols import B, L, M, formula_text, h

__all__ = ["Cost", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """Formulas in B, L and M."""

    flops: Expr
    """Floating-point operations of the products, a multiplication and an addition each."""
    elements: Expr
    """Elements of q, k, v and the output: what has to move through memory in any case."""
    scores: Expr
    """Elements of the scores: what moves several times more where they are materialised."""

    def __str__(self) -> str:
        return f"{formula_text(self.flops)} FLOP"


def cost_of(site: Site, spec: Spec | None = None) -> Cost | None:
    """The cost of a site; None if its heads or dimensions are not known.

    Args:
        site: where it stands, and its dimensions.
        spec: what it computes by now, such as `SiteReport.after`; None: all scores of all heads.
    """
    if not (site.heads and site.kv_heads and site.head_dim and site.value_dim):
        return None
    dims = site.head_dim + site.value_dim
    elements = B * dims * (site.heads * L + site.kv_heads * M)
    if isinstance(spec, LinearSpec):
        near = 0 if spec.near is None else spec.near.window
        scores = site.heads * B * L * near
        return Cost(_linear_flops(site, spec) + 2 * dims * scores, elements, scores)
    active = None if spec is None else spec.active
    heads = Integer(site.heads if active is None else min(active, site.heads))
    scores, chosen = heads * B * L * M, Integer(0)
    if isinstance(spec, SoftmaxSpec) and spec.route is not None:
        scores, chosen = _routed(site, spec.route, heads)
    return Cost(2 * dims * scores + chosen, elements, scores)


def _routed(site: Site, route: Route, heads: Expr) -> tuple[Expr, Expr]:
    """Scores of the chosen blocks, at lengths where some are left out; and what it takes to choose:
    a product of each query with the mean of each block, or of the means of the regions."""
    if route.by == "query":
        seen = Integer(route.topk * route.block)
        blocks = M / Integer(route.block)
        return heads * B * L * seen, 2 * heads * site.head_dim * B * L * blocks
    (high, wide), (down, across) = route.region, route.region_counts
    count = down * across
    seen = Integer(min(route.topk, count) * high * wide + route.extra)
    dense = heads * B * route.extra * M  # the first queries see every key
    return heads * B * (L - route.extra) * seen + dense, 2 * heads * site.head_dim * B * count**2


def _linear_flops(site: Site, spec: LinearSpec) -> Expr:
    """The feature maps, the state that is built, the state that is read; with a sum beside the
    values where the output is divided by it."""
    width = site.value_dim + (1 if spec.norm == "sum" else 0)
    on = site.heads if spec.active is None else min(spec.active, site.heads)
    own = any(x.has(h) for x in (spec.decay, spec.key_weight, spec.seen))
    states = site.heads if own else site.kv_heads  # query heads share what does not depend on them
    flops = 2 * width * B * states * _features(spec, spec.k_map, site) * M
    flops += 2 * width * B * on * _features(spec, spec.q_map, site) * L
    for phi, rows in ((spec.q_map, site.heads * L), (spec.k_map, site.kv_heads * M)):
        if phi.weight:
            flops += 2 * B * rows * site.head_dim * _columns(spec, phi, site)
    return flops


def _columns(spec: LinearSpec, phi: Features, site: Site) -> int:
    """Columns of the matrix of a map; as many as the head has dimensions, where no parameter
    says."""
    source = spec.tensor(phi.weight).source if phi.weight else None
    shapes = [p.shape for p in source.parameters if len(p.shape) == 3] if source else []
    return shapes[0][-1] if shapes else site.head_dim


def _features(spec: LinearSpec, phi: Features, site: Site) -> int:
    """How many features a row has."""
    return (2 if phi.map == "exp" else 1) * _columns(spec, phi, site)
