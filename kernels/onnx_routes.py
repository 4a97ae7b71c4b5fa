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
from rewriter.kernels.onnx_formulas import Formulas, Value
from rewriter.kernels.onnx_site import SiteWriter
from rewriter.kernels.onnx_state import is_last
from rewriter.reference_routes import key_terms
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.stages import Route

__all__ = ["block_sums", "has_sums", "routed_keys", "summaries"]

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


def routed_keys(site: SiteWriter, spec: SoftmaxSpec, sums: Node | None = None) -> Node | None:
    """True where the route lets query q see key k, broadcasts to `[B, Hq, L, M]`; None if it lets
    it see every key. What the mask hides may be True here.

    sums: those of `block_sums`, if they are known.
    """
    route = spec.route
    assert route is not None
    there = _there(site, spec)
    if route.by == "region":
        return _by_region(site, route, there)
    if sums is None and route.topk > 1:
        sums = block_sums(site, spec)
    return _by_query(site, route, there, sums)


def block_sums(
    site: SiteWriter, spec: SoftmaxSpec, new: SiteWriter | None = None, past: Node | None = None
) -> Node:
    """The sum of the keys of each block `[B, H, C, D]` in float32, 0 for the last `topk - 1`, which
    hold none; H is that of the mask where that differs by head.

    Args:
        new: the same site with its last keys alone, which are to be added to `past`; None: all.
        past: the sums before those keys, of no more blocks than now.
    """
    write, route, keys = site.write, spec.route, (new or site).k
    assert route is not None
    there = _there(site, spec)
    number = _numbers(site, there)
    if new is not None:
        first = site.add(site.extent["k"], site.mul(new.extent["k"], -1))
        number = write(aten.slice.Tensor, number, -1, first, _END)
        there = there and write(aten.slice.Tensor, there, -1, first, _END)
    blocks = _blocks(site, route)
    member = write(aten.eq.Tensor, _block(site, number, route), _column(site, blocks))
    sums = _sums(site, write.to(keys, torch.float32), member, there)
    if past is None:
        return sums
    more = site.add(blocks, site.mul(write.size(past, 2), -1))
    return write(aten.add.Tensor, write(aten.constant_pad_nd.default, past, [0, 0, 0, more]), sums)


def summaries(site: SiteWriter, spec: SoftmaxSpec, sums: Node) -> Node:
    """The sums of the blocks that hold keys: what `block_sums` takes of earlier keys."""
    route = spec.route
    assert route is not None
    end = site.add(_blocks(site, route), 1 - route.topk)
    return site.write(aten.slice.Tensor, sums, 2, 0, end)


def has_sums(site: SiteWriter, spec: Spec) -> bool:
    """Blocks of cached keys are chosen from, by the sums of their keys alone."""
    if not isinstance(spec, SoftmaxSpec) or spec.route is None or spec.route.topk == 1:
        return False
    is_cached = not site.write.same_size(site.k, 2, site.extent["q"])
    return spec.route.by == "query" and is_cached and is_last(site, spec.route.position)


def _there(site: SiteWriter, spec: SoftmaxSpec) -> Node | None:
    """The keys that are counted, `[., ., 1, M]`; None: all are."""
    there = site.formula(key_terms(spec.mask))
    return site.full_rank(there) if site.write.is_tensor(there) else None


def _blocks(site: SiteWriter, route: Route) -> Node:
    """How many blocks the keys make if all are counted, and `topk - 1` more: `TopK` then finds as
    many however few keys there are. Two at least, so that torch takes no size for 1."""
    whole = site.formula.divide("IDiv", site.add(site.extent["k"], route.block - 1), route.block)
    return cast(Node, site.add(whole, route.topk - 1))


def _column(site: SiteWriter, count: Value) -> Node:
    return site.write(aten.reshape.default, site.count(count), [-1, 1])


def _by_query(site: SiteWriter, route: Route, there: Node | None, sums: Node | None) -> Node:
    write = site.write
    number = _numbers(site, there)  # [M], or [., ., 1, M]
    last = _last(site, route, number)
    block = _block(site, number, route)
    own = _block(site, last, route)
    result = write(aten.eq.Tensor, block, own)
    if route.dense_below:
        dense = write(aten.lt.Scalar, last, route.dense_below)
        result = write(aten.logical_or.default, result, dense)
    if sums is None:
        return result
    means = write(aten.div.Tensor, sums, _counts(site, route, there))
    affinity = site.grouped(write.to(site.q, torch.float32), site.turned(means))  # [B, Hq, L, C]
    earlier = write(aten.lt.Tensor, site.count(_blocks(site, route)), own)
    affinity = site.where(earlier, affinity, -torch.inf)
    best = _chosen(site, affinity, route.topk - 1)
    return write(aten.logical_or.default, result, _spread(site, best, block))


def _counts(site: SiteWriter, route: Route, there: Node | None) -> Node:
    """How many keys each block holds, at least 1, broadcasts to `[B, H, C, 1]` in float32."""
    write = site.write
    start = write(aten.mul.Tensor, _column(site, _blocks(site, route)), route.block)
    total = site.extent["k"]
    if there is not None:
        total = write(aten.sum.dim_IntList, write.to(there, torch.int64), [-1], True)
    left = site.add(site.mul(start, -1), total)
    return write.to(write(aten.clamp.default, left, 1, route.block), torch.float32)


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


def _sums(site: SiteWriter, rows: Node, member: Node, there: Node | None) -> Node:
    """The sum of each group `[B, H, C, D]` of rows `[B, H, N, D]` that are there.

    member `[..., C, N]` says what is in a group; H is that of `there`, where it differs by head.
    """
    write = site.write
    if there is not None:
        member = write(aten.logical_and.default, member, there)
    if site.differs_by_head(member):
        rows = site.repeated(rows)
    return write(aten.matmul.default, write.to(member, torch.float32), rows)


def _means(site: SiteWriter, rows: Node, member: Node, there: Node | None) -> Node:
    """The mean of each group, as in `_sums`."""
    write = site.write
    counted = member if there is None else write(aten.logical_and.default, member, there)
    count = write(aten.sum.dim_IntList, write.to(counted, torch.float32), [-1], True)
    total = _sums(site, rows, member, there)
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
    member = write(aten.eq.Tensor, region, _column(site, down * across))  # [R, N]
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
