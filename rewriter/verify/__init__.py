"""The equivalence harness: is a rewritten model the same function as its original.

`verify`, `bisect` and `behaviour` are functions. Each hides the module of its name as an attribute,
not as a module: `from rewriter.verify.report import VerifyReport` works as always.
"""

from rewriter.verify.behaviour import behaviour
from rewriter.verify.bisect import Culprit, bisect
from rewriter.verify.generation import GenerationReport, token_agreement
from rewriter.verify.measures import Behaviour
from rewriter.verify.memory import MemoryUse
from rewriter.verify.report import VerifyReport, VerifyRow
from rewriter.verify.run import verify
from rewriter.verify.structure import Structure, structure_of

__all__ = [
    "Behaviour",
    "Culprit",
    "GenerationReport",
    "MemoryUse",
    "Structure",
    "VerifyReport",
    "VerifyRow",
    "behaviour",
    "bisect",
    "structure_of",
    "token_agreement",
    "verify",
]
