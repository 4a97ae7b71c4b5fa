"""Attention sinks: keys that get much weight whatever the query asks for.

Sources: massive activations (arXiv 2402.17762), learned sinks and off-by-one softmax. The sinks of
StreamingLLM, which keep their weight, are in `sparse`; VAR is in `sinks_visual`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import sympy
import torch
from sympy import Expr, Float, Integer, Symbol
from sympy.logic.boolalg import Boolean
from torch._subclasses.fake_tensor import FakeTensor

from rewriter import symbols as sym
from rewriter.errors import Declined, NotAppliedWarning, PassError
from rewriter.passbase import PATTERNS, Pass, option
from rewriter.passes.sparse import hides_padding_alone
from rewriter.spec import SoftmaxSpec, TensorArg, fresh_name
from rewriter.stages import Edit, Parameter, Source
from rewriter.symbols import Read, Where

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.sites import Site

__all__ = ["LearnedSinks", "RedirectSinks", "RemoveSinks", "massive_dimensions"]

LEAST = Float(1e-12)
"""A group with less of a row's weight than this has nothing to divide by, and gets nothing."""
_KEPT = ("future", "decode", "batch", "heads", "values")


def massive_dimensions(
    states: Tensor, *, above: float = 100.0, times_median: float = 1000.0
) -> list[int]:
    """The dimensions in which the first token has a massive activation (arXiv 2402.17762).

    Args:
        states: hidden states that enter a layer, `[L, C]` or `[B, L, C]`, the first token first
            (no padding on the left); of several rows, a dimension has to stand out in each.
        above: the least magnitude.
        times_median: the least multiple of the median magnitude of the same state.
    """
    first = states.detach().float().reshape(-1, *states.shape[-2:])[:, 0].abs()  # [B, C]
    least = (times_median * first.median(-1, keepdim=True).values).clamp(min=above)
    return cast(list[int], (first > least).all(0).nonzero().flatten().tolist())


# --- what the passes share ------------------------------------------------------------------------


def check_unedited(spec: SoftmaxSpec) -> None:
    """Raises Declined if another pass edits the weights already: groups do not combine. Nor does
    an edit with a route: no implementation edits weights over chosen blocks."""
    if spec.route is not None:
        raise Declined(f"keys are chosen at run time ({spec.route}), and weights cannot be edited")
    if spec.edit is not None:
        raise Declined(f"the weights are edited already ({spec.edit.text(spec.truths)})")


def _divides_share_out(edit: Edit) -> bool:
    """A sink takes the same share of every mass, and the factor of some group would be another one
    for it: it divides by what the keys have, and not by what they have of each other."""
    share, condition = Symbol("share", positive=True), Symbol("condition")
    smaller = {mass: share * mass for mass in sym.masses}
    for factor in edit.factors:
        found = factor.replace(sym.Maximum, lambda mass, least: mass)
        found = found.replace(sym.Where, lambda _, a, b: condition * a + b)
        if sympy.simplify(found.xreplace(smaller) - found) != 0:
            return True
    return False


def with_labels(spec: SoftmaxSpec, named: tuple[int, ...]) -> tuple[SoftmaxSpec, Expr]:
    """The spec with a tensor of the user's labels, and the label of key k. Generated keys have 0:
    labels belong to the prompt and are kept beside the KV cache. If no token has one of `named`,
    that is a warning."""
    name = fresh_name(spec, "labels")
    source = Source(_as_given, taps=("labels",), options=(("named", named),), later=0)
    tensors = (*spec.tensors, TensorArg(name, "int64", 2, source))
    return replace(spec, tensors=tensors), cast(Expr, Read(Symbol(name), sym.b, sym.k))


def _as_given(labels: Tensor, *, named: tuple[int, ...]) -> Tensor:
    if not isinstance(labels, FakeTensor):  # of an exported graph, which has no values yet
        held = {int(x) for x in labels.flatten().tolist()}
        missing = sorted({*named} - held)
        if missing:
            found = ", ".join(map(str, sorted(held)))
            message = f"no token has label {missing[0]}; the labels given are {found}"
            warnings.warn(message, NotAppliedWarning, stacklevel=2)
    return labels.to(torch.int64)


