"""The sums over keys that a kernel carries along: denominators, and weights times values.

Without an edit there is one of each. With one (`rewriter.stages.Edit`) the output of a row is `sum
over groups g of a_g o_g`: a factor that is known
before the loop multiplies the weights in it, and such groups share a sum; groups with the same
factor in the masses share another one, which the factor multiplies at the end. A factor of 0 has no
sum. All sums share one running maximum. Factors are finite, as passes see to: an infinite one gives
NaN, also where its group has no key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from sympy import Expr, Integer

from rewriter import symbols as sym
from rewriter.errors import LoweringError
from rewriter.kernels.triton_loads import Loads
from rewriter.stages import Edit
from rewriter.symbols import formula_text

if TYPE_CHECKING:
    from rewriter.kernels.triton_codegen import Dtype

__all__ = ["EditedSums", "Sum", "Sums", "sums_of_edit"]

# --- which sums -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """Weights times values, added up over the keys of some groups."""

    groups: tuple[int, ...]
    known: tuple[Expr, ...]
    """Factors of the groups that multiply the weights."""
    factor: Expr = Integer(1)
    """Multiplies the sum of a row at the end."""


@lru_cache(maxsize=1024)
def sums_of_edit(edit: Edit, dtype: Dtype) -> tuple[Sum, ...]:
    """The sums that the output of an edit is made of; at least one."""
    known: dict[int, Expr] = {}
    late: dict[Expr, list[int]] = {}
    for group, factor in enumerate(edit.factors):
        if factor.has(sym.k, sym.s):
            raise LoweringError(f"the factor of a group depends on the key: {formula_text(factor)}")
        if factor == 0:
            continue
        if factor.has(*sym.masses) or not _multiplies_weights(factor, dtype):
            late.setdefault(factor, []).append(group)
        else:
            known[group] = factor
    if len(set(known.values())) == 1:
        late = {known[min(known)]: [*known]} | late
        known = {}
    first = [Sum(tuple(known), tuple(known.values()))] if known or not late else []
    return (*first, *(Sum(tuple(g), (Integer(1),) * len(g), a) for a, g in late.items()))


def _multiplies_weights(factor: Expr, dtype: Dtype) -> bool:
    """The product of a weight and the factor has a place in the dtype."""
    return dtype != "float16" or bool(factor.is_number and abs(factor) <= 1)


# --- their lines ----------------------------------------------------------------------------------


class Sums:
    """The lines of a kernel without an edit: `b_l` and `b_o`."""

    loaded: tuple[str, ...] = ()
    """The lines that load what a group reads."""

    def __init__(self, ieee: str) -> None:
        """Args:
        ieee: the further argument of each product.
        """
        self.ieee = ieee

    @property
    def weight_names(self) -> list[str]:
        """The weights that products take, in the loop."""
        return ["b_p"]

    @property
    def names(self) -> list[str]:
        """The sums of weights times values."""
        return ["b_o"]

    @property
    def masses(self) -> list[str]:
        """The sums of weights besides `b_l`."""
        return []

    def state(self) -> list[str]:
        """The lines before the loop, `b_l` left out."""
        lines = [f"{name} = tl.zeros([BQ], dtype=tl.float32)" for name in self.masses]
        zeros = "tl.zeros([BQ, BE], dtype=tl.float32)"
        return [*lines, "# [BQ, BE]", *(f"{name} = {zeros}" for name in self.names)]

    def weights(self, rate: str = " * b_r") -> list[str]:
        """The lines that add the weights `b_p` up; earlier ones times a rate."""
        return [f"b_l = b_l{rate} + tl.sum(b_p, 1)"]

    def products(self, rate: str = " * b_r[:, None]") -> list[str]:
        """The lines that add weights times `b_v` up."""
        return ["# [BQ, BE]", self._dot("b_o", "b_p", rate)]

    def end(self) -> list[str]:
        """The lines that make the output `b_o` of the sums."""
        return ["b_o = b_o / b_l[:, None]"]

    def alike(self, load_values: Sequence[str], dropped: Sequence[str]) -> list[str]:
        """The lines in which rows `m_empty` weigh all keys alike, whichever the loop has seen.

        Args:
            load_values: the lines that load the values.
            dropped: those that take weights away.
        """
        lines = [f"{x} = tl.where(m_empty, 0.0, {x})" for x in ("b_l", *self.masses)]
        lines += [f"{x} = tl.where(m_empty[:, None], 0.0, {x})" for x in self.names]
        step = [
            "o_k = i_k + tl.arange(0, BK)",
            "m_k = o_k < M",
            *self.loaded,
            "b_p = tl.where(m_empty[:, None] & m_k[None, :], 1.0, 0.0)",
            *self.weights(""),
            *dropped,
            *load_values,
            *self.products(""),
        ]
        return [*lines, "for i_k in range(0, M, BK):", *(f"    {line}" for line in step)]

    def _dot(self, name: str, weights: str, rate: str) -> str:
        return f"{name} = tl.dot({weights}.to(b_v.dtype), b_v, {name}{rate}{self.ieee})"


class EditedSums(Sums):
    """The lines of a kernel with an edit.

    `b_group` are the groups of the keys, `b_p1` the weights of group 1, `b_l1` their sum, `b_m1`
    what they have of the row, `b_a1` their factor if the weights are multiplied by it, `b_f1` that
    of the sum `b_o1`.
    """

    def __init__(self, edit: Edit, dtype: Dtype, loads: Loads, ieee: str) -> None:
        """Prints the group before any other formula, so that what it reads can be loaded again."""
        super().__init__(ieee)
        taken = sorted({str(m) for m in sym.masses} & set(loads.sizes))
        if taken:
            raise LoweringError(f"a size is called {taken[0]}, as the mass of a group is")
        self.sums, self.loads = sums_of_edit(edit, dtype), loads
        self.read = [i for i, m in enumerate(sym.masses) if any(s.factor.has(m) for s in self.sums)]
        self.raised = dtype == "float16"
        self.factors: dict[int, str] = {}
        """Of groups, by what they are called in the loop; complete after `state`."""
        text = loads.text(edit.group)
        if not edit.group.has(sym.k):
            text = f"tl.zeros([1, BK], dtype=tl.int32) + ({text})"
        self.loaded = tuple(loads.each)
        self.group, self.group_lines = _named("b_group", text)

    @property
    def names(self) -> list[str]:
        return ["b_o"] if len(self.sums) == 1 else [f"b_o{i}" for i in range(len(self.sums))]

    @property
    def weight_names(self) -> list[str]:
        return [f"b_p{g}" for g in sorted({g for s in self.sums for g in s.groups})]

    @property
    def masses(self) -> list[str]:
        return [f"b_l{g}" for g in self.read]

    def state(self) -> list[str]:
        """Also the factors that are known before the loop."""
        lines = super().state()
        for group, factor in (p for s in self.sums for p in zip(s.groups, s.known, strict=True)):
            self.factors[group], more = _named(f"b_a{group}", self.loads.text(factor))
            lines += more
        return lines

    def weights(self, rate: str = " * b_r") -> list[str]:
        used = {g for s in self.sums for g in s.groups} | set(self.read)
        lines = [*super().weights(rate), *self.group_lines, "# [BQ, BK], the weights of a group"]
        for g in sorted(used):
            lines.append(f"b_p{g} = tl.where({self.group} == {g}, b_p, 0.0)")
            if g in self.read:
                lines.append(f"b_l{g} = b_l{g}{rate} + tl.sum(b_p{g}, 1)")
        return lines

    def products(self, rate: str = " * b_r[:, None]") -> list[str]:
        lines = ["# [BQ, BE]"]
        for name, one in zip(self.names, self.sums, strict=True):
            parts = [_times(f"b_p{g}", self.factors[g]) for g in one.groups]
            if parts:
                lines.append(self._dot(name, self._raised(" + ".join(parts)), rate))
        return lines

    def _raised(self, weights: str) -> str:
        """The weights in brackets where they need them; in float16 raised."""
        inner = f"({weights})" if " " in weights else weights
        return f"({inner} * RAISE)" if self.raised else inner

    def end(self) -> list[str]:
        lines = ["# what each group has of a row, and the factors"] if self.read else []
        lines += [f"b_m{g} = (b_l{g} / b_l)[:, None]" for g in self.read]
        terms = []
        for i, (name, one) in enumerate(zip(self.names, self.sums, strict=True)):
            factor, more = _named(f"b_f{i}", self.loads.text(one.factor))
            lines += more
            terms.append(_times(name, factor))
        total = f"({' + '.join(terms)})" if len(terms) > 1 else terms[0]
        return [*lines, f"b_o = {total} / {'(b_l * RAISE)' if self.raised else 'b_l'}[:, None]"]


def _named(name: str, text: str) -> tuple[str, list[str]]:
    """What the value is called, and the line that gives it that name if it has none."""
    if text.isidentifier() or text.replace(".", "", 1).isdigit():
        return text, []
    return name, [f"{name} = {text}"]


def _times(name: str, factor: str) -> str:
    return name if factor == "1" else f"{name} * {factor}"
