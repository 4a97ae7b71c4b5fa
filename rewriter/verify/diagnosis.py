"""What is wrong at one site, seen on the operands that it had in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from rewriter.spec import Spec
from rewriter.verify.growing import Stage
from rewriter.verify.guesses import Seen, misread_stage
from rewriter.verify.reverting import Recorded
from rewriter.verify.script import (
    Drawn,
    is_free,
    op_script,
    output_script,
    reference_script,
    reloaded,
    smallest,
    stored,
)
from rewriter.verify.stages import (
    Operands,
    changed_stage,
    difference,
    lowered,
    lowering_of,
    run,
    stage_of,
)

__all__ = ["At", "Finding", "diagnosis"]

At = Literal["lift", "pass", "lowering", "none"]
"""`"lift"`: the formula is not what the model computes; `"pass"`: a pass changed what it promised
to keep; `"lowering"`: the implementation does not compute the formula."""


@dataclass(frozen=True)
class Finding:
    """What is wrong at a site."""

    at: At
    stage: Stage
    reason: str
    script: str = ""
    operands: Mapping[str, Tensor] = field(default_factory=dict)
    """What the script reads from the file beside it; empty if it draws its own."""

    @property
    def silent(self) -> Finding:
        """The same without a program, because it would show nothing."""
        why = "; there is no program, because with operands read from a file the two agree"
        return replace(self, script="", operands={}, reason=f"{self.reason}{why}")


def diagnosis(
    recorded: Recorded, own: Recorded | None, target: str, *, gradients: bool
) -> Finding | None:
    """The first of formula, passes and implementation that is wrong, and how; None if, on these
    operands, none is.

    Args:
        recorded: the site in the model as its requests define it.
        own: the site in the original model.
        target: what the model was optimized for.
        gradients: look at gradients as well, where the outputs are right.
    """
    looks: list[Iterator[Finding]] = [_of_lift(own)] if own is not None else []
    for wanted in (False, True) if gradients else (False,):
        looks += [_of_pass(recorded, wanted), _of_lowering(recorded, target, wanted, gradients)]
    return next((finding for look in looks for finding in look), None)


def _of_lift(recorded: Recorded) -> Iterator[Finding]:
    spec, gold = recorded.report.site.spec, recorded.gold
    if spec is None or gold is None or spec.dropout:
        return
    operands = recorded.operands(gold)
    seen = Seen(operands, gold.out, recorded.ref.out)
    found = misread_stage(spec, seen)
    if found is not None:
        stage, reason = found
        name = recorded.ref.name
        title = f"{name}: the formula that was read is not what the model computes ({stage})."
        script = output_script(title, spec, operands)
        saved = stored(operands) | {"gold": gold.out.contiguous(), "ref": recorded.ref.out}
        saved["ref"] = saved["ref"].contiguous()
        reason = f"{spec} is not what the model computes: {reason}"
        finding = Finding("lift", stage, reason, script, saved)
        again = replace(seen, operands=reloaded(operands))
        yield finding if again.against(run(spec, again.operands)) else finding.silent


def _of_pass(recorded: Recorded, gradients: bool) -> Iterator[Finding]:
    before, after = recorded.report.site.spec, recorded.report.after
    if before is None or after is None or before == after or recorded.is_defined:
        return
    operands = recorded.operands(recorded.ref)
    if not operands.hold(after):  # it reads what a pass computes, which the model does not have
        return
    found = changed_stage(before, after, operands, gradients=gradients)
    if found is not None:
        passes = ", ".join(recorded.report.passes)
        stage, reason = found
        title = f"{recorded.ref.name}: {passes} changed the {_part(stage, gradients)}."

        def shows(candidate: Operands) -> bool:
            return bool(difference(run, after, before, candidate, gradients=gradients))

        drawn = _smallest((before, after), operands, shows)
        script = reference_script(title, before, after, drawn or operands, gradients=gradients)
        saved = {} if drawn else stored(operands)
        reason = f"{passes} made {after} of {before}, which is another function: {reason}"
        finding = Finding("pass", "gradient" if gradients else stage, reason, script, saved)
        yield finding if drawn or shows(reloaded(operands)) else finding.silent


def _of_lowering(
    recorded: Recorded, target: str, gradients: bool, recording: bool
) -> Iterator[Finding]:
    """Which implementation runs may depend on whether gradients are recorded."""
    spec = recorded.report.after
    if spec is None:
        return
    operands = recorded.operands(recorded.ref)
    if not operands.hold(spec):
        return
    modes = (True,) if gradients else (False, True) if recording else (False,)
    for name in dict.fromkeys(lowering_of(spec, operands, target, grad=g) for g in modes):
        new = lowered(name)
        found = stage_of(new, spec, operands, gradients=gradients)
        if found is None:
            continue
        stage, reason = found
        title = (
            f"{recorded.ref.name}: {name} differs from the reference: {_part(stage, gradients)}."
        )

        def shows(candidate: Operands, new: Callable[..., Tensor] = new) -> bool:
            return bool(difference(new, spec, spec, candidate, gradients=gradients))

        drawn = _smallest((spec,), operands, shows)
        script = op_script(title, spec, name, drawn or operands, gradients=gradients)
        what = "the gradient of " if gradients else ""
        since = "in plain attention" if stage == "operands" else f"when the {stage} joins"
        reason = f"{name} does not compute {what}{spec}; it goes wrong {since}: {reason}"
        saved = {} if drawn else stored(operands)
        finding = Finding("lowering", "gradient" if gradients else stage, reason, script, saved)
        yield finding if drawn or shows(reloaded(operands)) else finding.silent


def _smallest(
    specs: tuple[Spec, ...], operands: Operands, shows: Callable[[Operands], bool]
) -> Drawn | None:
    """Random operands that show it, with every tensor that a spec reads; None where none do, or
    where a spec promises of a tensor what no random one keeps."""
    if not all(map(is_free, specs)):
        return None
    first, *rest = (Drawn.like(spec, operands) for spec in specs)
    return smallest(first.joined(*rest), shows)


def _part(stage: Stage, gradients: bool) -> str:
    return f"gradient of the {stage}" if gradients else stage
