"""What the torch lowerings work out once a spec: its code, the bounds and the terms of its mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
from torch import Tensor

from rewriter import symbols as sym
from rewriter.families import from_json
from rewriter.kernels.block_bounds import KeyRanges, Queries, causal_offset, key_ranges
from rewriter.kernels.torch_block import Block, Value
from rewriter.kernels.torch_code import Code, compiled, conjuncts
from rewriter.spec import SoftmaxSpec

__all__ = ["Plan", "Spans", "Term", "any_hidden", "plan_of", "queries_of"]

Spans = Mapping[str, tuple[int, int]]
"""`[start, stop)` of b, h and q."""


@dataclass(frozen=True)
class Term:
    """One term of the conjunction that the mask is."""

    hidden: Callable[[Block], Value]
    where_hidden: KeyRanges | None
    """The keys at which the term can hide something; None for all."""
    causal: Callable[[Queries], float] | None
    """c, if the term is `k <= q + c`."""
    has_q: bool


@dataclass(frozen=True)
class Plan:
    """What is worked out once a spec."""

    spec: SoftmaxSpec
    code: Code
    visible: KeyRanges | None
    terms: tuple[Term, ...]
    drops_empty: bool
    """A row without a key gives 0."""


@lru_cache(maxsize=1024)
def plan_of(spec_json: str) -> Plan:
    """The plan of the spec that `SoftmaxSpec.to_json` wrote."""
    spec = from_json(spec_json)
    assert isinstance(spec, SoftmaxSpec)
    code = compiled(spec_json)
    terms = tuple(
        Term(hidden, key_ranges(sympy.Not(term)), causal_offset(term), term.has(sym.q))
        for hidden, term in zip(code.hidden, conjuncts(spec.mask), strict=True)
    )
    drops_empty = spec.masked == "zero" or (spec.masked == "nan" and spec.sink is not None)
    return Plan(spec, code, key_ranges(spec.mask), terms, drops_empty)


def queries_of(spans: Spans, sizes: Mapping[str, int]) -> Queries:
    """A block as `block_bounds` wants it."""
    (b, b1), (h, h1), (q, q1) = spans["b"], spans["h"], spans["q"]
    return Queries((b, b1 - 1), (h, h1 - 1), (q, q1 - 1), sizes)


def any_hidden(x: Block, terms: Sequence[Term]) -> Tensor:
    """Where any of the terms hides a key."""
    found: Any = terms[0].hidden(x)
    for term in terms[1:]:
        found = found | term.hidden(x)
    return found if isinstance(found, Tensor) else x.value(bool(found))
