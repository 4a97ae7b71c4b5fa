"""Reads of tensors as loads of a kernel: pointers from indices and strides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from sympy import Expr, Symbol

from rewriter import symbols as sym
from rewriter.kernels.triton_code import Printer
from rewriter.kernels.triton_ranges import BEHIND, FIRST
from rewriter.symbols import Formula, Read

__all__ = ["KEYS", "PACKED", "PRODUCT", "QUERIES", "Layout", "Loads", "Place", "identifiers"]

Place = Literal["tile", "row"]
"""Where a formula is evaluated: over a tile, or over the queries `[BQ]` of one."""

PRODUCT = Symbol("q·k", real=True)
"""A product of a query and a key before it is scaled, `b_x`."""

_NAMES = {
    **{name: name for name in "BHLM"},
    **{str(m): f"b_{m}" for m in sym.masses},
    "b": "i_b",
    "h": "i_h",
    "s": "b_s",
    str(PRODUCT): "b_x",
}


@dataclass(frozen=True)
class Layout:
    """How a tile lies, and what a program goes through in its loop."""

    queries: str
    keys: str
    shape: tuple[Symbol, Symbol]
    """The index of each dimension of a tile."""
    loop: Symbol
    """The index that the inner loop goes through."""
    head: bool = False
    """An outer loop goes through heads."""
    packed: bool = False
    """The rows of a tile are of several heads."""

    @property
    def names(self) -> dict[str, str]:
        """What the symbols of a tile are called."""
        names = {"q": self.queries, "k": self.keys}
        if self.packed:
            return {**names, "h": "o_h[:, None]", str(FIRST): "0", str(BEHIND): "L"}
        own = "k" if self.loop == sym.q else "q"
        return {**names, str(FIRST): f"i_{own}", str(BEHIND): f"(i_{own} + B{own.upper()})"}


QUERIES = Layout("o_q[:, None]", "o_k[None, :]", (sym.q, sym.k), loop=sym.k)
"""A program has a tile of queries of one head, and goes through keys: tiles are `[BQ, BK]`."""
PACKED = replace(QUERIES, packed=True)
"""The same with queries of all heads that share keys."""
KEYS = Layout("o_q[None, :]", "o_k[:, None]", (sym.k, sym.q), loop=sym.q, head=True)
"""A program has a tile of keys, and goes through heads and their queries: tiles are `[BK, BQ]`."""

_TAKEN = (
    "q",
    "k",
    "v",
    "o",
    "s",
    "m",
    "l",
    "n",
    "z",
    "r",
    "p",
    "mean",
    "t",
    "first",
    "low",
    "high",
    "group",
    "f",
    *(f"{letter}{number}" for letter in "aflmop" for number in range(len(sym.masses))),
)
"""What the kernel itself writes behind `b_` and `n_`."""


@dataclass
class Loads:
    """Prints formulas, and collects the lines that load what they read.

    Attributes:
        dtypes: the dtype of each tensor, by name.
        sizes: what each size of the formulas is called in the kernel, by name.
        taken: names that the kernel uses itself, besides those that every kernel does.
        layout: of the tiles.
        addressed: tensors whose offsets get a name, `o_` and that of the value.
        once: lines that stand before the loops.
        head: lines that stand in the loop over heads, if there is one.
        each: lines that stand in the inner loop.
        extents: the tensors and dimensions whose extent the lines ask for.
        strides: the tensors and dimensions whose stride the lines ask for.
        helpers: the functions that the printed formulas call.
    """

    dtypes: Mapping[str, str]
    sizes: Mapping[str, str]
    taken: Sequence[str] = ()
    layout: Layout = QUERIES
    addressed: frozenset[str] = frozenset()
    once: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    each: list[str] = field(default_factory=list)
    extents: dict[tuple[str, int], None] = field(default_factory=dict)
    strides: set[tuple[str, int]] = field(default_factory=set)
    helpers: set[str] = field(default_factory=set)
    _values: dict[tuple[Place, Read], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.idents = identifiers(self.dtypes, self.taken)

    def text(self, formula: Formula, place: Place = "tile") -> str:
        """The formula as a Triton expression; the lines for its reads are added."""
        names = {**_NAMES, **self.layout.names, **self.sizes}
        if place == "row":
            names |= {"q": "o_q", **({"h": "o_h"} if self.layout.packed else {})}
        load = partial(self._value, place)
        return Printer(names, self.dtypes, load, self.helpers).text(formula)

    def _value(self, place: Place, read: Read) -> str:
        """The name of the loaded value."""
        if (place, read) not in self._values:
            name = self._fresh(self.idents[read.tensor])
            lines = self._lines(read, name, place)
            inner = self.head if self.layout.head and read.has(sym.h) else self.once
            (self.each if read.has(self.layout.loop) else inner).extend(lines)
            self._values[place, read] = f"b_{name}"
        return self._values[place, read]

    def offsets(self, read: Read) -> str:
        """The name of the offsets of a read that has been printed, of an addressed tensor."""
        return self._values["tile", read].replace("b_", "o_", 1)

    def _fresh(self, ident: str) -> str:
        """A name for the next value of a tensor, which may be read at several places."""
        name, count = ident, 0
        while f"b_{name}" in self._values.values() or (count and name in self.idents.values()):
            count += 1
            name = f"{ident}_{count}"
        return name

    def _lines(self, read: Read, name: str, place: Place) -> list[str]:
        """The lines that load one read."""
        ident, dtype = self.idents[read.tensor], self.dtypes[read.tensor]
        terms: list[str] = []
        bounds, lines = [], []
        for dim, index in enumerate(read.index):
            if index == 0:
                continue
            text = self.text(index, place)
            if index in (sym.q, sym.k):
                bounds.append(text.replace("o_", "m_"))
            elif index not in (sym.b, sym.h):  # of these the launcher knows that they fit
                text = f"o_{name}_{dim}"
                lines += self._offset(index, text, f"size_{ident}_{dim}", place)
                self.extents[read.tensor, dim] = None
            self.strides.add((read.tensor, dim))
            terms.append(f"{text}.to(tl.int64) * stride_{ident}_{dim}")
        mask = f", mask={' & '.join(bounds)}, other=0" if bounds else ""
        cast = ".to(tl.float32)" if "float" in dtype else ".to(tl.int32)"
        cast = "" if dtype in ("int32", "int64") else cast
        if read.tensor in self.addressed:
            lines.append(f"o_{name} = {' + '.join(terms) or '0'}")
            terms = [f"o_{name}"]
        return [
            *self._shape(read, place),
            *lines,
            f"p_{name} = {' + '.join([f't_{ident}', *terms])}",
            f"b_{name} = tl.load(p_{name}{mask}){cast}",
        ]

    def _shape(self, read: Read, place: Place) -> list[str]:
        """The comment with the shape of the value."""
        if place == "row":
            return ["# [BQ]"] if read.has(sym.q) else []
        sizes = [f"B{str(x).upper()}" if read.has(x) else "1" for x in self.layout.shape]
        return [f"# [{', '.join(sizes)}]"] if read.has(*self.layout.shape) else []

    def _offset(self, index: Expr, name: str, size: str, place: Place) -> list[str]:
        """The lines that compute one index.

        A negative one counts from the end, as it does in torch. Rows and keys behind the last are
        computed too, and not used: the index is kept inside the tensor for them.
        """
        text = self.text(index, place)
        lines = [f"{name} = {f'tl.full([], {text}, tl.int64)' if index.is_Integer else text}"]
        if index.is_nonnegative:
            return [*lines, f"{name} = tl.minimum({name}, {size} - 1)"]
        return [
            *lines,
            f"{name} = tl.where({name} < 0, {name} + {size}, {name})",
            f"{name} = tl.minimum(tl.maximum({name}, 0), {size} - 1)",
        ]


def identifiers(names: Iterable[str], taken: Sequence[str] = ()) -> dict[str, str]:
    """An identifier for each name, all different, and none that the kernel uses itself: those of
    every kernel, and those `taken`."""
    result: dict[str, str] = {}
    for name in names:
        ident = re.sub(r"\W", "_", name, flags=re.ASCII).strip("_").lower() or "t"
        while ident in result.values() or ident in _TAKEN or ident in taken:
            ident += "_"
        result[name] = ident
    return result
