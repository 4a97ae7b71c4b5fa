"""Base specs of what is more than softmax attention: routed, edited, gated, patched, linear."""

from __future__ import annotations

from typing import Any

import sympy
from sympy import Float, Symbol

from rewriter.linear import Features, LinearSpec, Near
from rewriter.spec import SoftmaxSpec, Spec, TensorArg
from rewriter.stages import Edit, Local, Patch, Route
from rewriter.symbols import L, M, Read, b, h, k, masses, q, s

__all__ = ["CAUSAL", "FAMILIES", "GRID", "PAD", "POSITION", "SEEN", "grid_of", "read"]


def read(name: str, *index: Any) -> Read:
    """The element of a tensor."""
    return Read(Symbol(name), *index)


POSITION = q + M - L
"""Where query q stands on the key axis: the last query sees the last key, so that a call with one
query is a step of decoding."""
CAUSAL = k <= POSITION
PAD = (TensorArg("pad", "bool", 2),)
SEEN = sympy.Ne(read("pad", b, k), 0)

GRID = (8, 8)
"""With one token before it, 65 tokens: a size that every base is tried at."""


def _floats(**ranks: int) -> tuple[TensorArg, ...]:
    return tuple(TensorArg(name, "float32", rank) for name, rank in ranks.items())


_GROUP = (TensorArg("group", "int64", 2),)
_SILU, _ELU = Features("silu"), Features("elu")
_LEARNED = (Features("exp", "q_matrix", "q_offset"), Features("exp", "k_matrix", "k_offset"))
_MATRICES = _floats(q_matrix=3, q_offset=2, k_matrix=3, k_offset=2)

FAMILIES: dict[str, Spec] = {
    # routed
    "routed": SoftmaxSpec(mask=CAUSAL, route=Route("query", topk=3, block=8)),
    "routed padding": SoftmaxSpec(
        mask=CAUSAL & SEEN,
        route=Route("query", topk=2, block=6, dense_below=14),
        tensors=PAD,
    ),
    "regions": SoftmaxSpec(route=Route("region", topk=2, grid=GRID, regions=3, extra=1)),
    # edited: what a group loses another one gets; groups that are removed, and one of each head
    "edit": SoftmaxSpec(
        mask=CAUSAL,
        edit=Edit(
            read("group", b, k),
            (Float(0.4), 1 + Float(0.6) * masses[0] / (masses[1] + Float(0.01))),
        ),
        tensors=_GROUP,
    ),
    "edit, cap, sink": SoftmaxSpec(
        score=5 * sympy.tanh(s / 5),
        mask=CAUSAL & SEEN,
        sink=read("sink", h),
        edit=Edit(read("group", b, k), (sympy.Integer(1), sympy.Integer(0), read("share", h))),
        tensors=(*_floats(sink=1, share=1), *PAD, *_GROUP),
    ),
    # heads that are off, rows that are replaced, a convolution beside
    "gated heads": SoftmaxSpec(
        mask=CAUSAL, heads=read("gates", b, h, q), tensors=_floats(gates=3), active=2
    ),
    "gated padding": SoftmaxSpec(
        score=5 * sympy.tanh(s / 5),
        mask=SEEN,
        masked="mean",
        heads=read("gates", b, h, q),
        tensors=(*PAD, *_floats(gates=3)),
        active=3,
    ),
    "patched": SoftmaxSpec(
        mask=CAUSAL,
        tensors=(*_floats(patch=4), TensorArg("rows", "bool", 2)),
        patch=Patch("patch", sympy.Eq(h, 1) & sympy.Ne(read("rows", b, q), 0)),
    ),
    "local": SoftmaxSpec(
        tensors=_floats(kernel=4, offset=1), local=Local("kernel", "offset", GRID, extra=1)
    ),
    # linear
    "linear": LinearSpec(_ELU, _ELU, norm="sum"),
    "linear padding": LinearSpec(
        Features("relu"), _ELU, seen=SEEN, norm="sum", heads=read("gate", b, h, q),
        tensors=(*PAD, *_floats(gate=3)),
    ),
    "causal linear": LinearSpec(_ELU, _ELU, position=POSITION, norm="sum"),
    "lightning": LinearSpec(
        _SILU, _SILU, position=POSITION, decay=read("decay", h), norm="rms",
        tensors=_floats(decay=1),
    ),
    "lightning padding": LinearSpec(
        _SILU, Features(), position=POSITION, seen=SEEN, decay=read("decay", h),
        query_weight=read("query_gate", b, h, q), key_weight=read("key_gate", b, h, k),
        tensors=(*PAD, *_floats(decay=1, query_gate=3, key_gate=3)),
    ),
    "features": LinearSpec(*_LEARNED, norm="sum", tensors=_MATRICES),
    "window tail": LinearSpec(
        *_LEARNED, position=POSITION, seen=SEEN, norm="sum",
        near=Near(8, factor=sympy.exp(read("mix", h))),
        tensors=(*_MATRICES, *PAD, *_floats(mix=1)),
    ),
}  # fmt: skip
"""Without the scale, as in `rewriter.testing.cases`."""


def grid_of(spec: Spec) -> int:
    """The only number of tokens that the spec takes, because they lie on a grid; 0 if any does."""
    route, local = getattr(spec, "route", None), getattr(spec, "local", None)
    if local is not None:
        return int(local.extra + local.grid[0] * local.grid[1])
    if route is not None and route.by == "region":
        return int(route.extra + route.grid[0] * route.grid[1])
    return 0
