"""Softmax attention in primitive ATen ops, weights and all: the product with the values."""

from __future__ import annotations

import torch
from torch.fx import Node

from rewriter.errors import ExportError
from rewriter.kernels.onnx_routes import routed_keys
from rewriter.kernels.onnx_site import SiteWriter
from rewriter.kernels.onnx_stages import edited
from rewriter.spec import SoftmaxSpec

__all__ = ["softmax_form"]

aten = torch.ops.aten


def softmax_form(site: SiteWriter, spec: SoftmaxSpec, sums: Node | None = None) -> Node:
    """The attention before the local term, the factor of the heads and the patch, `[B, Hq, L, Dv]`
    in the dtype of v.

    sums: of the keys of each block of the route, if they are known.

    Raises:
        ExportError: if weights are dropped.
    """
    if spec.dropout:
        raise ExportError(
            "attention with dropout has no ONNX form; call model.eval() before the export"
        )
    write = site.write
    score = _score(site, spec)
    seen = _seen(site, spec, sums)
    if seen is not None:
        score = _masked(site, seen, spec, score)
    weights = _softmax(site, spec, score)
    if spec.edit is not None:
        if seen is not None and spec.masked == "zero":  # the masses of such a row are 0
            weights = _zero_where_none(site, seen, weights)
        weights = edited(site, spec.edit, weights)
    out = site.grouped(write.to(weights, site.dtype), site.v)
    if seen is not None and spec.masked == "zero":
        out = _zero_where_none(site, seen, out)
    return out


def _score(site: SiteWriter, spec: SoftmaxSpec) -> Node:
    write, formula = site.write, site.formula
    q, k = site.wide(site.q), site.wide(site.k)
    q = site.mul(q, formula(spec.scale)) if spec.scale != 1 else q
    site.values["s"] = site.grouped(q, site.turned(k))  # [B, Hq, L, M]
    score = formula(spec.score)
    if not write.is_tensor(score) or write.value(score).ndim < 4:
        whole = [site.extent[name] for name in "bhqk"]
        score = write(aten.expand.default, write.tensor(score, torch.float32, site.device), whole)
    found: Node = score
    return found


def _seen(site: SiteWriter, spec: SoftmaxSpec, sums: Node | None) -> Node | None:
    """The keys that a query sees, as truth values that broadcast; None if it sees all."""
    write = site.write
    seen = (
        None if spec.is_unmasked else write.tensor(site.formula(spec.mask), torch.bool, site.device)
    )
    routed = None if spec.route is None else routed_keys(site, spec, sums)
    if seen is None or routed is None:
        return seen if routed is None else routed
    return write(aten.logical_and.default, seen, routed)


def _masked(site: SiteWriter, seen: Node, spec: SoftmaxSpec, score: Node) -> Node:
    """The scores, with those of hidden keys so low that their weights vanish."""
    write = site.write
    dtype = write.value(score).dtype
    low = site.constant(-torch.inf if spec.masked == "nan" else torch.finfo(dtype).min, dtype)
    if spec.masked == "add":
        zero = site.constant(0.0, dtype)
        return write(aten.add.Tensor, score, write(aten.where.self, seen, zero, low))
    return write(aten.where.self, seen, score, low)


def _zero_where_none(site: SiteWriter, seen: Node, x: Node) -> Node:
    """0 in the rows that see no key."""
    write = site.write
    some = write(aten.any.dim, seen, -1, True) if write.value(seen).ndim else seen
    return write(aten.where.self, some, x, site.constant(0.0, write.value(x).dtype))


def _softmax(site: SiteWriter, spec: SoftmaxSpec, score: Node) -> Node:
    write = site.write
    if spec.sink is None:
        return write(aten.softmax.int, score, -1)
    sink = write.tensor(site.formula(spec.sink), write.value(score).dtype, site.device)
    column = write(aten.expand.default, sink, [*(site.extent[name] for name in "bhq"), 1])
    weights = write(aten.softmax.int, write(aten.cat.default, [score, column], -1), -1)
    return write(aten.slice.Tensor, weights, 3, 0, -1)
