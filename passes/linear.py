"""Linear attention in the place of softmax attention: Lightning Attention (arXiv 2401.04658,
2405.17381), feature maps (arXiv 2006.16236, 2103.13076, 2402.04347), a softmax window with a linear
tail (arXiv 2410.10254).

A model that was trained with softmax computes something else afterwards, and has to be trained for
it. What is given up: a query that sees no key gives 0, whatever it gave before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import sympy
from sympy import Expr, Integer
from sympy.logic.boolalg import Boolean

from rewriter import symbols as sym
from rewriter.errors import Declined, PassError
from rewriter.linear import MAPS, POSITIVE, Features, LinearSpec, Map, Near, Norm
from rewriter.passbase import PATTERNS, Pass, option
from rewriter.passes.decay import RULES, decay_of
from rewriter.passes.heads import itself
from rewriter.passes.sparse import query_position
from rewriter.spec import SoftmaxSpec, TensorArg, fresh_name
from rewriter.stages import Parameter, Source
from rewriter.symbols import formula_text

if TYPE_CHECKING:
    from rewriter.sites import Site

__all__ = ["FeatureMaps", "Lightning", "WindowTail"]

FACTOR = -2.197
"""Where θ starts; softmax weights count `sigmoid(θ)` = 0.1 beside the linear ones."""


def _plain(site: Site, spec: SoftmaxSpec, *, scores: bool = False) -> LinearSpec:
    """The mask, the heads and the patch of a softmax spec, as a linear one without maps.

    Args:
        site: where it is; one query alone stands at the last key.
        spec: what the site computes.
        scores: its scores are kept, so they may be any formula.

    Raises:
        Declined: a stage has no place in linear attention.
    """
    if not scores and not spec.is_plain_score:
        raise Declined(
            "products of features take no score bias and no soft cap; the score is "
            f"{formula_text(spec.score, spec.truths)}"
        )
    for stage, text in (
        ("sink", "a sink"),
        ("route", "chosen blocks of keys"),
        ("edit", "an edit of weights"),
        ("local", "a convolution of the values"),
    ):
        if getattr(spec, stage) is not None:
            raise Declined(f"{text} has no place in linear attention")
    if spec.dropout:
        raise Declined("weights that are never computed cannot be dropped; set the dropout to 0")
    position, causal = query_position(site, spec)
    one_query = site.q_len == 1
    if one_query and not position.has(sym.q):
        position = position + sym.q  # which is 0: queries stand side by side
    if one_query and not site.is_cross:
        causal = True  # a step of decoding: the last query of the sequence sees every key
    return LinearSpec(
        position=position if causal else None,
        seen=_seen(spec, one_query=one_query),
        heads=spec.heads,
        tensors=spec.tensors,
        sizes=spec.sizes,
        active=spec.active,
        patch=spec.patch,
    )


def _seen(spec: SoftmaxSpec, *, one_query: bool) -> Boolean:
    """The terms of the mask that hide keys from all queries; the causal one is left out."""
    terms = [t for t in sympy.And.make_args(spec.mask) if not _is_causal(t, one_query=one_query)]
    other = [t for t in terms if t.has(sym.q)]
    if other:
        raise Declined(
            "linear attention hides later keys, and padding; the mask also says "
            f"{formula_text(other[0], spec.truths)}"
        )
    return cast(Boolean, sympy.And(*terms))


def _is_causal(term: Any, *, one_query: bool) -> bool:
    """The term says `k ≤ position` of the query; `query_position` reads it."""
    if not isinstance(term, sympy.Ge | sympy.Le | sympy.Gt | sympy.Lt):
        return False
    rest = term.gts - term.lts + sym.k
    return (rest.has(sym.q) or one_query) and not rest.has(sym.k)


# --- trained tensors ------------------------------------------------------------------------------


def _parameter(spec: LinearSpec, name: str, parameter: Parameter) -> tuple[str, LinearSpec]:
    """A tensor that is a new parameter: its name, and the spec that lists it."""
    name = fresh_name(spec, name)
    source = Source(itself, parameters=(parameter,))
    tensor = TensorArg(name, "float32", len(parameter.shape), source)
    return name, replace(spec, tensors=(*spec.tensors, tensor))


def _check_width(name: str, map: str, width: int) -> None:
    if width and map == "elu":
        raise PassError(f"{name}: the map elu has no matrix; width is for relu and exp")


def _mapped(site: Site, spec: LinearSpec, map: Map, width: int) -> LinearSpec:
    """The spec with maps of queries and keys; `relu` and `exp` have trained matrices."""
    if map not in ("relu", "exp"):
        return replace(spec, q_map=Features(map), k_map=Features(map))
    if not (site.heads and site.kv_heads and site.head_dim):
        raise Declined(f"the map {map} has a matrix for each head, and the heads are not known")
    maps, width = [], width or site.head_dim
    for of, heads in (("q", site.heads), ("k", site.kv_heads)):
        matrix = Parameter("weight", (heads, site.head_dim, width), "eye")
        weight, spec = _parameter(spec, f"{of}_map", matrix)
        bias = ""
        if map == "relu":
            offset = Parameter("bias", (heads, width))
            bias, spec = _parameter(spec, f"{of}_map_bias", offset)
        maps.append(Features(map, weight, bias))
    return replace(spec, q_map=maps[0], k_map=maps[1])


def _ended(spec: LinearSpec, **changes: Any) -> LinearSpec:
    """The spec with changes that may need the tensors that it lists, and without the others."""
    return cast(LinearSpec, replace(cast(Any, spec), **changes)).without_unused()


# --- passes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lightning(Pass):
    """Weights are `decay^distance · φ(q) · φ(k)`, and the output is normalised instead of them.

    The decay is fixed, for each head and layer, by `rule`. There is no `1 / sqrt(D)`: the scale of
    the model is dropped. Padding neither adds to the state nor lets it decay. φ is for q and k
    only; models that also map v do that in their projection.

    Contract: approximate; a model that was trained with softmax has to be trained again.
    Patterns: causal self; without a decay all.
    Declines when: a decay meets a site without a causal mask, or cross-attention; the mask hides
    more than later keys and padding; scores have a bias or a cap; there is a sink, a dropout, an
    edit or a route; the rule needs heads or layers that are not known, or `tnl` a single layer.
    """

    name = "linear.lightning"
    contract = "approximate"
    stage = "normaliser"
    identity = ""
    patterns = PATTERNS
    laws = ("future", "past", "decode", "batch")
    empty_rows = False
    examples = (
        "linear.lightning(rule=retnet)",
        "linear.lightning(rule=supra, map=identity, norm=none)",
        "linear.lightning(rule=none, map=elu, norm=sum)",
    )
    rule: str | None = option(
        "how the decay depends on head and layer; none: no decay", choices=RULES
    )
    map: str = option("features of q and k", default="silu", choices=MAPS)
    norm: str | None = option("what normalises the output", default="rms", choices=("rms", "sum"))

    def __post_init__(self) -> None:
        for name in ("rule", "norm"):
            if getattr(self, name) == "none":  # as a request reads it
                object.__setattr__(self, name, None)
        super().__post_init__()
        if self.norm == "sum" and self.map not in POSITIVE:
            raise PassError(
                f"{self.name}: features of {self.map} may be negative, so their products have no"
                f" sum to divide by; with norm=sum, map is one of {', '.join(POSITIVE)}"
            )

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> LinearSpec:
        plain = _plain(site, spec)
        if self.rule is not None:
            if site.is_cross:
                raise Declined("a decay needs one axis of positions; this site is cross-attention")
            if not plain.is_causal:
                raise Declined("a decay needs a causal mask; rule=none does without")
        decay = decay_of(self.rule, site.heads, site.layer, site.layers)
        features, norm = Features(cast(Map, self.map)), cast(Norm, self.norm or "none")
        return _ended(plain, q_map=features, k_map=features, decay=decay, norm=norm)


@dataclass(frozen=True)
class FeatureMaps(Pass):
    """Weights are `φ(q) · φ(k)`, divided by their sum.

    `elu` is `1 + ELU(x)` (arXiv 2006.16236) and has no parameters. `relu` is `ReLU(x W + b)` (T2R,
    arXiv 2103.13076) and `exp` has two halves, `exp(y - max y)` and `exp(min y - y)` with `y = x W`
    (Hedgehog, arXiv 2402.04347): W, trained, is a matrix for each query head and another one for
    each key head, the identity at first.

    Contract: approximate; the maps have to be trained to follow the softmax.
    Patterns: all.
    Declines when: the mask hides more than later keys and padding; scores have a bias or a cap;
    there is a sink, a dropout, an edit or a route; a trained map at a site of unknown heads.
    """

    name = "linear.features"
    contract = "approximate"
    stage = "normaliser"
    identity = ""
    patterns = PATTERNS
    laws = ("future", "past", "decode", "queries", "keys", "batch", "values")
    empty_rows = False
    examples = (
        "linear.features(map=elu)",
        "linear.features(map=exp)",
        "linear.features(map=relu, width=12)",
    )
    map: str = option("features of q and k", choices=("elu", "relu", "exp"))
    width: int = option("columns of W; 0 takes the head dim", default=0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width(self.name, self.map, self.width)

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> LinearSpec:
        mapped = _mapped(site, _plain(site, spec), cast(Map, self.map), self.width)
        return _ended(mapped, norm="sum")


@dataclass(frozen=True)
class WindowTail(Pass):
    """The last `window` keys keep their softmax weights, times a factor of the head; the older ones
    have linear weights; one denominator for both (LoLCATs, arXiv 2410.10254, sliding form).

    The window counts the query's own key, and no padding. The factor is `sigmoid(θ)`, trained, 0.1
    at first; scores are those of the model, with its scale, bias and cap. The maps of the linear
    weights are those of `linear.features`.

    Contract: limit; `window >= M` is the identity, whatever the factor and the maps, but for
    padded queries that see no key: they give 0, which other masks than boolean ones do not.
    Patterns: causal self.
    Declines when: the site has no causal mask, or is cross-attention; the mask hides more than
    later keys and padding; there is a sink, a dropout, an edit or a route; the heads of the site
    are not known.
    """

    name = "linear.window_tail"
    contract = "limit"
    stage = "normaliser"
    identity = "linear.window_tail(window=1000000000)"
    patterns = ("causal self",)
    laws = ("future", "past", "decode", "batch", "values")
    empty_rows = False
    examples = (
        "linear.window_tail(window=4)",
        "linear.window_tail(window=2, map=elu)",
        "linear.window_tail(window=5, map=relu, width=3)",
    )
    window: int = option("keys with softmax weights, the query's own included", at_least=1)
    map: str = option("features of older keys", default="exp", choices=("elu", "relu", "exp"))
    width: int = option("columns of W; 0 takes the head dim", default=0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width(self.name, self.map, self.width)

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> LinearSpec:
        if site.is_cross:
            raise Declined(
                "a window needs query and key positions on one axis; this site is cross-attention"
            )
        if not site.heads:
            raise Declined("how many heads this site has is not known")
        plain = _plain(site, spec, scores=True)
        if not plain.is_causal:
            raise Declined("a linear tail needs a causal mask: older keys join a state")
        mapped = _mapped(site, plain, cast(Map, self.map), self.width)
        theta, mapped = _parameter(mapped, "near", Parameter("theta", (site.heads,), FACTOR))
        factor = _sigmoid(sym.Read(sympy.Symbol(theta), sym.h))
        near = Near(self.window, spec.scale, spec.score, factor)
        return _ended(mapped, norm="sum", near=near)


def _sigmoid(x: Expr) -> Expr:
    return cast(Expr, Integer(1) / (1 + sympy.exp(-x)))
