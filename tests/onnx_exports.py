"""Attentions of many specs in one ONNX file: one export serves a whole table of cases."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from rewriter.kernels.onnx_attention import inline_attention
from rewriter.op import attention
from rewriter.reference import reference
from rewriter.spec import Spec

__all__ = ["EXAMPLE", "Exported", "Operands", "exported", "program_of"]

EXAMPLE = (3, 5, 7)
"""Batch, queries and keys of the export: sizes that nothing else has."""


@dataclass(frozen=True)
class Operands:
    """What the attentions share; of the tensors each takes those that its spec names."""

    q: Tensor
    k: Tensor
    v: Tensor
    tensors: dict[str, Tensor]

    def of(self, spec: Spec) -> list[Tensor]:
        return [self.tensors[t.name] for t in spec.tensors]

    def expected(self, spec: Spec) -> Tensor:
        sizes = [self.k.shape[2] - self.q.shape[2]] * len(spec.sizes)
        return reference(spec, self.q, self.k, self.v, self.of(spec), sizes)


class _Sites(nn.Module):
    def __init__(self, specs: Mapping[str, Spec]) -> None:
        super().__init__()
        self.specs = dict(specs)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = {}
        for name, spec in self.specs.items():
            sizes = [k.shape[2] - q.shape[2] for _ in spec.sizes]
            found[name] = attention(q, k, v, [tensors[t.name] for t in spec.tensors], sizes, spec)
        return found


@dataclass(frozen=True)
class Exported:
    """A file in ONNX Runtime."""

    names: tuple[str, ...]
    session: Any
    model: Any

    def __call__(self, x: Operands) -> dict[str, Tensor]:
        given = {"q": x.q, "k": x.k, "v": x.v}
        given |= {f"tensors_{name}": t for name, t in x.tensors.items()}
        taken = {i.name: given[i.name].numpy() for i in self.session.get_inputs()}
        found = self.session.run(None, taken)
        return {n: torch.from_numpy(y) for n, y in zip(self.names, found, strict=True)}


def program_of(
    specs: Mapping[str, Spec],
    operands: Callable[..., Operands],
    *,
    example: tuple[int, int, int] = EXAMPLE,
    tied: bool = True,
) -> Any:
    """The exported program of the attentions, with primitive ops in place of their nodes.

    Sizes of the example that appear in a shape are dynamic; equal ones are one size if they are
    tied, else each has a symbol of its own.
    """
    x = operands(*example)
    used = {t.name for spec in specs.values() for t in spec.tensors}
    inputs = (x.q, x.k, x.v, {n: t for n, t in x.tensors.items() if n in used})
    labels = dict(zip(reversed(example), ("kv_len", "q_len", "batch"), strict=True))
    dims: dict[int, Any] = {
        n: torch.export.Dim(label, min=1) if tied else torch.export.Dim.AUTO
        for n, label in labels.items()
    }
    shapes = cast(Any, torch.utils._pytree).tree_map(
        lambda t: {i: dims[n] for i, n in enumerate(t.shape) if n in dims}, inputs
    )
    with torch.no_grad():
        program = torch.export.export(_Sites(specs), inputs, dynamic_shapes=shapes, strict=False)
    assert inline_attention(program.graph_module) == len(specs)
    return program


def exported(
    specs: Mapping[str, Spec], operands: Callable[..., Operands], **options: Any
) -> Exported:
    """The attentions as a file that ONNX Runtime has loaded."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch.onnx
        program = program_of(specs, operands, **options)
        cast(Any, torch.onnx.export(program, dynamo=True, verbose=False, opset_version=18)).save(
            file
        )
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        file.getvalue(), chosen, providers=["CPUExecutionProvider"]
    )
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model, full_check=True)
    return Exported(tuple(specs), session, model)
