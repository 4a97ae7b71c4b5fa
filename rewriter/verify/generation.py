"""Do two models write the same text: greedy decoding, its logits, its cache, and padded prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture import uncompiled
from rewriter.errors import InputError, RewriterError
from rewriter.verify.call import coarsest_dtype, one_line
from rewriter.verify.compare import WITHOUT_GOLD, baseline_of, compare
from rewriter.verify.continuations import GenerationReport, Parting, Step
from rewriter.verify.decoding import Gold, OneCall, Text, padded_prompts, recorded, written
from rewriter.verify.leaves import leaves_of
from rewriter.verify.rows import Errors, VerifyRow

__all__ = ["GenerationReport", "Parting", "Step", "token_agreement"]

TIE = 8.0
"""Two logits that differ by at most this many roundings of the dtype, at the size of the largest
logit, are a tie: which of them wins is rounding, in the original as well."""

_PADDED_TOKENS = 8
"""A fault in the handling of padding shows in the first token, one in positions a few later."""
_LOOSE = 0.25
"""Where the original's own steps are off from one call by this share of the logits, one call is no
gold for them."""


def token_agreement(
    original: nn.Module,
    model: nn.Module,
    inputs: Any,
    new_tokens: int = 32,
    *,
    seed: int = 0,
    padding: bool = True,
) -> GenerationReport:
    """Compare greedy continuations, their logits, and the models' own caches.

    Every row gets exactly `new_tokens` tokens. Two rows agree if they are equal, or part at a tie
    of the original's logits; after the first difference they continue different texts, and are no
    longer compared. Up to there the logits are held to the error-ratio rule, and so are each
    model's steps to its own logits in one call over the text.

    Args:
        original: as in `verify`; may be the same object as `model`.
        model: the model under test.
        inputs: keyword arguments of `generate`, or one tensor of token numbers `[B, L]`. Those of
            one call may say `use_cache=False`; decoding is compared with a cache even so.
        new_tokens: how many tokens to write.
        seed: of what the models draw.
        padding: also continue one prompt alone, and padded on either side.

    Raises:
        InputError: if a model has no `generate`, or if it fails for the original.
    """
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    if arguments.get("use_cache") is False:
        del arguments["use_cache"]
    pair = _Pair.of(original, model, arguments, seed)
    try:
        report = pair.compared("as given", arguments, new_tokens)
    except _OriginalFailed as failure:
        raise InputError(
            f"the original cannot generate from these inputs: {one_line(failure.error)}; check them"
        ) from failure.error
    if not padding:
        return report
    prompts = padded_prompts(arguments, _pad_token(original))
    if isinstance(prompts, str):
        return replace(report, notes=(*report.notes, f"padding was not tried: {prompts}"))
    padded, notes = [], list(report.notes)
    for name, prompt in prompts.items():
        try:
            padded.append(pair.compared(name, prompt, min(new_tokens, _PADDED_TOKENS)))
        except _OriginalFailed as failure:
            reason = one_line(failure.error)
            notes.append(f"{name} was not compared, the original raises {reason}")
    return replace(report, padded=tuple(padded), notes=tuple(notes))


class _OriginalFailed(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class _Pair:
    """Both models, and what every comparison of their texts needs."""

    original: nn.Module
    model: nn.Module
    gold: Gold
    dtype: torch.dtype
    """The coarsest one that the original computes in."""
    seed: int

    @classmethod
    def of(
        cls, original: nn.Module, model: nn.Module, arguments: dict[str, Any], seed: int
    ) -> _Pair:
        dtype = coarsest_dtype(original, leaves_of(arguments).tensors.values())
        return cls(original, model, Gold(original, dtype), dtype, seed)

    def compared(self, name: str, arguments: dict[str, Any], count: int) -> GenerationReport:
        with uncompiled(self.original):
            try:
                with recorded(self.original) as calls:
                    ref = written(self.original, arguments, count, self.seed)
            except InputError:
                raise
            except Exception as error:
                raise _OriginalFailed(error) from error
            main = str(getattr(self.original, "main_input_name", "input_ids"))
            call = OneCall.of(calls, ref, arguments, main)
            whole, call = self._whole(call, ref)
        report = GenerationReport(len(ref.tokens), count, (), name=name)
        try:
            new = written(self.model, arguments, count, self.seed)
        except RewriterError:
            raise  # said on purpose, and better than a row could
        except Exception as error:
            return replace(report, checks=(_raised("generate", error),))
        if new.logits.shape != ref.logits.shape:
            shapes = f"{list(new.logits.shape)}, the original gives {list(ref.logits.shape)}"
            row = VerifyRow("generate", "output", "", False, f"its logits are {shapes}")
            return replace(report, checks=(row,))
        partings = tuple(_partings(ref, new, torch.finfo(self.dtype).eps))
        same = torch.ones_like(ref.tokens, dtype=torch.bool)
        for parting in partings:
            same[parting.row, parting.step + 1 :] = False
        notes: list[str] = []
        gold = self._gold(call, ref, notes) if isinstance(call, OneCall) else None
        checks = [self._logits(ref, new, gold, same)]
        if not isinstance(call, OneCall) or whole is None:
            notes.append(f"steps were not compared with one call: {call}")
        elif not call.cached:
            notes.append("no step had a cache, so that none was compared with one call")
        else:
            checks.append(self._cache(call, ref, new, whole, gold))
        if count > 1 and bool((ref.tokens == ref.tokens[:, :1]).all()):
            notes.append("the original repeats one token: that tokens agree shows little")
        steps = tuple(_steps(ref.logits, new.logits, same))
        return replace(
            report, partings=partings, steps=steps, checks=tuple(checks), notes=tuple(notes)
        )

    def _whole(self, call: OneCall | str, ref: Text) -> tuple[Tensor | None, OneCall | str]:
        """The original's logits in one call, or why there are none."""
        if isinstance(call, str):
            return None, call
        try:
            whole = call.logits(self.original, ref.tokens, self.seed)
        except Exception as error:
            return None, f"the original raises {one_line(error)}"
        if whole.shape != ref.logits.shape:
            return None, f"the original gives logits {list(whole.shape)} there"
        return whole, call

    def _gold(self, call: OneCall, ref: Text, notes: list[str]) -> Tensor | None:
        """The logits of the steps without rounding: those of one call in a wider dtype."""
        gold = self.gold.logits(call, ref.tokens, self.seed)
        if gold is None:
            notes.append(f"no gold for the logits of the steps: {self.gold.reason}")
            return None
        base = baseline_of(ref.logits, gold)
        if base.err_ref.mean <= _LOOSE * base.size.mean:
            return gold
        off = f"{base.err_ref.mean:.1e} on values of {base.size.mean:.1e}"
        notes.append(f"the original's steps are off from one call by {off}, so it is no gold")
        return None

    def _logits(self, ref: Text, new: Text, gold: Tensor | None, same: Tensor) -> VerifyRow:
        """The logits of all steps before the texts part."""
        base = baseline_of(ref.logits[same], (ref.logits if gold is None else gold)[same])
        wider = WITHOUT_GOLD if gold is None else 1.0
        row = compare("logits", "output", base, new.logits[same], self.dtype, wider=wider)
        if row.ok or row.err_new is None:
            return row
        exact = ref.logits if gold is None else gold
        worst = (new.logits - exact).abs().amax(-1).masked_fill(~same, -1.0)
        place, step = divmod(int(worst.argmax()), worst.shape[1])
        return replace(row, reason=f"{row.reason}; the largest in row {place}, step {step}")

    def _cache(
        self, call: OneCall, ref: Text, new: Text, whole: Tensor, gold: Tensor | None
    ) -> VerifyRow:
        """Steps with a cache against one call, each model over its own text.

        Both round, so the difference may have the errors of both. In the original the two may round
        alike, and differ by less, or by nothing: gold says what each of them is off by.
        """
        name = "cache"
        try:
            own = call.logits(self.model, new.tokens, self.seed)
        except RewriterError:
            raise
        except Exception as error:
            return _raised(name, error)
        if own.shape != new.logits.shape:
            reason = f"one call gives logits {list(own.shape)}, steps {list(new.logits.shape)}"
            return VerifyRow(name, "output", "", False, reason)
        base = baseline_of(ref.logits - whole, torch.zeros_like(whole))
        err = base.err_ref
        if gold is not None:
            steps, one = (baseline_of(x, gold).err_ref for x in (ref.logits, whole))
            err = Errors(steps.mean + one.mean, steps.max + one.max)
        base = replace(base, size=baseline_of(whole, whole).size, err_ref=err)
        wider = 2.0 if gold is not None else 2.0 * WITHOUT_GOLD
        row = compare(name, "output", base, new.logits - own, self.dtype, wider=wider)
        if row.ok:
            return row
        worst = (new.logits - own).abs().nan_to_num(torch.inf).amax((0, 2))
        reason = f"steps with a cache differ from one call over the same text: {row.reason}"
        return replace(row, reason=f"{reason}; most at step {int(worst.argmax())}")


