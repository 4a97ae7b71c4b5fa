"""What a pass promises of the specs that it makes: implementations, laws, decoding, a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from rewriter.lowering import BLOCKED, LOWERINGS, REFERENCE, TRITON
from rewriter.passbase import Pattern, Request
from rewriter.reference import reference
from rewriter.testing import laws
from rewriter.testing.agreement import run
from rewriter.testing.cases import Case, Dims
from rewriter.testing.conformance import decode_equals_parallel, dynamic_shapes, spec_rows
from rewriter.testing.grid import DECODING
from rewriter.testing.onnx_runtime import ONNX
from rewriter.testing.operands import Operands, operands
from rewriter.testing.outcome import Outcome
from rewriter.testing.subject import Subject, Trial, rewritten
from rewriter.testing.worker import interpreted
from rewriter.verify.growing import without_dropout

__all__ = ["implementation_rows", "law_rows"]


def implementation_rows(trials: Sequence[Trial], *, full: bool = False) -> Iterator[Outcome]:
    """Every implementation computes the new specs as the reference does, with gradients; at sizes
    that follow each other as well."""
    found = {t.after.text: t for t in trials if without_dropout(t.case.spec) == t.case.spec}
    cases = [t.after for t in found.values()]
    for lowering in LOWERINGS:
        if lowering not in (TRITON, REFERENCE):  # the one runs elsewhere, the other is the judge
            yield from _named(lowering.name, spec_rows(lowering, cases))
    some = cases[:: max(1, len(cases) // (60 if full else 5))]
    if torch.cuda.is_available():
        yield from _named("triton", spec_rows(TRITON, [replace(c, device="cuda") for c in some]))
    else:
        yield from _named("triton", interpreted(some))
    one = {t.after.spec: t.after for t in found.values() if t.case.name in ("plain", "causal")}
    some = list(one.values())[0 if full else -1 :]  # seconds for each spec
    yield from _named("onnx", spec_rows(ONNX, some, gradients=False))
    for trial in found.values():
        square = trial.case.dims.q_len == trial.case.dims.kv_len
        if square and (full or trial.case.name in ("plain", "causal")):
            yield dynamic_shapes(BLOCKED, trial.after)


def _named(lowering: str, rows: Iterable[Outcome]) -> Iterator[Outcome]:
    for row in rows:
        yield replace(row, check=f"{lowering}, {row.check}")


# --- laws -----------------------------------------------------------------------------------------

_DIMS = Dims(batch=3, heads=4, kv_heads=2, q_len=9, kv_len=9)
_CAUSAL = ("causal", "soft cap", "alibi", "sink", "window")


def law_rows(subject: Subject, *, full: bool = False) -> Iterator[Outcome]:
    """The laws that the pass claims, on plain and causal attention; causality always."""
    claimed = subject.kind.laws
    for request in subject.examples or subject.requests:
        for pattern in subject.patterns:
            for name in _CAUSAL if pattern == "causal self" else _plain(pattern):
                case = replace(Case.of(name, _DIMS), dtype=torch.float64)
                trial = rewritten(request, pattern, case)
                if trial.new is not None and trial.new.family == "linear":  # its sums have a floor
                    trial = replace(trial, case=replace(case, dtype=torch.float32))
                if trial.new is None:
                    yield Outcome("laws", trial.text, "skipped", trial.reason)
                    continue
                for law in _laws_for(name, pattern, claimed):
                    yield _obeys(law, trial)
        if "causal self" in subject.patterns:
            yield from _decoding(request, claimed, DECODING if full else _FEW_DECODING)


def _plain(pattern: Pattern) -> tuple[str, ...]:
    return ("causal",) if pattern.startswith("causal") else ("plain",)


def _laws_for(name: str, pattern: Pattern, claimed: Sequence[str]) -> list[str]:
    """Causality, and what is claimed and holds for plain attention of this kind."""
    if pattern.startswith("noncausal"):
        return [x for x in claimed if x in laws.LAWS and x not in laws.CAUSAL_LAWS]
    if name != "causal":
        return ["future"]
    other = (*laws.UNORDERED_LAWS, "future")
    return ["future", *(x for x in claimed if x in laws.LAWS and x not in other)]


def _obeys(law: str, trial: Trial) -> Outcome:
    """The law, of the function that the new spec means."""
    case = replace(trial.after, name=f"{trial.request.text}, {trial.pattern}, {trial.case.name}")
    x = operands(case)

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return run(reference, case.spec, Operands(q, k, v, x.tensors, x.sizes))

    try:
        return laws.LAWS[law](f, case)
    except Exception as error:
        return Outcome(f"law: {law}", case.text, "failed", f"{type(error).__name__}: {error}")


_FEW_DECODING = ("causal", "causal padding", "alibi", "sink")


def _decoding(request: Request, claimed: Sequence[str], names: Sequence[str]) -> Iterator[Outcome]:
    """Steps of decoding by the new specs, in two implementations."""
    check = "decode = parallel"
    if claimed and "decode" not in claimed:
        yield Outcome(check, request.text, "skipped", "the pass does not claim it")
        return
    for name in names:
        for ahead in (0, 4):
            case = Case.of(name, Dims(q_len=7, kv_len=7 + ahead))
            trial = rewritten(request, "causal self", case)
            if trial.new is None:
                yield Outcome(check, trial.text, "skipped", trial.reason)
                continue
            for lowering in (REFERENCE, BLOCKED):
                row = decode_equals_parallel(lowering, trial.after)
                yield replace(row, case=f"{lowering.name}, {row.case}")
