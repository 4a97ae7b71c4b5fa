"""Sliding windows with sinks: Mistral 7B (arXiv 2310.06825), StreamingLLM (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sympy
import torch
from sympy import Abs, Expr

from rewriter import symbols as sym
from rewriter.errors import Declined
from rewriter.passbase import Pass, option
from rewriter.spec import SoftmaxSpec

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.sites import Site


def query_position(site: Site, spec: SoftmaxSpec) -> tuple[Expr, bool]:
    """Where query q stands on the key axis, and whether it sees nothing behind that place.

    A mask `k ≤ position` says it itself, so a cache with free room at its end is read rightly; of
    a single query, whose own key is the last that it sees, the position may be without q. Without
    such a mask, the queries are the last L of the M keys.
    """
    found = set()
    for term in sympy.And.make_args(spec.mask):
        if isinstance(term, sympy.Ge | sympy.Le | sympy.Gt | sympy.Lt):
            rest = term.gts - term.lts + sym.k  # the term says k ≤ rest, or k < rest
            if not rest.has(sym.k) and (rest.has(sym.q) or site.q_len == 1):
                found.add(rest if isinstance(term, sympy.Ge | sympy.Le) else rest - 1)
    if len(found) > 1:
        texts = " and ".join(sorted(map(str, found)))
        raise Declined(f"the mask ends at two places ({texts}), so positions are not known")
    return (found.pop(), True) if found else (sym.q + sym.M - sym.L, False)


def hides_padding_alone(site: Site, spec: SoftmaxSpec) -> bool:
    """A query that sees no key is padding itself: it sees its own key, unless that is hidden from
    every query. Of cross-attention: all keys are hidden from it, as from every query, or every
    query sees the first key."""
    terms = [t for t in sympy.And.make_args(spec.mask) if t.has(sym.q)]
    if site.is_cross:
        return not terms or spec.mask.xreplace({sym.k: sympy.Integer(0)}) == sympy.true
    position, _ = query_position(site, spec)
    behind = sympy.expand(position - sym.q).as_coeff_Add()[0] < 0  # the first query stands nowhere
    return not behind and all(t.xreplace({sym.k: position}) == sympy.true for t in terms)


@dataclass(frozen=True)
class SlidingWindow(Pass):
    """Each query sees the last `window` keys, its own included, and the first `sinks` keys.

    Without a causal mask the window is open to both sides: keys at a distance below `window`.
    What the mask of the model hides stays hidden, sinks too. Positions are those of the key axis,
    padding included: query q stands where the causal mask of the model ends, else at `q + M - L`.

    Contract: limit; `window >= M` is the identity. Patterns: causal self, noncausal self.
    Declines when: the site is cross-attention (no common positions).
    """

    name = "sparse.window"
    contract = "limit"
    stage = "mask"
    identity = "sparse.window(window=1000000000)"
    patterns = ("noncausal self", "causal self")
    laws = ("future", "past", "decode", "batch", "heads", "row sums", "values", "shift")
    examples = (
        "sparse.window(window=2)",
        "sparse.window(window=5)",
        "sparse.window(window=3, sinks=2)",
    )
    window: int = option("keys visible to one query, its own included", at_least=1)
    sinks: int = option("first keys that stay visible", default=0, at_least=0)

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if site.is_cross:
            raise Declined(
                "a window needs query and key positions on one axis; this site is cross-attention"
            )
        position, causal = query_position(site, spec)
        back = position - sym.k
        near = (back if causal else Abs(back)) < self.window
        return replace(spec, mask=spec.mask & (near | (sym.k < self.sinks)))

    def meaning(self, weights: Tensor) -> Tensor:
        q_len, kv_len = weights.shape[-2:]
        key = torch.arange(kv_len)
        distance = (torch.arange(kv_len - q_len, kv_len)[:, None] - key).abs()
        kept = weights * ((distance < self.window) | (key < self.sinks))
        return (kept / kept.sum(-1, keepdim=True)).nan_to_num(0.0)  # no key is left: 0
