"""The primitive form of attention against the reference, in ONNX Runtime, at shapes not traced."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import onnxruntime
import pytest
import sympy
import torch
from sympy import Eq, Float, Or
from torch import Tensor, nn

from rewriter import symbols as sym
from rewriter.errors import ExportError
from rewriter.kernels.onnx_softmax import inline_attention
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

OP = "rewriter_test_onnx"
library = torch.library.Library(OP, "FRAGMENT")
library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] tensors, SymInt[] sizes, str spec, "
    "str target) -> Tensor"
)


@torch.library.register_fake(f"{OP}::attention", lib=library)
def _fake(
    q: Tensor, k: Tensor, v: Tensor, tensors: Any, sizes: Any, spec: str, target: str
) -> Tensor:
    return v.new_empty((*q.shape[:3], v.shape[3]))


def _op() -> Any:
    return getattr(torch.ops, OP).attention.default


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
        mask=sympy.Ne(read("pad", b, Minimum(k + 1, M - 1)), 0) & CAUSAL,
        masked="mean",
        tensors=(TensorArg("pad", "int64", 2),),
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


class Site(nn.Module):
    """One or two attentions of the same spec on the same tensors."""

    def __init__(
        self, spec: SoftmaxSpec, count: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.text = spec.to_json()
        self.has_size = bool(spec.sizes)
        self.count = count

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor]) -> Tensor:
        sizes = [k.shape[2] - q.shape[2]] if self.has_size else []
        for _ in range(self.count):
            q = _op()(q, k, v, tensors, sizes, self.text, "auto")
        return q


def inputs_of(
    spec: SoftmaxSpec, batch: int, q_len: int, kv_len: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(batch + q_len + kv_len)
    heads, kv_heads = HEAD_SIZES
    shapes = {
        "pad": (batch, kv_len),
        "slope": (heads,),
        "bias": (16, heads),
        "full": (batch, heads, q_len, kv_len),
        "sinks": (heads,),
        "gate": (batch, q_len, heads),
    }
    tensors = []
    for arg in spec.tensors:
        x = torch.randn(shapes[arg.name])
        tensors.append(
            x.to(dtype) if arg.dtype == "float32" else (x > 0).to(getattr(torch, arg.dtype))
        )
    q = torch.randn(batch, heads, q_len, 8, dtype=dtype)
    k = torch.randn(batch, kv_heads, kv_len, 8, dtype=dtype)
    return q, k, torch.randn(batch, kv_heads, kv_len, 8, dtype=dtype), tensors


def traced(
    spec: SoftmaxSpec, count: int = 1, dtype: torch.dtype = torch.float32, tied: bool = True
) -> Any:
    """The exported program of a site, with its op node replaced.

    Where sizes are tied, the graph knows that a tensor fills the grid; else each size has a symbol
    of its own.
    """
    inputs = inputs_of(spec, 3, 5, 7, dtype)
    dims: dict[int, Any] = {3: "batch", 5: "q_len", 7: "kv_len"}
    dims = {
        n: torch.export.Dim(name, min=1) if tied else torch.export.Dim.AUTO
        for n, name in dims.items()
    }
    shapes = torch.utils._pytree.tree_map(
        lambda x: {i: dims[n] for i, n in enumerate(x.shape) if n in dims}, inputs
    )
    program = torch.export.export(Site(spec, count), inputs, dynamic_shapes=shapes, strict=False)
    assert inline_attention(program.graph_module, _op()) == count
    return program


def in_onnx_runtime(program: Any) -> Any:
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False, opset_version=18).save(file)
    return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "tied"),
    [
        *((name, True) for name in SPECS),
        ("padding as truth", False),
        ("opaque bias", False),
        ("sink", False),
    ],
)
def test_form_equals_the_reference_in_onnx_runtime(name: str, tied: bool) -> None:
    spec = SPECS[name]
    program = traced(spec, tied=tied)
    session = in_onnx_runtime(program)
    names = [x.name for x in session.get_inputs()]
    for batch, q_len, kv_len in [(2, 5, 7), (3, 4, 11), (1, 1, 6)]:
        q, k, v, tensors = inputs_of(spec, batch, q_len, kv_len)
        expected = reference(spec, q, k, v, tensors, [kv_len - q_len] * len(spec.sizes))
        given = dict(
            zip(
                ["q", "k", "v", *(f"tensors_{i}" for i in range(9))],
                [q, k, v, *tensors],
                strict=False,
            )
        )
        found = session.run(None, {n: given[n].numpy() for n in names})[0]
        torch.testing.assert_close(
            torch.from_numpy(found), expected, equal_nan=True, rtol=1e-5, atol=2e-6
        )


def test_float16_scores_are_float32() -> None:
    spec = SPECS["cap and window"]
    module = traced(spec, dtype=torch.float16).module()
    q, k, v, tensors = inputs_of(spec, 3, 4, 9, torch.float16)
    expected = reference(spec, q.double(), k.double(), v.double(), tensors)
    found = module(q, k, v, tensors)
    assert found.dtype == torch.float16
    assert (found - expected).abs().max() < 2e-3


def test_layers_with_the_same_mask_share_it() -> None:
    spec = replace(SPECS["padding as truth"], mask=SPECS["padding as truth"].mask & CAUSAL)
    targets = [str(n.target) for n in traced(spec, count=3).graph.nodes if n.op == "call_function"]
    assert targets.count("aten.softmax.int") == 3
    assert targets.count("aten.le.Tensor") == 1
    assert targets.count("aten.logical_and.default") == 1
    assert targets.count("aten.any.dim") == 1


def test_dropout_is_refused() -> None:
    with pytest.raises(ExportError, match=r"dropout has no ONNX form; call model\.eval\(\)"):
        traced(SoftmaxSpec(dropout=0.1))


def test_numbers_that_are_equal_but_of_another_kind_are_not_shared() -> None:
    spec = SoftmaxSpec(score=s + Where(k > q, 1, 0) + Where(k > q, Float(1.0), Float(0.0)))
    q_, k_, v_, tensors = inputs_of(spec, 2, 3, 4)
    expected = reference(spec, q_, k_, v_)
    torch.testing.assert_close(traced(spec).module()(q_, k_, v_, tensors), expected)
