"""What a mutant is: a realistic mistake, small, with a name and the check that is to see it.

The files beside this one hold the mistakes, by where they are made; `seams.py` says how each kind
meets the harness, and `run.py` prints who caught what. No mutant has a check of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["KINDS", "Kind", "Mutant", "catalogue"]

Kind = Literal[
    "spec",
    "pass",
    "lowering",
    "gradient",
    "lift",
    "graph",
    "round trip",
    "form",
    "generation",
    "memory",
]
KINDS: tuple[Kind, ...] = (
    "spec",
    "pass",
    "lowering",
    "gradient",
    "lift",
    "graph",
    "round trip",
    "form",
    "generation",
    "memory",
)


@dataclass(frozen=True)
class Mutant:
    """One wrong rewrite."""

    name: str
    kind: Kind
    breaks: str
    """What is wrong, or where the mistake was seen."""
    expected: str
    """Words of the name of the check that has to catch it."""
    made: Any
    """What its seam takes: an edit of specs, a Pass, a Lowering, a patch, a form, a decoder."""


def catalogue() -> tuple[Mutant, ...]:
    """All mutants, in the order of their kinds."""
    from mutants import (
        decoders,
        executors,
        forms,
        gradients,
        graphs,
        lifts,
        lowerings,
        memories,
        passes,
        round_trips,
        specs,
    )

    modules: tuple[Any, ...] = (specs, passes, lowerings, executors, gradients, lifts, graphs)
    modules += (round_trips, forms, decoders, memories)
    return tuple(m for module in modules for m in module.MUTANTS)
