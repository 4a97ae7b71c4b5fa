"""`bisect` names the site and the stage of faults that are planted among twelve sites.

A capture of twelve sites takes torch seconds. So sizes are constants here, which makes it three
times faster, and faults of implementations share a model.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

import rewriter
from rewriter import decide, lowering, op
from rewriter import symbols as sym
from rewriter.errors import InputError
from rewriter.kernels import torch_backward
from rewriter.passbase import Pass, Request, Selector, option
from rewriter.report import SiteReport
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec
from rewriter.verify.bisect import Culprit, bisect
from rewriter.verify.diagnosis import Finding, diagnosis
from rewriter.verify.reverting import Recorded
from rewriter.verify.script import reloaded
from rewriter.verify.stages import Operands
from rewriter.watch import SiteCall, Watched
from verify.many_sites import (
    BIAS,
    CAP,
    EMPTY,
    FORMS,
    GROUPS,
    PLAIN_AGAIN,
    SINK,
    SLOPES,
    WIDE,
    WINDOW,
    Row,
    inputs,
)
from verify.small_models import Shape, Tower, batch

FUSE = "fuse(from_scores=0)"


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    right = torch.compile

    def constant(function: Any, *, backend: Any, dynamic: bool) -> Any:
        return right(function, backend=backend, dynamic=False)

    monkeypatch.setattr(torch, "compile", constant)
    return Row()


def run_script(culprit: Culprit) -> tuple[int, str]:
    """Its exit status and what it prints, in this process and so under its patches."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        exec(compile(culprit.script, "culprit", "exec"), {"__name__": "__main__"})
    return int(str(end.value.code)), out.getvalue()


# --- implementations ------------------------------------------------------------------------------

Forward = Callable[..., Tensor]


@contextlib.contextmanager
def faulty(change: Callable[[Forward], Forward]) -> Iterator[None]:
    """For a while, every implementation in torch is a wrong one."""
    before = dict(lowering._TARGETS)
    caches = (lowering._chosen, op._chosen_for)
    try:
        for name, choices in before.items():
            wrong = tuple(
                replace(x, forward=change(x.forward)) if x.name.startswith("torch") else x
                for x in choices
            )
            lowering._TARGETS[name] = wrong
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        lowering._TARGETS.update(before)
        for cache in caches:
            cache.cache_clear()


def next_slope(forward: Forward) -> Forward:
    def wrong(
        spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Any, sizes: Any
    ) -> Tensor:
        by_head = spec.score.has(sym.h) and not spec.opaque_reads()
        tensors = [x.roll(1) if by_head and x.dim() == 1 else x for x in tensors]
        return forward(spec, q, k, v, tensors, sizes)

    return wrong


def interleaved(forward: Forward) -> Forward:
    def wrong(
        spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Any, sizes: Any
    ) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and k.shape[1] > 1:
            k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)
        return forward(spec, q, k, v, tensors, sizes)

    return wrong


def nan_without_key(forward: Forward) -> Forward:
    def wrong(spec: SoftmaxSpec, *rest: Any) -> Tensor:
        if spec.masked == "zero" and spec.sink is None:
            spec = replace(spec, masked="nan")
        return forward(spec, *rest)

    return wrong


def last_block_dropped(forward: Forward) -> Forward:
    def wrong(
        spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Any, sizes: Any
    ) -> Tensor:
        if q.shape[3] == 6:  # a head dim that no other site has
            rows = v.shape[2] // 4 * 4
            k, v = k.clone(), v.clone()
            v[:, :, rows:] = 0
        return forward(spec, q, k, v, tensors, sizes)

    return wrong


def sink_twice(forward: Forward) -> Forward:
    def wrong(spec: SoftmaxSpec, *rest: Any) -> Tensor:
        if spec.sink is not None:
            spec = replace(spec, sink=spec.sink + sympy.log(2))
        return forward(spec, *rest)

    return wrong


@contextlib.contextmanager
def without_gradient_of_a_bias() -> Iterator[None]:
    right = torch_backward.backward

    def wrong(*args: Any, **options: Any) -> list[Tensor | None]:
        found = right(*args, **options)
        has_bias = bool(args[0].opaque_reads())
        return [
            torch.zeros_like(x) if has_bias and n >= 3 and x is not None else x
            for n, x in enumerate(found)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backward, "backward", wrong)
        yield


