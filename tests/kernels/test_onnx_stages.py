"""Routes, edits, patches and local terms in ONNX Runtime, at lengths that were not exported."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import sympy
import torch
from sympy import Eq, Float

from onnx_exports import Exported, Operands, exported, program_of
from rewriter.errors import ExportError
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit, Local, Patch, Route
from rewriter.symbols import L, M, Read, Where, b, h, k, masses, q, s

HEADS, KV_HEADS, DIM = 4, 2, 6
GRID, EXTRA = (4, 6), 2
CAUSAL = k <= q + M - L
M0, M1, *_ = masses


def read(name: str, *index: Any) -> Read:
    return Read(sympy.Symbol(name), *index)


PAD = TensorArg("pad", "bool", 2)
SEEN = sympy.Ne(read("pad", b, k), 0)
HEAD_PAD = TensorArg("head_pad", "int64", 3)
SINK = TensorArg("sinks", "float32", 1)
PATCH = TensorArg("patch", "float32", 4)
LOCAL = (TensorArg("kernel", "float32", 4), TensorArg("offset", "float32", 1))
BY_QUERY = Route("query", topk=2, block=3)
MOVED = Edit(
    Where(k < 2, 0, Where(Eq(read("label", b, k), 1), 1, 2)),
    (Float(0.25) * M0 / (M0 + M1 + Float(1e-9)), 1 + M0, sympy.Integer(0)),
)
LABEL = TensorArg("label", "int64", 2)

SPECS = {
    "route": SoftmaxSpec(mask=CAUSAL, route=BY_QUERY),
    "route to the own block": SoftmaxSpec(mask=CAUSAL, route=replace(BY_QUERY, topk=1)),
    "route, no mask": SoftmaxSpec(route=replace(BY_QUERY, topk=3, block=2)),
    "route, padding": SoftmaxSpec(mask=CAUSAL & SEEN, route=BY_QUERY, tensors=(PAD,)),
    "route, padding by head, dense": SoftmaxSpec(
        mask=CAUSAL & sympy.Ne(read("head_pad", b, h, k), 0),
        route=replace(BY_QUERY, dense_below=4),
        masked="mean",
        tensors=(HEAD_PAD,),
    ),
    "route, score and sink": SoftmaxSpec(
        mask=CAUSAL,
        score=3 * sympy.tanh(s / 3),
        scale=Float(0.5),
        sink=read("sinks", h),
        route=replace(BY_QUERY, topk=5),
        tensors=(SINK,),
    ),
    "edit": SoftmaxSpec(mask=CAUSAL, edit=MOVED, tensors=(LABEL,)),
    "edit where rows see nothing": SoftmaxSpec(
        mask=k < q - 1, edit=Edit(Where(k < 2, 0, 1), (Float(0.5), 1 + M0 * h))
    ),
    "edit of a sink's rest": SoftmaxSpec(
        mask=CAUSAL & SEEN,
        sink=read("sinks", h),
        edit=Edit(Where(Eq(k, 0), 3, 0), (1 - M0, Float(0.5))),
        tensors=(PAD, SINK),
    ),
    "patch": SoftmaxSpec(
        mask=CAUSAL,
        heads=h + 1,
        patch=Patch("patch", Eq(q, L - 1) & Eq(h, 2)),
        tensors=(PATCH,),
    ),
    "patch of everything": SoftmaxSpec(patch=Patch("patch"), tensors=(PATCH,)),
}
BY_REGION = Route("region", topk=2, grid=GRID, regions=3)
ON_GRIDS = {
    "regions": SoftmaxSpec(route=BY_REGION),
    "regions, padding": SoftmaxSpec(mask=SEEN, route=BY_REGION, tensors=(PAD,)),
    "regions, padding by head, some dense": SoftmaxSpec(
        mask=sympy.Ne(read("head_pad", b, h, k), 0),
        route=replace(BY_REGION, dense_below=17),
        tensors=(HEAD_PAD,),
    ),
    "more regions than there are": SoftmaxSpec(
        mask=SEEN, route=replace(BY_REGION, topk=99), tensors=(PAD,)
    ),
    "local": SoftmaxSpec(heads=h + 1, local=Local("kernel", "offset", GRID), tensors=LOCAL),
}
AFTER_FIRST_TOKENS = ("regions", "regions, padding by head, some dense", "local")


def with_first_tokens(spec: SoftmaxSpec) -> SoftmaxSpec:
    route = None if spec.route is None else replace(spec.route, extra=EXTRA)
    local = None if spec.local is None else replace(spec.local, extra=EXTRA)
    return replace(spec, route=route, local=local)


def operands(batch: int, q_len: int, kv_len: int) -> Operands:
    torch.manual_seed(batch + q_len + kv_len)
    tensors = {
        "pad": torch.rand(batch, kv_len) > 0.3,
        "head_pad": (torch.rand(batch, HEADS, kv_len) > 0.3).long(),
        "sinks": torch.randn(HEADS),
        "label": torch.randint(3, (batch, kv_len)),
        "patch": torch.randn(batch, HEADS, q_len, DIM + 2),
        "kernel": torch.randn(HEADS * (DIM + 2), 1, 3, 3),
        "offset": torch.randn(HEADS * (DIM + 2)),
    }
    return Operands(
        torch.randn(batch, HEADS, q_len, DIM),
        torch.randn(batch, KV_HEADS, kv_len, DIM),
        torch.randn(batch, KV_HEADS, kv_len, DIM + 2),
        tensors,
    )


def on_grid(extra: int, batch: int) -> Operands:
    length = extra + GRID[0] * GRID[1]
    return operands(batch, length, length)


@lru_cache
def of_any_lengths() -> Exported:
    return exported(SPECS, operands)


@lru_cache
def of_the_grid(extra: int) -> Exported:
    specs = ON_GRIDS
    if extra:
        specs = {name: with_first_tokens(ON_GRIDS[name]) for name in AFTER_FIRST_TOKENS}
    return exported(specs, lambda batch, *_: on_grid(extra, batch), example=(13, 5, 7))


@pytest.mark.parametrize("name", SPECS)
def test_stage_equals_the_reference(name: str) -> None:
    for x in (operands(2, 5, 11), operands(1, 1, 4), operands(2, 17, 17)):
        found = of_any_lengths()(x)[name]
        torch.testing.assert_close(found, x.expected(SPECS[name]), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(
    ("name", "extra"),
    [*((name, 0) for name in ON_GRIDS), *((name, EXTRA) for name in AFTER_FIRST_TOKENS)],
)
def test_stage_on_a_grid_equals_the_reference(name: str, extra: int) -> None:
    spec = ON_GRIDS[name] if extra == 0 else with_first_tokens(ON_GRIDS[name])
    for x in (on_grid(extra, 1), on_grid(extra, 5)):
        found = of_the_grid(extra)(x)[name]
        torch.testing.assert_close(found, x.expected(spec), rtol=1e-5, atol=3e-6)


def test_a_length_that_is_not_the_grid_is_refused() -> None:
    with pytest.raises(ExportError, match=r"7 tokens are not 0 and a grid of 4 x 6"):
        program_of({"x": SoftmaxSpec(route=BY_REGION)}, lambda n, *_: operands(n, 7, 7))