def _partings(ref: Text, new: Text, eps: float) -> Iterator[Parting]:
    for row in range(len(ref.tokens)):
        steps = (ref.tokens[row] != new.tokens[row]).nonzero()
        if not len(steps):
            continue
        step = int(steps[0])
        scores = ref.logits[row, step].double()
        x, y = int(ref.tokens[row, step]), int(new.tokens[row, step])
        margin = float(scores[x] - scores[y])
        size = float(scores[scores.isfinite()].abs().max())
        yield Parting(row, step, x, y, margin, margin <= TIE * eps * size)


def _steps(ref: Tensor, new: Tensor, same: Tensor) -> Iterator[Step]:
    for step in range(ref.shape[1]):
        rows = same[:, step]
        if not bool(rows.any()):
            return
        x, y = ref[rows, step].double(), new[rows, step].double()
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).clamp_min(0.0)
        known = x.isfinite() | y.isfinite()
        difference = (x - y)[known].abs()
        largest = float(difference.max()) if difference.numel() else 0.0
        yield Step(step, int(rows.sum()), float(kl.mean()), largest)


def _pad_token(original: nn.Module) -> int:
    pad = getattr(getattr(original, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _raised(name: str, error: Exception) -> VerifyRow:
    reason = f"the original runs, the model raises {one_line(error)}"
    return VerifyRow(name, "output", "", False, reason)
