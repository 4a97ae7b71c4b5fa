"""`testing.check`: a user's own pass, faults that it catches, and nothing is not enough."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch

from rewriter import symbols as sym
from rewriter.errors import CheckFailed, Declined, InputError
from rewriter.passbase import Pass, option
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.testing import check
from rewriter.testing.check import _differs, pass_rows
from rewriter.testing.subject import Subject, pattern_cases, rewritten


@pytest.fixture(autouse=True)
def _on_specs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process of Triton, ONNX and a model, which the tests of the registry run."""
    import sys

    module: Any = sys.modules["rewriter.testing.check"]
    monkeypatch.setattr(module, "model_rows", lambda subject, full: [])
    promises: Any = sys.modules["rewriter.testing.promises"]
    monkeypatch.setattr(promises, "interpreted", lambda cases: ())
    monkeypatch.setattr(promises, "ONNX", replace(promises.ONNX, supports=lambda *_: "not here"))


@dataclass(frozen=True)
class Cap(Pass):
    """Scores are kept between -cap and cap."""

    name = "mine.cap"
    contract = "limit"
    stage = "score"
    identity = "mine.cap(cap=1e6)"
    cap: float = option("largest absolute score", at_least=0.0)

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        return replace(spec, score=spec.score.subs(sym.s, self.cap * sympy.tanh(sym.s / self.cap)))


# --- an honest pass -------------------------------------------------------------------------------


def test_a_pass_of_a_user_that_declares_little_is_checked_and_told_so() -> None:
    outcomes = check(Cap)
    assert outcomes.ok, str(outcomes)
    loud = [row.reason for row in outcomes.rows if row.check == "declaration"]
    assert [reason.split(";")[0] for reason in loud] == [
        "NOT DECLARED: mine.cap says no patterns",
        "NOT DECLARED: mine.cap says no laws",
        "NOT DECLARED: mine.cap says no examples",
    ]
    outcomes.raise_if_failed()


def test_one_setting_is_the_example() -> None:
    outcomes = check(Cap(cap=5.0))
    assert outcomes.ok, str(outcomes)
    assert "changes something" in {row.check for row in outcomes.rows}
    assert any("mine.cap(cap=5)" in row.case for row in outcomes.rows)


def test_what_is_no_pass_is_refused() -> None:
    for what in (Pass, int, "fuse"):
        with pytest.raises(InputError, match="check takes a Pass"):
            check(what)  # type: ignore[arg-type]


# --- faults ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared(Cap):
    """As `Cap`, with everything declared; faulty ones below change one thing."""

    patterns = ("noncausal self", "causal self", "noncausal cross", "causal cross")
    laws = ("future", "past", "decode", "queries", "keys", "batch", "heads", "row sums", "values")
    examples = ("mine.cap(cap=5)",)


@dataclass(frozen=True)
class BadIdentity(Declared):
    identity = "mine.cap(cap=3)"


@dataclass(frozen=True)
class SaysExact(Declared):
    contract = "exact"


@dataclass(frozen=True)
class ChangesNothing(Declared):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        return spec


@dataclass(frozen=True)
class ForgetsCross(Declared):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if site.is_cross:
            raise Declined("not for cross-attention")
        return super().rewrite(site, spec)


@dataclass(frozen=True)
class ClaimsLess(Declared):
    patterns = ("causal self",)


@dataclass(frozen=True)
class Silent(Declared):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if site.is_cross:
            raise Declined("")
        return super().rewrite(site, spec)


@dataclass(frozen=True)
class SeesTheFuture(Declared):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if self.cap > 1e5:
            return spec
        return replace(super().rewrite(site, spec), mask=sympy.true).without_unused()


@dataclass(frozen=True)
class SeesOneKeyMore(Declared):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if self.cap > 1e5:
            return spec
        mask = spec.mask.subs(sym.q, sym.q + 1)
        return replace(super().rewrite(site, spec), mask=mask)


@dataclass(frozen=True)
class BreaksALaw(Declared):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if self.cap > 1e5:
            return spec
        return replace(spec, heads=spec.heads * sympy.Float(0.9))


