"""Checks of passes and implementations: the conformance suite, the laws of attention, round trips.

from rewriter import testing
testing.check(MyPass).raise_if_failed()  # in a test
print(testing.check(MyPass))  # every promise of a pass, as a table
"""

from rewriter.testing import laws
from rewriter.testing.check import check
from rewriter.testing.conformance import check_backward, check_lowering
from rewriter.testing.outcome import Outcome, Outcomes
from rewriter.testing.round_trips import round_trips

__all__ = [
    "Outcome",
    "Outcomes",
    "check",
    "check_backward",
    "check_lowering",
    "laws",
    "round_trips",
]
