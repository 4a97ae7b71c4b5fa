"""From one spec to another, a stage at a time: what lies between plain attention and a spec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, cast

import sympy
from sympy import Float, Integer

from rewriter import symbols as sym
from rewriter.spec import SoftmaxSpec, Spec

__all__ = ["Stage", "grown", "plainest", "without_dropout"]

Stage = Literal[
    "score",
    "mask",
    "route",
    "normaliser",
    "edit",
    "heads",
    "local",
    "patch",
    "family",
    "operands",
    "gradient",
    "none",
]
"""A part of the computation of a site. `"score"` has the scale in it, `"normaliser"` rows without a
key, sinks and dropout, `"heads"` how many of them are on, `"family"` all of linear attention up to
its heads, `"operands"` what lies where: layout, groups of heads, strides. `"none"`: no site is to
blame."""

_LAST: tuple[tuple[Stage, tuple[str, ...]], ...] = (
    ("heads", ("heads", "active")),
    ("patch", ("patch",)),
)
_FIELDS: tuple[tuple[Stage, tuple[str, ...]], ...] = (
    ("score", ("scale", "score")),
    ("mask", ("mask",)),
    ("route", ("route",)),
    ("normaliser", ("masked", "sink", "dropout")),
    ("edit", ("edit",)),
    ("local", ("local",)),
    *_LAST,
)
_LINEAR_FIELDS: tuple[tuple[Stage, tuple[str, ...]], ...] = (
    (
        "family",
        (
            "q_map",
            "k_map",
            "position",
            "seen",
            "decay",
            "query_weight",
            "key_weight",
            "norm",
            "near",
        ),
    ),
    *_LAST,
)


def without_dropout(spec: Spec) -> Spec:
    """The same function with nothing dropped."""
    return replace(spec, dropout=0.0) if isinstance(spec, SoftmaxSpec) else spec


def plainest(spec: Spec, head_dim: int) -> Spec:
    """Attention of the same family with no stage switched on, and scores of a usual size. Linear
    attention has but stages after the product to switch off."""
    off: dict[str, Any] = {"heads": Integer(1), "active": None, "patch": None}
    if isinstance(spec, SoftmaxSpec):
        off |= {"scale": Float(max(1, head_dim) ** -0.5), "score": sym.s, "mask": sympy.true}
        off |= {"masked": "zero", "sink": None, "dropout": 0.0}
        off |= {"route": None, "edit": None, "local": None}
    return cast(Spec, replace(cast(Any, spec), **off)).without_unused()


def grown(start: Spec, end: Spec) -> Iterator[tuple[Stage, Spec]]:
    """From one spec to the other, one stage after another; stages that change nothing are left
    out. Between two families there is one step."""
    start, end = without_dropout(start), without_dropout(end)
    if start.family != end.family:
        yield "family", end
        return
    union = {t.name: t for t in (*start.tensors, *end.tensors)}
    sizes = tuple(dict.fromkeys((*start.sizes, *end.sizes)))
    both: dict[str, Any] = {"tensors": tuple(union.values()), "sizes": sizes}
    here = cast(Any, replace(cast(Any, start), **both))
    for stage, names in _FIELDS if isinstance(start, SoftmaxSpec) else _LINEAR_FIELDS:
        there = replace(here, **{n: getattr(end, n) for n in names})
        if there != here:
            yield stage, there.without_unused()
        here = there