def where(condition: Boolean, a: Expr, b: Expr | int) -> Expr:
    """`Where`, for both branches as expressions."""
    return cast(Expr, Where(condition, a, b))


@dataclass(frozen=True)
class _OfGroup(Pass):
    """A pass on a group of keys: the first ones, or those with a label."""

    stage = "edit"
    patterns = PATTERNS
    first: int | None = option("the first keys are the group", default=None, at_least=0)
    label: int | None = option("keys with this label are the group", default=None, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.first is None) == (self.label is None):
            raise PassError(f"{self.name} needs first= or label=, and not both")

    def _group(self, spec: SoftmaxSpec, to: int | None = None) -> tuple[SoftmaxSpec, Expr]:
        """The spec with the labels, if they are read, and the group of key k: 1 for the chosen
        keys, 2 for other keys with the label `to`, else 0."""
        spec, chosen, label = self._members(spec, to)
        others = Integer(0) if to is None else where(sympy.Eq(label, to), Integer(2), 0)
        return spec, where(chosen, Integer(1), others)

    def _members(
        self, spec: SoftmaxSpec, to: int | None = None
    ) -> tuple[SoftmaxSpec, Boolean, Expr]:
        """The spec with the labels, if they are read; whether key k is chosen; its label."""
        label: Expr = Integer(0)
        if self.label is not None or to is not None:
            named = (self.label, to)
            spec, label = with_labels(spec, tuple(x for x in named if x is not None))
        chosen = sym.k < self.first if self.first is not None else sympy.Eq(label, self.label)
        return spec, cast(Boolean, chosen), label

    def _chosen(self, weights: Tensor) -> Tensor:
        if self.first is None:
            raise NotImplementedError
        return torch.arange(weights.shape[-1]) < self.first


@dataclass(frozen=True)
class RemoveSinks(_OfGroup):
    """Keys of the group get no weight, and the rest of each row is divided by what it had.

    The same as hiding those keys, but for a row that sees no other key: it stays as it was. A
    learned sink of the model counts as one of the others and takes its share of the weight. Keys
    are counted from the start of the key axis, padding included.

    Contract: limit; `first=0` is the identity. Patterns: all four.
    Declines when: another pass edits the weights already.
    """

    name = "sinks.remove"
    contract = "limit"
    identity = "sinks.remove(first=0)"
    laws = (*_KEPT, "row sums")
    examples = ("sinks.remove(first=1)", "sinks.remove(first=3)")

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        check_unedited(spec)
        if self.first == 0:
            return spec
        if spec.sink is not None:  # which takes what is left of a row, so nothing is divided by 0
            spec, chosen, _ = self._members(spec)
            return replace(spec, mask=cast(Boolean, spec.mask & ~chosen))
        rest = sym.masses[0]
        spec, group = self._group(spec)
        others = where(rest > LEAST, 1 / cast(Expr, sym.Maximum(rest, LEAST)), 1)
        return replace(spec, edit=Edit(group, (others, where(rest > LEAST, Integer(0), 1))))

    def meaning(self, weights: Tensor) -> Tensor:
        left = weights.masked_fill(self._chosen(weights), 0.0)
        rest = left.sum(-1, keepdim=True)
        return torch.where(rest > 0, left / rest, weights)


