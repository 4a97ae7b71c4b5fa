"""`bisect`: the first site at which a rewritten model goes wrong, and the stage of it that does.

Sites are given back to the model's own code, one half of them after the other, until one site makes
the difference: with the sites before it rewritten the model agrees with its original, with this one
as well it does not. Then that site is looked at by itself, on the operands that it had: is its
formula what the model computes, did a pass change what it promised to keep, does the implementation
compute the formula.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rewriter.capture import uncompiled
from rewriter.errors import InputError
from rewriter.optimize import reinstalled, requests_of, target_of
from rewriter.verify.call import Call
from rewriter.verify.diagnosis import At, diagnosis
from rewriter.verify.growing import Stage
from rewriter.verify.judge import Judge
from rewriter.verify.reverting import Recorded, Reverter, failure, first_failing
from rewriter.verify.yardstick import Yardstick

__all__ = ["Culprit", "bisect"]

_NEXT = {
    "lift": "the formula was read wrongly: please report it{program}; "
    "until then select the other sites, as in `fuse @ path=...`",
    "pass": "the pass breaks its contract `exact`; `rewriter.testing.check` shows it without a "
    "model. Leave it out until it is mended",
    "lowering": "please report it{program}; until then another target "
    'computes it, as in `optimize(model, target="reference")`',
    "none": "give `bisect` the very model that was optimized, and call `optimize` on it again",
}


@dataclass(frozen=True)
class Culprit:
    """The first site at which a rewritten model goes wrong. `print(culprit)` explains it."""

    site: str
    """Name of the site; empty if no site is to blame."""
    stage: Stage
    at: At
    reason: str
    """How the site differs, by itself."""
    script: str = field(default="", repr=False)
    """A program that shows it; exits with 1 while the two differ."""
    evidence: str = ""
    """How the model differs, with this site rewritten and without."""
    operands: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """What the program reads from the file beside it; empty if it draws its own operands."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program to `path`, and what it reads, if anything, beside it as
        `.safetensors`."""
        target = Path(path)
        if not self.script:
            raise InputError(f"there is no program that shows it: {self.reason}")
        if target.suffix != ".py":
            raise InputError(f"{target.name}: a program is saved as .py; give the file that suffix")
        if self.operands:
            from safetensors.torch import save_file

            save_file(dict(self.operands), target.with_suffix(".safetensors"))
        target.write_text(self.script, encoding="utf-8")

    def __str__(self) -> str:
        stage = "" if self.stage == "none" else f", stage `{self.stage}`"
        head = f"{self.site}: {self.at}{stage}" if self.site else "no site is to blame"
        lines = [head, f"  {self.reason}"]
        lines += [f"  in the model: {self.evidence}"] if self.evidence else []
        program = " with the program that `save` writes" if self.script else ""
        return "\n".join([*lines, f"  next: {_NEXT[self.at].format(program=program)}"])


def bisect(
    original: nn.Module, model: nn.Module, inputs: Any, *, gradients: bool = True
) -> Culprit | None:
    """The first site and stage that make `model` differ from `original`; None if the outputs and
    the gradients agree.

    Judged by the rule of `verify`; what `verify` says of sites by themselves, of texts and of
    memory is not looked at. Where a pass changes the function on purpose, the original with the
    dense reference of the new formulas is what the model has to agree with. The site is looked at
    by dense computations of L x M scores.

    Args:
        original: the model that defines what is right; may be `model` itself.
        model: what `optimize` returned; afterwards as before.
        inputs: a mapping of keyword arguments, a tuple of arguments, or one tensor.
        gradients: compare gradients as well.

    Raises:
        InputError: if the model was not optimized, the original cannot be run on the inputs, or
            there is nothing to compare.
    """
    requests = requests_of(model)
    if not requests:
        raise InputError(
            "bisect gives sites of a rewritten model back to the original code, but nothing is "
            "rewritten here: call rewriter.optimize(model, ...) first"
        )
    call = Call.of(inputs, 0, gradients)
    return _Search(original, model, call).culprit()


class _Search:
    """One search; the model is afterwards as before."""

    def __init__(self, original: nn.Module, model: nn.Module, call: Call) -> None:
        self.model, self.call = model, call
        self.yardstick = Yardstick(original, call, requests_of(model))
        self.seen = Reverter(call.seed, self.yardstick.is_exact)

    def culprit(self) -> Culprit | None:
        with reinstalled(self.model, watcher=self.seen.watch):
            whole = self._with_rewritten(None)
            if whole:
                return self._searched(self.seen.names, whole, self._with_rewritten)
        as_it_is = failure(self.model, self.call, self._judge(None))
        if not as_it_is:
            return None
        names = self.seen.names
        if whole := self._anew(frozenset(names)):
            return self._searched(names, whole, self._anew)
        why = "as it stands the model differs, but optimized anew in the same way it agrees: "
        why += "graphs that were captured at earlier calls do not suit these inputs"
        return Culprit("", "none", "none", why, evidence=as_it_is)

    def _with_rewritten(self, only: frozenset[str] | None) -> str:
        """How the model fails with these sites rewritten, in the graphs that are captured."""
        self.seen.only = only
        return failure(self.model, self.call, self._judge(only))

    def _anew(self, only: frozenset[str] | None) -> str:
        """The same, in graphs of their own."""
        with reinstalled(self.model, only=only):
            return failure(self.model, self.call, self._judge(only))

    def _judge(self, only: frozenset[str] | None) -> Judge:
        if only is None:
            return self.yardstick.judge(None)
        return self.yardstick.judge([x.name for x in self.seen.changed if x.name in only])

    def _searched(
        self, names: list[str], whole: str, fails: Callable[[frozenset[str]], str]
    ) -> Culprit:
        none = fails(frozenset())
        if none or not names:
            return self._without_site(none or whole)
        count, reason = first_failing(lambda n: fails(frozenset(names[:n])), len(names))
        reason = reason or whole
        evidence = f"with the first {count} of {len(names)} sites rewritten, {reason}"
        if count > 1:
            evidence += f"; with {count - 1} it agrees"
        return self._examined(names[count - 1], evidence, reason)

    def _without_site(self, reason: str) -> Culprit:
        with uncompiled(self.model):
            plain = failure(self.model, self.call, self.yardstick.judge(()))
        if plain:
            why = "with nothing rewritten and nothing captured the model still differs: it has "
            why += "other weights, other code or another dtype than the original"
        else:
            why = "with no site rewritten the model differs as soon as torch captures it"
        return Culprit("", "none", "none", why, evidence=plain or reason)

    def _examined(self, name: str, evidence: str, reason: str) -> Culprit:
        target = target_of(self.model)
        mine = [x for x in self.seen.recorded if x.name == name]
        own = self._recorded_in_original(name) if any(x.is_defined for x in mine) else mine
        for number, recorded in enumerate(mine):
            before = own[number] if number < len(own) else None
            found = diagnosis(recorded, before, target, gradients=self.call.gradients)
            if found is not None:
                shown = (found.script, evidence, found.operands)
                return Culprit(name, found.stage, found.at, found.reason, *shown)
        if reason.startswith("the gradient") and any(x.has_rows_without_key() for x in mine):
            why = "its formula gives what the model computes, and the implementation computes the "
            why += "formula, but rows that see no key have another gradient in the model"
            return Culprit(name, "normaliser", "lift", why, evidence=evidence)
        why = "by itself it computes what it should, on the operands that it has in the original: "
        why += "what it is given, or the place where its result goes, is wrong"
        return Culprit(name, "operands", "lowering", why, evidence=evidence)

    def _recorded_in_original(self, name: str) -> list[Recorded]:
        """The same site where no pass changed anything."""
        seen = Reverter(self.call.seed, self.yardstick.is_exact)
        call = replace(self.call, gradients=False)
        with reinstalled(self.model, requests=(), watcher=seen.watch):
            call.run(self.model)
        return [x for x in seen.recorded if x.name == name]
