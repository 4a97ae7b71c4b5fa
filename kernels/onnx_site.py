"""One attention of a graph while its ONNX form is written: operands, sizes, formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from rewriter.errors import ExportError
from rewriter.kernels.onnx_formulas import Formulas, Value, Writer
from rewriter.spec import Spec
from rewriter.symbols import Formula

__all__ = ["SiteWriter"]

aten = torch.ops.aten


class SiteWriter:
    """What the forms of all families share. Tensors broadcast to `[B, Hq, L, M]`, as in
    `rewriter.reference`."""

    def __init__(self, graph: Graph, node: Node, spec: Spec, written: dict[Any, Node]) -> None:
        q, k, v, tensors, sizes, *_ = cast(Any, node.args)
        self.q: Node = q
        self.k: Node = k
        self.v: Node = v
        self.write = Writer(graph, node, written)
        self.dtype: torch.dtype = self.write.value(v).dtype
        self.device: torch.device = self.write.value(q).device
        self.extent: dict[str, Value] = {
            "b": self.write.size(q, 0),
            "h": self.write.size(q, 1),
            "q": self.write.size(q, 2),
            "k": self.write.size(k, 2),
        }
        self.tensors: dict[str, Node] = dict(
            zip((t.name for t in spec.tensors), tensors, strict=True)
        )
        self.values = self._values(spec, sizes)
        self.formula = Formulas(self.write, self.values, self.tensors, self.extent)

    def _values(self, spec: Spec, sizes: Sequence[Value]) -> dict[str, Value]:
        """The index symbols as tensors, and the sizes as integers."""
        shapes = {"b": [-1, 1, 1, 1], "h": [-1, 1, 1], "q": [-1, 1], "k": [-1]}
        values: dict[str, Value] = {
            name: self.write(aten.reshape.default, self.count(self.extent[name]), shape)
            for name, shape in shapes.items()
        }
        values |= {symbol: self.extent[name] for symbol, name in zip("BHLM", "bhqk", strict=True)}
        return values | dict(zip(spec.sizes, sizes, strict=True))

    # --- tensors and numbers ----------------------------------------------------------------------

    def count(self, size: Value) -> Node:
        """0, 1, ... below the size, `[size]` in int64."""
        return self.write(aten.arange.default, size, device=self.device, pin_memory=False)

    def real(self, formula: Formula) -> Node:
        """The value of a formula as a tensor in float32."""
        return self.write.tensor(self.formula(formula), torch.float32, self.device)

    def constant(self, x: float | bool, dtype: torch.dtype = torch.float32) -> Node:
        return self.write.tensor(x, dtype, self.device)

    def wide(self, x: Node) -> Node:
        """In float32 where it is narrower."""
        return self.write.to(x, torch.float32) if self.write.value(x).itemsize < 4 else x

    def add(self, x: Value, *others: Value) -> Value:
        """The sum of tensors, integers of the graph and numbers."""
        return self.formula.fold("add", [x, *others])

    def mul(self, x: Value, *others: Value) -> Value:
        return self.formula.fold("mul", [x, *others])

    def where(self, condition: Node, x: Value, y: Value) -> Node:
        """In the wider of their dtypes; a number beside a tensor is float32."""
        return cast(Node, self.formula.where(condition, x, y))

    # --- shapes -----------------------------------------------------------------------------------

    def full_rank(self, x: Node) -> Node:
        """With dimensions of 1 in front, so that there are four."""
        for _ in range(4 - self.write.value(x).ndim):
            x = self.write(aten.unsqueeze.default, x, 0)
        return x

    def turned(self, x: Node) -> Node:
        """`[..., N, F]` from `[..., F, N]`."""
        return self.write(aten.transpose.int, x, -2, -1)

    def of_rows(self, x: Node) -> Node:
        """A value of keys `[..., 1, M]` as one of rows of k, `[..., M, 1]`; numbers stay."""
        return self.turned(self.full_rank(x)) if self.write.value(x).ndim else x

    def differs_by_head(self, x: Node) -> bool:
        shape = self.write.value(x).shape
        return len(shape) >= 3 and not self.write.same_size(x, -3, 1)

    def repeated(self, x: Node) -> Node:
        """`[B, Hkv, N, F]` with each head as often as queries read it, `[B, Hq, N, F]`."""
        write = self.write
        groups = self.groups(x)
        if groups == 1:
            return x
        batch, heads, rows, width = (write.size(x, i) for i in range(4))
        each = write(aten.unsqueeze.default, x, 2)
        each = write(aten.expand.default, each, [batch, heads, groups, rows, width])
        return write(aten.reshape.default, each, [batch, self.extent["h"], rows, width])

    def groups(self, shared: Node) -> int:
        """Query heads that read one head of `shared`."""
        heads, kv_heads = (int(self.write.value(x).shape[1]) for x in (self.q, shared))
        return heads // kv_heads

    def grouped(self, rows: Node, shared: Node) -> Node:
        """`rows @ shared`, where consecutive heads of `rows`, as one matrix, meet one of
        `shared`."""
        write = self.write
        heads, kv_heads = write.size(rows, 1), write.size(shared, 1)
        if write.value(heads) == write.value(kv_heads):
            return write(aten.matmul.default, rows, shared)
        batch, length, width = (write.size(rows, i) for i in (0, 2, 3))
        folded = write(aten.reshape.default, rows, [batch, kv_heads, -1, width])
        product = write(aten.matmul.default, folded, shared)
        return write(aten.reshape.default, product, [batch, heads, length, write.size(shared, 3)])

    # --- the token grid of a vision model ---------------------------------------------------------

    def check_grid(self, grid: tuple[int, int], extra: int) -> None:
        """Raises ExportError if the keys cannot be the grid and what comes before it."""
        length = self.write.value(self.extent["k"])
        rows, columns = grid
        if length != extra + rows * columns:
            raise ExportError(
                f"{int(length)} tokens are not {extra} and a grid of {rows} x {columns}; "
                "export at the size for which the pass was given its grid"
            )
