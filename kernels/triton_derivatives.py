"""Which reads of a score want a gradient, and the slopes by which they get it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import sympy
from sympy import Dummy, Expr, Integer

from rewriter import symbols as sym
from rewriter.kernels.triton_loads import PRODUCT
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import Read

__all__ = ["ReadGradient", "derivative", "read_gradients"]


@dataclass(frozen=True)
class ReadGradient:
    """A read of the score that wants a gradient: `dz` times the slope, added up over the pairs."""

    read: Read
    slope: Expr
    """The derivative of the score by the read."""
    place: Literal["query", "key", "pair"]
    """What is added up in registers: `[B, H, L]` for reads that no key is in, `[B, H, M]` for those
    that no query is in; reads of both are added where they were read."""


@lru_cache(maxsize=1024)
def read_gradients(spec: SoftmaxSpec, wanted: frozenset[str]) -> tuple[ReadGradient, ...]:
    """The reads of the score and of its scale that want a gradient."""
    found = []
    slope = derivative(spec.score, sym.s)
    for read in sorted(sym.reads(spec.score) | sym.reads(spec.scale), key=str):
        if read.tensor not in wanted:
            continue
        name = Dummy(real=True)
        own = derivative(spec.score.xreplace({read: name}), name)
        scale = derivative(spec.scale.xreplace({read: name}), name)
        total = (own + slope * PRODUCT * scale).xreplace({name: read})
        place = "query" if not read.has(sym.k) else "key" if not read.has(sym.q) else "pair"
        found.append(ReadGradient(read, total, cast("Literal['query', 'key', 'pair']", place)))
    return tuple(found)


def derivative(formula: Expr, x: Expr) -> Expr:
    """Selections and rounded values have no gradient."""
    return cast(Expr, formula.diff(x).replace(sympy.DiracDelta, lambda *_: Integer(0)))
