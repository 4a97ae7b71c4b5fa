"""Formulas as Triton expressions: text only, Triton is not imported.

A symbol prints as the name that the caller gives it (`q` as `o_q[:, None]`), a read as the value
that the caller has loaded for it. What has no rule here raises LoweringError with the reason, which
the guard of the lowering reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import sympy
from sympy import Expr

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.symbols import Formula, Read, formula_text

__all__ = ["HELPERS", "Kind", "Printer", "is_number", "kind_of"]

Kind = Literal["bool", "int", "float"]

_OR, _AND, _ADD, _MUL, _UNARY, _ATOM = range(1, 7)
"""How tightly an expression binds."""
_COMPARE = 0
"""Comparisons bind less than `|` in Python."""

_FLOAT_MAX = 3.4028234663852886e38

HELPERS = {
    "tanh": '''@triton.jit
def tanh(x):
    """A series near 0, where 1 - 2 / (exp(2x) + 1) would cancel."""
    y = x * x
    near = x + x * y * (-0.33333334 + y * (0.13333334 + y * (-0.053968254 + y * (0.02186949
        + y * (-0.008863236 + y * 0.003592128)))))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(y < 0.16, near, tl.where(x < 0.0, -far, far))
''',
    "kept": '''@triton.jit
def kept(seed, q, k, head, rate):
    """Whether dropout keeps a weight: a number that counts from its pair alone, by Philox."""
    bits, _, _, _ = tl.philox(seed, k, head, q, 0)
    return tl.uint_to_uniform_float(bits) >= rate
''',
    "floor_mod": '''@triton.jit
def floor_mod(x, y):
    """The remainder with the sign of y; `%` has the sign of x."""
    return (x % y + y) % y
''',
    "floor_div": '''@triton.jit
def floor_div(x, y):
    """x / y rounded down; `//` rounds towards zero."""
    return (x - (x % y + y) % y) // y
''',
}
"""Functions that a kernel may call, each written into its file if it does."""

_CALLS = {
    "exp": "tl.exp",
    "log": "tl.log",
    "cos": "tl.cos",
    "sin": "tl.sin",
    "tanh": "tanh",
}


def is_number(formula: Formula) -> bool:
    """The formula is a constant."""
    return bool(formula.is_number) and not isinstance(formula, sympy.logic.boolalg.BooleanAtom)


def kind_of(formula: Formula, dtypes: Mapping[str, str]) -> Kind:
    """What a formula is made of in a kernel.

    Args:
        formula: the formula.
        dtypes: the dtype of each tensor that it may read, by name.
    """
    if formula.is_Relational or isinstance(formula, sympy.logic.boolalg.BooleanFunction):
        return "bool"
    if formula in (sympy.true, sympy.false):
        return "bool"
    if isinstance(formula, Read):
        return "float" if "float" in dtypes[formula.tensor] else "int"
    if isinstance(formula, sym.IDiv | sym.IMod | sym.Trunc | sympy.floor | sympy.ceiling):
        return "int"
    if isinstance(formula, sympy.Symbol) or formula.is_Integer:
        return "int" if formula.is_integer else "float"
    if isinstance(formula, sym.Where):
        parts = formula.args[1:]
    elif isinstance(
        formula, sympy.Add | sympy.Mul | sympy.Abs | sym.Minimum | sym.Maximum | sympy.sign
    ):
        parts = formula.args
    elif isinstance(formula, sympy.Pow) and formula.exp.is_Integer and formula.exp >= 0:
        parts = (formula.base,)
    else:
        return "float"
    return "float" if any(kind_of(p, dtypes) == "float" for p in parts) else "int"


@dataclass
class Printer:
    """Prints formulas for one place of a kernel.

    Attributes:
        names: what each symbol is called there.
        dtypes: the dtype of each tensor, by name.
        loaded: gives the name of the value that a read has been loaded into.
        helpers: the names of HELPERS that the printed text calls; grows.
    """

    names: Mapping[str, str]
    dtypes: Mapping[str, str]
    loaded: Callable[[Read], str]
    helpers: set[str]

    def text(self, formula: Formula) -> str:
        """The formula as a Triton expression.

        Raises:
            LoweringError: if some function in it has no rule.
        """
        return self._print(formula)[0]

    def _at(self, formula: Formula, binds: int) -> str:
        """The text, in brackets if it binds less tightly than its place asks for."""
        text, own = self._print(formula)
        return text if own >= binds else f"({text})"

    def _float(self, formula: Formula) -> str:
        """The text as a float, for functions that take no integers."""
        if kind_of(formula, self.dtypes) == "float":
            return self.text(formula)
        return f"{self._at(formula, _MUL)} * 1.0"

    def _print(self, formula: Formula) -> tuple[str, int]:
        if formula in (sympy.true, sympy.false):
            return str(bool(formula)), _ATOM
        if is_number(formula):
            return self._number(cast(Expr, formula))
        if isinstance(formula, sympy.Symbol):
            return self._symbol(formula), _ATOM
        if isinstance(formula, Read):
            return self.loaded(formula), _ATOM
        if formula.is_Relational:
            lhs, rhs = (self._at(x, _ADD) for x in (formula.lhs, formula.rhs))
            return f"{lhs} {formula.rel_op} {rhs}", _COMPARE
        name = formula.func.__name__
        if name in _CALLS:
            if name in HELPERS:
                self.helpers.add(name)
            return f"{_CALLS[name]}({self._float(formula.args[0])})", _ATOM
        rule = getattr(self, f"_{name.lower()}", None)
        if rule is None:
            raise LoweringError(f"{name} has no rule in Triton")
        return cast("tuple[str, int]", rule(formula))

    def _symbol(self, symbol: sympy.Symbol) -> str:
        if str(symbol) not in self.names:
            raise LoweringError(f"{symbol} is not known at this place of the kernel")
        return self.names[str(symbol)]

    def _number(self, number: Expr) -> tuple[str, int]:
        if number.is_Integer:
            value: float = int(number)
        else:
            value = float(number)
        if math.isinf(value):
            return f'float("{"-" if value < 0 else ""}inf")', _ATOM
        if abs(value) > _FLOAT_MAX:
            raise LoweringError(f"the constant {value:g} is beyond float32")
        return repr(value), _UNARY if value < 0 else _ATOM

    def _add(self, formula: Any) -> tuple[str, int]:
        terms = sorted(formula.args, key=_term_key)
        text = self._at(terms[0], _ADD)
        for term in terms[1:]:
            part = self._at(-term if _is_negative(term) else term, _MUL)
            text += f" - {part}" if _is_negative(term) else f" + {part}"
        return text, _ADD

    def _mul(self, formula: Any) -> tuple[str, int]:
        factor, rest = formula.as_coeff_Mul()
        if factor == -1:
            return f"-{self._at(rest, _UNARY)}", _UNARY
        above: list[Expr] = []
        below: list[Expr] = []
        for x in sorted(formula.args, key=_factor_key):
            inverse = isinstance(x, sympy.Pow) and x.exp == -1 and not x.base.is_number
            (below if inverse else above).append(x.base if inverse else x)
        text = (
            " * ".join(self._at(x, _MUL if i == 0 else _UNARY) for i, x in enumerate(above))
            or "1.0"
        )
        return text + "".join(f" / {self._at(x, _UNARY)}" for x in below), _MUL

    def _pow(self, formula: Any) -> tuple[str, int]:
        base, exponent = formula.args
        if base.is_number and base.is_positive:
            bits = math.log2(float(base))
            text = self._float(exponent) if bits == 1 else f"{self._at(exponent, _MUL)} * {bits!r}"
            return f"tl.exp2({text})", _ATOM
        if not exponent.is_number:
            raise LoweringError(f"the power {formula_text(formula)} has no rule in Triton")
        power = float(exponent)
        if power < 0:
            inner = base if power == -1 else sympy.Pow(base, -exponent, evaluate=False)
            return f"1.0 / {self._at(inner, _UNARY)}", _MUL
        if power == 0.5:
            return f"tl.sqrt({self._float(base)})", _ATOM
        if power not in (1.0, 2.0, 3.0, 4.0):
            raise LoweringError(f"the power {formula_text(formula)} has no rule in Triton")
        return " * ".join([self._at(base, _UNARY)] * int(power)), _MUL

    def _and(self, formula: Any) -> tuple[str, int]:
        return " & ".join(self._at(x, _ADD) for x in _logical_order(formula)), _AND

    def _or(self, formula: Any) -> tuple[str, int]:
        return " | ".join(self._at(x, _AND) for x in _logical_order(formula)), _OR

    def _not(self, formula: Any) -> tuple[str, int]:
        return f"~({self.text(formula.args[0])})", _UNARY

    def _where(self, formula: Any) -> tuple[str, int]:
        return f"tl.where({', '.join(self.text(x) for x in formula.args)})", _ATOM

    def _minimum(self, formula: Any) -> tuple[str, int]:
        return f"tl.minimum({', '.join(self.text(x) for x in formula.args)})", _ATOM

    def _maximum(self, formula: Any) -> tuple[str, int]:
        return f"tl.maximum({', '.join(self.text(x) for x in formula.args)})", _ATOM

    def _abs(self, formula: Any) -> tuple[str, int]:
        return f"tl.abs({self.text(formula.args[0])})", _ATOM

    def _sign(self, formula: Any) -> tuple[str, int]:
        x = self._at(formula.args[0], _ADD)
        return f"tl.where({x} > 0, 1, tl.where({x} < 0, -1, 0))", _ATOM

    def _idiv(self, formula: Any) -> tuple[str, int]:
        return self._integer_pair(formula, "//", "floor_div")

    def _imod(self, formula: Any) -> tuple[str, int]:
        return self._integer_pair(formula, "%", "floor_mod")

    def _integer_pair(self, formula: Any, sign: str, helper: str) -> tuple[str, int]:
        x, y = formula.args
        if {kind_of(x, self.dtypes), kind_of(y, self.dtypes)} != {"int"}:
            raise LoweringError(f"{formula_text(formula)} divides values that are no integers")
        if x.is_nonnegative and y.is_positive:
            return f"{self._at(x, _MUL)} {sign} {self._at(y, _UNARY)}", _MUL
        self.helpers.add(helper)
        return f"{helper}({self.text(x)}, {self.text(y)})", _ATOM

    def _fadd(self, formula: Any) -> tuple[str, int]:
        x, y = formula.args
        return f"{self._at(x, _ADD)} + {self._at(y, _MUL)}", _ADD

    def _fmul(self, formula: Any) -> tuple[str, int]:
        x, y = formula.args
        return f"{self._at(x, _MUL)} * {self._at(y, _UNARY)}", _MUL

    def _fdiv(self, formula: Any) -> tuple[str, int]:
        x, y = formula.args
        return f"{self._at(x, _MUL)} / {self._at(y, _UNARY)}", _MUL

    def _trunc(self, formula: Any) -> tuple[str, int]:
        raise LoweringError(
            "a value is rounded to an integer that depends on more than q, k or k - q alone, "
            "so that a kernel and torch may round it differently"
        )

    _floor = _ceiling = _trunc


def _term_key(x: Expr) -> tuple[bool, bool, bool, str]:
    """The score first, positive terms before negative ones, numbers last."""
    return (not x.has(sym.s), bool(x.is_number), _is_negative(x), str(x))


def _factor_key(x: Expr) -> tuple[bool, bool, str]:
    """Numbers first, then the score."""
    return (not x.is_number, not x.has(sym.s), str(x))


def _is_negative(term: Expr) -> bool:
    return bool(term.as_coeff_Mul()[0] < 0)


def _logical_order(formula: Any) -> list[Formula]:
    """Comparisons of positions before reads of tensors, as formulas are printed for people."""
    return sorted(formula.args, key=lambda x: (len(x.atoms(Read)), len(str(x)), str(x)))
