"""Exact fusion: the same function, computed without the matrix of weights.

Online softmax: Milakov and Gimelshein (arXiv 1805.02867); tiles: FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewriter.errors import Declined
from rewriter.passbase import PATTERNS, Pass, option
from rewriter.spec import SoftmaxSpec

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.sites import Site


@dataclass(frozen=True)
class Fuse(Pass):
    """The site computes what it computed before, by the best implementation for the device.

    Contract: exact; every setting is the identity. Patterns: all.
    Declines when: dropout is active and `dropout` is off: other code draws other random numbers.
    """

    name = "fuse"
    contract = "exact"
    stage = "none"
    identity = "fuse"
    patterns = PATTERNS
    laws = (
        "future",
        "past",
        "decode",
        "queries",
        "keys",
        "batch",
        "heads",
        "row sums",
        "values",
        "shift",
    )
    examples = ("fuse(from_scores=0)", "fuse(dropout=True)")
    from_scores: int | None = option(
        "scores (queries x keys) of one head from which the fused form is used; below, the "
        "original code runs; None takes the measured default",
        default=None,
        at_least=0,
    )
    dropout: bool = option(
        "also fuse sites whose dropout is active, which changes the random stream", default=False
    )

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if spec.dropout and not self.dropout:
            raise Declined(
                f"dropout of {spec.dropout:g} is active; fused code draws other random numbers: "
                "ask for fuse(dropout=True), or call model.eval()"
            )
        return spec

    def meaning(self, weights: Tensor) -> Tensor:
        return weights
