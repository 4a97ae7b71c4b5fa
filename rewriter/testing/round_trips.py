"""Round trips: what is done to a model can be undone, repeated, saved, planned and exported.

All runs are of copies; the model that is given stays as it is, and that is checked as well. Equal
means equal bits, except in ONNX Runtime, which sums in another order.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from rewriter.checkpoint import changed_sites, load, save
from rewriter.errors import ExportError, InputError
from rewriter.export import export_onnx
from rewriter.isolation import COMPILED
from rewriter.optimize import optimize, report_of, requests_of, restore, target_of
from rewriter.optimize import restore as made_plain  # `restore` by its name is what is checked
from rewriter.passbase import Pass, Request
from rewriter.plan import Plan, config_of, parameters_of
from rewriter.program import Call as NamedCall
from rewriter.program import inference
from rewriter.registry import read_requests
from rewriter.runtime import compare, run_file
from rewriter.testing.bits import Trace, different, tells, tensors_of, unequal
from rewriter.testing.outcome import Outcome, Outcomes, Verdict
from rewriter.verify.call import Call
from rewriter.verify.leaves import Leaves

__all__ = ["CHECKS", "round_trips"]


class Skipped(Exception):
    """A round trip that this model cannot make; the text says why."""


def round_trips(
    model: nn.Module,
    passes: Sequence[str | Pass | Request] | str | Pass | Request,
    inputs: Any,
    *,
    directory: str | Path | None = None,
    onnx: bool = True,
    target: str = "auto",
    only: Collection[str] | None = None,
) -> Outcomes:
    """Check that rewriting a model can be undone, repeated, saved and loaded, planned and exported.

    Args:
        model: any module, in any state; it is the same afterwards. A Hugging Face model is saved
            and loaded too.
        passes: requests, as `optimize` takes them; none means `"fuse"`. A pass that would leave
            short inputs to the original code (`from_scores`) is made to rewrite them.
        inputs: of one call: a mapping of keyword arguments, a tuple of arguments, or one tensor.
        directory: where files are written, and stay; None for a temporary one.
        onnx: also export to ONNX, and run the file.
        target: as in `optimize`.
        only: names of `CHECKS`; None for all of them. That a site is rewritten is always checked:
            without one the others would show nothing.

    Raises:
        InputError: if no round trip is asked for, if the model cannot be run on the inputs, or if
            equal outputs would show nothing.
    """
    items = [passes] if isinstance(passes, (str, Pass, Request)) else list(passes)
    wanted = _wanted(only, onnx=onnx)
    case = f"{type(model).__name__}, {'; '.join(map(_text, items)) or 'fuse'}"
    before = Trace.of(model)
    with _place(directory) as place:
        trips = _Trips(_plain(model), _everywhere(items), target, _call(inputs), inputs, place)
        rows = [
            _outcome(name, case, check, trips) for name, check in CHECKS.items() if name in wanted
        ]
    left = before.differs(Trace.of(model))
    rows.append(Outcome("no trace", case, "failed" if left else "passed", left))
    return Outcomes("round trips", tuple(rows))


def _wanted(only: Collection[str] | None, *, onnx: bool) -> set[str]:
    """Names of the checks to run, "rewrite" always among them."""
    asked = set(CHECKS if only is None else only)
    unknown = sorted(asked - CHECKS.keys())
    if unknown:
        raise InputError(f"there is no round trip {unknown[0]!r} ({', '.join(CHECKS)})")
    wanted = asked if onnx else asked - {"export"}
    if not wanted:
        why = "it is `export` alone, and `onnx` is False" if asked else "it is empty"
        raise InputError(f"`only` asks for no round trip: {why}")
    return wanted | {"rewrite"}


@dataclass
class _Trips:
    """A plain copy of the model, its rewritten twin, and what both gave."""

    plain: nn.Module
    requests: tuple[Request, ...]
    target: str
    call: Call
    inputs: Any
    place: Path
    state: dict[str, Tensor] = field(init=False)
    want: Leaves = field(init=False)
    """What the plain model gives."""

    def __post_init__(self) -> None:
        self.state = {n: x.detach().clone() for n, x in tensors_of(self.plain).items()}
        try:
            self.want = self.run(self.plain)
        except Exception as error:
            raise InputError(
                f"the model cannot be run on these inputs: {type(error).__name__}: {error}"
            ) from error
        if not any(tells(x) for x in self.want.tensors.values()):
            raise InputError(
                "every output of the model is one number everywhere, or there is none: that "
                "outputs are equal would show nothing; give other inputs"
            )

    def run(self, module: nn.Module) -> Leaves:
        return self.call.run(module).outputs

    def optimized(self, module: nn.Module) -> nn.Module:
        return optimize(module, *self.requests, target=self.target)

    @cached_property
    def twin(self) -> nn.Module:
        """A rewritten copy."""
        return self.optimized(copy.deepcopy(self.plain))

    @cached_property
    def ours(self) -> Leaves:
        """What the rewritten copy gives."""
        return self.run(self.twin)

    @cached_property
    def digests(self) -> list[tuple[Any, ...]]:
        """What was done to each site of the twin."""
        _ = self.ours  # its sites are known when it has run
        return _digests(self.twin)

    @cached_property
    def saved(self) -> Path:
        """The directory of the twin."""
        kind, name = type(self.plain), type(self.plain).__name__
        if not callable(getattr(kind, "from_pretrained", None)) or not hasattr(
            self.plain, "config"
        ):
            raise Skipped(f"{name} is not a Hugging Face model: there is nothing to load it by")
        import transformers

        if getattr(transformers, name, None) is not kind:
            raise Skipped(f"{name} is not a class of transformers, so no directory can name it")
        _ = self.ours  # so that the plan records its sites
        save(self.twin, self.place / "rewritten")
        return self.place / "rewritten"


# --- the round trips; each gives what differs, or nothing ----------------------------------------


def _rewrites(trips: _Trips) -> str:
    """Without a rewritten site the other checks would compare the model with itself."""
    if any(row[2] == "rewritten" for row in trips.digests):
        return ""
    report = report_of(trips.twin)
    reasons = [*(s.reason for s in report.sites if s.reason), *report.notes]
    why = reasons[0] if reasons else "no attention was found"
    return f"no site was rewritten, so the round trips show nothing: {why}"


def _restores(trips: _Trips) -> str:
    twin = trips.optimized(copy.deepcopy(trips.plain))
    trips.run(twin)
    restore(twin)
    if twin.__dict__.get(COMPILED) is not None:
        return "something is still installed on the model"
    reason = different("the state of the restored model", trips.state, tensors_of(twin))
    return reason or unequal("the restored model", trips.want, trips.run(twin))


def _repeats(trips: _Trips) -> str:
    twin = trips.optimized(trips.optimized(copy.deepcopy(trips.plain)))
    found = trips.run(twin)
    reason = _other_sites("optimized twice", trips.digests, _digests(twin))
    reason = reason or different("the state after two rewritings", trips.state, tensors_of(twin))
    return reason or unequal("the model optimized twice", trips.ours, found)


def _replans(trips: _Trips) -> str:
    """The plan as text, read again, on a fresh copy."""
    plan = Plan(
        requests_of(trips.twin),
        target_of(trips.twin),
        kind=type(trips.plain).__name__,
        config=config_of({}),
        parameters=parameters_of(trips.twin),
    )
    path = trips.place / "plan.json"
    path.write_text(json.dumps(plan.to_dict()), encoding="utf-8")
    read = Plan.read(path)
    fresh = copy.deepcopy(trips.plain)
    read.check_model(path, fresh)
    found = trips.run(optimize(fresh, *read.passes, target=read.target))
    reason = _other_sites("from the plan", trips.digests, _digests(fresh))
    return reason or unequal("a fresh model with the plan", trips.ours, found)


def _loads(trips: _Trips) -> str:
    loaded = _alike(load(trips.saved), trips.plain)
    found = trips.run(loaded)
    reason = different("the state of the loaded model", trips.state, tensors_of(loaded))
    reason = reason or unequal("the loaded model", trips.ours, found)
    changed = changed_sites(trips.saved, loaded)
    return reason or (f"it is computed by another formula: {changed[0]}" if changed else "")


def _loads_plainly(trips: _Trips) -> str:
    """What everybody else finds in the directory: the original."""
    directory, kind = trips.saved, cast(Any, type(trips.plain))
    plain = kind.from_pretrained(str(directory), local_files_only=True, dtype="auto")
    found = trips.run(_alike(plain, trips.plain))
    what = "the model that plain transformers loads"
    reason = different(f"the state of {what}", trips.state, tensors_of(plain))
    return reason or unequal(what, trips.want, found)


def _exports(trips: _Trips) -> str:
    path = trips.place / "model.onnx"
    try:
        # whether it agrees is judged below, on a file that was loaded from the disk
        report = export_onnx(
            trips.twin, trips.inputs, path, check_inputs=[], tolerance=float("inf")
        )
    except ExportError as error:
        return _unless_plain_fails(trips, error)
    if all(isinstance(n, int) for dims in report.inputs.values() for n in dims):
        return "the file takes inputs of one shape only: no batch or length of it may change"
    named = NamedCall(trips.twin, trips.inputs)
    with inference(trips.twin):
        expected = named(named.tree.tensors)
    wanted = dict(zip(named.outputs(expected), expected.tensors, strict=True))
    given = dict(zip(named.tree.names, named.tree.tensors, strict=True))
    try:
        compare(run_file(path, given), wanted, None, "the inputs of this check")
    except ExportError as error:
        return str(error)
    return ""


def _unless_plain_fails(trips: _Trips, error: ExportError) -> str:
    """Why the rewritten model is not exported, if the plain one is.

    Raises:
        Skipped: if the plain one is not either.
    """
    with _place(None) as place:
        plain, path = copy.deepcopy(trips.plain), place / "plain.onnx"
        try:
            export_onnx(plain, trips.inputs, path, check_inputs=[], tolerance=float("inf"))
        except ExportError as also:
            raise Skipped(f"the plain model is not exported either: {also}") from also
    return f"the plain model is exported, the rewritten one is not: {error}"


CHECKS: dict[str, Callable[[_Trips], str]] = {
    "rewrite": _rewrites,
    "restore": _restores,
    "optimize twice": _repeats,
    "plan": _replans,
    "save and load": _loads,
    "plain load": _loads_plainly,
    "export": _exports,
}
"""By name, in the order in which they run."""


def _outcome(name: str, case: str, check: Callable[[_Trips], str], trips: _Trips) -> Outcome:
    verdict: Verdict
    try:
        reason = check(trips)
        verdict = "failed" if reason else "passed"
    except Skipped as skip:
        verdict, reason = "skipped", str(skip)
    except Exception as error:
        text = " ".join(str(error).split())
        verdict, reason = "failed", f"it raises {type(error).__name__}: {text}"
    return Outcome(name, case, verdict, reason)


# --- sites, models and files ---------------------------------------------------------------------


def _other_sites(
    what: str, want: Sequence[tuple[Any, ...]], found: Sequence[tuple[Any, ...]]
) -> str:
    if len(want) != len(found):
        return f"{what}, {len(found)} sites are seen, {len(want)} before"
    for x, y in zip(want, found, strict=True):
        if x != y:
            return f"{what}, {y[0]} is {y[2]} by {', '.join(y[5]) or 'nothing'}, before {x[2:]}"
    return ""


def _digests(module: nn.Module) -> list[tuple[Any, ...]]:
    """Name, graph, decision, formulas before and after, requests and implementation of a site."""
    rows = []
    for s in report_of(module).sites:
        formulas = tuple(x.digest() if x is not None else "" for x in (s.site.spec, s.after))
        rows.append((s.site.name, s.graph, s.decision, *formulas, s.passes, s.lowering))
    return rows


def _plain(model: nn.Module) -> nn.Module:
    """A copy with nothing installed on it, in eval mode."""
    twin = made_plain(copy.deepcopy(model))
    for module in twin.modules():
        module.__dict__.pop(COMPILED, None)
    return twin.eval()


def _alike(loaded: Any, plain: Any) -> nn.Module:
    """Loaded with the attention code of the original, a setting that a directory does not hold."""
    wanted = getattr(plain.config, "_attn_implementation", None)
    if wanted and wanted != getattr(loaded.config, "_attn_implementation", None):
        loaded.set_attn_implementation(wanted)
    result: nn.Module = loaded.eval()
    return result


def _everywhere(items: Sequence[str | Pass | Request]) -> tuple[Request, ...]:
    """The requests, made to rewrite short inputs too."""
    changes: dict[str, Any] = {"from_scores": 0}
    return tuple(
        replace(r, action=replace(r.action, **changes))
        if getattr(r.action, "from_scores", 0) is None
        else r
        for r in read_requests(items or ("fuse",))
    )


def _text(item: str | Pass | Request) -> str:
    return item if isinstance(item, str) else item.text


def _call(inputs: Any) -> Call:
    return Call.of(inputs, 0, gradients=False)


@contextmanager
def _place(directory: str | Path | None) -> Iterator[Path]:
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="round-trips-") as name:
            yield Path(name)
        return
    if not Path(directory).is_dir():
        raise InputError(f"{directory} is not a directory; make it first")
    yield Path(directory)
