"""The equivalence harness: is a rewritten model the same function as its original.

`rewriter.verify(...)` is the function. It hides this package as an attribute of `rewriter`, not as
a module: `from rewriter.verify.report import VerifyReport` works as always.
"""

from rewriter.verify.generation import GenerationReport, token_agreement
from rewriter.verify.report import VerifyReport, VerifyRow
from rewriter.verify.run import verify

__all__ = ["GenerationReport", "VerifyReport", "VerifyRow", "token_agreement", "verify"]
