"""The ONNX form of attention as a lowering: exported once a spec, run in ONNX Runtime at any size.

The door is that of `export_onnx`: `inline_attention` writes the op in primitive operations, with
batch, queries and keys dynamic; torch translates them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from rewriter.families import from_json
from rewriter.kernels.onnx_attention import inline_attention
from rewriter.lowering import Lowering, Shapes
from rewriter.op import attention
from rewriter.program import quiet
from rewriter.spec import Spec
from rewriter.testing.cases import Case, Dims
from rewriter.testing.families import grid_of
from rewriter.testing.operands import operands
from rewriter.verify.growing import without_dropout

__all__ = ["ONNX"]

_DTYPES = (torch.float32, torch.float16)
_OPSET = 20
_EXAMPLE = (13, 5, 7)  # batch, queries, keys: sizes that nothing else in a case has


class _Attention(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor]) -> Tensor:
        sizes = [k.shape[2] - q.shape[2] for _ in self.spec.sizes]
        return attention(q, k, v, tensors, sizes, self.spec)


def _supports(spec: Spec, shapes: Shapes) -> str | None:
    if shapes.dtype not in _DTYPES:
        name = str(shapes.dtype).removeprefix("torch.")
        return f"ONNX Runtime has no CPU kernels for {name}"
    if without_dropout(spec) != spec:
        return "dropout has no ONNX form"
    if shapes.heads % shapes.kv_heads:
        return f"{shapes.heads} query heads are not a multiple of {shapes.kv_heads} key heads"
    return None


def _forward(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    dims = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    own = {t.name: tuple(x.shape) for t, x in zip(spec.tensors, tensors, strict=True)}
    shapes = tuple((n, own[n]) for n in spec.whole if spec.patch is None or n != spec.patch.tensor)
    session = _session(spec.to_json(), *dims, q.dtype, shapes)
    given = [q, k, v, *tensors]
    names = ["q", "k", "v", *(f"tensors_{i}" for i in range(len(tensors)))]
    feed = dict(zip(names, (x.detach().contiguous().numpy() for x in given), strict=True))
    taken = {x.name for x in session.get_inputs()}
    (out,) = session.run(None, {name: x for name, x in feed.items() if name in taken})
    return torch.from_numpy(out)


@lru_cache(maxsize=64)
def _session(
    spec_json: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
) -> Any:
    """ONNX Runtime with the file of a spec, in which the tensors in `shapes` have that shape."""
    import onnxruntime

    spec = from_json(spec_json)
    batch, q_len, kv_len = _EXAMPLE
    q_len, kv_len = grid_of(spec) or q_len, grid_of(spec) or kv_len
    dims = Dims(batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim)
    x = operands(Case("export", spec, dims, dtype))
    fixed = {name: torch.zeros(shape) for name, shape in shapes}
    read = [fixed.get(t.name, y) for t, y in zip(spec.tensors, x.tensors, strict=True)]
    inputs = (x.q, x.k, x.v, read)
    free = dict(zip((batch, q_len, kv_len), ("batch", "queries", "keys"), strict=True))
    if grid_of(spec):
        free = {batch: "batch"}
    free_dims = cast(Any, torch.utils._pytree).tree_map(lambda t: _free(t, free), inputs)
    with torch.no_grad(), quiet():
        program = torch.export.export(
            _Attention(spec), inputs, dynamic_shapes=free_dims, strict=False
        )
        if inline_attention(program.graph_module) != 1:
            raise RuntimeError("the exported graph does not hold the attention op")
        file = io.BytesIO()
        cast(
            Any, torch.onnx.export(program, dynamo=True, verbose=False, opset_version=_OPSET)
        ).save(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )


def _free(x: Tensor, names: dict[int, str]) -> dict[int, Any]:
    """The dimensions of a tensor that vary: those whose size in the example says so."""
    return {i: torch.export.Dim(names[n], min=1) for i, n in enumerate(x.shape) if n in names}


ONNX = Lowering("onnx", _supports, _forward)
"""Not a target of `optimize`; it has the form of one so that `check_lowering` takes it."""
