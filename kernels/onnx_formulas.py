"""Formulas of a spec as ATen calls in a graph, with sizes that stay symbolic.

Equal calls are written once a graph, so what layers share, such as a mask, is computed once.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree

from rewriter import symbols as sym
from rewriter.errors import ExportError
from rewriter.symbols import Formula

__all__ = ["Formulas", "Value", "Writer"]

aten = torch.ops.aten

Value = Any
"""A graph node that holds a tensor or an integer, or a Python number."""

UNARY = {
    "Abs": aten.abs.default,
    "exp": aten.exp.default,
    "log": aten.log.default,
    "tanh": aten.tanh.default,
    "cos": aten.cos.default,
    "sin": aten.sin.default,
    "sign": aten.sign.default,
    "floor": aten.floor.default,
    "ceiling": aten.ceil.default,
}
COMPARE = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
MIRROR = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


class Writer:
    """Writes ATen calls before one node of a graph, with fake values; none is written twice."""

    def __init__(self, graph: Graph, site: Node, written: dict[Any, Node]) -> None:
        self.graph = graph
        self.written = written
        self.meta = {k: m for k, m in site.meta.items() if k in ("nn_module_stack", "stack_trace")}
        inputs = [x.meta["val"] for x in site.all_input_nodes]
        self.mode: FakeTensorMode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        key = (target, _hashable(args), _hashable(kwargs))
        if key not in self.written:
            node = self.graph.call_function(target, args, kwargs)
            fake_args, fake_kwargs = _pytree.tree_map(self.value, (args, kwargs))
            with self.mode, enable_python_dispatcher():
                node.meta = {**self.meta, "val": target(*fake_args, **fake_kwargs)}
            self.written[key] = node
        return self.written[key]

    @staticmethod
    def value(x: Value) -> Any:
        return x.meta["val"] if isinstance(x, Node) else x

    def is_tensor(self, x: Value) -> bool:
        return isinstance(self.value(x), Tensor)

    def size(self, x: Node, dim: int) -> Value:
        """The size as a number, or as the first node that was written for its symbol."""
        size = self.value(x).shape[dim]
        if isinstance(size, int):
            return size
        key = ("size", size.node.expr)
        if key not in self.written:
            self.written[key] = self(aten.sym_size.int, x, dim)
        return self.written[key]

    def same_size(self, x: Node, dim: int, size: Value) -> bool:
        return statically_known_true(self.value(x).shape[dim] == self.value(size))

    def to(self, x: Node, dtype: torch.dtype) -> Node:
        return x if self.value(x).dtype == dtype else self(aten.to.dtype, x, dtype)

    def tensor(self, x: Value, dtype: torch.dtype, device: torch.device) -> Node:
        """The value as a tensor of that dtype."""
        if self.is_tensor(x):
            return self.to(x, dtype)
        if isinstance(x, Node):
            whole = self(aten.scalar_tensor.default, x, dtype=torch.int64, device=device)
            return self.to(whole, dtype)
        shape = [1] if isinstance(x, float) and _is_dropped(x) else []
        return self(aten.full.default, shape, x, dtype=dtype, device=device)


def _is_dropped(x: float) -> bool:
    """The optimizer of torch.onnx takes the number for 0 or 1, and leaves out what adds it or
    multiplies by it, if it has no dimension."""
    return 0 < abs(x) <= 1e-8 or 0 < abs(x - 1) <= 1e-5


def _hashable(x: Any) -> Any:
    """Equal and hashable for equal arguments; 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if isinstance(x, Sequence) and not isinstance(x, str):
        return tuple(_hashable(i) for i in x)
    if isinstance(x, dict):
        return tuple((name, _hashable(i)) for name, i in x.items())
    return (type(x), repr(x)) if isinstance(x, int | float) else x


