"""What a kernel of linear attention is made for, as a value; and what none is made for."""

from __future__ import annotations

from dataclasses import dataclass

from sympy.logic.boolalg import BooleanTrue

from rewriter import symbols as sym
from rewriter.kernels.triton_codegen import Dtype
from rewriter.linear import LinearSpec
from rewriter.symbols import formula_text

__all__ = ["LinearKernel", "LinearTile", "refusal"]


@dataclass(frozen=True)
class LinearTile:
    """How the work is cut: `span` is a multiple of `queries` and of `keys`."""

    queries: int
    keys: int
    columns: int
    """Of the values, in one program."""
    span: int
    """Keys between two states."""
    warps: int
    stages: int


@dataclass(frozen=True)
class LinearKernel:
    """Everything that changes the text of the kernels; equal ones give equal text."""

    spec: LinearSpec
    """Matrices of its maps have been applied: the kernels get `x W + b` in float32."""
    features: int
    """Columns of q and k as the kernels get them."""
    value_dim: int
    dtype: Dtype
    """Of v, and of q and k without a matrix."""
    tile: LinearTile

    @property
    def is_shared(self) -> bool:
        """The query heads of a key head have one state."""
        spec = self.spec
        formulas = (spec.decay, spec.key_weight, spec.seen)
        return not any(f.has(sym.h, sym.H) for f in formulas)

    @property
    def is_numbered(self) -> bool:
        """Distances are counted among the keys that take part, which some do not."""
        return self.spec.decay != 0 and not isinstance(self.spec.seen, BooleanTrue)

    @property
    def halves(self) -> int:
        """Parts of the features, each with a state of its own."""
        return 2 if self.spec.k_map.map == "exp" else 1

    def dtype_of(self, name: str) -> Dtype:
        """The dtype of q, k, v or o as the kernels get them."""
        maps = {"q": self.spec.q_map, "k": self.spec.k_map}
        wide = maps[name].weight if name in maps else name == "o" and self.spec.norm == "rms"
        return "float32" if wide else self.dtype


def refusal(spec: LinearSpec) -> str | None:
    """Why the kernels do not compute a spec, in one clause."""
    if spec.near is not None:
        return "the softmax weights of near keys beside linear ones have no kernel"
    if (spec.q_map.map == "exp") != (spec.k_map.map == "exp"):
        return "a map in two halves is for both queries and keys"
    for name, formula, other in (
        ("weight of a key", spec.key_weight, sym.q),
        ("set of keys that take part", spec.seen, sym.q),
        ("weight of a query", spec.query_weight, sym.k),
        ("factor of a head", spec.heads, sym.k),
    ):
        if formula.has(other, sym.s):
            return f"the {name} has a wrong index: {formula_text(formula)}"
    return None
