"""What stands for the tensors that a formula reads, where it is drawn: their values are not part of
a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import sympy
from sympy import Expr, Integer, Symbol

from rewriter.spec import Spec
from rewriter.symbols import Formula, IDiv, IMod, Read, b, h, k, q, reads

__all__ = ["StandIns"]


class StandIns:
    """What stands for the tensors that a formula reads."""

    def __init__(self, spec: Spec, origins: Mapping[str, str], length: int) -> None:
        self.spec, self.origins, self.length = spec, origins, length
        self.told: list[str] = []
        self.tables: list[str] = []

    def mask(self, mask: Formula) -> Formula:
        """Keys are not padding, segments are thirds of the sequence, lengths half of it."""
        compared = {
            r.tensor
            for x in mask.atoms(sympy.Eq)
            if isinstance(x.lhs, Read) and isinstance(x.rhs, Read)
            for r in (x.lhs, x.rhs)
        }
        wanted = {x.lhs: x.rhs for x in mask.atoms(sympy.Eq) if x.rhs.is_Integer}
        bounds = mask.atoms(sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)
        any_ = Symbol("any", integer=True)
        lengths = {r for x in bounds for r in reads(x) if x.xreplace({r: any_}).has(q, k)}
        found: dict[Read, Expr] = {}
        for read in _outer(mask):
            at = read.index[-1:] if read.index else (Integer(0),)
            if read.tensor in compared:
                found[read] = IDiv(3 * at[0], Integer(self.length))
                self._tell(f"three segments ({read.tensor})")
            elif read in self.spec.opaque_reads():
                found[read] = wanted.get(read, Integer(1))
            elif read in lengths:
                found[read] = Integer(self.length // 2)
                self._tell(f"{read.tensor} = {self.length // 2:,}")
            else:
                found[read] = wanted.get(read, Integer(1))
                padding = read.index[:1] == (b,) and len(read.index) == 2
                what = "no padding" if padding else "nothing hidden"
                self._tell(f"{what} ({read.tensor})")
        return cast(Formula, mask.xreplace(found))

    def bias(self, bias: Expr) -> Expr:
        """A table has another value at each entry, counted positions start at 1, a slope is 1."""
        found = {read: self._of_bias(read) for read in _outer(bias)}
        if self.tables:
            names = ", ".join(dict.fromkeys(self.tables))
            self._tell(f"shades: sample values, one for each entry of {names}")
        return cast(Expr, bias.xreplace(found))

    def _of_bias(self, read: Read) -> Expr:
        name, at = read.tensor, [i for i in read.index if i.has(q, k)]
        whole = self.spec.tensor(name).dtype.startswith(("int", "bool"))
        if read in self.spec.opaque_reads():
            return Integer(0)
        if any(i.has(Read) for i in read.index):
            self._tell(f"the entries of {name} are not drawn")
            return Integer(0)
        if read.has(q) and read.has(k):
            self.tables.append(name)
            # entries near each other get values far from each other
            moving = next((i for i in at if i not in (q, k)), at[0])
            return cast(Expr, IMod(61 * moving, Integer(97)) / Integer(97))
        if "cumsum" in self.origins.get(name, ""):
            return cast(Expr, read.index[-1] + 1)
        if not at and read.has(h):
            self._tell(f"slope 1 ({name})")
            return Integer(1)
        if not whole:
            self._tell(f"{name} is not drawn")
        return Integer(int(whole))

    def _tell(self, text: str) -> None:
        if text not in self.told:
            self.told.append(text)


def _outer(formula: Formula) -> Sequence[Read]:
    """Reads that stand in no index of another."""
    found = reads(formula)
    inner = {x for r in found for i in r.index for x in i.atoms(Read)}
    return sorted(found - inner, key=str)
