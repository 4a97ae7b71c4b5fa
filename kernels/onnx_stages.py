"""The edit of the weights, and what happens to the output: local term, factor of heads, patch."""

from __future__ import annotations

import torch
from torch.fx import Node

from rewriter import symbols as sym
from rewriter.kernels.onnx_site import SiteWriter
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.stages import Edit, Local, Patch

__all__ = ["edited", "finished"]

aten = torch.ops.aten


def edited(site: SiteWriter, edit: Edit, weights: Node) -> Node:
    """The weights `[B, Hq, L, M]` times the factors of their groups."""
    write = site.write
    group = write.tensor(site.formula(edit.group), torch.int64, site.device)
    here = [write(aten.eq.Scalar, group, g) for g in range(len(edit.factors))]
    used = set().union(*(a.free_symbols for a in edit.factors))
    for mass, members in zip(sym.masses, here, strict=False):
        if mass in used:
            part = site.where(members, weights, 0.0)
            site.values[str(mass)] = write(aten.sum.dim_IntList, part, [-1], True)  # [B, Hq, L, 1]
    result = site.constant(0.0)
    for factor, members in zip(reversed(edit.factors), reversed(here), strict=True):
        result = site.where(members, site.mul(weights, site.real(factor)), result)
    return result


def finished(site: SiteWriter, spec: Spec, out: Node) -> Node:
    """What follows the product with the values, `[B, Hq, L, Dv]` in the dtype of v."""
    write = site.write
    if isinstance(spec, SoftmaxSpec) and spec.local is not None:
        out = write(aten.add.Tensor, out, _convolved(site, spec.local))
    if spec.heads != 1:
        out = write.to(site.mul(out, site.formula(spec.heads)), site.dtype)
    return out if spec.patch is None else _patched(site, spec.patch, out)


def _patched(site: SiteWriter, patch: Patch, out: Node) -> Node:
    write = site.write
    where = write.tensor(site.formula(patch.where), torch.bool, site.device)
    given = write.to(site.tensors[patch.tensor], site.dtype)
    return write(aten.where.self, where, given, out)


def _convolved(site: SiteWriter, local: Local) -> Node:
    """The convolution of the values over the grid, `[B, Hq, L, Dv]`. A channel of v is one group,
    for all the query heads that read it, so v is not repeated."""
    site.check_grid(local.grid, local.extra)
    write, (rows, columns) = site.write, local.grid
    batch, length = site.extent["b"], rows * columns
    kv_heads, dim = (int(write.value(site.v).shape[i]) for i in (1, 3))
    groups, channels = site.groups(site.v), kv_heads * dim

    image = write(aten.slice.Tensor, site.v, 2, local.extra, local.extra + length)
    image = write(aten.reshape.default, site.turned(image), [batch, channels, rows, columns])
    weight = write.to(site.tensors[local.weight], site.dtype)  # [Hq · Dv, 1, n, n]
    bias = write.to(site.tensors[local.bias], site.dtype)
    side = int(write.value(weight).shape[-1])
    if groups > 1:
        order = [kv_heads, groups, dim, side * side]
        weight = write(aten.transpose.int, write(aten.reshape.default, weight, order), 1, 2)
        bias = write(aten.transpose.int, write(aten.reshape.default, bias, order[:3]), 1, 2)
        weight = write(aten.reshape.default, weight, [-1, 1, side, side])
        bias = write(aten.reshape.default, bias, [-1])
    pad = [side // 2, side // 2]
    found = write(aten.conv2d.default, image, weight, bias, [1, 1], pad, [1, 1], channels)
    found = write(aten.reshape.default, found, [batch, kv_heads, dim, groups, length])
    tokens = write(aten.permute.default, found, [0, 1, 3, 4, 2])
    tokens = write(aten.reshape.default, tokens, [batch, site.extent["h"], length, dim])
    if not local.extra:
        return tokens
    return write(aten.constant_pad_nd.default, tokens, [0, 0, local.extra, 0], 0.0)
