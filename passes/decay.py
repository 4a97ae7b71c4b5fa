"""Decays of linear attention that do not depend on the data: a slope for each head, a factor for
each layer.

The state is multiplied by `exp(-slope)` at every key. The rules are those of released models and
of papers; checkpoints of one are wrong under any other, so a rule is always asked for by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import sympy
from sympy import Expr, Float, Integer

from rewriter import symbols as sym
from rewriter.errors import Declined

__all__ = ["RULES", "decay_of"]

RULES = ("tnl", "minimax", "paper", "retnet", "supra")
"""`tnl`: the released models of arXiv 2405.17381, slopes of ALiBi (arXiv 2108.12409) times
`1 - l / (L - 1) + 1e-5`. `minimax`: arXiv 2501.08313, `2^(-8 (h + 1) / H)` for every H, times
`1 - l / (L - 1 + 1e-5) + 1e-5`. `paper`: equation 10 of arXiv 2405.17381, `8 h / H · (1 - l / L)`.
`retnet`: arXiv 2307.08621, `-ln(1 - 2^(-5 - h))` in every layer. `supra`: arXiv 2405.06640, slopes
of ALiBi in every layer. Heads h and layers l count from 0."""

_OF_LAYERS = ("tnl", "minimax", "paper")
_OF_HEADS = ("tnl", "minimax", "paper", "supra")


def decay_of(rule: str | None, heads: int, layer: int | None, layers: int) -> Expr:
    """The logarithm of the decay, in h; 0 without a rule.

    Args:
        rule: one of `RULES`, or None.
        heads: query heads of the site; 0 if unknown.
        layer: of the site, from 0; None if unknown.
        layers: of the model; 0 if unknown.

    Raises:
        Declined: something that the rule needs is not known, or `tnl` in a model of one layer.
    """
    if rule is None:
        return Integer(0)
    if rule in _OF_HEADS and not heads:
        raise Declined(f"the rule {rule} needs the number of heads, which is not known here")
    factor = _layer_factor(rule, layer, layers) if rule in _OF_LAYERS else 1.0
    slopes: dict[str, Callable[[int], Expr]] = {
        "tnl": _alibi,
        "supra": _alibi,
        "minimax": lambda count: _power_of_two(Float(-8 / count) * (sym.h + 1)),
        "paper": lambda count: Float(8 / count) * sym.h,
        "retnet": lambda count: -sympy.log(1 - _power_of_two(-5 - sym.h)),
    }
    return cast(Expr, Float(-factor) * slopes[rule](heads))


def _power_of_two(exponent: Expr) -> Expr:
    return cast(Expr, sympy.exp(Float(math.log(2)) * exponent))


def _alibi(heads: int) -> Expr:
    """`2^(-8 (h + 1) / P)` for the first P heads, P the largest power of two; for the others every
    second slope that 2 P heads would have."""
    count = 2 ** (heads.bit_length() - 1)
    first = _power_of_two(Float(-8 / count) * (sym.h + 1))
    if count == heads:
        return first
    rest = _power_of_two(Float(-4 / count) * (2 * (sym.h - count) + 1))
    return cast(Expr, sym.Where(sym.h < count, first, rest))


def _layer_factor(rule: str, layer: int | None, layers: int) -> float:
    if layer is None or not layers:
        raise Declined(
            f"the rule {rule} needs the layer and the number of layers, which are not known here;"
            " retnet and supra do without"
        )
    if rule == "tnl":
        if layers == 1:
            raise Declined("the rule tnl divides by the number of layers less 1, and there is 1")
        return 1 - layer / (layers - 1) + 1e-5
    if rule == "minimax":
        return 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return 1 - layer / layers
