"""What an attention computes, as a value: frozen, hashable, printable as a formula, JSON.

A spec knows nothing of shapes, devices or models. Shapes are those of the tensors it is applied to:
q `[B, Hq, L, D]`, k `[B, Hkv, M, D]`, v `[B, Hkv, M, Dv]`, where `Hq` is a multiple of `Hkv` and
query head h reads key head `h // (Hq / Hkv)`. This file has what all families share, and the
softmax family; `rewriter.linear` has the linear one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, cast

import sympy
from sympy import Expr, Integer, Symbol
from sympy.logic.boolalg import Boolean, BooleanTrue

from rewriter import symbols as sym
from rewriter.errors import SpecError
from rewriter.stages import Edit, Local, Patch, Route, Source
from rewriter.symbols import Formula, Read, decode, encode, formula_text

__all__ = ["MASKED", "Masked", "SoftmaxSpec", "Spec", "TensorArg", "fresh_name"]

Masked = Literal["zero", "mean", "add", "nan"]
MASKED: tuple[Masked, ...] = ("zero", "mean", "add", "nan")

VERSION = 1


@dataclass(frozen=True)
class TensorArg:
    """A tensor that a spec reads, by name; handed over in the order of `Spec.tensors`."""

    name: str
    dtype: str
    """`"bool"`, `"int64"`, `"float32"`, ...: the name of a torch dtype."""
    rank: int
    source: Source | None = field(default=None, compare=False)
    """How it is computed, if the model does not have it; no part of the JSON."""


class Spec:
    """What the families have in common. A family is a frozen dataclass with the fields below."""

    family: ClassVar[str]
    heads: Expr
    """Multiplies the output, in b, h, q and reads."""
    active: int | None
    """At most so many heads of a token have a factor in `heads` that is not 0; None if that is not
    known. The work of the others may be left out."""
    patch: Patch | None
    tensors: tuple[TensorArg, ...]
    sizes: tuple[str, ...]
    """Names of integers besides B, H, L, M that the formulas use, in the order in which they are
    handed over."""

    @property
    def formulas(self) -> tuple[Formula, ...]:
        """Every formula of the spec."""
        raise NotImplementedError

    @property
    def whole(self) -> tuple[str, ...]:
        """Names of tensors that are used as they are, not read by a formula."""
        return () if self.patch is None else (self.patch.tensor,)

    @property
    def kept(self) -> tuple[Any, ...]:
        """What has to be the same in two calls, so that what one leaves beside a KV cache serves
        the other: prompts and single tokens have specs that place their queries differently."""
        return (self.family,)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `rewriter.families.from_dict` is the inverse."""
        raise NotImplementedError

    def _check_reads(self) -> None:
        known = {t.name for t in self.tensors}
        used = {r.tensor for f in self.formulas for r in sym.reads(f)} | set(self.whole)
        if used - known:
            unknown = ", ".join(sorted(used - known))
            raise SpecError(f"the formulas read {unknown}, which `tensors` does not list")

    def tensor(self, name: str) -> TensorArg:
        """The tensor of that name."""
        return next(t for t in self.tensors if t.name == name)

    def without_unused(self) -> Self:
        """The same spec without tensors and sizes that no formula uses any more."""
        read = {r.tensor for f in self.formulas for r in sym.reads(f)} | set(self.whole)
        used = {str(x) for f in self.formulas for x in f.free_symbols}
        tensors = tuple(t for t in self.tensors if t.name in read)
        sizes = tuple(n for n in self.sizes if n in used)
        return cast(Self, replace(cast(Any, self), tensors=tensors, sizes=sizes))

    def opaque_reads(self) -> tuple[Read, ...]:
        """Reads that keep an L x M tensor alive: one dimension of the tensor is q itself and
        another is k itself."""
        found = {
            r for f in self.formulas for r in sym.reads(f) if sym.q in r.index and sym.k in r.index
        }
        return tuple(sorted(found, key=str))

    @property
    def truths(self) -> list[str]:
        """Names of the tensors of truth values, which print as such."""
        return [t.name for t in self.tensors if t.dtype == "bool"]

    @cached_property
    def _json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))

    def to_json(self) -> str:
        """One line of JSON, equal for equal specs."""
        return self._json

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self._json.encode()).hexdigest()[:16]

    def digest(self) -> str:
        """16 hexadecimal digits that name this spec: the key of kernels and the mark in saved
        plans."""
        return self._digest


def fresh_name(spec: Spec, wanted: str) -> str:
    """The name, or with a number behind it, so that no tensor of the spec has it."""
    taken = {t.name for t in spec.tensors} | set(spec.sizes) | set("bhqksBHLM")
    names = (wanted, *(f"{wanted}_{n}" for n in range(1, len(taken) + 2)))
    return next(n for n in names if n not in taken)