LOWERING_FAULTS = (
    (faulty(next_slope), SLOPES, "score"),
    (faulty(interleaved), GROUPS, "operands"),
    (faulty(nan_without_key), EMPTY, "normaliser"),
    (faulty(sink_twice), SINK, "normaliser"),
    (without_gradient_of_a_bias(), BIAS, "gradient"),
    (faulty(last_block_dropped), WIDE, "operands"),
)


def test_a_fault_of_an_implementation_is_found_and_shown(row: nn.Module) -> None:
    model = rewriter.optimize(row, FUSE)
    assert bisect(row, model, inputs()) is None
    for fault, layer, stage in LOWERING_FAULTS:
        with fault:
            culprit = bisect(row, model, inputs())
            assert culprit is not None
            assert run_script(culprit)[0] == 1, culprit
        assert (culprit.at, culprit.site, culprit.stage) == ("lowering", f"layers.{layer}", stage)
        assert run_script(culprit)[0] == 0, culprit


# --- passes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faulty(Pass):
    """Says that it changes nothing, and does.

    Contract: exact, which it breaks. Patterns: all.
    """

    name = "faulty"
    contract = "exact"
    stage = "none"
    identity = "fuse"
    kind: str = option("what it does wrong", default="mask")

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        change = {
            "mask": {"mask": spec.mask.subs(sym.k, sym.k - 1)},
            "scale": {"scale": spec.scale * 2},
            "cap": {"score": sym.s},
            "sink": {"sink": sympy.Integer(0)},
            "heads": {"heads": sym.Where(sym.h < 1, sympy.Float(0.5), 1)},
        }
        return replace(spec, **change[self.kind])


PASS_FAULTS = (
    ("mask", WINDOW, "mask"),
    ("scale", PLAIN_AGAIN, "score"),
    ("cap", CAP, "score"),
    ("sink", SLOPES, "normaliser"),
    ("heads", 11, "heads"),
)


@pytest.mark.parametrize(("kind", "layer", "stage"), PASS_FAULTS)
def test_a_pass_that_breaks_its_contract_is_found_and_shown(
    row: nn.Module, kind: str, layer: int, stage: str
) -> None:
    passes = (FUSE, Request(Faulty(kind=kind), Selector.parse(f"@ {layer}")))
    culprit = bisect(row, rewriter.optimize(row, *passes), inputs(), gradients=False)
    assert culprit is not None
    assert (culprit.at, culprit.site, culprit.stage) == ("pass", f"layers.{layer}", stage)
    assert "faulty" in culprit.reason
    assert run_script(culprit)[0] == 1  # the specs are in it: it needs no patch


