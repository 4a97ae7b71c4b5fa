"""Index symbols, tensor reads and the small sympy layer in which attention is written.

A formula is a sympy expression in the index symbols `b, h, q, k` (batch, query head, query
position, key position), the scaled score `s`, the sizes `B, H, L, M` (batch, query heads, queries,
keys), further named sizes, numbers, and reads of tensors at index expressions, `Read(Symbol("pad"),
b, k)`.

sympy's own `Piecewise`, `Min`, `Max` and `Mod` simplify as they are built, which costs milliseconds
a node; the functions here do not simplify beyond constants, so that reading a model stays fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

import sympy
from sympy import Expr, Integer, Symbol
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue
from sympy.printing.str import StrPrinter

from rewriter.errors import SpecError

__all__ = [
    "B",
    "Fadd",
    "Fdiv",
    "Fmul",
    "Formula",
    "H",
    "IDiv",
    "IMod",
    "L",
    "M",
    "Maximum",
    "Minimum",
    "Read",
    "Trunc",
    "Where",
    "b",
    "decode",
    "encode",
    "formula_text",
    "h",
    "k",
    "masses",
    "q",
    "reads",
    "s",
    "size_symbol",
]

Formula: TypeAlias = Expr | Boolean
"""What a formula is made of: a number at each index, or a truth value at each index."""

b, h, q, k = (Symbol(name, integer=True, nonnegative=True) for name in "bhqk")
s = Symbol("s", real=True)
B, H, L, M = (Symbol(name, integer=True, positive=True) for name in "BHLM")
masses = tuple(Symbol(f"m{i}", real=True) for i in range(4))
"""What the keys of each group have of a row's weight, in the factors of an edit."""


def size_symbol(name: str) -> Symbol:
    """A further size or integer that is known only when the graph runs, such as the length of a
    cache."""
    return Symbol(name, integer=True)


class _Plain(sympy.Function):  # type: ignore[misc]
    """A function of real values that is never simplified."""

    is_real = True
    is_commutative = True

    def _eval_is_finite(self) -> bool:
        return True


class Read(_Plain):
    """`Read(name, i, j, ...)`: the element of the tensor called `name` at those indices. Truth
    values read as 0 and 1."""

    @property
    def tensor(self) -> str:
        return str(self.args[0])

    @property
    def index(self) -> tuple[Expr, ...]:
        return cast("tuple[Expr, ...]", self.args[1:])

    def fdiff(self, argindex: int = 1) -> Expr:
        return Integer(0)


class Where(_Plain):
    """`Where(condition, a, b)`: a where the condition holds, else b."""

    @classmethod
    def eval(cls, condition: Boolean, a: Expr, b: Expr) -> Expr | None:
        if isinstance(condition, BooleanTrue) or a == b:
            return a
        return b if isinstance(condition, BooleanFalse) else None

    def fdiff(self, argindex: int = 1) -> Expr:
        if argindex == 1:
            return Integer(0)
        return cast(Expr, Where(self.args[0], int(argindex == 2), int(argindex == 3)))

    def _eval_derivative(self, x: Symbol) -> Expr:
        condition, a, b = self.args
        return cast(Expr, Where(condition, a.diff(x), b.diff(x)))


class Minimum(_Plain):
    """The smaller of two values."""

    @classmethod
    def eval(cls, x: Expr, y: Expr) -> Expr | None:
        return min(x, y) if x.is_Number and y.is_Number else None

    def _eval_derivative(self, x: Symbol) -> Expr:
        a, b = self.args
        return cast(Expr, Where(a <= b, a.diff(x), b.diff(x)))


class Maximum(_Plain):
    """The larger of two values."""

    @classmethod
    def eval(cls, x: Expr, y: Expr) -> Expr | None:
        return max(x, y) if x.is_Number and y.is_Number else None

    def _eval_derivative(self, x: Symbol) -> Expr:
        a, b = self.args
        return cast(Expr, Where(a >= b, a.diff(x), b.diff(x)))


