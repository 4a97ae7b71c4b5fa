"""Integers that come out of rounded arithmetic, computed by torch before the kernel runs.

A bucket such as `int(2.885·log(|k - q|/8)) + 8` sits on an edge for some distances, where the last
bit of a logarithm decides. A kernel has another logarithm than torch. So an integer that goes
through a cast, and that depends on k - q alone (or on k, or on q), becomes a read of a table that
torch fills on the same device: the same integers, and less work in the kernel. The table has L + M
- 1 (or M, or L) entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import sympy
import torch
from sympy import Expr, Symbol
from torch import Tensor

from rewriter import symbols as sym
from rewriter.evaluate import evaluate
from rewriter.kernels.triton_code import kind_of
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit
from rewriter.symbols import Formula, Read

__all__ = ["Table", "filled", "tabulate"]

Axis = Literal["q", "k", "k - q"]

_d = Symbol("d", integer=True)
_INDEX: dict[Axis, Expr] = {"q": sym.q, "k": sym.k, "k - q": sym.k - sym.q + sym.L - 1}


@dataclass(frozen=True)
class Table:
    """The values of an integer formula of one index."""

    name: str
    formula: Expr
    axis: Axis


@lru_cache(maxsize=1024)
def tabulate(spec: SoftmaxSpec) -> tuple[SoftmaxSpec, tuple[Table, ...]]:
    """The same function with rounded integers of one index read from tables; and the tables.

    The tables follow the tensors of the spec. A rounded integer of more than one index stays as it
    is.
    """
    found: dict[Expr, Table] = {}

    def visit(formula: Any) -> Any:
        if not formula.has(sym.Trunc, sympy.floor, sympy.ceiling):
            return formula
        axis = _axis(formula)
        if axis is not None and kind_of(formula, {}) == "int":
            table = found.setdefault(formula, Table(f"rounded{len(found)}", formula, axis))
            return Read(Symbol(table.name), _INDEX[axis])
        return formula.func(*(visit(a) for a in formula.args))

    formulas: dict[str, Any] = {
        "scale": visit(spec.scale),
        "score": visit(spec.score),
        "mask": visit(spec.mask),
        "sink": None if spec.sink is None else visit(spec.sink),
        "heads": visit(spec.heads),
    }
    if spec.edit is not None:
        group, *factors = (visit(f) for f in spec.edit.formulas)
        formulas["edit"] = Edit(group, tuple(factors))
    tables = tuple(found.values())
    arguments = tuple(TensorArg(t.name, "int32", 1) for t in tables)
    return replace(spec, tensors=(*spec.tensors, *arguments), **formulas), tables


def _axis(formula: Formula) -> Axis | None:
    """The one index that decides the value of the formula."""
    names = {str(x) for x in formula.free_symbols}
    if formula.has(Read) or names & {"b", "h", "s"}:
        return None
    if "k" not in names:
        return "q"
    if "q" not in names:
        return "k"
    shifted = _shifted(formula)
    return None if shifted.has(sym.q) or shifted.has(sym.k) else "k - q"


def _shifted(formula: Any) -> Any:
    """The formula with `q + d` for k; q is gone from it if the formula depends on k - q alone."""
    if formula == sym.k:
        return sym.q + _d
    if not formula.args:
        return formula
    args = [_shifted(a) for a in formula.args]
    if formula.is_Relational:
        return formula.func(sympy.expand(args[0] - args[1]), 0)
    if formula.is_Mul:
        return sympy.expand(formula.func(*args))
    return formula.func(*args)


@lru_cache(maxsize=64)
def filled(
    table: Table, q_len: int, kv_len: int, sizes: tuple[tuple[str, int], ...], device: torch.device
) -> Tensor:
    """The table as an int32 tensor; computed once for all layers of a step.

    Args:
        table: what to compute.
        q_len: L.
        kv_len: M.
        sizes: the other sizes that formulas use, B and H included, by name.
        device: where; the arithmetic of this device decides how values round.
    """
    if table.axis == "k - q":
        distance = torch.arange(1 - q_len, kv_len, device=device)
        q, k = (-distance).clamp(min=0), distance.clamp(min=0)
    else:
        q = k = torch.arange(q_len if table.axis == "q" else kv_len, device=device)
    values: dict[str, Any] = {"q": q, "k": k, "L": q_len, "M": kv_len, **dict(sizes)}
    result = evaluate(table.formula, values, {}, torch.float32)
    values_at = torch.as_tensor(result, device=device).to(torch.int32)
    return values_at.expand(q.shape).contiguous()
