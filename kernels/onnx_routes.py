"""Routes in primitive ATen ops: which keys a query may see, as truth values over queries and keys.

`TopK` of ONNX takes the first of equal values, as `rewriter.reference_routes` does. The number of
keys may vary, so the blocks are counted in the graph.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch.fx import Node

from rewriter import symbols as sym
from rewriter.kernels.onnx_formulas import Formulas
from rewriter.kernels.onnx_site import SiteWriter
from rewriter.reference_routes import key_terms
from rewriter.spec import SoftmaxSpec
from rewriter.stages import Route

__all__ = ["routed_keys"]

aten = torch.ops.aten


def routed_keys(site: SiteWriter, spec: SoftmaxSpec) -> Node | None:
    """True where the route lets query q see key k, broadcasts to `[B, Hq, L, M]`; None if it lets
    it see every key. What the mask hides may be True here."""
    route = spec.route
    assert route is not None
    there = site.formula(key_terms(spec.mask))
    there = site.full_rank(there) if site.write.is_tensor(there) else None  # [., ., 1, M]
    if route.by == "region":
        return _by_region(site, route, there)
    return _by_query(site, route, there)


def _by_query(site: SiteWriter, route: Route, there: Node | None) -> Node:
    write, formula = site.write, site.formula
    number = _numbers(site, there)  # [M], or [., ., 1, M]
    last = _last(site, route, number)
    block = _block(site, number, route)
    own = _block(site, last, route)
    result = write(aten.eq.Tensor, block, own)
    if route.dense_below:
        dense = write(aten.lt.Scalar, last, route.dense_below)
        result = write(aten.logical_or.default, result, dense)
    if route.topk == 1:
        return result
    # some blocks more than there are, so that TopK finds topk - 1 however short the keys
    whole = formula.divide("IDiv", site.add(site.extent["k"], route.block - 1), route.block)
    blocks = site.count(site.add(whole, route.topk - 1))
    column = write(aten.reshape.default, blocks, [-1, 1])
    means = _means(
        site, write.to(site.k, torch.float32), write(aten.eq.Tensor, block, column), there
    )
    affinity = site.grouped(write.to(site.q, torch.float32), site.turned(means))  # [B, Hq, L, C]
    earlier = write(aten.lt.Tensor, blocks, own)
    affinity = site.where(earlier, affinity, -torch.inf)
    best = _chosen(site, affinity, route.topk - 1)
    return write(aten.logical_or.default, result, _spread(site, best, block))


def _numbers(site: SiteWriter, there: Node | None) -> Node:
    """The number of each key among those that are there."""
    if there is None:
        return site.count(site.extent["k"])
    counts = site.write(aten.cumsum.default, site.write.to(there, torch.int64), -1)
    return site.write(aten.sub.Tensor, counts, 1)


def _last(site: SiteWriter, route: Route, number: Node) -> Node:
    """The number of the last key up to the position of a query, broadcasts to `[B, Hq, L, 1]`."""
    write, formula = site.write, site.formula
    position = write.tensor(formula(route.position), torch.int64, site.device)
    end = site.add(site.extent["k"], -1)
    position = formula.extreme("minimum", formula.extreme("maximum", position, 0), end)
    if write.value(number).ndim == 1:
        return cast(Node, position)
    batch, heads, length = (site.extent[name] for name in "bhq")
    rows = write(aten.expand.default, number, [batch, heads, 1, site.extent["k"]])
    position = write(aten.expand.default, position, [batch, heads, length, 1])
    return site.turned(write(aten.gather.default, rows, 3, site.turned(position)))


def _block(site: SiteWriter, number: Node, route: Route) -> Node:
    least = site.write(aten.clamp_min.default, number, 0)  # -1: before the first key
    return site.write(aten.div.Tensor_mode, least, route.block, rounding_mode="floor")


def _means(site: SiteWriter, rows: Node, member: Node, there: Node | None) -> Node:
    """The mean row of each group `[B, H, C, D]` of rows `[B, H, N, D]` that are there.

    member `[..., C, N]` says what is in a group; H is that of `there`, where it differs by head.
    """
    write = site.write
    if there is not None:
        member = write(aten.logical_and.default, member, there)
    member = write.to(member, torch.float32)
    if site.differs_by_head(member):
        rows = site.repeated(rows)
    total = write(aten.matmul.default, member, rows)
    count = write(aten.sum.dim_IntList, member, [-1], True)
    return write(aten.div.Tensor, total, write(aten.clamp_min.default, count, 1.0))


def _chosen(site: SiteWriter, affinity: Node, count: int) -> Node:
    """True at the largest `count` of the last dimension that are not minus infinity."""
    write = site.write
    index = write(operator.getitem, write(aten.topk.default, affinity, count), 1)
    none = write(aten.zeros_like.default, affinity, dtype=torch.bool)
    best = write(aten.scatter.value, none, -1, index, True)
    return write(aten.logical_and.default, best, write(aten.gt.Scalar, affinity, -torch.inf))


def _spread(site: SiteWriter, best: Node, block: Node) -> Node:
    """What was chosen of blocks `[B, Hq, L, C]` as a choice of keys `[B, Hq, L, M]`."""
    write = site.write
    if write.value(block).ndim == 1:
        return write(aten.index_select.default, best, 3, block)
    whole = write(aten.expand.default, block, [site.extent[name] for name in "bhqk"])
    return write(aten.gather.default, best, 3, whole)


# --- regions --------------------------------------------------------------------------------------


def _by_region(site: SiteWriter, route: Route, there: Node | None) -> Node | None:
    site.check_grid(route.grid, route.extra)
    write = site.write
    down, across = route.region_counts
    length = route.extra + route.grid[0] * route.grid[1]
    if there is None and (length <= route.dense_below or route.topk >= down * across):
        return None

    def grid(x: Node, dim: int) -> Node:
        return write(aten.slice.Tensor, x, dim, route.extra, length)

    inside = None if there is None else grid(there, 3)
    region = _regions(site, route)
    column = write(aten.reshape.default, site.count(down * across), [-1, 1])
    member = write(aten.eq.Tensor, region, column)  # [R, N]
    queries = _means(site, grid(write.to(site.q, torch.float32), 2), member, None)
    keys = _means(site, grid(write.to(site.k, torch.float32), 2), member, inside)
    affinity = site.grouped(queries, site.turned(keys))
    affinity = write(aten.sum.dim_IntList, affinity, [1])  # [B, R, R]
    if inside is not None:
        visible = write(aten.logical_and.default, member, inside)
        some = write(aten.any.dim, write(aten.any.dim, visible, -1), 1, True)
        affinity = site.where(some, affinity, -torch.inf)
    best = _chosen(site, affinity, min(route.topk, down * across))
    seen = _of_tokens(site, best, region, route.extra)
    if there is None or not route.dense_below:
        return seen
    count = write(aten.sum.dim_IntList, there, [-1], True)
    dense = write(aten.le.Scalar, count, route.dense_below)
    return write(aten.logical_or.default, seen, dense)


def _regions(site: SiteWriter, route: Route) -> Node:
    """The region of each token of the grid, `[N]`."""
    (rows, columns), (high, wide) = route.grid, route.region
    token = sym.k  # of the grid: counted after the first `extra`
    row = sym.IDiv(sym.IDiv(token, columns), high)
    column = sym.IDiv(sym.IMod(token, columns), wide)
    values = {**site.values, "k": site.count(rows * columns)}
    region = Formulas(site.write, values, {}, site.extent)(row * route.region_counts[1] + column)
    return site.write.tensor(region, torch.int64, site.device)


def _of_tokens(site: SiteWriter, best: Node, region: Node, extra: int) -> Node:
    """What was chosen of regions `[B, R, R]` as a choice of tokens `[B, 1, L, M]`; the first
    `extra` tokens see everything and are seen by all."""
    write = site.write
    if extra:
        count = int(write.value(best).shape[-1])  # one more region, for the first tokens
        best = write(aten.constant_pad_nd.default, best, [0, 1, 0, 1], True)
        first = write(aten.full.default, [extra], count, dtype=torch.int64, device=site.device)
        region = write(aten.cat.default, [first, region])
    for dim in (1, 2):
        best = write(aten.index_select.default, best, dim, region)
    return write(aten.unsqueeze.default, best, 1)
