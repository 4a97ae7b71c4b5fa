"""`verify`: run gold, the original and the model one after another, and compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import nn

from rewriter.additions import lent
from rewriter.errors import InputError, RewriterError
from rewriter.isolation import is_compiled
from rewriter.optimize import report_of, requests_of, target_of
from rewriter.verify.against import original_runs, reference_runs
from rewriter.verify.call import Call, Run, coarsest_dtype, one_line
from rewriter.verify.environment import environment_of
from rewriter.verify.generation import token_agreement
from rewriter.verify.judge import Judge
from rewriter.verify.memory import SiteMeter, memory_of
from rewriter.verify.report import VerifyReport
from rewriter.verify.rows import VerifyRow
from rewriter.verify.sites import Sites, compare_sites
from rewriter.verify.structure import Structure

__all__ = ["verify"]

Against = Literal["original", "reference"]


def verify(
    original: nn.Module,
    model: nn.Module,
    inputs: Any,
    *,
    gradients: bool = True,
    raises: bool = True,
    seed: int = 0,
    generate: int | None = None,
    sites: bool | None = None,
    against: Against = "original",
    memory: bool = False,
) -> VerifyReport:
    """Compare each output, site and gradient of `model` with the original's by the error-ratio
    rule.

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
        sites: also compare each attention site with the model's own code, for one more capture.
            True fails where no rewritten site could be compared; None, if `optimize` returned the
            model, says so in a note.
        against: `"reference"` compares with the original in which the passes that the model was
            optimized with are applied by the dense reference: for passes that change the function
            on purpose. Sites are compared in this way always, and `generate` never.
        memory: also measure what a call and each site allocate; a site that makes its matrix of
            scores fails. A site is judged from 2^21 scores over batch and heads (2^28 on CUDA), and
            from queries and keys that are each 8 times its head dimension; none judged fails.

    Raises:
        InputError: if the original cannot be run on `inputs`, if `sites`, `memory` or
            `against="reference"` is asked for a model that `optimize` did not return, or
            `generate` with `against="reference"`.
        NotEquivalent: if the models differ and `raises` is set; it carries the report.
    """
    call = Call.of(inputs, seed, gradients)
    ours = bool(requests_of(model))
    _check_asked(ours, model, sites=sites, against=against, memory=memory)
    if against == "reference" and generate is not None:
        raise InputError(
            'generate compares with the text of the original: leave out against="reference"'
        )
    dtype = coarsest_dtype(original, call.tensors.values())
    notes: list[str] = []
    if against == "original":
        expected = original_runs(original, call, dtype, notes)
    else:
        with lent(model, original):
            expected = reference_runs(original, call, requests_of(model), notes)
    described = expected.described
    judge = Judge.of(expected.ref, expected.gold, expected.gold_dtype, dtype)
    del expected
    rows, new = _rows(model, call, judge)
    notes += [*judge.notes(new), *_warnings(original, model, call, rows)]
    ran = new is not None
    del new
    meter = SiteMeter(target_of(model)) if memory else None
    seen = None
    if ran and (memory or (ours if sites is None else sites)):
        coarsest = coarsest_dtype(model, call.tensors.values())
        seen = compare_sites(model, call, coarsest, look=meter)
        rows = _with_sites(rows, seen, asked=bool(sites))
        notes += [note for note in seen.notes if note not in notes]
    elif sites is None and not ours:
        notes.append("sites were not compared: `rewriter.optimize` did not return this model")
    tokens = (
        None
        if generate is None
        else token_agreement(original, model, inputs, new_tokens=generate, seed=seed)
    )
    report = VerifyReport(
        tuple(rows),
        described,
        tuple(notes),
        tokens,
        structure=_structure(model, seen),
        memory=memory_of(original, model, call, meter) if ran and meter is not None else None,
        attention=report_of(model) if seen is None else seen.report,
        environment=environment_of([*original.parameters(), *call.tensors.values()], dtype, seed),
    )
    if raises:
        report.raise_if_failed()
    return report


def _check_asked(
    ours: bool, model: nn.Module, *, sites: bool | None, against: Against, memory: bool
) -> None:
    if against not in ("original", "reference"):
        raise InputError(f'against is "original" or "reference", got {against!r}')
    asked = {"sites=True": bool(sites), "memory=True": memory}
    asked['against="reference"'] = against == "reference"
    name = next((name for name, wanted in asked.items() if wanted), None)
    if name is not None and not ours:
        raise InputError(
            f"{name}: this {type(model).__name__} was not optimized by rewriter, so it has no "
            f"sites that are known; call rewriter.optimize(model, ...) first, or leave out {name}"
        )


def _rows(model: nn.Module, call: Call, judge: Judge) -> tuple[list[VerifyRow], Run | None]:
    try:
        new = call.run(model)
    except RewriterError:
        raise  # said on purpose, and better than a row could
    except Exception as error:
        what = f"the original runs, the model raises {one_line(error)}"
        return [
            VerifyRow("(call)", "output", "", False, f"{what}; call the model to see where")
        ], None
    return judge.rows(new), new


def _with_sites(rows: list[VerifyRow], seen: Sites, *, asked: bool) -> list[VerifyRow]:
    """Outputs, sites, gradients. Where sites are asked for and no new code was compared, or not all
    of the call, that is a failure."""
    sites = list(seen.rows)
    reason = seen.failed
    why = "; ".join(seen.notes) or "the model has no attention that was found"
    if not any(row.count or not row.ok for row in sites):
        reason = f"no attention site was compared: {why}"
        if not asked:
            seen.notes[:] = [reason]
    elif not reason and not seen.compared_new:
        reason = f"no rewritten attention site was compared: {why}"
    if asked and reason:
        sites.append(VerifyRow("(sites)", "site", "", False, reason))
    outputs = [row for row in rows if row.kind == "output"]
    return [*outputs, *sites, *(row for row in rows if row.kind != "output")]


def _structure(model: nn.Module, seen: Sites | None) -> Structure | None:
    """Of the call that was compared; recompilations since the model was optimized."""
    own = report_of(model)
    if seen is not None:
        return replace(seen.structure, recompiles=own.recompiles)
    return Structure.of(own) if own.graphs else None


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
