"""`check`: every promise of a pass, checked on specs, on every implementation, and in a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.families import from_dict, from_json
from rewriter.passbase import PATTERNS, Pass, Pattern, Request, parse_request
from rewriter.reference import reference
from rewriter.selectors import Selector
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.testing.agreement import Row, gradients, judged, run
from rewriter.testing.cases import Case
from rewriter.testing.laws import tolerance
from rewriter.testing.meaning import meaning_rows
from rewriter.testing.operands import operands
from rewriter.testing.outcome import Outcome, Outcomes, Verdict
from rewriter.testing.promises import implementation_rows, law_rows
from rewriter.testing.small import model_rows
from rewriter.testing.subject import (
    Subject,
    Trial,
    function_cases,
    pattern_cases,
    rewritten,
)
from rewriter.verify.compare import baseline_of
from rewriter.verify.growing import without_dropout

__all__ = ["check", "pass_rows"]


def check(what: type[Pass] | Pass, *, full: bool = False) -> Outcomes:
    """Everything that a pass promises.

    The identity changes no function; an exact pass changes none at all, another one does change
    some, as its `meaning` says; it declines what it does not claim; it is pure, and its text reads
    back; the specs that it makes are computed alike by every implementation, with gradients;
    claimed laws hold, and causality always; decoding gives the rows of the whole; a small model
    agrees with its reference.

    Args:
        what: a class, registered or not, which is checked with the examples that it declares; or
            one setting of it.
        full: more sites, sizes and models.

    Raises:
        InputError: if it is no pass.
    """
    subject = Subject.of(what)
    return Outcomes(f"pass {subject.kind.name}", tuple(pass_rows(subject, full=full)))


def pass_rows(subject: Subject, *, full: bool = False) -> Iterator[Outcome]:
    """The rows of `check`, the cheap ones first, each as soon as it is known."""
    yield from subject.problems
    trials: list[Trial] = []
    for pattern in PATTERNS:
        yield from _tried(subject, pattern, pattern_cases(pattern, full=full), trials)
    yield from claim_rows(subject, trials)
    done = [t for t in trials if t.new is not None and t.pattern in subject.patterns]
    if not done:
        reason = next((t.reason for t in trials if t.reason), "it has no request")
        yield Outcome("rewrite", "all cases", "failed", f"it declines everything: {reason}")
        return
    further: list[Trial] = []
    for pattern in subject.patterns:
        yield from _tried(subject, pattern, function_cases(pattern), further)
    yield from function_rows(subject, [*done, *(t for t in further if t.new is not None)])
    for request in subject.requests:
        yield from text_rows(subject, request)
    for trial in done:
        yield purity(trial)
        yield selected_heads(trial)
        yield selected_layers(trial)
    yield from meaning_rows(subject)
    yield from law_rows(subject, full=full)
    yield from implementation_rows(
        [t for t in done if t.request in subject.examples] or done, full=full
    )
    yield from model_rows(subject, full=full)


def _tried(
    subject: Subject, pattern: Pattern, cases: Iterable[Case], trials: list[Trial]
) -> Iterator[Outcome]:
    """Adds a trial of every request on every case; a row for each that raises."""
    for case in cases:
        for request in subject.requests:
            try:
                trials.append(rewritten(request, pattern, case))
            except Exception as error:
                text = f"{request.text}, {pattern}, {case.text}"
                reason = f"{type(error).__name__}: {error}"
                yield Outcome("rewrite", text, "failed", reason)


# --- claims ---------------------------------------------------------------------------------------


def claim_rows(subject: Subject, trials: list[Trial]) -> Iterator[Outcome]:
    """A claimed pattern is rewritten, another one declined; what is declined says why."""
    for pattern in PATTERNS:
        found = [t for t in trials if t.pattern == pattern]
        if not found:
            continue
        silent = next((t for t in found if t.new is None and not t.reason.strip()), None)
        if silent is not None:
            yield Outcome("declines", silent.text, "failed", "it declines without a reason")
        taken = [t for t in found if t.new is not None]
        if pattern in subject.kind.patterns:
            verdict: Verdict = "passed" if taken else "failed"
            reason = "" if taken else f"it claims this and declines it: {found[0].reason}"
            yield Outcome("claimed patterns", pattern, verdict, reason)
        elif subject.kind.patterns:
            # a single query that sees every key is a step of decoding as well
            taken = [t for t in taken if t.case.dims.q_len > 1 or "cross" in pattern]
            verdict = "failed" if taken else "passed"
            reason = "it does not claim this, and rewrites it" if taken else ""
            yield Outcome("declines", pattern, verdict, reason)
        for t in found if pattern in subject.patterns else ():
            if t.new is None:
                yield Outcome("rewrite", t.text, "skipped", t.reason)


def function_rows(subject: Subject, done: list[Trial]) -> Iterator[Outcome]:
    """The identity, and an exact pass, leave functions as they are; another pass changes some."""
    kind, changed = subject.kind, False
    for trial in done:
        is_identity = trial.request == subject.identity
        name = "identity" if is_identity else "exact"
        if is_identity or kind.contract == "exact":
            start = replace(trial, case=replace(trial.case, untrained=True))
            yield same_function(start, name)
        else:
            changed = changed or same_function(trial, name).verdict == "failed"
    others = [request for request in subject.examples if request != subject.identity]
    if kind.contract == "exact" or not others:
        return
    yield Outcome(
        "changes something",
        "all examples",
        "passed" if changed else "failed",
        "" if changed else "no example changes the function of any site",
    )


def same_function(trial: Trial, check: str) -> Outcome:
    """The new spec has the outputs and gradients of the old one."""
    old, new = trial.case, trial.after
    if not trial.request.action.empty_rows and isinstance(old.spec, SoftmaxSpec):
        old = replace(old, spec=replace(old.spec, masked="zero"))
    if new.spec == old.spec:
        return Outcome(check, trial.text, "passed")
    try:
        found = _results(new, old.spec)
    except Exception as error:
        return Outcome(check, trial.text, "failed", f"{type(error).__name__}: {error}")
    ref, gold = _results(old, old.spec), _results(old, old.spec, double=True)
    rows = [
        Row(
            name,
            "output" if name == "the output" else "gradient",
            baseline_of(ref[name], gold[name]),
            result,
            old.dtype,
        )
        for name, result in found.items()
    ]
    return judged(check, trial.text, rows)


def _results(case: Case, like: Spec, *, double: bool = False) -> dict[str, Tensor]:
    """Output and gradients by the reference, for every tensor that `like` reads."""
    x = operands(case)
    x = x.map(Tensor.double) if double else x
    out = run(reference, case.spec, x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = gradients(reference, case.spec, x, cotangent)
    read = [t.name for t in case.spec.tensors if "float" in t.dtype]
    named = dict(zip(("q", "k", "v", *read), found, strict=True))
    result = {"the output": out}
    for name in ("q", "k", "v", *(t.name for t in like.tensors if "float" in t.dtype)):
        # what the new spec does not read has no gradient
        result[f"the gradient of {name}"] = named.get(name, torch.zeros(()))
    return result


# --- one request ----------------------------------------------------------------------------------


def text_rows(subject: Subject, request: Request) -> Iterator[Outcome]:
    """The text of a request, with and without a selector, reads back as an equal request."""
    for where in ("", "0", "2-5", "heads=0,3", "path=decoder"):
        one = Request(request.action, Selector.parse(f"@ {where}" if where else ""))
        try:
            again = parse_request(one.text, subject)
        except Exception as error:
            yield Outcome("text", one.text, "failed", f"{type(error).__name__}: {error}")
            continue
        equal = again == one and again.text == one.text and hash(again) == hash(one)
        reason = "" if equal else f"it reads back as {again.text!r}, which is not equal"
        yield Outcome("text", one.text, "passed" if equal else "failed", reason)


def purity(trial: Trial) -> Outcome:
    """The same spec again, the old one as it was, and JSON that means the same."""
    old, new = trial.case.spec, trial.new
    assert new is not None
    before = old.to_json(), hash(old)
    again = rewritten(trial.request, trial.pattern, trial.case).new
    fresh = rewritten(
        trial.request, trial.pattern, replace(trial.case, spec=from_json(old.to_json()))
    ).new
    reason = ""
    if not isinstance(new, Spec):
        reason = f"it gives a {type(new).__name__}, not a Spec"
    elif (from_dict(old.to_dict()).to_json(), hash(old)) != before:
        reason = "it changes the spec that it is given"
    elif again != new or hash(again) != hash(new) or again.to_json() != new.to_json():
        reason = "the same spec gives another result the second time"
    elif fresh is None or fresh.to_json() != new.to_json():
        reason = "an equal spec, read from JSON, gives another result"
    elif str(from_dict(new.to_dict())) != str(new):
        reason = "the JSON of its result does not read back as the same spec"
    return Outcome("purity", trial.text, "failed" if reason else "passed", reason)


def selected_layers(trial: Trial) -> Outcome:
    """With `@ 0` the site of layer 0 is rewritten as without a selector, with `@ 1` it is not."""
    here, elsewhere = (
        rewritten(
            replace(trial.request, selector=Selector.parse(f"@ {n}")), trial.pattern, trial.case
        )
        for n in (0, 1)
    )
    reason = ""
    if here.new != trial.new:
        reason = f"with @ 0 a site of layer 0 is not rewritten alike: {here.reason}"
    elif elsewhere.new is not None:
        reason = "with @ 1 a site of layer 0 is rewritten too"
    return Outcome("selected layers", trial.text, "failed" if reason else "passed", reason)


def selected_heads(trial: Trial) -> Outcome:
    """With `@ heads=1` head 1 is as the pass makes it, and the other heads are as before."""
    check = "selected heads"
    old, new = trial.case, trial.after
    if old.spec == new.spec or old.dims.heads < 2:
        return Outcome(check, trial.text, "skipped", "the pass leaves the spec as it is")
    request = replace(trial.request, selector=Selector.parse("@ heads=1"))
    mixed = rewritten(request, trial.pattern, old)
    if mixed.new is None:
        return Outcome(check, trial.text, "skipped", mixed.reason)
    outs = []
    with torch.no_grad():
        for case in (mixed.after, new, old):
            spec = without_dropout(case.spec)  # which weights it drops is not the question
            outs.append(run(reference, spec, operands(case).map(Tensor.double)))
    found, one, others = outs
    rest = [h for h in range(old.dims.heads) if h != 1]
    for what, x, y in (
        ("head 1", found[:, 1], one[:, 1]),
        ("another head", found[:, rest], others[:, rest]),
    ):
        reason = _differs(x, y)
        if reason:
            return Outcome(check, trial.text, "failed", f"{what} {reason}")
    return Outcome(check, trial.text, "passed")


def _differs(x: Tensor, y: Tensor) -> str:
    """How x differs from what it should be; NaN is expected where y has it, and only there."""
    wrong = x.isnan() != y.isnan()
    if bool(wrong.any()):
        return f"is NaN on one side alone, in {int(wrong.sum())} of {wrong.numel()} values"
    differ = (x != y) & ~y.isnan()  # equal infinities have no difference
    difference = float((x - y)[differ].abs().max()) if bool(differ.any()) else 0.0
    finite = y[y.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return "" if difference <= tolerance(torch.float64, size) else f"differs by {difference:.1e}"
