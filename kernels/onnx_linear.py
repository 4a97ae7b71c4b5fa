"""Linear attention in primitive ATen ops, and in one operator of ONNX Runtime.

Four forms, each with any lengths. Without positions: keys and values are summed first. Causal, the
queries being the keys: the operator, or in float64, which it does not take, by chunks, whose states
a small matrix over chunks joins (Lightning Attention-2, arXiv 2401.04658; the states are not kept
but computed at once). Otherwise: the weights `[B, Hq, L, M]` themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import sympy
import torch
from torch.fx import Node

from rewriter import symbols as sym
from rewriter.kernels.onnx_chunks import by_chunks
from rewriter.kernels.onnx_operator import by_operator
from rewriter.kernels.onnx_site import SiteWriter
from rewriter.linear import EPS_RMS, EPS_SUM, POSITIVE, Features, LinearSpec, Near

__all__ = ["linear_form", "stateful_form"]

aten = torch.ops.aten

_LEAST = 1e-12  # of a positive feature, as in `rewriter.reference_linear`


def linear_form(site: SiteWriter, spec: LinearSpec) -> Node:
    """The attention before the factor of the heads and the patch, `[B, Hq, L, Dv]` in the dtype
    of v. Everything up to there is float32, or float64 if the operands are."""
    write = site.write
    queries, keys, values = _operands(site, spec)
    if spec.position is None:
        out = _of_sums(site, spec, queries, keys, values)
    elif spec.near is None and _queries_are_keys(site, spec):
        out = _of_one_sequence(site, spec, queries, keys, values)
    else:
        out = site.grouped(_weights(site, spec, queries, keys), values)
    return write.to(_normed(site, spec, out), site.dtype)


def stateful_form(site: SiteWriter, spec: LinearSpec, past: Node | None) -> tuple[Node, Node]:
    """The same where the keys are those of the queries alone, and what earlier ones add is a state;
    and the state after the last key, `[B, H, P, Dv]` with one more column for a sum."""
    queries, keys, values = _operands(site, spec)
    out, state = by_operator(site, queries, *_gated(site, spec, keys, values), past)
    return site.write.to(_normed(site, spec, out), site.dtype), state


def _operands(site: SiteWriter, spec: LinearSpec) -> tuple[Node, Node, Node]:
    """φ(q) with its weight, φ(k), and the values."""
    queries = _features(site, site.q, spec.q_map)
    if spec.query_weight != 1:
        queries = site.mul(queries, site.real(spec.query_weight))
    keys = _features(site, site.k, spec.k_map)
    values = site.wide(site.v)
    if spec.norm == "sum":  # one more column of ones is the sum of the weights
        values = site.write(aten.constant_pad_nd.default, values, [0, 1], 1.0)
    return queries, keys, values


def _queries_are_keys(site: SiteWriter, spec: LinearSpec) -> bool:
    """Query q stands where key q is, whatever the length."""
    position = spec.position
    if position is None or not site.write.same_size(site.k, 2, site.extent["q"]):
        return False
    return bool(position.subs(sym.M, sym.L) == sym.q)


def _normed(site: SiteWriter, spec: LinearSpec, out: Node) -> Node:
    write = site.write
    if spec.norm == "sum":
        total = write(aten.slice.Tensor, out, 3, -1, torch.iinfo(torch.int64).max)
        out = write(aten.slice.Tensor, out, 3, 0, -1)
        return write(aten.div.Tensor, out, site.add(total, EPS_SUM))
    if spec.norm == "rms":
        square = write(aten.mean.dim, write(aten.mul.Tensor, out, out), [1, 3], True)
        out = site.mul(out, write(aten.rsqrt.default, site.add(square, EPS_RMS)))
    return out


def _features(site: SiteWriter, x: Node, phi: Features) -> Node:
    """φ of the rows of x `[B, H, N, D]`, `[B, H, N, P]` in float32 or float64."""
    write = site.write
    x = site.wide(x)
    if phi.weight:
        weight = write.to(site.tensors[phi.weight], write.value(x).dtype)
        x = write(aten.matmul.default, x, weight)
    if phi.bias:
        bias = write.to(site.tensors[phi.bias], write.value(x).dtype)
        x = write(aten.add.Tensor, x, write(aten.unsqueeze.default, bias, 1))
    match phi.map:
        case "silu":
            x = write(aten.silu.default, x)
        case "relu":
            x = write(aten.relu.default, x)
        case "elu":
            x = write(aten.add.Tensor, write(aten.elu.default, x), 1.0)
        case "exp":
            up = write(aten.sub.Tensor, x, write(aten.amax.default, x, [-1], True))
            down = write(aten.sub.Tensor, write(aten.amin.default, x, [-1], True), x)
            x = write(aten.exp.default, write(aten.cat.default, [up, down], -1))
    return write(aten.clamp_min.default, x, _LEAST) if phi.map in POSITIVE else x


# --- which keys take part -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Keys:
    """Keys that take part `[., ., 1, M]`, and the number of each among them; None: all do."""

    seen: Node | None
    number: Node


def _keys(site: SiteWriter, spec: LinearSpec) -> _Keys:
    write = site.write
    if spec.seen is sympy.true:
        return _Keys(None, write(aten.reshape.default, site.count(site.extent["k"]), [1, 1, 1, -1]))
    seen = write.tensor(site.formula(spec.seen), torch.bool, site.device)
    whole = [1, 1, 1, site.extent["k"]]
    seen = (
        site.full_rank(seen) if write.value(seen).ndim else write(aten.expand.default, seen, whole)
    )
    counts = write(aten.cumsum.default, write.to(seen, torch.int64), -1)
    return _Keys(seen, write(aten.sub.Tensor, counts, 1))


def _last(site: SiteWriter, spec: LinearSpec, keys: _Keys) -> Node:
    """The number of the last key that a query may see, `[B, Hq, L, 1]`; -1 if there is none."""
    write, formula = site.write, site.formula
    assert spec.position is not None
    position = write.tensor(formula(spec.position), torch.int64, site.device)
    end = site.add(site.extent["k"], -1)
    if keys.seen is None:
        last = formula.extreme("minimum", formula.extreme("maximum", position, -1), end)
        return cast(Node, last)
    batch, heads, length = (site.extent[name] for name in "bhq")
    position = write(aten.expand.default, position, [batch, heads, length, 1])
    index = formula.extreme("minimum", formula.extreme("maximum", position, 0), end)
    rows = write(aten.expand.default, keys.number, [batch, heads, 1, site.extent["k"]])
    found = site.turned(write(aten.gather.default, rows, 3, site.turned(index)))
    none = site.constant(-1, torch.int64)
    return write(aten.where.self, write(aten.lt.Scalar, position, 0), none, found)


def _weighted(site: SiteWriter, spec: LinearSpec, keys: Node, seen: Node | None) -> Node:
    """φ(k) times the weight of the key, and 0 where it does not take part, `[B, H, M, P]`; H is Hq
    if that differs between the query heads of a key head."""
    factors = []
    if spec.key_weight != 1:
        factors.append(site.real(spec.key_weight))
    if any(site.differs_by_head(x) for x in (*factors, *([] if seen is None else [seen]))):
        keys = site.repeated(keys)
    for x in factors:
        keys = site.mul(keys, site.of_rows(x))
    return keys if seen is None else site.where(site.of_rows(seen), keys, 0.0)


# --- the four forms ------------------------------------------------------------------------------


def _of_sums(site: SiteWriter, spec: LinearSpec, queries: Node, keys: Node, values: Node) -> Node:
    """Every query sees the same keys: `φ(q) · (Σ φ(k) v)`."""
    keys = _weighted(site, spec, keys, _keys(site, spec).seen)
    if site.groups(keys) == 1:
        values = site.repeated(values)
    state = site.write(aten.matmul.default, site.turned(keys), values)  # [B, H, P, Dv]
    return site.grouped(queries, state)


def _of_one_sequence(
    site: SiteWriter, spec: LinearSpec, queries: Node, keys: Node, values: Node
) -> Node:
    keys, values, seen, decay = _gated(site, spec, keys, values)
    if site.write.value(queries).dtype == torch.float32:
        return by_operator(site, queries, keys, values, seen, decay)[0]
    keys, values = site.repeated(keys), site.repeated(values)
    return by_chunks(site, queries, keys, values, seen, decay)


def _gated(
    site: SiteWriter, spec: LinearSpec, keys: Node, values: Node
) -> tuple[Node, Node, Node | None, Node | None]:
    """Keys with their weights and values, for each head that has a state of its own; which keys
    take part; and the logarithm of the factor of each."""
    seen = _keys(site, spec).seen
    keys = _weighted(site, spec, keys, seen)
    decay = None if spec.decay == 0 else site.real(spec.decay)
    if decay is not None and site.write.value(decay).ndim:
        keys = site.repeated(keys)
    if site.groups(keys) == 1:
        values = site.repeated(values)
    return keys, values, seen, decay


def _weights(site: SiteWriter, spec: LinearSpec, queries: Node, keys: Node) -> Node:
    """w(q, k) `[B, Hq, L, M]`, those of near keys included."""
    write = site.write
    weights = site.grouped(queries, site.turned(keys))
    if spec.key_weight != 1:
        weights = site.mul(weights, site.real(spec.key_weight))
    found = _keys(site, spec)
    distance = write(aten.sub.Tensor, _last(site, spec, found), found.number)
    visible = write(aten.ge.Scalar, distance, 0)
    if spec.decay != 0:
        since = write.to(write(aten.clamp_min.default, distance, 0), torch.float32)
        decay = write(aten.exp.default, site.mul(since, site.real(spec.decay)))
        weights = site.mul(weights, decay)
    if found.seen is not None:
        visible = write(aten.logical_and.default, visible, found.seen)
    weights = site.where(visible, weights, 0.0)
    if spec.near is None:
        return weights
    here = write(aten.lt.Scalar, distance, spec.near.window)
    here = write(aten.logical_and.default, visible, here)
    return site.where(here, _near(site, spec.near, here), weights)


def _near(site: SiteWriter, near: Near, here: Node) -> Node:
    """`f e^(z - c)` of every key, `[B, Hq, L, M]`; c is the largest score of a near key."""
    write, formula = site.write, site.formula
    product = site.grouped(site.wide(site.q), site.turned(site.wide(site.k)))
    site.values["s"] = site.mul(product, formula(near.scale)) if near.scale != 1 else product
    score = site.where(here, formula(near.score), -torch.inf)
    largest = write(aten.amax.default, score, [-1], True)
    largest = write(aten.clamp_min.default, largest, torch.finfo(torch.float32).min)
    weights = write(aten.exp.default, write(aten.sub.Tensor, score, largest))
    return weights if near.factor == 1 else site.mul(weights, site.real(near.factor))
