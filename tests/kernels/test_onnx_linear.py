"""Linear attention in ONNX Runtime against the reference, at lengths that were not exported."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import sympy
import torch
from sympy import Float

from onnx_exports import Exported, Operands, exported
from rewriter.linear import Features, LinearSpec, Near
from rewriter.spec import TensorArg
from rewriter.symbols import L, M, Read, b, h, k, q, s

HEADS, KV_HEADS, DIM = 4, 2, 6
POSITION = q + M - L


def read(name: str, *index: Any) -> Read:
    return Read(sympy.Symbol(name), *index)


PAD = TensorArg("pad", "int64", 2)
SEEN = sympy.Ne(read("pad", b, k), 0)
GATES = (TensorArg("of_query", "float32", 3), TensorArg("of_key", "float32", 2))
SLOPE = TensorArg("slope", "float32", 1)
MAPS = {
    "q_map": Features("exp", "wq", "bq"),
    "k_map": Features("exp", "wk"),
    "tensors": (
        TensorArg("wq", "float32", 3),
        TensorArg("bq", "float32", 2),
        TensorArg("wk", "float32", 3),
    ),
}


def weighted(**more: Any) -> LinearSpec:
    tensors = (*GATES, *more.pop("tensors", ()))
    return LinearSpec(
        query_weight=1 / (1 + sympy.Abs(read("of_query", b, q, h))),
        key_weight=read("of_key", b, k),
        tensors=tensors,
        **more,
    )


def near(**more: Any) -> LinearSpec:
    factor = sympy.exp(read("slope", h))
    return LinearSpec(
        q_map=Features("elu"),
        k_map=Features("elu"),
        position=POSITION,
        norm="sum",
        near=Near(3, Float(0.4), 4 * sympy.tanh(s / 4), factor),
        tensors=(SLOPE, *more.pop("tensors", ())),
        **more,
    )


SPECS = {
    "sums": LinearSpec(),
    "sums of weighted keys that are seen": weighted(seen=SEEN, norm="rms", tensors=(PAD,)),
    "sums, keys weighted by head": LinearSpec(
        q_map=Features("silu"), key_weight=1 + h * k, norm="rms"
    ),
    "sums, normalised": LinearSpec(q_map=Features("elu"), k_map=Features("relu"), norm="sum"),
    "causal": LinearSpec(position=POSITION),
    "causal, maps with weights": LinearSpec(position=POSITION, norm="sum", **MAPS),
    "causal, decay": LinearSpec(position=POSITION, decay=-Float(0.2) * (h + 1), norm="rms"),
    "causal, decay of a tensor, padding": LinearSpec(
        position=POSITION, decay=-sympy.Abs(read("slope", h)), seen=SEEN, tensors=(SLOPE, PAD)
    ),
    "causal, weighted": weighted(position=POSITION, decay=Float(-0.1)),
    "causal, some queries before all keys": LinearSpec(position=q - 2, decay=Float(-0.3)),
    "near keys": near(),
    "near keys, padding, heads": near(seen=SEEN, tensors=(PAD,), heads=h + 1),
}
ONE_SEQUENCE = {
    torch.float32: ("causal", "causal, decay of a tensor, padding", "causal, weighted"),
    torch.float64: ("causal, maps with weights", "causal, decay of a tensor, padding"),
    torch.float16: ("causal, maps with weights",),
}
"""Where the queries are the keys: one operator of ONNX Runtime, and in float64, which it does not
take, written by chunks. Sums are float32 or wider, whatever the operands are."""


def operands(batch: int, q_len: int, kv_len: int, dtype: torch.dtype = torch.float32) -> Operands:
    torch.manual_seed(batch + q_len + kv_len)
    tensors = {
        "pad": (torch.rand(batch, kv_len) > 0.3).long(),
        "of_query": torch.randn(batch, q_len, HEADS),
        "of_key": torch.rand(batch, kv_len),
        "slope": 0.3 * torch.randn(HEADS),
        "wq": torch.randn(HEADS, DIM, 9),
        "bq": torch.randn(HEADS, 9),
        "wk": torch.randn(KV_HEADS, DIM, 9),
    }
    return Operands(
        torch.randn(batch, HEADS, q_len, DIM, dtype=dtype),
        torch.randn(batch, KV_HEADS, kv_len, DIM, dtype=dtype),
        torch.randn(batch, KV_HEADS, kv_len, DIM + 2, dtype=dtype),
        tensors,
    )


@lru_cache
def of_any_lengths() -> Exported:
    return exported(SPECS, operands)


def of_one_length(dtype: torch.dtype) -> Exported:
    specs = {name: SPECS[name] for name in ONE_SEQUENCE[dtype]}
    return exported(specs, lambda batch, length, _: operands(batch, length, length, dtype))


@pytest.mark.parametrize("name", SPECS)
def test_form_with_a_cache_equals_the_reference(name: str) -> None:
    for x in (operands(2, 5, 9), operands(1, 1, 12)):
        found = of_any_lengths()(x)[name]
        torch.testing.assert_close(found, x.expected(SPECS[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ONE_SEQUENCE, ids=str)
def test_form_of_one_sequence_equals_the_reference(dtype: torch.dtype) -> None:
    tolerance, file = 2e-3 if dtype == torch.float16 else 1e-4, of_one_length(dtype)
    for x in (operands(2, n, n, dtype) for n in (150, 64, 3)):
        found = file(x)
        for name in ONE_SEQUENCE[dtype]:
            assert found[name].dtype == dtype
            torch.testing.assert_close(
                found[name], x.expected(SPECS[name]), rtol=tolerance, atol=tolerance, msg=name
            )
    kinds = [node.op_type for node in file.model.graph.node]
    operators = 0 if dtype == torch.float64 else len(ONE_SEQUENCE[dtype])
    assert kinds.count("LinearAttention") == operators
