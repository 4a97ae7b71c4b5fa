"""`verify`: run gold, the original and the model one after another, and compare."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rewriter.errors import InputError, RewriterError
from rewriter.verify.call import Call, Run
from rewriter.verify.generation import token_agreement
from rewriter.verify.isolation import is_compiled, plain_calls, precise
from rewriter.verify.judge import Judge, same_structure
from rewriter.verify.report import VerifyReport, VerifyRow

__all__ = ["verify"]

_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALF, torch.float32, torch.float64)


def verify(
    original: nn.Module,
    model: nn.Module,
    inputs: Any,
    *,
    gradients: bool = True,
    raises: bool = True,
    seed: int = 0,
    generate: int | None = None,
) -> VerifyReport:
    """Compare each output and gradient of `model` with the original's by the error-ratio rule.

    Both run in eval mode (no dropout), from the same random seed; mode,
    random state, default dtype and `.grad` fields are afterwards as before. The rule stands in
    `rewriter.verify.compare`. A half type hides what is smaller than its rounding: to judge a
    rewrite, compare in float32 as well.

    Args:
        original: the model that defines what is right. It runs without what `optimize` or `compile`
            put on it, so it may be the same object as `model`.
        model: the model under test.
        inputs: a mapping of keyword arguments, a tuple of arguments, or one tensor.
        gradients: also compare the gradients of all parameters and floating inputs, for one random
            cotangent.
        raises: raise if the models differ; else the report says it.
        seed: of the cotangents, and of what the models draw.
        generate: also compare this many greedy tokens (`token_agreement`).

    Raises:
        InputError: if the original cannot be run on `inputs`.
        NotEquivalent: if the models differ and `raises` is set; it carries the report.
    """
    call = Call.of(inputs, seed, gradients)
    dtype = _coarsest_dtype(original, call)
    notes: list[str] = []
    gold, gold_dtype = _gold(original, call, dtype, notes)
    try:
        with plain_calls(original):
            ref = call.run(original)
    except Exception as error:
        raise InputError(
            f"the original cannot be run on these inputs: {_line(error)}; check `inputs`"
        ) from error
    if gold is not None and not same_structure(gold, ref):
        notes.append(
            f"the {_name(gold_dtype)} run of the original returns other shapes than the original"
        )
        gold = None
    described = "the original itself" if gold is None else f"the original in {_name(gold_dtype)}"
    judge = Judge.of(ref, gold, gold_dtype, dtype)
    del gold, ref
    rows, new = _rows(model, call, judge)
    notes += [*judge.notes(new), *_warnings(original, model, call, rows)]
    del new
    tokens = (
        None
        if generate is None
        else token_agreement(original, model, inputs, new_tokens=generate, seed=seed)
    )
    report = VerifyReport(tuple(rows), described, tuple(notes), tokens)
    if raises:
        report.raise_if_failed()
    return report


def _gold(
    original: nn.Module, call: Call, dtype: torch.dtype, notes: list[str]
) -> tuple[Run | None, torch.dtype]:
    """The most precise run of the original that works, and its dtype; None where only the original
    itself runs."""
    for wide in (torch.float64, torch.float32) if dtype in _HALF else (torch.float64,):
        try:
            with precise(wide):
                twin = copy.deepcopy(original)
                twin = twin.double() if wide == torch.float64 else twin.float()
                with plain_calls(twin):
                    return call.run(twin, wide), wide
        except Exception as error:
            notes.append(f"the original does not run in {_name(wide)}: {_line(error)}")
    notes.append(
        "gold is the original in its own dtype: its rounding is not known, so the bound is the "
        "floor alone, taken wider than usual"
    )
    return None, dtype


def _rows(model: nn.Module, call: Call, judge: Judge) -> tuple[list[VerifyRow], Run | None]:
    try:
        new = call.run(model)
    except RewriterError:
        raise  # said on purpose, and better than a row could
    except Exception as error:
        reason = f"the original runs, the model raises {_line(error)}; call the model to see where"
        return [VerifyRow("(call)", "output", "", False, reason)], None
    return judge.rows(new), new


def _warnings(
    original: nn.Module, model: nn.Module, call: Call, rows: list[VerifyRow]
) -> list[str]:
    found = []
    if original is model and not any(is_compiled(m) for m in model.modules()):
        found.append(
            "original and model are one object on which nothing is installed: it was compared "
            "with itself"
        )
    if call.gradients and not any(row.kind == "gradient" for row in rows):
        found.append(
            "no gradient was compared: no trainable parameter and no floating input acts on the "
            "outputs"
        )
    return found


def _coarsest_dtype(original: nn.Module, call: Call) -> torch.dtype:
    """The dtype with the largest rounding among parameters (inputs, if there are none) and active
    autocast."""
    tensors: list[torch.Tensor] = [p for p in original.parameters() if p.dtype in _FLOATS]
    tensors = tensors or [t for t in call.tensors.values() if t.dtype in _FLOATS]
    dtypes = {t.dtype for t in tensors} or {torch.get_default_dtype()}
    for device in {t.device.type for t in tensors}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _line(error: Exception) -> str:
    """`ValueError: what happened`, one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
