"""Runs the kernels of linear attention with more features than a tile holds, in a process of its
own; see `triton_worker`. The torch kernel may not be called."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from linear_cases import PAD, SEEN, floats
from rewriter.beside import beside
from rewriter.kernels import torch_linear, triton_linear
from rewriter.kernels.triton_linear_kernel import LinearTile
from rewriter.linear import Features, LinearSpec
from rewriter.reference import reference
from rewriter.symbols import L, M, Read, Symbol, b, h, k, q

FEATURES = 270
"""A tile holds 256; there are twice as many with the map `exp`."""
POSITION = q + M - L
_MATRICES = floats(wq=3, wk=3)


def wide(map: str, **more: Any) -> LinearSpec:
    tensors = (*_MATRICES, *more.pop("tensors", ()))
    maps = (Features(map, w) for w in ("wq", "wk"))  # type: ignore[arg-type]
    return LinearSpec(*maps, **{"position": POSITION, "tensors": tensors, **more})


SPECS = {
    "exp-sum": wide("exp", norm="sum"),
    "silu-rms": wide("silu", norm="rms", heads=1 + h, decay=-(1 + h) / 8),
    "plain": wide("identity", heads=1 + h),
    "everything": wide(
        "relu", norm="sum", seen=SEEN, decay=-(1 + h) / 8, heads=1 + h,
        query_weight=Read(Symbol("a"), b, h, q), key_weight=Read(Symbol("c"), b, h, k),
        tensors=(*PAD, *floats(a=3, c=3)),
    ),
    "cross": wide("elu", norm="sum", position=None),
}  # fmt: skip


def operands(spec: LinearSpec, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and the tensors: two query heads, one key head, 40 keys."""
    torch.manual_seed(0)
    x = [torch.randn(2, heads, 40, 16).to(dtype) for heads in (2, 1, 1)]
    pad = torch.ones(2, 40, dtype=torch.bool)
    pad[1, 5:20] = False
    made = {
        "wq": torch.randn(2, 16, FEATURES) * 0.3,
        "wk": torch.randn(1, 16, FEATURES) * 0.3,
        "pad": pad,
        "a": torch.rand(2, 2, 40),
        "c": torch.rand(2, 2, 40),
    }
    return x, [made[t.name] for t in spec.tensors]


def run(spec: LinearSpec, dtype: torch.dtype) -> dict[str, Any]:
    """Errors of the kernels and of the reference in the same dtype, against float64."""
    x, tensors = operands(spec, dtype)
    gold = reference(spec, *(t.double() for t in x), tensors, [])
    out = triton_linear.forward(spec, *x, tensors)
    return {
        "error": float((out - gold).abs().max()),
        "reference_error": float((reference(spec, *x, tensors, []) - gold).abs().max()),
        "floor": torch.finfo(dtype).eps * float(gold.abs().max()),
        "dtype": str(out.dtype),
        "size": float(gold.square().mean().sqrt()),
    }


def remembered(spec: LinearSpec, plain: Any) -> float:
    """A prompt by the kernels and the next tokens by torch: the distance from one call of all."""
    x, tensors = operands(spec, torch.float32)
    whole, past, rows = reference(spec, *x, tensors, []), None, []
    for start, stop in ((0, 37), (37, 40)):
        full = x[1][:, :, :stop].clone()
        memory = beside(full, past, ("site",))
        if past is not None:
            assert memory is not None
            assert memory.recall() is not None, "the prompt left a state"
        forward = triton_linear.forward if past is None else plain
        now = [x[0][:, :, start:stop], full, x[2][:, :, :stop]]
        rows.append(forward(spec, *now, tensors, [], memory))
        past = full
    return float((torch.cat(rows, dim=2) - whole).abs().max())


def build(name: str, dtype: str, capability: int) -> dict[str, int]:
    """The most that a kernel of a part of the features takes."""
    from rewriter.kernels.triton_linear_code import linear_source
    from rewriter.kernels.triton_source import compile_function

    plain = [Features(weight=w) for w in ("wq", "wk")]
    spec = replace(SPECS[name], q_map=plain[0], k_map=plain[1], norm="rms")
    part = triton_linear._PART
    kernel = triton_linear._kernel(spec, part, 65, getattr(torch, dtype), capability)
    dtypes = {n: kernel.dtype_of(n) for n in "qkvo"} | {"s": "float32", "number": "int32"}
    dtypes |= {f"t:{t.name}": t.dtype for t in spec.tensors}
    source = linear_source(kernel)
    found = [compile_function(source, f.name, dtypes, capability) for f in source.functions]
    return {n: max(vars(x)[n] for x in found) for n in vars(found[0])}


def main(mode: str) -> None:
    if mode == "compile":
        builds = {"silu-rms": "float32", "everything": "float16"}
        print(json.dumps({n: build(n, dtype, 80) for n, dtype in builds.items()}))
        return
    torch.use_deterministic_algorithms(True)  # what torch.empty gives is NaN
    plain = torch_linear.forward

    def refused(*_: Any) -> NoReturn:
        raise AssertionError("the torch kernel was called")

    torch_linear.forward = refused
    triton_linear.tile_for = lambda *_: LinearTile(16, 16, 16, 32, 4, 1)
    found: dict[str, Any] = {n: run(spec, torch.float32) for n, spec in SPECS.items()}
    found["plain-float16"] = run(SPECS["plain"], torch.float16)
    found["exp-sum-float16"] = run(SPECS["exp-sum"], torch.float16)
    with torch.no_grad():
        found["remembered"] = {n: remembered(SPECS[n], plain) for n in ("exp-sum", "silu-rms")}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
