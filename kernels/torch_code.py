"""Prints the formulas of a spec as torch code, and compiles it once a spec.

The text is a Python module: `score(x, s)`, `score_(x, s)` which overwrites s where the formula is a
chain of operations on s, `hidden_0(x)`, `hidden_1(x)`, ... for the terms of the mask (true where a
key is not seen), `sink(x)`, `heads(x)`, and for an edit `group(x)`, `factor_0(x, m)`, ... and
`slope_1_0(x, m)`, the derivative of factor 1 by mass 0. `x` is a `Block`, `m` holds the masses. The
functions follow the reference operation by operation; only two things differ. A scale is part of
the score unless it is a number,
and a formula in `k - q` alone, such as a bucketed relative bias, is computed once a diagonal.
"""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import sympy
import torch
from sympy import Expr, Symbol
from sympy.logic.boolalg import Boolean
from torch import Tensor

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.families import from_json
from rewriter.kernels.torch_block import Block, Value
from rewriter.spec import SoftmaxSpec
from rewriter.stages import Edit
from rewriter.symbols import Formula

__all__ = ["Code", "EditCode", "compiled", "conjuncts", "source"]

_D = Symbol("k - q", integer=True)
"""The diagonal. No size can have this name."""

_UNARY = {
    "Abs": "abs",
    "ceiling": "ceil",
    **{name: name for name in ("exp", "log", "tanh", "cos", "sin", "sign", "floor")},
}
_FOLDED = {"Add": "+", "Mul": "*", "Pow": "**", "And": "&", "Or": "|", "IDiv": "//", "IMod": "%"}


@dataclass(frozen=True)
class EditCode:
    """The compiled functions of an edit; `m` are the masses of a row, each `[B, H, rows, 1]`."""

    group: Callable[[Block], Value]
    factors: tuple[Callable[[Block, Sequence[Tensor]], Value], ...]
    slopes: tuple[tuple[int, int, Callable[[Block, Sequence[Tensor]], Value]], ...]
    """`(i, j, d factor i / d mass j)`, without those that are 0."""
    reads_masses: bool
    concerned: tuple[bool, ...]
    """For each group, whether its factor is not 1 or some factor reads its mass."""


@dataclass(frozen=True)
class Code:
    """The compiled functions of one spec."""

    text: str
    scale: float
    """Multiplies q before the product. What is left of the scale and the score is in `score`."""
    score: Callable[[Block, Tensor], Tensor] | None
    """None if the score is the scaled product."""
    score_in_place: Callable[[Block, Tensor], Tensor] | None
    """The same, overwriting s; None if s is needed more than once."""
    is_linear: bool
    """The score is s plus something free of s."""
    hidden: tuple[Callable[[Block], Value], ...]
    """One a term of the mask, in the order of `conjuncts`."""
    sink: Callable[[Block], Value] | None
    heads: Callable[[Block], Value] | None
    bias: Callable[[Block], Value] | None
    """What is added to s, if the score is linear and adds something."""
    edit: EditCode | None


def conjuncts(mask: Boolean) -> tuple[Boolean, ...]:
    """The terms whose conjunction the mask is."""
    if mask == sympy.true:
        return ()
    return tuple(mask.args) if isinstance(mask, sympy.And) else (mask,)


@lru_cache(maxsize=1024)
def compiled(spec_json: str) -> Code:
    """The functions of the spec that `SoftmaxSpec.to_json` wrote."""
    spec = from_json(spec_json)
    assert isinstance(spec, SoftmaxSpec)
    text = source(spec)
    name = f"<attention {spec.digest()}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(text, name, "exec"), namespace)
    scale, score = _scale_and_score(spec)
    linear = not (score - sym.s).has(sym.s)
    terms = range(len(conjuncts(spec.mask)))
    return Code(
        text=text,
        scale=scale,
        score=namespace.get("score"),
        score_in_place=namespace.get("score_"),
        is_linear=linear,
        hidden=tuple(namespace[f"hidden_{i}"] for i in terms),
        sink=namespace.get("sink"),
        heads=namespace.get("heads"),
        bias=namespace.get("bias"),
        edit=None if spec.edit is None else _edit_code(spec.edit, namespace),
    )


