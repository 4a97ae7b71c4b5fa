"""What a model is compared with: runs of the original, in its own dtype and in a wider one.

`reference_runs` is for a model whose function a pass changed on purpose. Sites that such a pass
changes are computed by the dense reference of their new formula, everything else by the model's own
code. So a wrong kernel, a wrong operand or a wrong place is still seen, and that the formula is
another one is not.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from rewriter.capture import uncompiled
from rewriter.errors import InputError, RewriterError
from rewriter.isolation import kept_buffers, precise
from rewriter.optimize import reinstalled
from rewriter.passbase import Request
from rewriter.verify.call import Call, Run, one_line
from rewriter.verify.judge import same_structure
from rewriter.watch import Watched

__all__ = ["HALF", "Expected", "original_runs", "reference_runs"]

HALF = (torch.float16, torch.bfloat16)


@dataclass
class Expected:
    """Two runs of the original."""

    ref: Run
    """In its own dtype."""
    gold: Run | None
    """In a wider one; None where only the original itself runs."""
    gold_dtype: torch.dtype
    described: str
    """What gold is, in words."""


def original_runs(
    original: nn.Module, call: Call, dtype: torch.dtype, notes: list[str]
) -> Expected:
    """Gold and the original itself.

    Args:
        original: runs without what `optimize` or `compile` put on it.
        call: the arguments.
        dtype: the coarsest dtype that the original computes in.
        notes: gets what weakens the result.

    Raises:
        InputError: if the original cannot be run.
    """
    gold, gold_dtype = _gold(original, call, dtype, notes)
    try:
        with uncompiled(original):
            ref = call.run(original)
    except Exception as error:
        raise InputError(
            f"the original cannot be run on these inputs: {one_line(error)}; check `inputs`"
        ) from error
    if gold is not None and not same_structure(gold, ref):
        notes.append(
            f"the {_name(gold_dtype)} run of the original returns other shapes than the original"
        )
        gold = None
    described = "the original itself" if gold is None else f"the original in {_name(gold_dtype)}"
    return Expected(ref, gold, gold_dtype, described)


def _gold(
    original: nn.Module, call: Call, dtype: torch.dtype, notes: list[str]
) -> tuple[Run | None, torch.dtype]:
    """The most precise run of the original that works, and its dtype; None where only the original
    itself runs."""
    for wide in (torch.float64, torch.float32) if dtype in HALF else (torch.float64,):
        try:
            with precise(wide):
                twin = copy.deepcopy(original)
                twin = twin.double() if wide == torch.float64 else twin.float()
                with uncompiled(twin):
                    return call.run(twin, wide), wide
        except Exception as error:
            notes.append(f"the original does not run in {_name(wide)}: {one_line(error)}")
    notes.append(
        "gold is the original in its own dtype: its rounding is not known, so the bound is the "
        "floor alone, taken wider than usual"
    )
    return None, dtype


@dataclass
class _Definition:
    """Runs each graph by the code that defines what is right, in its own dtype or in float64."""

    wide: bool = False
    keep_wide: bool = True
    """The result of a wide run stays float64; where several graphs run, it goes back to the dtype
    that the next one was captured for."""
    runs: list[Watched] = field(default_factory=list)
    """Of the narrow run; also keeps their ids in use."""
    dtypes: dict[int, list[Any]] = field(default_factory=dict)

    def __call__(self, w: Watched, args: Sequence[Any]) -> Any:
        if not self.wide:
            self.runs.append(w)
            result = w.base.run(args)[0]
            leaves = _pytree.tree_leaves(result)
            self.dtypes[id(w)] = [x.dtype if isinstance(x, Tensor) else None for x in leaves]
            return result
        with precise(torch.float64):
            result = w.double().run([_widened(x) for x in args])[0]
        if self.keep_wide:
            return result
        leaves, form = _pytree.tree_flatten(result)
        cast = zip(leaves, self.dtypes[id(w)], strict=True)
        return _pytree.tree_unflatten([x if d is None else x.to(d) for x, d in cast], form)


def reference_runs(
    original: nn.Module,
    call: Call,
    requests: Sequence[Request],
    notes: list[str],
    only: Collection[str] | None = None,
) -> Expected:
    """Gold and the original, both with what the requests change on purpose.

    Args:
        original: runs without what `optimize` or `compile` put on it.
        call: the arguments.
        requests: what the model under test was optimized with.
        notes: gets what weakens the result.
        only: names of the sites that the requests are for; None for all.

    Raises:
        InputError: if the original cannot be run.
    """
    definition = _Definition()
    described = "the original with the same passes"
    with (
        uncompiled(original),
        reinstalled(
            original, requests=requests, target="reference", only=only, watcher=definition
        ) as report,
    ):
        try:
            with kept_buffers(original):
                ref = call.run(original)
        except RewriterError:
            raise
        except Exception as error:
            raise InputError(
                f"the original cannot be run with {'; '.join(r.text for r in requests)}: "
                f"{one_line(error)}"
            ) from error
        if not definition.runs:
            raise InputError(
                "torch captured no graph of the original, so it cannot be run with the requests of "
                f"the model; {'; '.join(report().notes) or 'compare with against=`original`'}"
            )
        definition.wide, definition.keep_wide = True, len(definition.runs) == 1
        try:
            with kept_buffers(original):
                gold = call.run(original)
        except Exception as error:
            notes.append(f"the original does not run in float64: {one_line(error)}")
            return Expected(ref, None, torch.float64, described)
    if not same_structure(gold, ref):
        notes.append("the float64 run of the original returns other shapes than the original")
        return Expected(ref, None, torch.float64, described)
    if not definition.keep_wide:
        notes.append("gold is float64 inside each graph, and rounded between graphs")
    return Expected(ref, gold, torch.float64, f"{described} in float64")


def _widened(x: Any) -> Any:
    """An input in float64, with its gradient going back to the narrow one; others are copied,
    because a graph may write into them."""
    if not isinstance(x, Tensor):
        return x
    if x.is_floating_point() and x.dtype != torch.float64:
        return x.double()
    return x.clone()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
