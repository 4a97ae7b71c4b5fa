"""What a pass computes, against what its definition says of dense weights.

The identity shows nothing of what a pass does at another setting, and the laws little: a window of
w + 1 keys obeys them all. So a pass says its definition a second time, as a function of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.passbase import Pass, Pattern
from rewriter.reference import reference, reference_weights
from rewriter.testing.agreement import Row, judged, run
from rewriter.testing.cases import Case, Dims
from rewriter.testing.operands import Operands, operands
from rewriter.testing.outcome import Outcome
from rewriter.testing.subject import Subject, Trial, rewritten
from rewriter.verify.compare import baseline_of

__all__ = ["meaning_rows"]

_LENGTHS = ((9, 9), (5, 9), (1, 9))


def meaning_rows(subject: Subject) -> Iterator[Outcome]:
    """Every example computes what `Pass.meaning` makes of the weights that there were."""
    if subject.kind.meaning is Pass.meaning:
        text = f"NOT DECLARED: {subject.kind.name} has no `meaning`"
        reason = f"{text}; what it computes at other settings than the identity is not checked"
        yield Outcome("meaning", "all examples", "skipped", reason)
        return
    for request in subject.examples:
        for pattern in subject.patterns:
            for case in _cases(pattern):
                trial = rewritten(request, pattern, case)
                if trial.new is None:
                    yield Outcome("meaning", trial.text, "skipped", trial.reason)
                else:
                    yield _agrees(trial)


def _cases(pattern: Pattern) -> Iterator[Case]:
    """Attentions without a sink or a gate, whose last query stands at the last key."""
    names = ("causal", "causal padding") if pattern.startswith("causal") else ("plain", "padding")
    for name in names:
        for q_len, kv_len in _LENGTHS:
            yield Case.of(name, Dims(q_len=q_len, kv_len=kv_len))


def _agrees(trial: Trial) -> Outcome:
    x = operands(trial.case)
    try:
        with torch.no_grad():
            ref, gold = (_meant(trial, y) for y in (x, x.map(Tensor.double)))
            new = run(reference, trial.after.spec, x)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return Outcome("meaning", trial.text, "failed", reason)
    row = Row("the output", "output", baseline_of(ref, gold), new, trial.case.dtype)
    return judged("meaning", trial.text, [row])


def _meant(trial: Trial, x: Operands) -> Tensor:
    spec = replace(trial.case.softmax, dropout=0.0)
    weights = reference_weights(spec, x.q, x.k, x.tensors, x.sizes)
    meant = trial.request.action.meaning(weights)
    return meant @ x.v.repeat_interleave(weights.shape[1] // x.v.shape[1], dim=1)
