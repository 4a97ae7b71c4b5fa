"""VAR, visual attention redistribution: "See What You Are Told: Visual Attention Sink in Large
Multimodal Models" (arXiv 2503.03321) and its code, which differ in three places."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from sympy import Expr, Float, Integer, Symbol

from rewriter import symbols as sym
from rewriter.errors import Declined, PassError
from rewriter.passbase import Pass, option
from rewriter.passes.sinks import LEAST, check_unedited, where
from rewriter.passes.sparse import query_position
from rewriter.spec import SoftmaxSpec, TensorArg, fresh_name
from rewriter.stages import Edit, Source
from rewriter.symbols import Read

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.sites import Site

__all__ = ["RedistributeVisual", "first_row", "groups_of", "sink_value"]

OTHER, TEXT_SINK, VISUAL_SINK, VISUAL = range(4)


# --- what is known of the keys before attention ---------------------------------------------------


def sink_value(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """phi `[B, L]`: the largest magnitude in `dims` over the root mean square of the state
    `[B, L, C]`, in float32; at most `sqrt(C)`."""
    x = x.detach().float()
    size = (x.square().mean(-1) + 1e-6).sqrt()
    return x[..., list(dims)].abs().amax(-1) / size


def groups_of(x: Tensor, labels: Tensor, *, dims: tuple[int, ...], tau: float) -> Tensor:
    """The group of each key of the prompt, int64 `[B, L]`.

    Args:
        x: the hidden states that enter the layer, `[B, L, C]`, before its norm.
        labels: 1 for the tokens of an image, `[B or 1, ·]`; keys beyond its length are others.
        dims: the dimensions in which sinks of this base model have massive activations.
        tau: a sink has a sink value above it.

    A sample without a visual sink has no groups: nothing is moved, text sinks or not.
    """
    length = x.shape[1]
    place = torch.arange(length, device=x.device)
    is_sink = sink_value(x, dims) > tau
    is_sink &= place < labels.shape[1]  # generated tokens are never tested
    found = torch.nn.functional.pad(labels, (0, length))[:, :length] == 1
    group = torch.where(found, VISUAL, OTHER)
    group = torch.where(is_sink, torch.where(found, VISUAL_SINK, TEXT_SINK), group)
    return group * (group == VISUAL_SINK).any(1, keepdim=True)


def first_row(labels: Tensor) -> Tensor:
    """The position after the last image token, int64 `[B]`; the length where there is none."""
    place = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    last = (place * (labels == 1)).amax(1)
    return torch.where(last > 0, last, labels.shape[1])


# --- the pass -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RedistributeVisual(Pass):
    """Weight on sink tokens goes to the image tokens that are no sinks, in image-centric heads.

    Rows after the last image token, head by head, where all image tokens have at least `min_mass`
    of the weight and the non-sinks at least `min_nonsink_ratio` of that: sinks (of the text too)
    keep `keep_fraction`, and the non-sink image tokens get the rest in proportion. A key is a sink
    if its hidden state has a sink value above `tau`; that is decided by the prompt, and tokens that
    come later are never tested. The user says where the images are (`rewriter.give`).

    `mode` sets what is not given, and the layers. The paper's p is the fraction taken, the code's
    the fraction kept; the paper leaves the last layer alone, the code does not. Both leave layers 0
    and 1 alone.

    Contract: limit; `keep_fraction=1` is the identity, as is a prompt without an image or without a
    visual sink. Patterns: causal self.
    Declines when: the layer is left alone; the site is not causal self-attention; the hidden state
    that enters the layer is not in the graph; another pass edits the weights already.
    """

    name = "sinks.var"
    contract = "limit"
    stage = "edit"
    identity = "sinks.var(dims=[0], keep_fraction=1, tau=0.1, first_layer=0, last_layer=True)"
    patterns = ("causal self",)
    laws = ("future", "values")
    examples = (
        "sinks.var(dims=[0, 3], tau=1, min_nonsink_ratio=0.1, first_layer=0, last_layer=True)",
    )
    dims: tuple[int, ...] | None = option("dimensions of massive activations", default=None)
    keep_fraction: float | None = option(
        "what sinks keep; None: 0.4 (paper) or 0.6 (released)", default=None, at_least=0, at_most=1
    )
    min_nonsink_ratio: float | None = option(
        "least share of non-sinks in the weight on images; None: 0.8 (paper) or 0.5 (released)",
        default=None,
        at_least=0,
        at_most=1,
    )
    min_mass: float = option("least weight on images", default=0.2, at_least=0)
    tau: float = option("a sink has a sink value above it", default=20.0, at_least=0)
    mode: str = option("whose rules", default="paper", choices=("paper", "released"))
    first_layer: int = option("layers before it are left alone", default=2, at_least=0)
    last_layer: bool | None = option(
        "edit the last layer; None: no (paper) or yes (released)", default=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims is None:
            raise PassError(
                f"{self.name}: D_sink is unknown for the base model: give dims=[...], see "
                "rewriter.massive_dimensions"
            )
        if min(self.dims) < 0:
            raise PassError(f"{self.name}: dims are counted from 0, got {min(self.dims)}")

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        assert self.dims is not None
        position = self._position(site, spec)
        check_unedited(spec)
        self._check_layer(site)
        if self._keep == 1:
            return spec
        if not site.residual_dim:
            raise Declined("the hidden state that enters the layer was not found in the graph")
        if max(self.dims) >= site.residual_dim:
            last = site.residual_dim - 1
            raise Declined(f"the hidden state has dimensions 0 to {last}, not {max(self.dims)}")
        group, row = (fresh_name(spec, x) for x in ("sink_group", "first_row"))
        options = (("dims", self.dims), ("tau", self.tau))
        source = Source(groups_of, ("residual", "labels"), options=options, later=0)
        tensors = (
            TensorArg(group, "int64", 2, source),
            TensorArg(row, "int64", 1, Source(first_row, ("labels",))),
        )
        late = position >= Read(Symbol(row), sym.b)
        edit = Edit(cast(Expr, Read(Symbol(group), sym.b, sym.k)), self._factors(late))
        return replace(spec, edit=edit, tensors=(*spec.tensors, *tensors))

    def _factors(self, late: object) -> tuple[Expr, ...]:
        _, text, visual, rest = sym.masses
        image = visual + rest
        selected = late & (image >= Float(self.min_mass)) & (rest >= Float(self._ratio) * image)
        selected &= rest > LEAST
        kept = where(selected, Float(self._keep), 1)
        moved = (1 - Float(self._keep)) * (text + visual)
        more = where(selected, 1 + moved / cast(Expr, sym.Maximum(rest, LEAST)), 1)
        return Integer(1), kept, kept, more

    @property
    def _is_paper(self) -> bool:
        return self.mode == "paper"

    @property
    def _keep(self) -> float:
        default = 0.4 if self._is_paper else 0.6
        return default if self.keep_fraction is None else self.keep_fraction

    @property
    def _ratio(self) -> float:
        default = 0.8 if self._is_paper else 0.5
        return default if self.min_nonsink_ratio is None else self.min_nonsink_ratio

    def _position(self, site: Site, spec: SoftmaxSpec) -> Expr:
        """Where query q stands on the key axis."""
        if site.is_cross:
            raise Declined("images and questions stand on one axis; this site is cross-attention")
        position, is_causal = query_position(site, spec)
        if not is_causal and site.q_len != 1:  # a step of decoding needs no causal mask
            raise Declined("it is for causal self-attention, and this site is not causal")
        return position

    def _check_layer(self, site: Site) -> None:
        edits_last = not self._is_paper if self.last_layer is None else self.last_layer
        if edits_last and not self.first_layer:
            return
        if site.layer is None:
            raise Declined("the number of the layer is not known")
        if site.layer < self.first_layer:
            raise Declined(
                f"layers before {self.first_layer} are left alone, where sinks are not there yet; "
                "first_layer= says otherwise"
            )
        if edits_last:
            return
        if not site.layers:
            raise Declined("which layer is the last is not known; last_layer=True edits it too")
        if site.layer == site.layers - 1:
            raise Declined("the last layer is left alone; last_layer=True says otherwise")