@dataclass(frozen=True)
class SoftmaxSpec(Spec):
    """Softmax attention: `heads · dropout(softmax over k of score, where mask holds) @ v`.

    The stages, in the order in which they apply:
    `s = scale · (q_row · k_row)`; `score` in s, indices and reads; keys where `mask` is false, and
    those that `route` does not choose, are not seen; a learned `sink` adds `exp(sink)` to the
    denominator; `edit` multiplies the weights; dropout; the product with v; `local` is added; the
    output times `heads`; `patch` replaces rows of it.
    """

    family: ClassVar[str] = "softmax"

    scale: Expr = Integer(1)
    """Multiplies the product of q and k: a number, or an expression in h and reads."""
    score: Expr = sym.s
    mask: Boolean = sympy.true
    masked: Masked = "zero"
    """What a query row that sees no key gives, which depends on how the model hides keys:
    `"zero"`: 0 (boolean mask of `scaled_dot_product_attention`, or a sink);
    `"mean"`: the mean of v over all M keys (scores filled with the most negative finite number);
    `"add"`: the same mean, with a gradient to the scores (that number added to the scores);
    `"nan"`: NaN (scores of minus infinity)."""
    sink: Expr | None = None
    """A logit without a key, in b, h, q and reads; neither scaled nor masked."""
    dropout: float = 0.0
    """Probability that a weight is dropped; the others are divided by `1 - dropout`."""
    heads: Expr = Integer(1)
    tensors: tuple[TensorArg, ...] = ()
    sizes: tuple[str, ...] = ()
    route: Route | None = None
    edit: Edit | None = None
    local: Local | None = None
    active: int | None = None
    patch: Patch | None = None

    def __post_init__(self) -> None:
        if self.masked not in MASKED:
            raise SpecError(f"masked is {self.masked!r}; it is one of {', '.join(MASKED)}")
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"dropout is {self.dropout}; it lies in [0, 1)")
        self._check_reads()

    @property
    def formulas(self) -> tuple[Formula, ...]:
        """Every formula of the spec."""
        sink = () if self.sink is None else (self.sink,)
        route = () if self.route is None else (self.route.position,)
        edit = () if self.edit is None else self.edit.formulas
        patch = () if self.patch is None else (self.patch.where,)
        return (self.scale, self.score, self.mask, *route, *sink, *edit, self.heads, *patch)

    @property
    def whole(self) -> tuple[str, ...]:
        local = () if self.local is None else (self.local.weight, self.local.bias)
        return (*super().whole, *local)

    @property
    def kept(self) -> tuple[Any, ...]:
        return (self.family, None if self.route is None else self.route.block)

    @property
    def is_plain_score(self) -> bool:
        """The score is the scaled product itself."""
        return bool(self.score == sym.s)

    @property
    def is_unmasked(self) -> bool:
        return isinstance(self.mask, BooleanTrue)

    @property
    def bias(self) -> Expr | None:
        """What is added to s, where the score is s plus something that does not depend on s; else
        None."""
        rest = self.score - sym.s
        return None if rest.has(sym.s) else rest

    def __str__(self) -> str:
        truths = self.truths
        text = formula_text(self.score, truths)
        if not self.is_unmasked:
            text += f" | {formula_text(self.mask, truths)}"
        if self.route is not None:
            text += f" ; {self.route}"
        if self.sink is not None:
            text += f" ; sink {formula_text(self.sink, truths)}"
        text = f"softmax( {text} )"
        if self.edit is not None:
            text += f" {self.edit.text(truths)}"
        if self.dropout:
            text = f"dropout({self.dropout:g}, {text})"
        text = f"{text} · v{ending(self)}"
        if self.scale != 1:
            text += f", s = {formula_text(self.scale * Symbol('q·k'), truths)}"
        return text if self.heads == 1 else f"{formula_text(self.heads, truths)} · {text}"

    # --- JSON -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return {
            "family": self.family,
            "version": VERSION,
            "scale": encode(self.scale),
            "score": encode(self.score),
            "mask": encode(self.mask),
            "masked": self.masked,
            "sink": None if self.sink is None else encode(self.sink),
            "dropout": self.dropout,
            "heads": encode(self.heads),
            "tensors": [[t.name, t.dtype, t.rank] for t in self.tensors],
            "sizes": list(self.sizes),
        } | stages_to_dict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> SoftmaxSpec:
        """The spec that `to_dict` wrote.

        Raises:
            SpecError: if the data is of another family or version, or not a spec.
        """
        try:
            if data["family"] != "softmax" or data["version"] != VERSION:
                got = f"{data['family']} {data['version']}"
                raise SpecError(f"a softmax spec of version {VERSION} was expected, got {got}")
            return SoftmaxSpec(
                scale=cast(Expr, decode(data["scale"])),
                score=cast(Expr, decode(data["score"])),
                mask=cast(Boolean, decode(data["mask"])),
                masked=data["masked"],
                sink=None if data["sink"] is None else cast(Expr, decode(data["sink"])),
                dropout=float(data["dropout"]),
                heads=cast(Expr, decode(data["heads"])),
                tensors=tuple(TensorArg(str(n), str(d), int(r)) for n, d, r in data["tensors"]),
                sizes=tuple(str(n) for n in data["sizes"]),
                **stages_from_dict(data),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"not a softmax spec: {error}") from error


_STAGES: dict[str, Any] = {"route": Route, "edit": Edit, "local": Local, "patch": Patch}


def stages_to_dict(spec: Spec) -> dict[str, Any]:
    """The optional stages that the spec has, as plain JSON values."""
    found = {name: getattr(spec, name, None) for name in _STAGES}
    data = {name: x.to_dict() for name, x in found.items() if x is not None}
    return data if spec.active is None else {**data, "active": spec.active}


def stages_from_dict(data: dict[str, Any]) -> dict[str, Any]:
    """The optional stages that `stages_to_dict` wrote, as keyword arguments."""
    found = {name: kind.from_dict(data[name]) for name, kind in _STAGES.items() if name in data}
    return found if "active" not in data else {**found, "active": int(data["active"])}


def ending(spec: Spec) -> str:
    """What happens to the output besides its factor, as the end of a formula."""
    text = ""
    local = getattr(spec, "local", None)
    if local is not None:
        text += f" + {local.weight} ∗ v"
    if spec.patch is not None:
        where = formula_text(spec.patch.where, spec.truths)
        text += f", {spec.patch.tensor} where {where}"
    return text
