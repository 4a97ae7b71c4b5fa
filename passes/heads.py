"""Heads that are scaled, ablated, gated or replaced: "Are Sixteen Heads Really Better than One?"
(arXiv 1905.10650), gated attention (arXiv 2505.06708), activation patching.

Each acts on what a head gives, after the values and before the output projection, whose bias is
not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import sympy
import torch
from sympy import Expr, Float, Integer, Symbol
from sympy.logic.boolalg import Boolean

from rewriter import symbols as sym
from rewriter.errors import Declined
from rewriter.passbase import PATTERNS, Pass, head_condition, heads_text, option
from rewriter.spec import Spec, TensorArg, fresh_name
from rewriter.stages import Parameter, Patch, Source
from rewriter.symbols import Read

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.sites import Site

__all__ = [
    "HeadAblate",
    "HeadGate",
    "HeadPatch",
    "HeadScale",
    "existing_heads",
    "itself",
    "with_factor",
]


def existing_heads(site: Site, heads: tuple[int, ...] | None) -> tuple[int, ...]:
    """The heads in ascending order, -1 being the last one; None: all.

    Raises:
        Declined: the site has no such head, or its number of heads is unknown.
    """
    if not site.heads:
        raise Declined("how many heads this site has is not known")
    for head in heads or ():
        if not -site.heads <= head < site.heads:
            raise Declined(f"head {head} does not exist; {heads_text(site.heads)}")
    everything = range(site.heads)
    return tuple(everything if heads is None else sorted({h % site.heads for h in heads}))


def with_factor(spec: Spec, factor: Expr, most: int | None = None) -> Any:
    """The spec whose output is multiplied by one more factor.

    Args:
        spec: of any family.
        factor: in b, h, q and reads.
        most: at most so many heads of a token have a factor that is not 0; None: all may.
    """
    known = [n for n in (spec.active, most) if n is not None]
    changes = {"heads": spec.heads * factor, "active": min(known, default=None)}
    return replace(cast(Any, spec), **changes)


def factor_text(by: float) -> Expr:
    """The number as a formula has it: whole numbers are integers."""
    return cast(Expr, Integer(int(by)) if by.is_integer() else Float(by))


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
    families = ("softmax", "linear")
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

    def rewrite(self, site: Site, spec: Spec) -> Any:
        here = head_condition(existing_heads(site, self.heads))
        factor = sym.Where(here, factor_text(self.by), 1)
        return replace(cast(Any, spec), heads=spec.heads * factor)

    def meaning(self, weights: Tensor) -> Tensor:
        factor = weights.new_ones(weights.shape[1], 1, 1)
        for head in self.heads:
            factor[head] = self.by
        return weights * factor


@dataclass(frozen=True)
class HeadAblate(Pass):
    """The query heads in `heads` give 0, and their work may be left out.

    All heads if none are named: meant for `heads.ablate @ 3 heads=1`. `by` other than 0 leaves that
    share of the heads (the ξ of arXiv 1905.10650), as `heads.scale` does. A head whose part of the
    output projection is removed gives the same.

    Contract: limit; `by=1` is the identity. Patterns: all.
    Declines when: the site has no such head, or its number of heads is unknown.
    """

    name = "heads.ablate"
    contract = "limit"
    stage = "heads"
    families = ("softmax", "linear")
    identity = "heads.ablate(by=1)"
    patterns = PATTERNS
    laws = ("future", "past", "decode", "queries", "keys", "batch", "values", "shift")
    examples = ("heads.ablate(heads=[1])", "heads.ablate(heads=[0, -1])")
    heads: tuple[int, ...] | None = option("query heads that are ablated; all", default=None)
    by: float = option("what is left of their output, as a factor", default=0.0)

    def rewrite(self, site: Site, spec: Spec) -> Any:
        found = existing_heads(site, self.heads)
        if self.by == 1.0:
            return spec
        is_all = len(found) == site.heads
        left = factor_text(self.by)
        factor = left if is_all else cast(Expr, sym.Where(head_condition(found), left, 1))
        return with_factor(spec, factor, None if self.by else site.heads - len(found))

    def meaning(self, weights: Tensor) -> Tensor:
        factor = weights.new_ones(weights.shape[1], 1, 1)
        factor[list(range(weights.shape[1]) if self.heads is None else self.heads)] = self.by
        return weights * factor


# --- gates ----------------------------------------------------------------------------------------


def gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`2 sigmoid(x W^T + b)` of inputs `[B, L, C]` and a weight `[H, C]`, as `[B, H, L]`.

    The logits are float32 at least: gates of half precision are reported to make losses jump.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = torch.nn.functional.linear(x.to(wide), weight.to(wide), bias.to(wide))
    return 2.0 * torch.sigmoid(logits).mT


@dataclass(frozen=True)
class HeadGate(Pass):
    """The output of each head is multiplied by `2 sigmoid(x W + b)`, x what feeds the queries.

    One number a head and token: the headwise form of gated attention (arXiv 2505.06708), which
    places its gate here, without the 2. With it a new gate is exactly 1: W `[H, C]` and b `[H]`
    start at 0, and `2 sigmoid(0) = 1`; theirs is trained from scratch and starts near one half.

    Contract: limit; the identity until its parameters are trained. Patterns: all.
    Declines when: what feeds the queries was not found; the number of heads is unknown.
    """

    name = "heads.gate"
    contract = "limit"
    stage = "heads"
    families = ("softmax", "linear")
    identity = "heads.gate"
    patterns = PATTERNS
    laws = ("future", "values")
    examples = ("heads.gate",)

    def rewrite(self, site: Site, spec: Spec) -> Any:
        heads = len(existing_heads(site, None))
        width = input_width(site, "the gate")
        name = fresh_name(spec, "gate")
        parameters = (Parameter("weight", (heads, width)), Parameter("bias", (heads,)))
        tensor = TensorArg(name, "float32", 3, Source(gate, ("input",), parameters))
        spec = replace(cast(Any, spec), tensors=(*spec.tensors, tensor))
        return with_factor(spec, Read(Symbol(name), sym.b, sym.h, sym.q))


def input_width(site: Site, what: str) -> int:
    """The width of what feeds the queries.

    Raises:
        Declined: it was not found in the graph.
    """
    if not site.input_dim:
        raise Declined(
            f"{what} reads what feeds the projection of the queries, which was not found in the "
            "graph of this site"
        )
    return site.input_dim


# --- patches --------------------------------------------------------------------------------------


def itself(x: Tensor) -> Tensor:
    """What the user gives, or a new parameter, as it is."""
    return x


@dataclass(frozen=True)
class HeadPatch(Pass):
    """The outputs of the query heads in `heads` are those of another run, which the user gives.

    `[B, H, L, Dv]`, given at run time; other heads are as before. With `last`, only the last so
    many queries of a call are replaced. Applies after every factor of the heads: what is given is
    what the output projection sees.

    Contract: limit; `last=0` is the identity, and so are outputs of the same run. Patterns: all.
    Declines when: the site has no such head, or its number of heads is unknown; it is patched.
    """

    name = "heads.patch"
    contract = "limit"
    stage = "patch"
    families = ("softmax", "linear")
    identity = "heads.patch(last=0)"
    patterns = PATTERNS
    laws = ("future",)
    examples = ("heads.patch(heads=[0, 2])", "heads.patch(heads=[-1], last=2)")
    heads: tuple[int, ...] | None = option("query heads that are replaced; all", default=None)
    last: int | None = option(
        "queries that are replaced, from the end; all", default=None, at_least=0
    )

    def rewrite(self, site: Site, spec: Spec) -> Any:
        found = existing_heads(site, self.heads)
        if self.last == 0:
            return spec
        if spec.patch is not None:
            raise Declined("the heads of this site are patched by now; name all of them in one")
        where: Boolean = sympy.true
        if len(found) < site.heads:
            where = head_condition(found)
        if self.last is not None:
            where = cast(Boolean, where & (sym.q >= sym.L - self.last))
        name = fresh_name(spec, "patch")
        tensor = TensorArg(name, "float32", 4, Source(itself, ("patch",)))
        tensors = (*spec.tensors, tensor)
        return replace(cast(Any, spec), tensors=tensors, patch=Patch(name, where))
