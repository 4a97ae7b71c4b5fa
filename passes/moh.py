"""Mixture of heads: each token picks the heads that it uses (MoH, arXiv 2410.11842)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from sympy import Symbol

from rewriter import symbols as sym
from rewriter.errors import Declined, PassError
from rewriter.passbase import PATTERNS, Pass, option
from rewriter.passes.heads import existing_heads, input_width, with_factor
from rewriter.spec import Spec, TensorArg, fresh_name
from rewriter.stages import Parameter, Source
from rewriter.symbols import Read

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.sites import Site

__all__ = ["MixtureOfHeads", "balance_loss", "linear_gate", "norm_gate"]

LEAST_STD = 1e-6
"""Norms that are all equal have a deviation of 0; divided by it they would be NaN."""


# --- gates ----------------------------------------------------------------------------------------


def linear_gate(x: Tensor, *weights: Tensor, **options: Any) -> Tensor:
    """The gates `[B, H, L]` of the two-stage linear router.

    Args:
        x: what feeds the queries, `[B, L, C]`.
        weights: those of `_routers` that there are.
        options: `shared`, the heads that are always on; `others`, the routed ones; `routed`, how
            many of these a token uses; `mode`.
    """
    shared, others, routed = options["shared"], options["others"], options["routed"]
    is_paper = options["mode"] == "paper"
    found = _routers(x, weights, len(shared), routed)
    parts = []
    if shared:  # one shared head has no router: a softmax over one logit
        ones = x.new_ones(*x.shape[:2], len(shared), dtype=_wide(x))
        logits = found.shared
        parts.append(ones if logits is None else _softmax(logits, 1 if is_paper else len(shared)))
    if routed and found.routed is not None:
        chosen = top(found.routed, routed)
        if is_paper:
            parts.append(_softmax(found.routed, 1) * chosen)
        else:
            parts.append(_softmax(found.routed, routed, chosen))
    else:
        parts.append(x.new_zeros(*x.shape[:2], len(others), dtype=_wide(x)))
    if found.stages is not None:
        share = _softmax(found.stages, 1 if is_paper else 2)  # [B, L, 2]
        parts = [part * share[..., i : i + 1] for i, part in enumerate(parts)]
    return _placed(parts, shared, others)


def norm_gate(q: Tensor, **options: Any) -> Tensor:
    """The gates `[B, H, L]` of the router without parameters: 1 for shared heads and for the routed
    ones with the largest queries, else 0.

    Straight-through: the gradient of a gate goes to the softmax of the norms over their standard
    deviation, unbiased, over the routed heads. Which heads are chosen is decided by the norms
    themselves, which are in the same order and have no ties of rounding.

    Args:
        q: queries `[B, H, L, D]`, before or after a rotation, which keeps norms.
        options: as for `linear_gate`.
    """
    shared, others, routed = options["shared"], options["others"], options["routed"]
    norms = torch.linalg.vector_norm(q.to(_wide(q)), dim=-1).mT  # [B, L, H]
    ones = norms.new_ones(*norms.shape[:2], len(shared))
    norms = norms[..., list(others)]
    chosen = top(norms, routed)
    if len(others) > 1:
        soft = torch.softmax(norms / norms.std(-1, keepdim=True).clamp_min(LEAST_STD), dim=-1)
        chosen = chosen + (soft - soft.detach())  # the value of `chosen`, to the last bit
    return _placed([ones, chosen], shared, others)


def balance_loss(x: Tensor, *weights: Tensor, **options: Any) -> Tensor:
    """`balance · E Σ_e P_e f_e`: P is the mean probability of a routed head, f how often it is
    chosen, without a gradient. E times what the paper prints, as in its released code.

    Over all tokens of the batch: the program sees no padding, as the authors' does not.
    """
    routed = options["routed"]
    logits = _routers(x, weights, len(options["shared"]), routed).routed
    if logits is None:
        return x.new_zeros((), dtype=_wide(x))
    p = torch.softmax(logits, dim=-1).mean((0, 1))
    f = top(logits, routed).mean((0, 1)).detach()
    count = 1 if options["mode"] == "paper" else len(options["others"])
    return cast("Tensor", options["balance"] * count * (p * f).sum())


class _Logits(NamedTuple):
    """Logits `[B, L, ·]` of the routers, in float32 at least; None where there is no router."""

    routed: Tensor | None
    shared: Tensor | None
    stages: Tensor | None


def _routers(x: Tensor, weights: tuple[Tensor, ...], shared: int, routed: int) -> _Logits:
    left = iter(weights)

    def logits(there: bool) -> Tensor | None:
        x_wide = x.to(_wide(x))
        return torch.nn.functional.linear(x_wide, next(left).to(x_wide.dtype)) if there else None

    return _Logits(*(logits(there) for there in _which(shared, routed)))


def _which(shared: int, routed: int) -> tuple[bool, bool, bool]:
    """Whether there are routers of the routed heads, of the shared ones, and between the two."""
    return routed > 0, shared > 1, shared > 0 and routed > 0


def top(scores: Tensor, count: int) -> Tensor:
    """1 for the `count` largest scores of the last dimension, else 0; ties to the lowest index.

    Each is compared with each, as there are few heads: a stable sort has no form in ONNX.
    """
    own, other = scores.detach()[..., :, None], scores.detach()[..., None, :]
    index = torch.arange(scores.shape[-1], device=scores.device)
    ahead = (other > own) | ((other == own) & (index < index[:, None]))  # [..., E, E]
    return (ahead.sum(-1) < count).to(scores.dtype)


def _softmax(logits: Tensor, times: int, kept: Tensor | None = None) -> Tensor:
    """`times` softmax over the logits, or over those that are kept; equal logits give exactly 1 if
    there are `times` of them, which a softmax that is multiplied afterwards need not."""
    found = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    found = found if kept is None else found * kept
    return found * times / found.sum(-1, keepdim=True)


def _placed(parts: list[Tensor], shared: tuple[int, ...], others: tuple[int, ...]) -> Tensor:
    """Gates of the shared and then the routed heads `[B, L, ·]`, as `[B, H, L]` in head order."""
    order = (*shared, *others)
    back = [order.index(head) for head in range(len(order))]
    return torch.cat(parts, dim=-1)[..., back].mT


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- the pass -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureOfHeads(Pass):
    """Each token uses the shared heads and the routed ones that its router picks; the rest give 0.

    `active` heads of all are on: half of all are shared and the rest picked, or half of those that
    are on where they are fewer; `shared` and `routed` say it in numbers. The routers:
    `"linear"` (trained): with r, g_s softmaxes over routed and shared heads and (a1, a2) one of two
    logits, gates are 2 a1 Hs g_s and 2 a2 K r of the K largest r, these summing to 1 before. Its
    weights start at 0, where with K = E every gate is exactly 1, and the first K routed heads are
    chosen else. `"norm"` (no parameters): 1 for the K heads with the largest queries, straight
    through in training. Ties go to the lowest head.
    `mode`: the paper prints gates a1 g_s and a2 r, not summing to 1, and a loss without the factor
    E; its released code has them as above. The two differ for the linear router.
    `balance` times the load balance of each layer is added to the training loss; over all tokens,
    padding included, since the router does not see which tokens are padding.

    The paper puts the shared heads first. The gate acts on heads by number, so that no weights have
    to be moved for it: the permutation of heads is a choice of which are shared, `shared_heads`.
    Keys and values of all heads stay in the cache: a later token may pick any of them.

    Contract: limit; `active=1` is the identity until routers are trained. Patterns: all.
    Declines when: more heads are shared or picked than there are; shared heads do not exist; heads
    are unknown; what feeds the queries was not found, for the linear router, which also needs K > 0
    or every head shared.
    """

    name = "heads.moh"
    contract = "limit"
    stage = "heads"
    families = ("softmax", "linear")
    identity = "heads.moh(active=1)"
    patterns = PATTERNS
    laws = ("future", "values")
    examples = (
        "heads.moh(active=0.75)",
        "heads.moh(shared=1, routed=2)",
        "heads.moh(active=0.5, router=norm)",
        "heads.moh(shared_heads=[3], routed=1, mode=paper)",
    )
    active: float = option("share of the heads that a token uses", default=0.75, at_most=1)
    shared: int | None = option("heads that are always on", default=None, at_least=0)
    routed: int | None = option("further heads that a token picks", default=None, at_least=0)
    router: str = option("what picks them", default="linear", choices=("linear", "norm"))
    mode: str = option("gates and loss of", default="released", choices=("released", "paper"))
    balance: float = option("factor of the load balance in the loss", default=0.01, at_least=0)
    shared_heads: tuple[int, ...] | None = option(
        "which heads are shared; None: the first ones", default=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active <= 0:
            raise PassError(f"{self.name}: option active is {self.active:g}; it has to be above 0")
        named = self.shared_heads
        if named is not None and self.shared not in (None, len(named)):
            raise PassError(
                f"{self.name}: shared={self.shared}, and shared_heads names {len(named)} heads; "
                "leave one of them out"
            )

    def split(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """The shared heads, the others, and how many of the others a token picks.

        Raises:
            Declined: the site does not have them.
        """
        count = len(existing_heads(site, None))
        on = max(1, round(self.active * count))
        wanted = None if self.shared_heads is None else len(self.shared_heads)
        wanted = self.shared if wanted is None else wanted
        if wanted is None and self.routed is None:
            wanted = count // 2 if on > count // 2 else on // 2
        if wanted is None:
            wanted = max(0, on - cast(int, self.routed))
        routed = max(0, on - wanted) if self.routed is None else self.routed
        if wanted > count:
            raise Declined(f"{wanted} heads are to be shared, and this site has {count}")
        if routed > count - wanted:
            raise Declined(
                f"{routed} heads are to be picked from the {count - wanted} of {count} that are "
                "not shared; lower routed or shared"
            )
        if wanted + routed == 0:
            raise Declined("no head is shared and none is picked; heads.ablate does that")
        shared = existing_heads(site, self.shared_heads or tuple(range(wanted)))
        if len(shared) < wanted:
            raise Declined("shared_heads names a head twice")
        shared = shared if wanted else ()
        return shared, tuple(h for h in range(count) if h not in shared), routed

    def rewrite(self, site: Site, spec: Spec) -> Any:
        shared, others, routed = self.split(site)
        name = fresh_name(spec, "gate")
        source = self._source(site, shared, others, routed)
        tensor = TensorArg(name, "float32", 3, source)
        spec = replace(cast(Any, spec), tensors=(*spec.tensors, tensor))
        on = len(shared) + routed
        factor = Read(Symbol(name), sym.b, sym.h, sym.q)
        return with_factor(spec, factor, on if on < site.heads else None)

    def _source(
        self, site: Site, shared: tuple[int, ...], others: tuple[int, ...], routed: int
    ) -> Source:
        """The program that computes the gates."""
        options = (
            ("shared", shared),
            ("others", others),
            ("routed", routed),
            ("mode", self.mode),
            ("balance", self.balance),
        )
        if self.router == "norm":
            return Source(norm_gate, ("q",), options=options)
        if not routed and others:
            raise Declined("the linear router picks at least one head, unless all heads are shared")
        width = input_width(site, "the linear router")
        names = (("routed", len(others)), ("shared", len(shared)), ("stages", 2))
        there = _which(len(shared), routed)
        weights = tuple(
            Parameter(name, (rows, width))
            for (name, rows), is_there in zip(names, there, strict=True)
            if is_there
        )
        loss = balance_loss if self.balance and routed else None
        return Source(linear_gate, ("input",), weights, options, loss)
