"""Reads of tensors as loads of a kernel: pointers from indices and strides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from sympy import Expr

from rewriter import symbols as sym
from rewriter.kernels.triton_code import Printer
from rewriter.kernels.triton_ranges import BEHIND, FIRST
from rewriter.symbols import Formula, Read

__all__ = ["Loads", "Place", "identifiers"]

Place = Literal["tile", "row"]
"""Where a formula is evaluated: over a tile `[BQ, BK]`, or over the rows `[BQ]` of one."""

_NAMES = {
    **{name: name for name in "BHLM"},
    **{str(m): f"b_{m}" for m in sym.masses},
    "b": "i_b",
    "h": "i_h",
    "k": "o_k[None, :]",
    "s": "b_s",
    str(FIRST): "i_q",
    str(BEHIND): "(i_q + BQ)",
}
_ROWS: dict[Place, str] = {"tile": "o_q[:, None]", "row": "o_q"}
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
        once: lines that stand before the loop over keys.
        each: lines that stand in it.
        extents: the tensors and dimensions whose extent the lines ask for.
        strides: the tensors and dimensions whose stride the lines ask for.
        helpers: the functions that the printed formulas call.
    """

    dtypes: Mapping[str, str]
    sizes: Mapping[str, str]
    taken: Sequence[str] = ()
    once: list[str] = field(default_factory=list)
    each: list[str] = field(default_factory=list)
    extents: dict[tuple[str, int], None] = field(default_factory=dict)
    strides: set[tuple[str, int]] = field(default_factory=set)
    helpers: set[str] = field(default_factory=set)
    _values: dict[tuple[Place, Read], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.idents = identifiers(self.dtypes, self.taken)

    def text(self, formula: Formula, place: Place = "tile") -> str:
        """The formula as a Triton expression; the lines for its reads are added."""
        names = {**_NAMES, "q": _ROWS[place], **self.sizes}
        load = partial(self._value, place)
        return Printer(names, self.dtypes, load, self.helpers).text(formula)

    def _value(self, place: Place, read: Read) -> str:
        """The name of the loaded value."""
        if (place, read) not in self._values:
            name = self._fresh(self.idents[read.tensor])
            lines = self._lines(read, name, place)
            (self.each if read.has(sym.k) else self.once).extend(lines)
            self._values[place, read] = f"b_{name}"
        return self._values[place, read]

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
        terms, bounds, lines = [f"t_{ident}"], [], []
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
        return [
            *_shape(read, place),
            *lines,
            f"p_{name} = {' + '.join(terms)}",
            f"b_{name} = tl.load(p_{name}{mask}){cast}",
        ]

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


def _shape(read: Read, place: Place) -> list[str]:
    """The comment with the shape of the value."""
    rows, columns = read.has(sym.q), read.has(sym.k)
    if place == "row":
        return ["# [BQ]"] if rows else []
    return [f"# [{'BQ' if rows else 1}, {'BK' if columns else 1}]"] if rows or columns else []


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
