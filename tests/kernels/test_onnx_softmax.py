"""The primitive form of attention against the reference, in ONNX Runtime, at shapes not traced."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import sympy
import torch
from sympy import Eq, Float, Or

from onnx_exports import Exported, Operands, exported, program_of
from rewriter import symbols as sym
from rewriter.errors import ExportError
from rewriter.reference import reference
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.symbols import (
    B,
    H,
    IDiv,
    IMod,
    L,
    M,
    Maximum,
    Minimum,
    Read,
    Trunc,
    Where,
    b,
    h,
    k,
    q,
    s,
)


def read(name: str, *index: Any) -> Read:
    return Read(sympy.Symbol(name), *index)


HEAD_SIZES = (4, 2)
CAUSAL = k <= q + M - L
SPECS: dict[str, SoftmaxSpec] = {
    "plain": SoftmaxSpec(),
    "scaled": SoftmaxSpec(scale=Float(0.3)),
    "causal": SoftmaxSpec(mask=CAUSAL),
    "cap and window": SoftmaxSpec(score=5 * sympy.tanh(s / 5), mask=CAUSAL & (q + M - L - k < 3)),
    "half of the rows see nothing, zero": SoftmaxSpec(
        mask=(k < q) & Eq(IMod(q, 2), 1), masked="zero"
    ),
    "half of the rows see nothing, mean": SoftmaxSpec(
        mask=(k < q) & Eq(IMod(q, 2), 1), masked="mean"
    ),
    "half of the rows see nothing, add": SoftmaxSpec(
        mask=(k < q) & Eq(IMod(q, 2), 1), masked="add"
    ),
    "half of the rows see nothing, nan": SoftmaxSpec(
        mask=(k < q) & Eq(IMod(q, 2), 1), masked="nan"
    ),
    "no key at all": SoftmaxSpec(mask=sympy.false),
    "mask of queries": SoftmaxSpec(mask=q > 1),
    "sizes decide": SoftmaxSpec(mask=Or(L < 5, k > 0)),
    "padding as truth": SoftmaxSpec(
        mask=sympy.Ne(read("pad", b, k), 0), tensors=(TensorArg("pad", "bool", 2),)
    ),
    "padding as number, shifted": SoftmaxSpec(
        mask=sympy.Ne(read("weights", b, Minimum(k + 1, M - 1)), 0) & CAUSAL,
        masked="mean",
        tensors=(TensorArg("weights", "int64", 2),),
    ),
    "alibi": SoftmaxSpec(
        score=s + read("slope", h) * (k + 1 - M), tensors=(TensorArg("slope", "float32", 1),)
    ),
    "buckets": SoftmaxSpec(
        score=s
        + read(
            "bias",
            Where(
                sympy.Abs(k - q) < 4,
                sympy.Abs(k - q),
                Minimum(
                    7, 4 + Trunc(sympy.log(Maximum(sympy.Abs(k - q), 1) / Float(4.0)) * Float(2.5))
                ),
            )
            + Where(k > q, 8, 0),
            h,
        ),
        tensors=(TensorArg("bias", "float32", 2),),
    ),
    "opaque bias": SoftmaxSpec(
        score=s + read("full", b, h, q, k), tensors=(TensorArg("full", "float32", 4),)
    ),
    "grid of width 3": SoftmaxSpec(
        mask=sympy.Abs(IDiv(k, 3) - IDiv(q, 3)) + sympy.Abs(IMod(k, 3) - IMod(q, 3)) < 3
    ),
    "sink": SoftmaxSpec(
        mask=CAUSAL, sink=read("sinks", h), tensors=(TensorArg("sinks", "float32", 1),)
    ),
    "head scale": SoftmaxSpec(heads=Where(Eq(h, 1) | Eq(h, 3), 0, Float(1.5))),
    "gate and scale of a head": SoftmaxSpec(
        scale=1 / sympy.sqrt(h + 1),
        heads=read("gate", b, q, h),
        tensors=(TensorArg("gate", "float32", 3),),
    ),
    "further size": SoftmaxSpec(mask=k <= q + sym.size_symbol("past"), sizes=("past",)),
    "score without product": SoftmaxSpec(
        score=-Float(0.5) * sympy.Abs(q - k) + Float(1.0) / B - Float(1.0) / H
    ),
}


def operands(batch: int, q_len: int, kv_len: int, dtype: torch.dtype = torch.float32) -> Operands:
    torch.manual_seed(batch + q_len + kv_len)
    heads, kv_heads = HEAD_SIZES
    tensors = {
        "pad": torch.randn(batch, kv_len) > 0,
        "weights": (torch.randn(batch, kv_len) > 0).long(),
        "slope": torch.randn(heads),
        "bias": torch.randn(16, heads),
        "full": torch.randn(batch, heads, q_len, kv_len),
        "sinks": torch.randn(heads),
        "gate": torch.randn(batch, q_len, heads),
    }
    q = torch.randn(batch, heads, q_len, 8, dtype=dtype)
    k = torch.randn(batch, kv_heads, kv_len, 8, dtype=dtype)
    v = torch.randn(batch, kv_heads, kv_len, 8, dtype=dtype)
    return Operands(q, k, v, tensors)


UNTIED = {name: SPECS[name] for name in ("padding as truth", "opaque bias", "sink")}
"""Exported a second time: there the graph does not know that a tensor fills the grid."""


@lru_cache
def file_of(tied: bool) -> Exported:
    return exported(SPECS if tied else UNTIED, operands, tied=tied)


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, True) for name in SPECS), *((name, False) for name in UNTIED)]
)
def test_form_equals_the_reference_in_onnx_runtime(name: str, tied: bool) -> None:
    for batch, q_len, kv_len in [(2, 5, 7), (3, 4, 11), (1, 1, 6)]:
        x = operands(batch, q_len, kv_len)
        found = file_of(tied)(x)[name]
        torch.testing.assert_close(
            found, x.expected(SPECS[name]), equal_nan=True, rtol=1e-5, atol=2e-6
        )


def test_float16_scores_are_float32() -> None:
    spec = SPECS["cap and window"]
    module = program_of({"x": spec}, partial(operands, dtype=torch.float16)).module()
    x = operands(3, 4, 9, torch.float16)
    expected = reference(spec, x.q.double(), x.k.double(), x.v.double())
    found = module(x.q, x.k, x.v, {})["x"]
    assert found.dtype == torch.float16
    assert (found - expected).abs().max() < 2e-3


def test_layers_with_the_same_mask_share_it() -> None:
    spec = replace(SPECS["padding as truth"], mask=SPECS["padding as truth"].mask & CAUSAL)
    graph = program_of(dict.fromkeys("abc", spec), operands).graph
    targets = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert targets.count("aten.le.Tensor") == 1
    assert targets.count("aten.logical_and.default") == 1
    assert targets.count("aten.any.dim") == 1


def test_dropout_is_refused() -> None:
    with pytest.raises(ExportError, match=r"dropout has no ONNX form; call model\.eval\(\)"):
        program_of({"x": SoftmaxSpec(dropout=0.1)}, operands)


def test_numbers_that_are_equal_but_of_another_kind_are_not_shared() -> None:
    spec = SoftmaxSpec(score=s + Where(k > q, 1, 0) + Where(k > q, Float(1.0), Float(0.0)))
    x = operands(2, 3, 4)
    found = program_of({"x": spec}, operands).module()(x.q, x.k, x.v, {})["x"]
    torch.testing.assert_close(found, x.expected(spec))