# --- lifting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "stage"), [(7, "score"), (9, "mask"), (GROUPS, "operands")])
def test_a_formula_that_was_read_wrongly_is_found_and_shown(
    row: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layer: int, stage: str
) -> None:
    right = decide._lifted

    def wrong(found: Any, captured: Any, verdicts: Any) -> Any:
        lifted = right(found, captured, verdicts)
        if lifted.site.path != f"layers.{layer}":
            return lifted
        spec = lifted.site.spec
        if stage == "operands":
            return replace(lifted, k=lifted.v, v=lifted.k)
        changed = {
            "score": {"scale": spec.scale * 2},
            "mask": {"mask": spec.mask & (sym.k < sym.q)},
        }
        return replace(lifted, site=replace(lifted.site, spec=replace(spec, **changed[stage])))

    monkeypatch.setattr(decide, "_lifted", wrong)
    culprit = bisect(row, rewriter.optimize(row, FUSE), inputs(), gradients=False)
    assert culprit is not None
    assert (culprit.at, culprit.site, culprit.stage) == ("lift", f"layers.{layer}", stage)
    if stage == "score":
        place = tmp_path / "culprit.py"
        culprit.save(place)
        done = subprocess.run([sys.executable, str(place)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, "")
        assert "out: max error" in done.stdout


def test_a_half_type_and_sizes_that_are_not_constants() -> None:
    torch.manual_seed(0)
    tower = Tower(Shape(dim=16, layers=1)).to(torch.bfloat16)
    data = batch(0, dim=16, length=7, dtype=torch.bfloat16)
    model = rewriter.optimize(tower, FUSE)
    assert bisect(tower, model, data) is None
    with faulty(interleaved):
        culprit = bisect(tower, model, data)
        assert culprit is not None
        assert run_script(culprit)[0] == 1
    assert (culprit.at, culprit.site, culprit.stage) == (
        "lowering",
        "blocks.0.attention",
        "operands",
    )


def test_a_fault_that_watched_graphs_do_not_show_is_searched_for_in_graphs_of_their_own(
    row: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Row(forms=FORMS[:4])
    model = rewriter.optimize(few, FUSE)
    monkeypatch.setattr(Watched, "ours", lambda w, args, only=None: w.base.run(args))
    with faulty(next_slope):
        culprit = bisect(few, model, inputs(), gradients=False)
    assert culprit is not None
    assert (culprit.at, culprit.site, culprit.stage) == ("lowering", "layers.2", "score")


def strided() -> dict[str, Tensor]:
    """Layouts that operands have in models."""
    x = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
    return {
        "contiguous": x,
        "heads inside": x.transpose(1, 2).contiguous().transpose(1, 2),
        "keys inside": x.mT.contiguous().mT,
        "part of a projection": torch.cat([x, x], -1)[..., :5],
        "expanded": x[:, :1].expand(2, 3, 4, 5),
        "expanded and turned": x[:1].mT.contiguous().mT.expand(2, 3, 4, 5),
        "windows": torch.arange(90.0).as_strided((2, 3, 4, 5), (40, 12, 3, 1)),
    }


@pytest.mark.parametrize("name", strided())
def test_operands_are_read_with_the_strides_that_they_had(name: str) -> None:
    x = strided()[name]
    again = reloaded(Operands(x, x, x, {"bias": x}, {}))
    for found in (again.q, again.k, again.v, again.tensors["bias"]):
        assert torch.equal(found, x)
        if name == "windows":  # one number has several places: it cannot be filled
            assert found.is_contiguous()
        else:
            assert found.stride() == x.stride()


SPEC = SoftmaxSpec()


def recorded(x: Tensor) -> Recorded:
    line = SiteReport(Site("layers.0", 0, spec=SPEC), 0, SPEC, "rewritten", "torch.blocked")
    return Recorded(line, False, SiteCall("layers.0", x, x, x, x, (), ()), None)


def found_on(x: Tensor, shows: Callable[[Tensor], bool]) -> Finding:
    """What is found of an implementation that goes wrong where the keys are such."""

    def change(forward: Forward) -> Forward:
        def wrong(spec: SoftmaxSpec, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
            out = forward(spec, q, k, *rest)
            return out + 1 if shows(k) else out

        return wrong

    with faulty(change):
        found = diagnosis(recorded(x), None, "torch.blocked", gradients=False)
    assert found is not None
    return found


def test_a_program_with_a_file_shows_what_depends_on_strides() -> None:
    x = strided()["keys inside"]
    found = found_on(x, lambda k: k.dim() == 4 and k.stride(2) == 1 and k.shape[3] > 1)
    assert "new_empty_strided" in found.script
    assert found.operands["k"].is_contiguous()


def test_a_program_that_would_not_show_the_fault_is_left_out() -> None:
    x = strided()["keys inside"]
    place = x.data_ptr()  # of the model alone
    found = found_on(x, lambda k: k.data_ptr() == place)
    assert (found.at, found.stage, found.script, found.operands) == ("lowering", "operands", "", {})
    assert "there is no program, because with operands read from a file the two agree" in (
        found.reason
    )
    culprit = Culprit("layers.0", found.stage, found.at, found.reason)
    assert "`save` writes" not in str(culprit)
    with pytest.raises(InputError, match="there is no program that shows it"):
        culprit.save("culprit.py")


# --- no site, no fault, no model ------------------------------------------------------------------


def test_a_function_that_is_changed_on_purpose_is_no_fault(row: nn.Module) -> None:
    """Beside it, a fault is still found."""
    few = Row(forms=FORMS[:4])
    model = rewriter.optimize(few, "heads.scale(heads=[0], by=0.5) @ 2", FUSE)
    assert bisect(few, model, inputs(), gradients=False) is None
    with faulty(next_slope):
        culprit = bisect(few, model, inputs(), gradients=False)
    assert culprit is not None
    assert (culprit.at, culprit.site, culprit.stage) == ("lowering", "layers.2", "score")


def test_a_model_with_other_weights_has_no_culprit_among_its_sites(row: nn.Module) -> None:
    few, other = Row(forms=FORMS[:4]), Row(forms=FORMS[:4])
    culprit = bisect(other, rewriter.optimize(few, FUSE), inputs(), gradients=False)
    assert culprit is not None
    assert (culprit.at, culprit.site, culprit.stage) == ("none", "", "none")
    assert "other weights" in str(culprit)
    with pytest.raises(InputError, match="there is no program"):
        culprit.save("culprit.py")


def test_a_model_that_was_not_optimized_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"call rewriter.optimize\(model, ...\) first"):
        bisect(Row(), Row(), inputs())