def _edit_code(edit: Edit, namespace: Mapping[str, Any]) -> EditCode:
    read = {m for a in edit.factors for m in a.free_symbols & set(sym.masses)}
    return EditCode(
        group=namespace["group"],
        factors=tuple(namespace[f"factor_{i}"] for i in range(len(edit.factors))),
        slopes=tuple((i, j, namespace[f"slope_{i}_{j}"]) for i, j, _ in _slopes(edit)),
        reads_masses=bool(read),
        concerned=tuple(
            a != 1 or m in read for a, m in zip(edit.factors, sym.masses, strict=False)
        ),
    )


def _slopes(edit: Edit) -> list[tuple[int, int, Expr]]:
    """The derivatives of factors by masses that are not 0."""
    found = [
        (i, j, cast(Expr, factor.diff(mass)))
        for i, factor in enumerate(edit.factors)
        for j, mass in enumerate(sym.masses)
        if factor.has(mass)
    ]
    return [x for x in found if x[2] != 0]


def source(spec: SoftmaxSpec) -> str:
    """The text of the module for a spec; equal for equal specs."""
    names = [t.name for t in spec.tensors]
    diagonals: dict[Formula, str] = {}

    def function(head: str, formula: Formula, *, chain: bool = False) -> str | None:
        printer = _Printer(names, diagonals)
        result = printer.chain(formula) if chain else printer.expression(formula)
        return None if result is None else printer.function(head, result)

    _, score = _scale_and_score(spec)
    found: list[str | None] = []
    if score != sym.s:
        found += [function("score(x, s)", score), function("score_(x, s)", score, chain=True)]
        if not (score - sym.s).has(sym.s):
            found.append(function("bias(x)", score - sym.s))
    for i, term in enumerate(conjuncts(spec.mask)):
        found.append(function(f"hidden_{i}(x)", sympy.Not(term)))
    if spec.sink is not None:
        found.append(function("sink(x)", spec.sink))
    if spec.heads != 1:
        found.append(function("heads(x)", spec.heads))
    if spec.edit is not None:
        found.append(function("group(x)", spec.edit.group))
        factors = enumerate(spec.edit.factors)
        found += [function(f"factor_{i}(x, m)", factor) for i, factor in factors]
        found += [function(f"slope_{i}_{j}(x, m)", d) for i, j, d in _slopes(spec.edit)]
    functions = [*diagonals.values(), *(f for f in found if f)]
    title = str(spec).replace("\\", "").replace('"', "'")
    return "\n\n\n".join([f'"""{title}"""\n\nimport torch', *functions]) + "\n"


def _scale_and_score(spec: SoftmaxSpec) -> tuple[float, Expr]:
    """What q is multiplied by, and the score as a formula in that scaled product.

    A number that multiplies s wherever it occurs, as in a soft cap, moves to q.
    """
    if not spec.scale.is_number:
        return 1.0, spec.score.xreplace({sym.s: spec.scale * sym.s})
    products = {m for m in spec.score.atoms(sympy.Mul) if sym.s in m.args and m.args[0].is_number}
    factors = {m.args[0] for m in products}
    if len(factors) == 1 and all(len(m.args) == 2 for m in products):
        (factor,) = factors
        score = spec.score.xreplace({m: Symbol("scaled", real=True) for m in products})
        if not score.has(sym.s) and float(factor) not in (0.0, math.inf, -math.inf):
            score = score.xreplace({Symbol("scaled", real=True): sym.s})
            return float(spec.scale) * float(factor), cast(Expr, score)
    return float(spec.scale), spec.score


# --- printer --------------------------------------------------------------------------------------


