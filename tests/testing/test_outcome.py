"""Outcomes as a truth value, a text and an exception."""

from __future__ import annotations

import pytest

from rewriter.testing import Outcome, Outcomes
from rewriter.testing.outcome import Verdict


@pytest.mark.parametrize(
    ("verdicts", "ok"),
    [
        (("passed",), True),
        (("passed", "skipped"), True),
        (("passed", "failed"), False),
        (("skipped",), False),
        ((), False),
    ],
)
def test_outcomes_are_true_if_something_passed_and_nothing_failed(
    verdicts: tuple[Verdict, ...], ok: bool
) -> None:
    found = Outcomes("pass mine.cap", tuple(Outcome("x", "y", v) for v in verdicts))
    assert bool(found) is found.ok is ok
