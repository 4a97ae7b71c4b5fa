"""Where a formula is not what the model computes: which stage of it was read wrongly.

Of the model only the output of the site is known, so the stages are tried: a change of one stage
that makes the formula agree with the model names the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import sympy
import torch
from sympy import Expr, Float
from sympy.logic.boolalg import Boolean
from torch import Tensor

from rewriter import symbols as sym
from rewriter.spec import MASKED, SoftmaxSpec
from rewriter.verify.growing import Stage
from rewriter.verify.stages import Operands, compared, factors, run, unmasked_rows

__all__ = ["Seen", "misread_stage"]


@dataclass(frozen=True)
class Seen:
    """One computation of a site by the model's own code, in float64 and in the model's dtype."""

    operands: Operands
    """In float64."""
    gold: Tensor
    """`[B, H, L, Dv]`, float64."""
    ref: Tensor
    """The same in the dtype of the model."""

    def against(self, out: Tensor, rows: Tensor | None = None) -> str:
        """How an output differs from the model's; `""` if it does not."""
        found = {"gold": self.gold, "ref": self.ref, "new": out.to(self.ref.dtype)}
        if rows is not None:
            if not bool(rows.any()):
                return ""
            found = {n: x[rows] for n, x in found.items()}
        (row,) = compared(*({"out": found[n]} for n in ("gold", "ref", "new")))
        return row.reason


def misread_stage(spec: SoftmaxSpec, seen: Seen) -> tuple[Stage, str] | None:
    """The stage in which the formula is not what the model computes, and how; None if the two
    agree."""
    mine = run(spec, seen.operands)
    whole = seen.against(mine)
    if not whole:
        return None
    rows = unmasked_rows(spec, seen.operands)
    if not bool(rows.all()) and not seen.against(mine, rows):
        return "normaliser", f"rows that see no key differ: {whole}"
    factor = _row_factors(mine, seen)
    if factor is not None:
        return factor[0], f"{factor[1]}; {whole}"
    tried: list[tuple[float, Stage, str]] = []
    for stage, words, changed, operands in _changes(spec, seen.operands):
        try:
            out = run(changed, operands)
        except (RuntimeError, IndexError):
            continue
        if not seen.against(out):
            return stage, f"it agrees with the model {words}; {whole}"
        error = float((out - seen.gold).abs().nan_to_num(torch.inf).mean())
        tried.append((error, stage, words))
    error, stage, words = min(tried, key=lambda x: x[0])
    return stage, f"no change of one stage explains it; nearest comes the formula {words}; {whole}"


def _row_factors(mine: Tensor, seen: Seen) -> tuple[Stage, str] | None:
    """Every row of the model is a multiple of ours: the weights are right up to a factor."""
    if mine.shape[-1] < 2 or not bool(mine.isfinite().all() and seen.gold.isfinite().all()):
        return None
    square = (mine * mine).sum(-1, keepdim=True)
    factor = (mine * seen.gold).sum(-1, keepdim=True) / square.clamp_min(1e-300)
    if seen.against(factor * mine):
        return None
    live = square > 0  # a row that sees no key may be 0, and has no factor
    if not bool(live.any((0, 2, 3)).all()):
        return None
    high = factor.masked_fill(~live, -torch.inf).amax((0, 2, 3))
    low = factor.masked_fill(~live, torch.inf).amin((0, 2, 3))
    if bool((high - low <= 1e-3 * torch.maximum(high.abs(), low.abs())).all()):
        return "heads", f"the heads are {', '.join(f'{x:.3g}' for x in high[:8])} times ours"
    return (
        "normaliser",
        f"the rows are {float(low.min()):.3g} to {float(high.max()):.3g} times ours",
    )


Change = tuple[Stage, str, SoftmaxSpec, Operands]


def _changes(spec: SoftmaxSpec, operands: Operands) -> Iterator[Change]:
    """Formulas and operands that differ in one stage, with words for the difference."""
    for words, moved in _moved(operands):
        yield "operands", words, spec, moved
    for factor in factors(operands):
        yield (
            "score",
            f"with scores {factor:.4g} times as large",
            replace(spec, scale=spec.scale * Float(factor)),
            operands,
        )
    for words, score in _scores(spec.score):
        yield "score", words, replace(spec, score=score), operands
    for words, mask in _masks(spec.mask):
        yield "mask", words, replace(spec, mask=mask), operands
    for masked in MASKED:
        if masked != spec.masked:
            yield "normaliser", f"with masked={masked!r}", replace(spec, masked=masked), operands
    if spec.sink is not None:
        yield "normaliser", "without the sink", replace(spec, sink=None), operands
    yield "heads", "without a factor of the heads", replace(spec, heads=sympy.Integer(1)), operands


def _moved(operands: Operands) -> Iterator[tuple[str, Operands]]:
    q, k, v = operands.q, operands.k, operands.v
    if k.shape == v.shape:
        yield "with keys and values exchanged", replace(operands, k=v, v=k)
        yield "with the keys as values", replace(operands, v=k)
        yield "with the values as keys", replace(operands, k=v)
    if q.shape == k.shape:
        yield "with queries and keys exchanged", replace(operands, q=k, k=q)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and k.shape[1] > 1:
        spread: Callable[[Tensor], Tensor] = lambda x: x.repeat(1, groups, 1, 1)  # noqa: E731
        yield "with interleaved groups of heads", replace(operands, k=spread(k), v=spread(v))
    if k.shape[1] > 1:
        yield "with the key heads in reverse", replace(operands, k=k.flip(1), v=v.flip(1))


def _scores(score: Expr) -> Iterator[tuple[str, Expr]]:
    if score != sym.s:
        yield "with plain scores", sym.s
    for term in sympy.Add.make_args(score):
        if term != score and term != sym.s:
            yield f"without {sym.formula_text(term)}", cast(Expr, score - term)
            yield f"with {sym.formula_text(term)} doubled", cast(Expr, score + term)


def _masks(mask: Boolean) -> Iterator[tuple[str, Boolean]]:
    yield "without a mask", cast(Boolean, sympy.true)
    yield "with a causal mask too", cast(Boolean, mask & (sym.k <= sym.q))
    for by in (1, -1):
        yield f"with the mask moved by {by} keys", cast(Boolean, mask.subs(sym.k, sym.k + by))
    terms = sympy.And.make_args(mask)
    for term in terms if len(terms) > 1 else ():
        rest = sympy.And(*(t for t in terms if t != term))
        yield f"without {sym.formula_text(term)} in the mask", cast(Boolean, rest)