class Formulas:
    """Writes the formulas of one site: values that broadcast to `[B, H, L, M]`."""

    def __init__(
        self,
        write: Writer,
        values: dict[str, Value],
        tensors: dict[str, Node],
        sizes: dict[str, Value],
    ):
        self.write = write
        self.values = values
        self.tensors = tensors
        self.sizes = sizes
        """The size of each index symbol."""
        self.device: torch.device = write.value(values["q"]).device

    def __call__(self, formula: Formula) -> Value:
        if formula in (sympy.true, sympy.false):
            return bool(formula)
        if isinstance(formula, sympy.Symbol):
            return self.values[str(formula)]
        if formula.is_Integer:
            return int(formula)
        if formula.is_number and not formula.args:
            return float(formula)
        args = formula.args
        match formula.func.__name__:
            case "Read":
                return self.read(cast(sym.Read, formula))
            case "Add" | "Mul" as name:
                return self.fold(name.lower(), [self(a) for a in args])
            case "Fadd" | "Fmul" | "Fdiv" as name:
                return self.fold(name[1:].lower(), [self.float32(self(a)) for a in args])
            case "And" | "Or" as name:
                return self.logic(f"logical_{name.lower()}", [self(a) for a in args])
            case "Not":
                x = self(args[0])
                return self.write(aten.logical_not.default, x) if self.write.is_tensor(x) else not x
            case "Pow":
                return self.power(self(args[0]), self(args[1]))
            case "Where":
                return self.where(*(self(a) for a in args))
            case "Minimum" | "Maximum" as name:
                return self.extreme(name.lower(), self(args[0]), self(args[1]))
            case "IDiv" | "IMod" as name:
                return self.divide(name, self(args[0]), self(args[1]))
            case "Trunc":
                x = self(args[0])
                return self.write.to(x, torch.int64) if self.write.is_tensor(x) else int(x)
            case name if name in UNARY:
                return self.unary(name, self(args[0]))
            case _ if formula.is_Relational:
                return self.compare(formula)
            case _ if formula.is_number:
                return float(formula)
        raise ExportError(
            f"no ONNX form of {formula.func.__name__} in {formula}; "
            "leave this site out of the passes"
        )

    def float32(self, x: Value) -> Value:
        return self.write.to(x, torch.float32) if self.write.is_tensor(x) else x

    def dtype(self, *values: Value) -> torch.dtype:
        """The dtype in which values meet: that of the widest tensor, floating if any value is."""
        dtypes = [self.write.value(x).dtype for x in values if self.write.is_tensor(x)]
        dtypes += [torch.float32 for x in values if isinstance(x, float)]
        dtype = dtypes[0] if dtypes else torch.int64
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        return torch.int64 if dtype == torch.bool else dtype

    def met(self, *values: Value) -> list[Node]:
        dtype = self.dtype(*values)
        return [self.write.tensor(x, dtype, self.device) for x in values]

    def fold(self, name: str, values: list[Value]) -> Value:
        """Numbers first and exactly, then tensors from left to right."""
        plain = {"add": operator.add, "mul": operator.mul, "div": operator.truediv}[name]
        op = {"add": aten.add.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor}[name]
        result = values[0]
        for x in values[1:]:
            if self.write.is_tensor(result) or self.write.is_tensor(x):
                result = self.write(op, *self.met(result, x))
            elif isinstance(result, Node) or isinstance(x, Node):
                result = self.write(plain, result, x)
            else:
                result = plain(result, x)
        return result

    def logic(self, name: str, values: list[Value]) -> Value:
        """Truth values joined; constants are dropped or decide."""
        decides = name == "logical_or"
        tensors = [x for x in values if self.write.is_tensor(x)]
        if any(x is decides for x in values):
            return decides
        if not tensors:
            return not decides
        result = tensors[0]
        for x in tensors[1:]:
            result = self.write(getattr(aten, name).default, result, x)
        return result

    def power(self, x: Value, exponent: Value) -> Value:
        if not self.write.is_tensor(x) and not self.write.is_tensor(exponent):
            return x**exponent if not isinstance(x, Node) else self.write(operator.pow, x, exponent)
        if self.write.is_tensor(exponent):
            return self.write(
                aten.pow.Tensor_Tensor, *self.met(self.float32(x), self.float32(exponent))
            )
        base = self.float32(x) if exponent < 0 or isinstance(exponent, float) else x
        if exponent == -1:
            return self.write(aten.reciprocal.default, base)
        return self.write(aten.pow.Tensor_Scalar, base, exponent)

    def where(self, condition: Value, a: Value, b: Value) -> Value:
        if not self.write.is_tensor(condition):
            return a if condition else b
        return self.write(aten.where.self, condition, *self.met(a, b))

    def extreme(self, name: str, x: Value, y: Value) -> Value:
        if not self.write.is_tensor(x) and not self.write.is_tensor(y):
            plain: Any = {"minimum": torch.sym_min, "maximum": torch.sym_max}[name]
            return (
                self.write(plain, x, y)
                if isinstance(x, Node) or isinstance(y, Node)
                else plain(x, y)
            )
        return self.write(getattr(aten, name).default, *self.met(x, y))

    def divide(self, name: str, x: Value, y: Value) -> Value:
        if not self.write.is_tensor(x) and not self.write.is_tensor(y):
            plain = operator.floordiv if name == "IDiv" else operator.mod
            return (
                self.write(plain, x, y)
                if isinstance(x, Node) or isinstance(y, Node)
                else plain(x, y)
            )
        if name == "IDiv":
            return self.write(aten.div.Tensor_mode, *self.met(x, y), rounding_mode="floor")
        return self.write(aten.remainder.Tensor, *self.met(x, y))

    def unary(self, name: str, x: Value) -> Value:
        if not self.write.is_tensor(x):
            x = self.write.tensor(x, self.dtype(x), self.device)
        whole = not self.write.value(x).is_floating_point()
        if whole and name in ("floor", "ceiling"):
            return x
        return self.write(
            UNARY[name], x if name in ("Abs", "sign") else self.float32(x) if whole else x
        )

    def compare(self, formula: Any) -> Value:
        lhs, rhs, sign = formula.lhs, formula.rhs, formula.rel_op
        if isinstance(lhs, sym.Read) and rhs == 0 and sign == "!=" and self.is_truth(lhs):
            return self.read(lhs, raw=True)
        x, y = self(lhs), self(rhs)
        if not self.write.is_tensor(x):
            x, y, sign = y, x, MIRROR[sign]
        if self.write.is_tensor(x):
            return self.write(getattr(aten, COMPARE[sign]).Tensor, *self.met(x, y))
        plain = getattr(operator, COMPARE[sign])
        if isinstance(x, Node) or isinstance(y, Node):
            x, y = (self.write.tensor(i, torch.int64, self.device) for i in (x, y))
            return self.write(getattr(aten, COMPARE[sign]).Tensor, x, y)
        return plain(x, y)

    def is_truth(self, read: sym.Read) -> bool:
        return bool(self.write.value(self.tensors[read.tensor]).dtype == torch.bool)

    def read(self, read: sym.Read, *, raw: bool = False) -> Value:
        """The tensor at the indices; truth values as 0 and 1 unless they are wanted as they are."""
        source = self.tensors[read.tensor]
        value = self.write.value(source)
        if not raw:
            source = self.write.to(
                source, torch.float32 if value.is_floating_point() else torch.int64
            )
        if not read.index:
            return source
        if self.reads_grid(read):
            return self.grid(read, source)
        index = [self.write.tensor(self(i), torch.int64, self.device) for i in read.index]
        return self.write(aten.index.Tensor, source, index)

    def reads_grid(self, read: sym.Read) -> bool:
        """The indices are plain symbols in the order b, h, q, k, and the tensor fills the grid."""
        order = ["bhqk".find(str(i)) if isinstance(i, sympy.Symbol) else -1 for i in read.index]
        source = self.tensors[read.tensor]
        return (
            order[0] >= 0
            and all(a < b for a, b in itertools.pairwise(order))
            and all(
                self.write.same_size(source, dim, self.sizes[str(i)])
                for dim, i in enumerate(read.index)
            )
        )

    def grid(self, read: sym.Read, source: Node) -> Node:
        """The whole tensor, with a dimension of 1 for each index that it lacks."""
        names = {str(i) for i in read.index}
        first = min("bhqk".index(name) for name in names)
        for position, name in enumerate("bhqk"[first:]):
            if name not in names:
                source = self.write(aten.unsqueeze.default, source, position)
        return source