class IDiv(_Plain):
    """Integer division rounding down."""

    is_integer = True

    @classmethod
    def eval(cls, x: Expr, y: Expr) -> Expr | None:
        if y == 1:
            return x
        return Integer(x // y) if x.is_Integer and y.is_Integer and y != 0 else None


class IMod(_Plain):
    """Remainder of `IDiv`; it has the sign of the divisor."""

    is_integer = True

    @classmethod
    def eval(cls, x: Expr, y: Expr) -> Expr | None:
        if y == 1:
            return Integer(0)
        return Integer(x % y) if x.is_Integer and y.is_Integer and y != 0 else None


class Trunc(_Plain):
    """A real value cut to an integer towards zero, as a cast to an integer dtype does."""

    is_integer = True

    @classmethod
    def eval(cls, x: Expr) -> Expr | None:
        return x if x.is_integer and not x.has(Fadd, Fmul, Fdiv) else None


class Fadd(_Plain):
    """A sum rounded to float32. Kept apart from `+` where a later cast to an integer makes rounding
    visible."""

    def fdiff(self, argindex: int = 1) -> Expr:
        return Integer(1)


class Fmul(_Plain):
    """A product rounded to float32; see `Fadd`."""

    def fdiff(self, argindex: int = 1) -> Expr:
        return cast(Expr, self.args[2 - argindex])


class Fdiv(_Plain):
    """A quotient rounded to float32; see `Fadd`."""

    def fdiff(self, argindex: int = 1) -> Expr:
        x, y = self.args
        return cast(Expr, 1 / y if argindex == 1 else -x / y**2)


def reads(formula: Formula) -> set[Read]:
    """Every tensor read in the formula, reads inside indices of reads included."""
    return cast("set[Read]", formula.atoms(Read))


# --- text -----------------------------------------------------------------------------------------

_RELATIONS = {"<": "<", "<=": "≤", ">": ">", ">=": "≥", "==": "=", "!=": "≠"}


class _FormulaPrinter(StrPrinter):  # type: ignore[misc]
    """Prints formulas the way a person would write them: `k ≤ q ∧ q − k < 4096 ∧ pad[b, k]`."""

    def __init__(self, truths: Iterable[str] = ()) -> None:
        super().__init__({"order": "none"})
        self.truths = frozenset(truths)

    def _print_Read(self, expr: Read) -> str:
        return f"{expr.tensor}[{', '.join(self._print(i) for i in expr.index)}]"

    def _print_Where(self, expr: Where) -> str:
        condition, a, b = expr.args
        return f"({self._print(a)} if {self._print(condition)} else {self._print(b)})"

    def _print_Minimum(self, expr: Minimum) -> str:
        return f"min({self._print(expr.args[0])}, {self._print(expr.args[1])})"

    def _print_Maximum(self, expr: Maximum) -> str:
        return f"max({self._print(expr.args[0])}, {self._print(expr.args[1])})"

    def _print_IDiv(self, expr: IDiv) -> str:
        return f"⌊{self._wrapped(expr.args[0])}/{self._wrapped(expr.args[1])}⌋"

    def _print_IMod(self, expr: IMod) -> str:
        return f"({self._wrapped(expr.args[0])} mod {self._wrapped(expr.args[1])})"

    def _print_Trunc(self, expr: Trunc) -> str:
        return f"int({self._print(expr.args[0])})"

    def _print_Fadd(self, expr: Fadd) -> str:
        return f"({self._print(expr.args[0])} + {self._print(expr.args[1])})"

    def _print_Fmul(self, expr: Fmul) -> str:
        return f"{self._wrapped(expr.args[0])}·{self._wrapped(expr.args[1])}"

    def _print_Fdiv(self, expr: Fdiv) -> str:
        return f"{self._wrapped(expr.args[0])}/{self._wrapped(expr.args[1])}"

    def _print_Abs(self, expr: Expr) -> str:
        return f"|{self._print(expr.args[0])}|"

    def _print_Float(self, expr: sympy.Float) -> str:
        return f"{float(expr):.6g}"

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        if expr.exp in (2, 3):
            base = self._print(expr.base)
            return (base if expr.base.is_Atom else f"({base})") + "²³"[int(expr.exp) - 2]
        return str(super()._print_Pow(expr, rational))

    def _print_Mul(self, expr: sympy.Mul) -> str:
        c, rest = expr.as_coeff_Mul()
        if c == -1:
            return f"-{self._wrapped(rest)}"
        if c.is_Rational and not c.is_Integer and c.p in (1, -1):
            return f"{'-' if c.p < 0 else ''}{self._wrapped(rest)}/{c.q}"
        if c.is_Float and 0 < abs(c) < 1 and float(1 / c).is_integer() and abs(1 / c) < 4096:
            return f"{'-' if c < 0 else ''}{self._wrapped(rest)}/{abs(int(1 / c))}"
        return "·".join(self._wrapped(a) for a in sorted(expr.args, key=_mul_key))

    def _print_Add(self, expr: sympy.Add) -> str:
        terms = sorted(expr.args, key=_add_key)
        text = str(self._print(terms[0]))
        for term in terms[1:]:
            part = self._print(term)
            text += f" - {part[1:]}" if part.startswith("-") else f" + {part}"
        return text

    def _print_Relational(self, expr: Any) -> str:
        lhs, rhs, op = expr.lhs, expr.rhs, expr.rel_op
        if isinstance(lhs, Read) and rhs == 0 and lhs.tensor in self.truths and op in ("!=", "=="):
            return self._print(lhs) if op == "!=" else f"¬{self._print(lhs)}"
        return f"{self._print(lhs)} {_RELATIONS[op]} {self._print(rhs)}"

    def _joined(self, expr: Any, sign: str) -> str:
        parts = sorted(expr.args, key=_logic_key)
        return sign.join(
            f"({self._print(p)})" if isinstance(p, sympy.And | sympy.Or) else self._print(p)
            for p in parts
        )

    def _print_And(self, expr: Any) -> str:
        return self._joined(expr, " ∧ ")

    def _print_Or(self, expr: Any) -> str:
        return self._joined(expr, " ∨ ")

    def _print_Not(self, expr: Any) -> str:
        return f"¬({self._print(expr.args[0])})"

    def _wrapped(self, expr: Expr) -> str:
        text = self._print(expr)
        return f"({text})" if isinstance(expr, sympy.Add) else text


def _mul_key(x: Expr) -> tuple[int, str]:
    return (0 if x.is_Number else 1 if not x.has(s) else 2, str(x))


def _add_key(x: Expr) -> tuple[int, int, str]:
    """The score first, positive terms before negative ones, numbers last."""
    return (0 if x.has(s) else 2 if x.is_Number else 1, int(x.could_extract_minus_sign()), str(x))


def _logic_key(x: Boolean) -> tuple[int, int, str]:
    """Comparisons of positions before reads of tensors."""
    return (len(x.atoms(Read)), len(str(x)), str(x))


def formula_text(formula: Formula, truths: Iterable[str] = ()) -> str:
    """The formula as a person would write it; reads of the tensors in `truths` print as truth
    values."""
    return str(_FormulaPrinter(truths).doprint(formula))


# --- JSON -----------------------------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[..., Formula]] = {
    "add": sympy.Add,
    "mul": sympy.Mul,
    "pow": sympy.Pow,
    "abs": sympy.Abs,
    "exp": sympy.exp,
    "log": sympy.log,
    "tanh": sympy.tanh,
    "cos": sympy.cos,
    "sin": sympy.sin,
    "sign": sympy.sign,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "read": Read,
    "where": Where,
    "min": Minimum,
    "max": Maximum,
    "idiv": IDiv,
    "imod": IMod,
    "trunc": Trunc,
    "fadd": Fadd,
    "fmul": Fmul,
    "fdiv": Fdiv,
    "and": sympy.And,
    "or": sympy.Or,
    "not": sympy.Not,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
    "eq": sympy.Eq,
    "ne": sympy.Ne,
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_SYMBOLS = {str(x): x for x in (b, h, q, k, s, B, H, L, M, *masses)}


def encode(formula: Formula) -> Any:
    """The formula as plain JSON values: a number, a symbol's name, a truth value, or `[function,
    *arguments]`."""
    if isinstance(formula, BooleanTrue | BooleanFalse):
        return bool(formula)
    if isinstance(formula, Symbol):
        return str(formula)
    if formula.is_Integer:
        return int(formula)
    if formula in (sympy.oo, -sympy.oo):
        return ["inf", 1 if formula == sympy.oo else -1]
    if formula.is_Rational:
        return ["rational", int(formula.p), int(formula.q)]
    if formula.is_Float:
        return float(formula)
    if formula.is_number and formula.func not in _NAMES:
        return float(formula)
    name = _NAMES.get(formula.func)
    if name is None:
        raise SpecError(f"a formula may not use {formula.func.__name__}: {formula}")
    args = (
        formula.args
        if name not in ("and", "or", "add", "mul")
        else sorted(formula.args, key=sympy.default_sort_key)
    )
    return [name, *(encode(a) for a in args)]


def decode(data: Any) -> Formula:
    """The formula that `encode` wrote. Runs no code from the data.

    Raises:
        SpecError: if the data is not such a formula.
    """
    if isinstance(data, bool):
        return cast(Boolean, sympy.true if data else sympy.false)
    if isinstance(data, int):
        return Integer(data)
    if isinstance(data, float):
        return cast(Expr, sympy.Float(data))
    if isinstance(data, str):
        return cast(Expr, _SYMBOLS.get(data, size_symbol(data)))
    if isinstance(data, list) and data and isinstance(data[0], str):
        name, args = data[0], data[1:]
        if name == "inf":
            return cast(Expr, sympy.oo * args[0])
        if name == "rational":
            return cast(Expr, sympy.Rational(*args))
        if name == "read":
            return cast(Expr, Read(Symbol(args[0]), *(decode(a) for a in args[1:])))
        if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(decode(a) for a in args))
    raise SpecError(f"not a formula: {data!r}")