@dataclass(frozen=True)
class CountsFromTheEnd(Declared):
    """A bias by the distance to the last query: decoding sees another one."""

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if self.cap > 1e5:
            return spec
        return replace(spec, score=spec.score + sympy.Float(0.3) * (sym.L - sym.q) * sym.k)


@dataclass(frozen=True)
class Moody(Declared):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        return replace(super().rewrite(site, spec), scale=spec.scale * (1 + random.random() * 1e-9))


@dataclass(frozen=True)
class WrongText(Declared):
    @property
    def text(self) -> str:
        return f"mine.cap(cap={self.cap + 1})"


@dataclass(frozen=True)
class UnreadableExample(Declared):
    examples = ("mine.cap(size=5)", "mine.cap(cap=5)")


@dataclass(frozen=True)
class UnknownLaw(Declared):
    laws = ("gravity",)


@dataclass(frozen=True)
class Raises(Declared):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        raise KeyError("pad")


@dataclass(frozen=True)
class Nothing(Declared):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        return None  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (BadIdentity, "identity"),
        (SaysExact, "exact"),
        (ChangesNothing, "changes something"),
        (ForgetsCross, "claimed patterns"),
        (ClaimsLess, "declines"),
        (Silent, "declines"),
        (SeesTheFuture, "law: future"),
        (SeesOneKeyMore, "law: future"),
        (BreaksALaw, "law: row sums"),
        (CountsFromTheEnd, "decode = parallel"),
        (Moody, "purity"),
        (WrongText, "text"),
        (UnreadableExample, "declaration"),
        (UnknownLaw, "declaration"),
        (Raises, "rewrite"),
        (Nothing, "rewrite"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_fault_in_a_pass_is_caught(kind: type[Pass], name: str) -> None:
    found = set()
    for row in pass_rows(Subject.of(kind)):
        found |= {row.check} if row.verdict == "failed" else set()
        if name in found:
            return
    pytest.fail(f"{name} is not among the failures: {', '.join(sorted(found)) or 'none'}")


def test_declared_passes() -> None:
    outcomes = check(Declared)
    assert outcomes.ok, str(outcomes)
    assert not [row for row in outcomes.rows if row.check == "declaration"]


@dataclass(frozen=True)
class DeclinesEverything(Cap):
    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        raise Declined("not today")


def test_a_pass_that_declines_everything_fails() -> None:
    outcomes = check(DeclinesEverything)
    assert outcomes.failures[-1].reason == "it declines everything: not today"
    with pytest.raises(CheckFailed, match="it declines everything: not today"):
        outcomes.raise_if_failed()


# --- sites ----------------------------------------------------------------------------------------


def test_every_pattern_has_attentions_of_its_kind() -> None:
    for pattern in ("noncausal self", "causal self", "noncausal cross", "causal cross"):
        for full in (False, True):
            found = list(pattern_cases(pattern, full=full))
            assert len({case.text for case in found}) == len(found)
            assert len(found) >= 5


def test_a_declined_trial_has_the_reason_of_the_pass() -> None:
    subject = Subject.of(DeclinesEverything(cap=1.0))
    case = next(pattern_cases("causal self"))
    trial = rewritten(subject.examples[0], "causal self", case)
    assert (trial.new, trial.reason) == (None, "not today")


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([1.0, math.nan], [1.0, math.nan], ""),
        ([1.0, 0.0], [1.0, math.nan], "is NaN on one side alone, in 1 of 2 values"),
        ([1.0, math.nan], [1.0, 0.0], "is NaN on one side alone, in 1 of 2 values"),
        ([2.0, math.nan], [1.0, math.nan], "differs by 1.0e+00"),
        ([1.0, math.inf], [1.0, math.inf], ""),
        ([1.0, math.inf], [1.0, -math.inf], "differs by inf"),
        ([math.nan], [math.nan], ""),
    ],
)
def test_heads_are_compared_with_their_nans(x: list[float], y: list[float], reason: str) -> None:
    assert _differs(torch.tensor(x).double(), torch.tensor(y).double()) == reason
