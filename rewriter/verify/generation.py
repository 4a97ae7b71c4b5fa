"""Do two models write the same text: greedy decoding, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import InputError
from rewriter.verify.isolation import evaluating, plain_calls, seeded
from rewriter.verify.leaves import copied, leaves_of

__all__ = ["GenerationReport", "Parting", "token_agreement"]

TIE = 8.0
"""Two logits that differ by at most this many roundings of the dtype, at the size of the largest
logit, are a tie: which of them wins is rounding, in the original as well."""


@dataclass(frozen=True)
class Parting:
    """The first token at which one row of the two continuations differs."""

    row: int
    step: int
    expected: int
    """Token of the original."""
    found: int
    """Token of the model."""
    margin: float
    """By how much the original's logit of `expected` is above that of `found`."""
    tie: bool
    """The margin is within rounding: either token is right."""


@dataclass(frozen=True)
class GenerationReport:
    """Greedy tokens of a model compared with those of its original."""

    rows: int
    new_tokens: int
    partings: tuple[Parting, ...]

    @property
    def ok(self) -> bool:
        """True if every row is equal, or parts at a tie."""
        return self.rows * self.new_tokens > 0 and all(p.tie for p in self.partings)

    @property
    def agreement(self) -> float:
        """Share of the tokens before the first difference of their row."""
        lost = sum(self.new_tokens - p.step for p in self.partings)
        return 1 - lost / max(1, self.rows * self.new_tokens)

    def __str__(self) -> str:
        count = f"{self.rows} x {self.new_tokens} greedy tokens"
        head = f"generation: {self.agreement:.1%} of {count} agree"
        if not self.partings:
            return head
        wrong = [p for p in self.partings if not p.tie]
        p = (wrong or list(self.partings))[0]
        what = "the model differs" if wrong else "a tie"
        return (
            f"{head}; {what}: row {p.row}, token {p.step} is {p.found} where the original has "
            f"{p.expected}, whose logit is higher by {p.margin:.2e}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "agreement": self.agreement,
            "rows": self.rows,
            "new_tokens": self.new_tokens,
            "partings": [asdict(p) for p in self.partings],
        }


def token_agreement(
    original: nn.Module, model: nn.Module, inputs: Any, new_tokens: int = 32, *, seed: int = 0
) -> GenerationReport:
    """Compare greedy continuations, with whatever cache the models use.

    Every row gets exactly `new_tokens` tokens. Two rows agree if they are equal, or part at a tie
    of the original's logits; after the first difference they continue different texts, and are no
    longer compared.

    Args:
        original: as in `verify`; may be the same object as `model`.
        model: the model under test.
        inputs: keyword arguments of `generate`, or one tensor of token numbers `[B, L]`.
        new_tokens: how many tokens to write.
        seed: of what the models draw.

    Raises:
        InputError: if a model has no `generate`, or if it fails for the original.
    """
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    with plain_calls(original):
        expected, logits = _generate(original, arguments, new_tokens, seed)
    found, _ = _generate(model, arguments, new_tokens, seed)
    floats = [p.dtype for p in original.parameters() if p.is_floating_point()]
    eps = max(torch.finfo(dtype).eps for dtype in floats)
    partings = []
    for row in range(expected.shape[0]):
        steps = (expected[row] != found[row]).nonzero()
        if len(steps):
            partings.append(_parting(row, int(steps[0]), expected, found, logits, eps))
    return GenerationReport(expected.shape[0], new_tokens, tuple(partings))


def _generate(
    module: nn.Module, arguments: dict[str, Any], new_tokens: int, seed: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The new tokens `[B, new_tokens]` and, for each, the logits `[B, V]`."""
    generate = getattr(module, "generate", None)
    if generate is None:
        raise InputError(
            f"{type(module).__name__} has no `generate`: leave out `generate=` for this model"
        )
    tensors = [*leaves_of(arguments).tensors.values(), *module.parameters()]
    with torch.no_grad(), evaluating(module), seeded(seed, {t.device for t in tensors}):
        result = generate(
            **copied(arguments, lambda _, t: t.detach().clone()),
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return result.sequences[:, -new_tokens:], result.logits


def _parting(
    row: int, step: int, expected: Tensor, found: Tensor, logits: tuple[Tensor, ...], eps: float
) -> Parting:
    scores = logits[step][row].double()
    x, y = int(expected[row, step]), int(found[row, step])
    margin = float(scores[x] - scores[y])
    size = float(scores[scores.isfinite()].abs().max())
    return Parting(row, step, x, y, margin, margin <= TIE * eps * size)
