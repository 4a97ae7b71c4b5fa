"""Attention to chosen blocks of keys: mixture of block attention (MoBA, arXiv 2502.13189) and
bi-level routing (BiFormer, arXiv 2303.08810)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sympy
from sympy.logic.boolalg import Boolean

from rewriter import symbols as sym
from rewriter.errors import Declined, PassError
from rewriter.passbase import Pass, option
from rewriter.passes.heads import itself
from rewriter.passes.sparse import query_position
from rewriter.spec import SoftmaxSpec, TensorArg, fresh_name
from rewriter.stages import Local, Parameter, Route, Source

if TYPE_CHECKING:
    from rewriter.sites import Site

__all__ = ["BiFormer", "MoBA"]


def _check(spec: SoftmaxSpec) -> None:
    if spec.route is not None:
        raise Declined(f"its keys are chosen already: {spec.route}")
    if spec.edit is not None:
        raise Declined("its weights are edited by groups of keys, of which all have to be seen")
    if spec.dropout:
        raise Declined("its weights are dropped at random, which is not done over chosen blocks")


def _terms_of_queries(mask: Boolean) -> list[Boolean]:
    """The terms of the mask that are not about keys alone."""
    return [t for t in sympy.And.make_args(mask) if t.has(sym.q)]


@dataclass(frozen=True)
class MoBA(Pass):
    """Each query sees the block of its own position and those `topk - 1` earlier blocks that fit it
    best: the largest `q · mean(keys)`, for each query head by itself.

    A block is `block` keys in a row, padding not counted. The own block counts as one of `topk`, as
    in the authors' code, and is seen up to the query. Queries that see at most `dense_below` keys
    see all of them. Causality is strict, and decoding equals the whole sequence. Score, soft cap,
    sinks and gates stay. Where the authors' fast code differs, this is the paper: topk=1 is the own
    block alone, and steps of generation choose too.

    Contract: limit; `topk · block >= M` is the identity. Patterns: causal self.
    Declines when: the site is cross-attention or not causal, its mask hides more than later keys
    and keys for all queries (a sliding window), its keys are chosen already, its weights are
    edited, or there is a dropout.
    """

    name = "sparse.moba"
    contract = "limit"
    stage = "route"
    identity = "sparse.moba(block=4, topk=1000000, dense_below=0)"
    patterns = ("causal self",)
    laws = ("future", "decode", "batch", "heads", "row sums", "values", "shift")
    examples = (
        "sparse.moba(block=2, topk=1, dense_below=0)",
        "sparse.moba(block=2, topk=2, dense_below=0)",
        "sparse.moba(block=3, topk=2, dense_below=4)",
    )
    block: int = option("keys of a block", default=256, at_least=1)
    topk: int = option("blocks that a query sees, its own included", default=3, at_least=1)
    dense_below: int = option(
        "queries that see at most so many keys see all of them", default=2048, at_least=0
    )

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if site.is_cross:
            raise Declined(
                "blocks before a query need positions on one axis; this site is cross-attention"
            )
        _check(spec)
        position, causal = query_position(site, spec)
        if not causal and site.q_len != 1:  # the last query needs no causal mask
            raise Declined("the site is not causal, so no block comes before the query")
        for term in _terms_of_queries(spec.mask):
            if not _is_end(term):
                raise Declined(
                    f"its mask hides keys by {sym.formula_text(term)} too, as a sliding window"
                    " does; blocks may be chosen under a mask that is causal, with or without keys"
                    " hidden from every query"
                )
        route = Route("query", self.topk, self.block, position, dense_below=self.dense_below)
        return replace(spec, route=route)


def _is_end(term: Boolean) -> bool:
    """The term says where the keys of a query end, and nothing else."""
    if not isinstance(term, sympy.Ge | sympy.Le | sympy.Gt | sympy.Lt):
        return False
    rest = term.gts - term.lts + sym.k
    return not rest.has(sym.k)


@dataclass(frozen=True)
class BiFormer(Pass):
    """Each region of queries sees the `topk` regions of keys that fit it best: the largest product
    of mean query and mean key, over all heads together.

    The tokens behind the first `extra` form a grid, row by row, cut into `regions` by `regions`
    regions; the last of a side may be smaller, where the authors pad. The scale stays that of the
    layer. The first `extra` tokens see all keys and are seen by all queries. `local` adds the local
    context term: a 5 x 5 depthwise convolution of the values, zero until it is trained.

    Contract: limit; `topk` = number of regions, without `local`, is the identity.
    Patterns: noncausal self.
    Declines when: the site is cross-attention or causal, its mask hides more than keys for all
    queries, its keys are chosen already, its weights are edited, there is a dropout, it has fewer
    regions than `topk`, or its grid is unknown.
    """

    name = "sparse.biformer"
    contract = "limit"
    stage = "route"
    identity = "sparse.biformer(regions=1, topk=1, grid=[3, 4])"
    patterns = ("noncausal self",)
    laws = ("batch", "heads", "row sums", "values", "shift")
    examples = (
        "sparse.biformer(regions=2, topk=1)",
        "sparse.biformer(regions=2, topk=2, grid=[3, 4])",
        "sparse.biformer(regions=3, topk=2, grid=[2, 5], extra=1)",
    )
    regions: int = option("regions along each side of the grid", at_least=1)
    topk: int = option("regions that a region of queries sees", at_least=1)
    grid: tuple[int, ...] | None = option(
        "rows and columns of the tokens; None for a square", default=None
    )
    extra: int | None = option(
        "tokens before the grid; None for 0 or 1, what fits", default=None, at_least=0
    )
    local: bool = option("add a depthwise convolution of the values", default=False)
    dense_below: int = option(
        "queries that see at most so many keys see all of them", default=0, at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.regions**2:
            raise PassError(
                f"{self.name}: topk is {self.topk}, and {self.regions} x {self.regions} regions are"
                f" {self.regions**2}; choose a smaller topk or more regions"
            )
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise PassError(f"{self.name}: grid is rows and columns, got {list(self.grid)}")

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if site.is_cross:
            raise Declined("queries and keys are of two sequences; this site is cross-attention")
        if site.q_len != site.kv_len:
            raise Declined(
                f"it has {site.q_len or 'some'} queries and {site.kv_len or 'some'} keys; regions"
                " are chosen where all tokens are both"
            )
        _check(spec)
        if _terms_of_queries(spec.mask):
            raise Declined(
                "its mask depends on the query; regions are chosen where every query sees the same"
                " keys"
            )
        grid, extra = self._grid(site)
        route = Route(
            "region",
            self.topk,
            grid=grid,
            regions=self.regions,
            extra=extra,
            dense_below=self.dense_below,
        )
        down, across = route.region_counts
        if self.topk > down * across:
            raise Declined(
                f"topk is {self.topk}, and a grid of {grid[0]} x {grid[1]} has {down * across}"
                " regions"
            )
        spec = replace(spec, route=route)
        return self._with_local(site, spec, grid, extra) if self.local else spec

    def _grid(self, site: Site) -> tuple[tuple[int, int], int]:
        """Rows and columns, and how many tokens stand before them."""
        length = site.kv_len
        if self.grid:
            rows, columns = self.grid
            extra = self.extra
            if extra is None:
                extra = length - rows * columns if length else 0
            if extra < 0 or (length and length != extra + rows * columns):
                raise Declined(
                    f"it has {length} tokens, and a grid of {rows} x {columns} has {rows * columns}"
                )
            return (rows, columns), extra
        if not length:
            raise Declined(
                "how many tokens it has is known only when it runs; give grid=[rows, columns]"
            )
        for extra in (0, 1) if self.extra is None else (self.extra,):
            side = math.isqrt(max(0, length - extra))
            if side and side * side == length - extra:
                return (side, side), extra
        raise Declined(f"its {length} tokens are no square grid; give grid=[rows, columns]")

    def _with_local(
        self, site: Site, spec: SoftmaxSpec, grid: tuple[int, int], extra: int
    ) -> SoftmaxSpec:
        if not site.heads or not site.value_dim:
            raise Declined("how many heads it has, and how wide, is not known")
        channels = site.heads * site.value_dim
        shapes: dict[str, tuple[int, ...]] = {
            "local_weight": (channels, 1, 5, 5),
            "local_bias": (channels,),
        }
        added = []
        for name, shape in shapes.items():
            source = Source(itself, parameters=(Parameter(name, shape),))
            added.append(TensorArg(fresh_name(spec, name), "float32", len(shape), source))
        local = Local(added[0].name, added[1].name, grid, extra)
        return replace(spec, local=local, tensors=(*spec.tensors, *added))
