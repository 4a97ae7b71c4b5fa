"""Wrong passes: classes that claim what the passes of the package claim, and do something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sympy import Float

from mutants.catalogue import Mutant
from mutants.lifts import Broken
from rewriter import passbase
from rewriter import symbols as sym
from rewriter.errors import Declined
from rewriter.passbase import Pass, head_condition
from rewriter.passes.heads import HeadScale
from rewriter.passes.sparse import SlidingWindow, query_position
from rewriter.selectors import Selector
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import k

__all__ = ["MUTANTS"]

MUTANTS: list[Mutant] = []

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


# --- what applies a pass --------------------------------------------------------------------------


def around(owner: Any, attribute: str, name: str, expected: str, breaks: str = "") -> Any:
    """The window as it is, applied by something broken."""

    def add(function: Callable[..., Any]) -> Any:
        made = SlidingWindow, Broken(((owner, attribute, function),))
        MUTANTS.append(Mutant(name, "pass", breaks, expected, made))
        return function

    return add


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