@dataclass(frozen=True)
class RedirectSinks(_OfGroup):
    """The weight of the group goes to the keys with label `to`, or to all others, in proportion.

    The group keeps `keep_fraction` of it. The sum of a row does not change. A row in which no key
    can take it stays as it was, and so does the share of a learned sink.

    Contract: limit; `keep_fraction=1` is the identity. Patterns: all four.
    Declines when: another pass edits the weights already.
    """

    name = "sinks.redirect"
    contract = "limit"
    identity = "sinks.redirect(first=1, keep_fraction=1)"
    laws = (*_KEPT, "row sums")
    examples = ("sinks.redirect(first=1)", "sinks.redirect(first=2, keep_fraction=0.5)")
    to: int | None = option(
        "label of the keys that get it; None: all others", default=None, at_least=1
    )
    keep_fraction: float = option("what the group keeps", default=0.0, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to is not None and self.to == self.label:
            raise PassError(f"{self.name}: to={self.to} is not another group; name another label")

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        check_unedited(spec)
        if self.keep_fraction == 1 or self.first == 0:
            return spec
        m0, m1, m2, *_ = sym.masses
        spec, group = self._group(spec, self.to)
        taker = m0 if self.to is None else m2
        moved = (1 - Float(self.keep_fraction)) * m1
        more = where(taker > LEAST, 1 + moved / cast(Expr, sym.Maximum(taker, LEAST)), 1)
        giver = where(taker > LEAST, Float(self.keep_fraction), 1)
        factors = (more, giver) if self.to is None else (Integer(1), giver, more)
        return replace(spec, edit=Edit(group, factors))

    def meaning(self, weights: Tensor) -> Tensor:
        if self.to is not None:
            raise NotImplementedError
        chosen = self._chosen(weights)
        left = weights.masked_fill(chosen, 0.0)
        taken = (weights - left) * (1 - self.keep_fraction)
        rest = left.sum(-1, keepdim=True)
        moved = weights - taken + left * taken.sum(-1, keepdim=True) / rest
        return torch.where(rest > 0, moved, weights)


@dataclass(frozen=True)
class LearnedSinks(Pass):
    """Each row has a further logit without a key, which takes weight away: one parameter a head.

    The parameter `[H]` starts at `initial` and is neither scaled nor masked. With `off_by_one` it
    is the number 0 and not trained: `exp(s) / (1 + sum exp(s))`. Sinks of the model are kept. Named
    together with `sinks.remove`, this comes first.

    Contract: limit; a logit of minus infinity is the identity, but for padded queries that see no
    key: they give 0 beside a sink, whatever hides the keys. Patterns: all four.
    Declines when: the model has sinks; `sinks.remove` was applied, which divides by what is left of
    a row and so gives back what a sink takes; the number of heads is unknown; a query that is no
    padding sees no key, and does not give 0.
    """

    name = "sinks.learned"
    contract = "limit"
    stage = "sink"
    identity = "sinks.learned(initial=-1000000000)"
    patterns = PATTERNS
    laws = tuple(x for x in (*_KEPT, "past") if x != "heads")
    empty_rows = False
    examples = ("sinks.learned", "sinks.learned(initial=1.5)", "sinks.learned(off_by_one=True)")
    initial: float = option("the logit of every head before training", default=0.0)
    off_by_one: bool = option("the logit is the number 0", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.off_by_one and self.initial:
            raise PassError(f"{self.name}: off_by_one is the logit 0; leave out initial")

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if spec.sink is not None:
            raise Declined("the model has sinks of its own, which are kept as they are")
        if spec.edit is not None and _divides_share_out(spec.edit):
            raise Declined(
                "what a sink takes would be divided out again: the weights are edited by "
                f"{spec.edit.text(spec.truths)}; name sinks.learned before sinks.remove"
            )
        if spec.masked != "zero" and not hides_padding_alone(site, spec):
            raise Declined(
                "a query that sees no key gives 0 beside a sink, and here it does not "
                f"({spec.masked}), and the mask {sym.formula_text(spec.mask, spec.truths)} leaves "
                "other queries than padding without a key; hide keys with a boolean mask"
            )
        spec = replace(spec, masked="zero")
        if self.off_by_one:
            return replace(spec, sink=Integer(0))
        if not site.heads:
            raise Declined("how many heads this site has is not known")
        name = fresh_name(spec, "sink")
        parameter = Parameter("logits", (site.heads,), self.initial)
        arg = TensorArg(name, "float32", 1, Source(_as_it_is, parameters=(parameter,)))
        return replace(
            spec, sink=cast(Expr, Read(Symbol(name), sym.h)), tensors=(*spec.tensors, arg)
        )


def _as_it_is(logits: Tensor) -> Tensor:
    return logits.float() * 1
