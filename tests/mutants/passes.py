"""Wrong passes: classes that claim what the passes of the package claim, and do something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy import Float, Integer
from torch import Tensor

from mutants.catalogue import Mutant
from mutants.lifts import Broken
from rewriter import passbase
from rewriter import symbols as sym
from rewriter.errors import Declined
from rewriter.passbase import Pass, head_condition
from rewriter.passes import moh
from rewriter.passes.heads import HeadScale
from rewriter.passes.linear import FeatureMaps, Lightning, WindowTail
from rewriter.passes.moh import MixtureOfHeads
from rewriter.passes.routed import BiFormer, MoBA
from rewriter.passes.sinks import LearnedSinks, RedirectSinks, RemoveSinks
from rewriter.passes.sinks_visual import RedistributeVisual
from rewriter.passes.sparse import SlidingWindow, query_position
from rewriter.selectors import Selector
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.stages import Route
from rewriter.symbols import k

__all__ = ["MUTANTS", "MUTATED"]

MUTANTS: list[Mutant] = []
MUTATED: tuple[type[Pass], ...] = (
    Lightning,
    FeatureMaps,
    WindowTail,
    MoBA,
    BiFormer,
    RemoveSinks,
    RedirectSinks,
    LearnedSinks,
    RedistributeVisual,
    MixtureOfHeads,
)
"""Passes of which there are wrong ones here, besides the window and the scale of heads."""

_matches, _blend, _to_dict = Selector.matches, passbase.blend, SoftmaxSpec.to_dict


def instead_of(kind: type[Pass], name: str, expected: str, breaks: str = "") -> Any:
    """A class that differs from a pass by its `rewrite`."""

    def add(rewrite: Callable[..., SoftmaxSpec]) -> Any:
        body = {"rewrite": rewrite, "__doc__": kind.__doc__, "__module__": __name__}
        made = dataclass(frozen=True)(type(rewrite.__name__, (kind,), body))
        MUTANTS.append(Mutant(name, "pass", breaks, expected, made))
        return rewrite

    return add


def near(self: Any, site: Site, spec: SoftmaxSpec, *, more: int = 0) -> Any:
    position, causal = query_position(site, spec)
    back = position - k
    return (back if causal else sym.Where(back >= 0, back, -back)) < self.window + more


def self_only(site: Site) -> None:
    if site.is_cross:
        raise Declined("cross-attention")


@instead_of(SlidingWindow, "a window of w + 1 keys", "meaning", "the query itself not counted")
def window_wider(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    self_only(site)
    return replace(spec, mask=spec.mask & (near(self, site, spec, more=1) | (k < self.sinks)))


@instead_of(SlidingWindow, "a window without its sinks", "meaning")
def window_without_sinks(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    self_only(site)
    return replace(spec, mask=spec.mask & near(self, site, spec))


@instead_of(SlidingWindow, "a window with one sink more", "meaning", "k <= sinks")
def window_more_sinks(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    self_only(site)
    return replace(
        spec, mask=spec.mask & (near(self, site, spec) | (k < self.sinks + (self.sinks > 0)))
    )


@instead_of(SlidingWindow, "sinks beyond the mask of the model", "future", "they see the future")
def sinks_unmasked(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    self_only(site)
    return replace(spec, mask=(spec.mask & near(self, site, spec)) | (k < self.sinks))


@instead_of(SlidingWindow, "a window instead of the mask", "identity", "the old mask is replaced")
def mask_replaced(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    self_only(site)
    return replace(spec, mask=near(self, site, spec) | (k < self.sinks)).without_unused()


@instead_of(SlidingWindow, "a window that ignores the cache", "law: decode", "q for q + M - L")
def cache_ignored(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    self_only(site)
    back = sym.q - k
    seen = (back < self.window) & (-back < self.window) | (k < self.sinks)
    return replace(spec, mask=spec.mask & seen)


@instead_of(SlidingWindow, "a window on cross-attention", "declines", "without common positions")
def window_on_cross(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, mask=spec.mask & (near(self, site, spec) | (k < self.sinks)))


@instead_of(SlidingWindow, "a window of blocks", "meaning", "keys of the query's own block only")
def block_window(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    self_only(site)
    position, _ = query_position(site, spec)
    start = sym.IDiv(position, self.window) * self.window
    return replace(spec, mask=spec.mask & ((k >= start) | (k < self.sinks)))


@instead_of(SlidingWindow, "a window that does nothing", "changes something")
def window_unused(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    self_only(site)
    return spec


@instead_of(SlidingWindow, "a pass that declines everything", "rewrite")
def declining(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    raise Declined("not today")


@instead_of(SlidingWindow, "a refusal without a reason", "declines")
def silent(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    if site.is_cross:
        raise Declined("")
    return window_right(self, site, spec)


def window_right(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return SlidingWindow.rewrite(self, site, spec)


_CALLS: list[int] = []


@instead_of(SlidingWindow, "a pass that remembers", "purity", "the second call gives another spec")
def remembering(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    _CALLS.append(1)
    found = window_right(self, site, spec)
    return replace(found, heads=Float(1.0 + 1e-9 * len(_CALLS)) * found.heads)


def scaled(self: Any, site: Site, spec: SoftmaxSpec, heads: Any, by: float) -> SoftmaxSpec:
    here = head_condition(sorted({head % site.heads for head in heads}))
    return replace(spec, heads=spec.heads * sym.Where(here, Float(by), 1))


@instead_of(HeadScale, "heads counted from 1", "meaning")
def heads_from_one(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return scaled(self, site, spec, [h - 1 for h in self.heads], self.by)


@instead_of(HeadScale, "the key head scaled", "meaning", "all query heads that share it")
def key_heads(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    group = max(1, site.heads // site.kv_heads)
    heads = {h % site.heads // group * group + i for h in self.heads for i in range(group)}
    return scaled(self, site, spec, heads, self.by)


@instead_of(HeadScale, "other heads scaled", "meaning")
def other_heads(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    chosen = {h % site.heads for h in self.heads}
    return scaled(self, site, spec, set(range(site.heads)) - chosen or chosen, self.by)


@instead_of(HeadScale, "a factor applied twice", "meaning")
def factor_twice(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return scaled(self, site, spec, self.heads, self.by**2)


@instead_of(HeadScale, "a factor without its sign", "meaning")
def factor_unsigned(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return scaled(self, site, spec, self.heads, abs(self.by))


@instead_of(
    HeadScale, "a factor on the scores", "meaning", "a sharper softmax, not a scaled output"
)
def factor_on_scores(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    here = head_condition(sorted({head % site.heads for head in self.heads}))
    return replace(spec, score=spec.score * sym.Where(here, Float(self.by), 1))


@instead_of(HeadScale, "a factor that is added", "identity", "1 + by, so that 0 is the identity")
def factor_added(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return scaled(self, site, spec, self.heads, 1.0 + self.by)


@instead_of(HeadScale, "the last factor stays", "identity", "an earlier gate is replaced")
def gate_replaced(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return scaled(self, site, replace(spec, heads=Float(1.0)).without_unused(), self.heads, self.by)


# --- linear attention -----------------------------------------------------------------------------


def changing(kind: type[Pass], name: str, expected: str, breaks: str = "") -> Any:
    """A class that changes what the `rewrite` of a pass gives."""

    def add(change: Callable[[Any, Site, SoftmaxSpec, Any], Any]) -> Any:
        def rewrite(self: Any, site: Site, spec: SoftmaxSpec) -> Any:
            return change(self, site, spec, kind.rewrite(self, site, spec))

        rewrite.__name__ = change.__name__
        instead_of(kind, name, expected, breaks)(rewrite)
        return change

    return add


def at(new: Any, where: Callable[[Any], Any]) -> Any:
    """A linear spec whose queries stand elsewhere."""
    return new if new.position is None else replace(new, position=where(new.position))


def from_start(position: Any) -> Any:
    return position.xreplace({sym.M: sym.L})


@changing(Lightning, "lightning: the cache ignored", "law: decode", "q for q + M - L")
def lightning_from_start(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return at(new, from_start)


@changing(Lightning, "lightning: the own key not in the state", "law: past", "read, then updated")
def lightning_late(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return at(new, lambda position: position - 1)


@changing(
    Lightning, "lightning: a sum over all keys", "law: future", "the state after the last one"
)
def lightning_open(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, position=None, decay=Integer(0)).without_unused()


@changing(FeatureMaps, "features: the cache ignored", "law: decode")
def features_from_start(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return at(new, from_start)


@changing(FeatureMaps, "features: a sum over all keys", "law: future")
def features_open(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, position=None).without_unused()


@changing(FeatureMaps, "features: the own key left out", "law: past")
def features_late(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return at(new, lambda position: position - 1)


@changing(WindowTail, "window tail: padding takes part", "identity")
def tail_of_padding(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, seen=sympy.true).without_unused()


@changing(WindowTail, "window tail: near scores without their scale", "identity")
def tail_unscaled(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, near=replace(new.near, scale=Integer(1)))


@changing(WindowTail, "window tail: near scores without bias and cap", "identity")
def tail_without_bias(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, near=replace(new.near, score=sym.s)).without_unused()


# --- chosen blocks --------------------------------------------------------------------------------


@changing(MoBA, "moba: the cache ignored", "law: decode", "block 0 is the own one of each step")
def moba_from_start(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, route=replace(new.route, position=from_start(new.route.position)))


@instead_of(MoBA, "moba on a site that is not causal", "declines", "no block comes before")
def moba_noncausal(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return MoBA.rewrite(self, replace(site, q_len=1), spec)


@changing(MoBA, "moba: blocks instead of the mask", "law: future", "the own block is seen whole")
def moba_unmasked(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, mask=sympy.true).without_unused()


@changing(BiFormer, "biformer: regions instead of the mask", "identity", "padding is seen")
def biformer_unmasked(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, mask=sympy.true).without_unused()


@changing(BiFormer, "biformer: four regions, whatever was asked for", "identity")
def biformer_of_four(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, route=replace(new.route, regions=2))


@instead_of(BiFormer, "biformer on a causal site", "declines", "a region sees later tokens")
def biformer_causal(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    self_only(site)
    if site.q_len != site.kv_len:
        raise Declined("other keys than queries")
    grid, extra = self._grid(site)
    route = Route("region", self.topk, grid=grid, regions=self.regions, extra=extra)
    return replace(spec, route=route)


# --- sinks ----------------------------------------------------------------------------------------


def later(new: Any) -> Any:
    """An edited spec whose groups begin one key later."""
    if new.edit is None:
        return new
    group = new.edit.group.xreplace({k: sym.Maximum(k - 1, 0)})
    return replace(new, edit=replace(new.edit, group=group))


def factors(new: Any, change: Callable[..., tuple[Any, ...]]) -> Any:
    """An edited spec with other factors."""
    if new.edit is None:
        return new
    return replace(new, edit=replace(new.edit, factors=change(*new.edit.factors)))


@changing(RemoveSinks, "remove: the group one key late", "meaning", "k <= first")
def remove_late(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return later(new)


@changing(RemoveSinks, "remove: the rest not divided", "meaning")
def remove_undivided(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return factors(new, lambda others, chosen: (Integer(1), chosen))


@changing(RemoveSinks, "remove: a row of sinks alone gives 0", "meaning", "as a mask does")
def remove_everything(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return factors(new, lambda others, chosen: (others, Integer(0)))


@changing(RedirectSinks, "redirect: the group one key late", "meaning")
def redirect_late(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return later(new)


@instead_of(RedirectSinks, "redirect: the fraction taken, not the one kept", "identity")
def redirect_taken(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    other = replace(self, keep_fraction=1 - self.keep_fraction)
    return RedirectSinks.rewrite(other, site, spec)


@changing(
    RedirectSinks, "redirect: not in proportion to the mass", "law: row sums", "a / m left out"
)
def redirect_undivided(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return factors(new, lambda taker, *rest: (1 + sym.masses[1], *rest))


@instead_of(LearnedSinks, "learned: the model's sink replaced", "identity")
def learned_instead(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return LearnedSinks.rewrite(self, site, replace(spec, sink=None).without_unused())


@instead_of(LearnedSinks, "learned: the model's sink kept twice", "identity", "and none is new")
def learned_twice(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    if spec.sink is None:
        return LearnedSinks.rewrite(self, site, spec)
    return replace(spec, sink=spec.sink + sympy.log(2))


@changing(LearnedSinks, "learned: a logit with the wrong sign", "identity", "exp(-sink)")
def learned_negated(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, sink=-new.sink)


@changing(RedistributeVisual, "var: an image that earlier rows see", "law: future")
def var_unmasked(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return new if new.edit is None else replace(new, mask=new.mask | (new.edit.group >= 2))


@instead_of(RedistributeVisual, "var on a site that is not causal", "declines")
def var_noncausal(self: Any, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
    return RedistributeVisual.rewrite(self, replace(site, q_len=1), spec)


# --- mixture of heads -----------------------------------------------------------------------------


@changing(MixtureOfHeads, "moh: an earlier gate replaced", "identity")
def moh_alone(self: Any, site: Site, spec: SoftmaxSpec, new: Any) -> Any:
    return replace(new, heads=new.heads / spec.heads).without_unused()


# --- what a pass is made of -----------------------------------------------------------------------


def around(
    owner: Any,
    attribute: str,
    name: str,
    expected: str,
    breaks: str = "",
    kind: type[Pass] = SlidingWindow,
) -> Any:
    """The pass as it is, made or applied by something broken."""

    def add(function: Callable[..., Any]) -> Any:
        made = kind, Broken(((owner, attribute, function),))
        MUTANTS.append(Mutant(name, "pass", breaks, expected, made))
        return function

    return add


_linear_gate, _placed = moh.linear_gate, moh._placed


@around(
    moh, "linear_gate", "moh: the gates of the paper", "identity", "a1 g and a2 r", MixtureOfHeads
)
def moh_of_paper(x: Tensor, *weights: Tensor, **options: Any) -> Tensor:
    return _linear_gate(x, *weights, **{**options, "mode": "paper"})


@around(moh, "_placed", "moh: a shared head gated", "identity", "by the best other", MixtureOfHeads)
def moh_shared_gated(parts: list[Tensor], shared: Any, others: Any) -> Tensor:
    if not (shared and others):
        return _placed(parts, shared, others)
    best = torch.sigmoid(parts[1].amax(-1, keepdim=True))
    return _placed([parts[0] * best, parts[1]], shared, others)


@around(moh, "_softmax", "moh: a softmax over tokens", "identity", kind=MixtureOfHeads)
def moh_over_tokens(logits: Tensor, times: int, kept: Tensor | None = None) -> Tensor:
    found = torch.softmax(logits, dim=1) if kept is None else torch.softmax(logits, 1) * kept
    return found * times


# --- what applies a pass --------------------------------------------------------------------------


@around(Selector, "matches", "a request for one layer changes every layer", "selected layers")
def matches_everything(self: Any, site: Any, layer_count: int) -> bool:
    return True


@around(Selector, "matches", "layers counted from 1", "selected layers")
def matches_the_next(self: Any, site: Any, layer_count: int) -> bool:
    return _matches(self, replace(site, layer=site.layer + 1), layer_count)


@around(passbase, "blend", "a request for one head changes every head", "selected heads")
def blended_not(new: SoftmaxSpec, old: SoftmaxSpec, heads: Any, count: int) -> SoftmaxSpec:
    return new


@around(passbase, "blend", "a request for one head changes the others", "selected heads")
def blended_backwards(new: SoftmaxSpec, old: SoftmaxSpec, heads: Any, count: int) -> SoftmaxSpec:
    return _blend(old, new, heads, count)


@around(SoftmaxSpec, "to_dict", "JSON without the mask", "purity", "a plan that forgets a stage")
def without_mask(self: Any) -> Any:
    return _to_dict(self) | {"mask": True}
