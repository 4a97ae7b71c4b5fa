"""Checks of passes and implementations: the conformance suite, the laws of attention, round trips.

from rewriter import testing
print(testing.check(MyPass))        # every promise of a pass, as a table
"""

from rewriter.testing.outcome import Outcome, Outcomes

__all__ = ["Outcome", "Outcomes"]
