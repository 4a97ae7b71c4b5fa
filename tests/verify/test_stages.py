"""Which stage differs, on operands alone: no model, so every stage and dtype can be tried."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
from sympy import Float, Integer, Symbol
from torch import Tensor

from rewriter import symbols as sym
from rewriter.report import SiteReport
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.symbols import Read
from rewriter.verify.bisect import Culprit
from rewriter.verify.diagnosis import diagnosis
from rewriter.verify.guesses import Seen, misread_stage
from rewriter.verify.reverting import Recorded
from rewriter.verify.script import Drawn, op_script, smallest
from rewriter.verify.stages import Operands, changed_stage, lowered, run, stage_of
from rewriter.watch import SiteCall

SPEC = SoftmaxSpec(
    scale=Float(0.5),
    score=3 * sympy.tanh(sym.s / 3) + Read(Symbol("slopes"), sym.h) * (sym.k - sym.q),
    mask=(sym.k <= sym.q) & sympy.Ne(Read(Symbol("pad"), sym.b, sym.k), 0),
    masked="zero",
    sink=Read(Symbol("sinks"), sym.h),
    heads=sym.Where(sym.h < 1, Float(0.5), Integer(1)),
    tensors=(
        TensorArg("slopes", "float32", 1),
        TensorArg("pad", "bool", 2),
        TensorArg("sinks", "float32", 1),
    ),
)
PLAIN = SoftmaxSpec(scale=Float(0.5), mask=sym.k <= sym.q)


def operands(dtype: torch.dtype = torch.float32) -> Operands:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    pad = torch.tensor([[True] * 5, [False, False, True, True, True]])
    tensors = {"slopes": torch.rand(4) + 0.5, "pad": pad, "sinks": torch.randn(4)}
    return Operands(2 * q, k, v, tensors, {}).map(lambda x: x.to(dtype))


def interleaved(given: Operands) -> Operands:
    groups = given.q.shape[1] // given.k.shape[1]
    return replace(given, k=given.k.repeat(1, groups, 1, 1), v=given.v.repeat(1, groups, 1, 1))


def shifted(spec: SoftmaxSpec) -> SoftmaxSpec:
    moved = {sym.k <= sym.q: sym.k < sym.q + 2}
    return replace(spec, mask=spec.mask.subs(moved))


FAULTS: dict[str, tuple[str, Callable[[SoftmaxSpec, Operands], Tensor]]] = {
    "groups interleaved": ("operands", lambda s, x: run(s, interleaved(x))),
    "keys as values": ("operands", lambda s, x: run(s, replace(x, v=x.k))),
    "scale doubled": ("score", lambda s, x: run(replace(s, scale=2 * s.scale), x)),
    "scale missing": ("score", lambda s, x: run(replace(s, scale=Integer(1)), x)),
    "cap dropped": (
        "score",
        lambda s, x: run(replace(s, score=s.score.replace(sympy.tanh, lambda y: y)), x),
    ),
    "mask off by one": ("mask", lambda s, x: run(shifted(s), x)),
    "nan without a key": (
        "normaliser",
        lambda s, x: run(s if s.sink is not None else replace(s, masked="nan"), x),
    ),
    "sink dropped": ("normaliser", lambda s, x: run(replace(s, sink=None), x)),
    "factor dropped": ("heads", lambda s, x: run(replace(s, heads=Integer(1)), x)),
    "raises": ("operands", lambda s, x: x.q @ x.q),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAULTS)
def test_the_first_wrong_stage_is_named(name: str, dtype: torch.dtype) -> None:
    stage, function = FAULTS[name]
    found = stage_of(function, replace(SPEC, sink=None) if "nan" in name else SPEC, operands(dtype))
    assert found is not None
    assert found[0] == stage, found


@pytest.mark.parametrize("gradients", [False, True], ids=["outputs", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [SPEC, PLAIN, replace(SPEC, sink=None)])
def test_honest_implementations_differ_in_no_stage(
    spec: SoftmaxSpec, dtype: torch.dtype, gradients: bool
) -> None:
    for target in ("auto", "torch.blocked"):
        given = operands(dtype)
        assert stage_of(lowered(target), spec, given, gradients=gradients) is None


CHANGES = {
    "score": replace(SPEC, scale=2 * SPEC.scale),
    "mask": shifted(SPEC),
    "normaliser": replace(SPEC, sink=None),
    "heads": replace(SPEC, heads=Integer(1)),
}


@pytest.mark.parametrize("stage", CHANGES)
def test_the_stage_that_a_pass_changed_is_named(stage: str) -> None:
    found = changed_stage(SPEC, CHANGES[stage], operands())
    assert found is not None
    assert found[0] == stage
    assert changed_stage(SPEC, SPEC, operands()) is None


@pytest.mark.parametrize("stage", [*CHANGES, "operands"])
def test_the_stage_that_was_misread_is_named(stage: str) -> None:
    """The model computes the changed formula, or on other operands; `SPEC` was read."""
    given = operands().map(Tensor.double)
    meant = CHANGES.get(stage, SPEC)
    gold = run(meant, given if stage != "operands" else replace(given, k=given.v, v=given.k))
    found = misread_stage(SPEC, Seen(given, gold, gold.float()))
    assert found is not None
    assert found[0] == stage, found
    gold = run(SPEC, given)
    assert misread_stage(SPEC, Seen(given, gold, gold.float())) is None


# --- programs -------------------------------------------------------------------------------------


def test_a_program_draws_the_smallest_operands_that_show_the_fault() -> None:
    drawn = smallest(Drawn.like(SPEC, operands()), lambda x: x.k.shape[2] > 2)
    assert drawn is not None
    assert {n: drawn.sizes[n] for n in "BHGLM"} == {"B": 1, "H": 1, "G": 1, "L": 1, "M": 3}
    assert drawn.operands().tensors["pad"].shape == (1, 3)
    assert smallest(drawn, lambda x: False) is None


def recorded(spec: SoftmaxSpec, after: SoftmaxSpec, given: Operands) -> Recorded:
    def call(x: Operands) -> SiteCall:
        return SiteCall("layer", run(spec, x), x.q, x.k, x.v, *map(tuple, x.of(spec)))

    report = SiteReport(Site("layer", 0, spec=spec), 0, after, "rewritten", "torch", "", ("p",))
    return Recorded(report, False, call(given), call(given.map(Tensor.double)))


def test_a_fault_that_random_operands_do_not_show_takes_those_of_the_model_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The fault needs a query of 100; the operands are saved, with heads inside as they were."""
    from rewriter.verify import diagnosis as module

    given = operands()
    given.q[0, 0, 0, 0] = 100.0
    inside = given.q.transpose(1, 2).contiguous().transpose(1, 2)

    def faulty(target: str) -> Callable[[SoftmaxSpec, Operands], Tensor]:
        return lambda spec, x: run(spec, x) * (2 if float(x.q.max()) > 50 else 1)

    monkeypatch.setattr(module, "lowered", faulty)
    found = diagnosis(
        recorded(PLAIN, PLAIN, replace(given, q=inside)), None, "auto", gradients=False
    )
    assert found is not None
    culprit = Culprit("layer", found.stage, found.at, "", found.script, "", found.operands)
    culprit.save(tmp_path / "it.py")
    assert (tmp_path / "it.safetensors").exists()
    assert 'q = saved["q"].new_empty_strided(' in culprit.script
    done = subprocess.run([sys.executable, str(tmp_path / "it.py")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), "without the fault they agree"
    assert "out: agrees" in done.stdout


def test_an_honest_site_has_no_finding() -> None:
    seen = recorded(SPEC, SPEC, operands())
    assert diagnosis(seen, seen, "auto", gradients=True) is None


def test_gradients_of_a_program_agree_where_there_is_no_fault() -> None:
    script = op_script("x", SPEC, "torch.blocked", Drawn.like(SPEC, operands()), gradients=True)
    with pytest.raises(SystemExit) as end:
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    assert end.value.code == 0