class _Printer:
    """Prints one function. Each value is computed once and has a name; leaves are written out."""

    def __init__(self, tensors: Sequence[str], diagonals: dict[Formula, str] | None) -> None:
        """Functions of `k - q` are added to `diagonals`; None inside such a function."""
        self.tensors, self.diagonals = tensors, diagonals
        self.lines: list[str] = []
        self.names: dict[Formula, str] = {}

    def function(self, head: str, result: str) -> str:
        """The text of the function whose body has been printed."""
        lines = [f"def {head}:", *(f"    {x}" for x in self.lines), f"    return {result}"]
        return "\n".join(lines)

    def expression(self, formula: Formula) -> str:
        """The value of the formula as an expression; what it needs is in `lines`."""
        if formula not in self.names:
            text = self._printed(formula)
            if formula.args:
                name = f"t{len(self.names)}"
                self.lines.append(f"{name} = {text}")
                text = name
            self.names[formula] = text
        return self.names[formula]

    def chain(self, formula: Formula) -> str | None:
        """Statements that turn s into the formula in place; None if s is used more than once."""
        if formula == sym.s:
            return "s"
        holders = [a for a in formula.args if a.has(sym.s)]
        if len(holders) != 1 or self.chain(holders[0]) is None:
            return None
        rest = [a for a in formula.args if a is not holders[0]]
        name = formula.func.__name__
        if name in ("Add", "Mul"):
            self.lines.append(f"s.{name.lower()}_({self.expression(formula.func(*rest))})")
        elif name in _UNARY:
            self.lines.append(f"s.{_UNARY[name]}_()")
        elif name in ("Minimum", "Maximum") and not _is_tensor(rest[0]):
            bound = "max" if name == "Minimum" else "min"
            self.lines.append(f"s.clamp_({bound}={self.expression(rest[0])})")
        elif name == "Where" and holders[0] is not formula.args[0] and not _is_tensor(rest[1]):
            condition = sympy.Not(rest[0]) if holders[0] is formula.args[1] else rest[0]
            self.lines.append(f"s = {self._filled(condition, rest[1])}")
        else:
            return None
        return "s"

    def _filled(self, condition: Boolean, value: Expr) -> str:
        if _is_tensor(condition):
            return f"s.masked_fill_({self.expression(condition)}, {self.expression(value)})"
        return f"s.fill_({self.expression(value)}) if {self.expression(condition)} else s"

    def _printed(self, formula: Formula) -> str:
        if formula in (sympy.true, sympy.false):
            return str(bool(formula))
        if isinstance(formula, Symbol):
            return self._symbol(formula)
        if formula.is_Integer:
            return _literal(int(formula))
        if formula.is_number and not formula.args:
            return _literal(float(formula))
        if self.diagonals is not None and _is_diagonal(formula):
            return self._diagonal(formula)
        name = formula.func.__name__
        if name in _UNARY:
            x = self.expression(formula.args[0])
            x = x if _is_tensor(formula.args[0]) else f"torch.tensor({x})"
            return f"torch.{_UNARY[name]}({x})"
        if name in _FOLDED:
            return self._folded(formula, _FOLDED[name])
        if name in ("Fadd", "Fmul", "Fdiv"):
            return {"Fadd": " + ", "Fmul": " * ", "Fdiv": " / "}[name].join(
                self._float32(a) for a in formula.args
            )
        if formula.is_Relational:
            return self._relation(formula)
        method = getattr(self, f"_print_{name}", None)
        if method is not None:
            return str(method(formula))
        if formula.is_number:
            return _literal(float(formula))
        raise LoweringError(f"torch code has no rule for {name} in {formula}")

    def _symbol(self, symbol: Symbol) -> str:
        if symbol == sym.s:
            return "s"
        if symbol == _D:
            return "d"
        if symbol in (sym.b, sym.h, sym.q, sym.k):
            return f"x.{symbol}"
        if symbol in sym.masses:
            return f"m[{sym.masses.index(symbol)}]"
        return f"x.sizes[{str(symbol)!r}]"

    def _diagonal(self, formula: Formula) -> str:
        assert self.diagonals is not None
        line = formula.xreplace({sym.k: sym.q + _D})
        if line not in self.diagonals:
            inner = _Printer(self.tensors, None)
            result = inner.expression(line)
            head = f"diagonal_{len(self.diagonals)}(x, d)"
            self.diagonals[line] = inner.function(head, result)
        return f"x.diagonals(diagonal_{list(self.diagonals).index(line)})"

    def _folded(self, formula: Formula, sign: str) -> str:
        if sign == "*" and formula.args[0] == -1:
            rest = formula.func(*formula.args[1:])
            return f"-{self.expression(rest)}"
        return f" {sign} ".join(self.expression(a) for a in formula.args)

    def _float32(self, formula: Formula) -> str:
        text = self.expression(formula)
        return f"{text}.to(torch.float32)" if _is_tensor(formula) else text

    def _relation(self, formula: Any) -> str:
        lhs, rhs = formula.lhs, formula.rhs
        if isinstance(lhs, sym.Read) and rhs == 0 and formula.rel_op in ("==", "!="):
            return f"{'' if formula.rel_op == '!=' else '~'}{self._read(lhs, 'truth')}"
        return f"{self.expression(lhs)} {formula.rel_op} {self.expression(rhs)}"

    def _read(self, read: sym.Read, method: str) -> str:
        axes = [self._axis(i, read) for i in read.index]
        return f"x.{method}({', '.join([str(self.tensors.index(read.tensor)), *axes])})"

    def _axis(self, index: Expr, read: sym.Read) -> str:
        """`("k", 3)` where the index is a position plus a number, and no other index uses it."""
        for symbol in (sym.b, sym.h, sym.q, sym.k):
            offset = index - symbol
            alone = sum(i.has(symbol) for i in read.index) == 1
            if alone and not _is_tensor(offset) and offset.is_integer:
                return f'("{symbol}", {self.expression(offset)})'
        return self.expression(index)

    def _print_Read(self, read: sym.Read) -> str:  # noqa: N802 - named after the class
        return self._read(read, "read")

    def _print_Not(self, formula: Formula) -> str:  # noqa: N802
        text = self.expression(formula.args[0])
        return f"~{text}" if _is_tensor(formula.args[0]) else f"not {text}"

    def _print_Trunc(self, formula: Formula) -> str:  # noqa: N802
        text = self.expression(formula.args[0])
        return f"{text}.to(torch.int64)" if _is_tensor(formula.args[0]) else f"int({text})"

    def _print_Where(self, formula: Formula) -> str:  # noqa: N802
        condition, a, c = formula.args
        if not _is_tensor(condition):
            return (
                f"({self.expression(a)} if {self.expression(condition)} else {self.expression(c)})"
            )
        return f"torch.where({self.expression(condition)}, {self._wrapped(a)}, {self._wrapped(c)})"

    def _wrapped(self, formula: Formula) -> str:
        text = self.expression(formula)
        return text if _is_tensor(formula) else f"x.value({text})"

    def _print_Minimum(self, formula: Formula) -> str:  # noqa: N802
        return self._extremum(formula, "minimum")

    def _print_Maximum(self, formula: Formula) -> str:  # noqa: N802
        return self._extremum(formula, "maximum")

    def _extremum(self, formula: Formula, function: str) -> str:
        a, c = formula.args
        first, second = self.expression(a), self.expression(c)
        if _is_tensor(a) and _is_tensor(c):
            return f"torch.{function}({first}, {second})"
        if not _is_tensor(a) and not _is_tensor(c):
            return f"{function[:3]}({first}, {second})"
        x, number = (first, second) if _is_tensor(a) else (second, first)
        return f"{x}.clamp({'max' if function == 'minimum' else 'min'}={number})"


def _literal(number: int | float) -> str:
    if isinstance(number, float) and not math.isfinite(number):
        return f'float("{number}")'
    return repr(number) if number >= 0 else f"({number!r})"


@lru_cache(maxsize=4096)
def _is_tensor(formula: Formula) -> bool:
    """The value is a tensor: it varies with an index, reads a tensor or is a real function."""
    if isinstance(formula, sym.Read) or formula.func.__name__ in _UNARY:
        return True
    if formula in (sym.b, sym.h, sym.q, sym.k, sym.s, _D, *sym.masses):
        return True
    return any(_is_tensor(a) for a in formula.args)


def _is_diagonal(formula: Formula) -> bool:
    """The formula varies with q and k through `k - q` alone, and costs more than a subtraction."""
    if not formula.has(sym.q) or not formula.has(sym.k) or formula.has(sym.s):
        return False
    if formula.is_Relational or formula.is_Boolean:
        return False
    line = formula.xreplace({sym.k: sym.q + _D})
    if line.has(sym.q) or not line.has(_D):
        return False
    size = sum(1 for _ in sympy.preorder_traversal(line))
    return size > 8 or any(r.has(_D) for r in sym.reads(line))
