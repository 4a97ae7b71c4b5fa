"""The conformance suite over the registries, in its fast choice; and that it catches faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.kernels import torch_backward
from rewriter.lowering import BLOCKED, LOWERINGS, REFERENCE, SDPA, TRITON, Lowering, Shapes
from rewriter.passbase import Pass
from rewriter.reference import reference
from rewriter.registry import PASSES
from rewriter.spec import SoftmaxSpec
from rewriter.testing import check, check_backward, check_lowering, grid, worker
from rewriter.testing.cases import BASES, LAYOUTS, Case, Dims
from rewriter.testing.conformance import lowering_rows, spec_rows
from rewriter.testing.onnx_runtime import ONNX
from rewriter.testing.operands import operands

# --- everything that is registered ---------------------------------------------------------------


@pytest.mark.parametrize("lowering", [*LOWERINGS, ONNX], ids=lambda x: x.name)
def test_the_lowering_conforms(lowering: Lowering) -> None:
    outcomes = check_lowering(lowering)
    assert outcomes.ok, str(outcomes)
    assert not [r for r in outcomes.rows if r.reason.startswith("NOT RUN")], str(outcomes)


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)
def test_the_pass_conforms(kind: type[Pass]) -> None:
    outcomes = check(kind)
    assert outcomes.ok, str(outcomes)
    assert kind.patterns
    assert kind.laws
    assert kind.examples
    checks = {row.check for row in outcomes.rows if row.verdict == "passed"}
    assert {"purity", "text", "model", "onnx, output"} <= checks
    assert "identity" in checks or (kind.contract == "approximate" and not kind.identity)
    kernels = [row for row in outcomes.rows if row.check == "triton, output"]
    assert kernels
    if kind.name == "linear.window_tail":
        assert all("near keys beside linear ones have no kernel" in row.reason for row in kernels)
    else:
        assert "triton, output" in checks


def test_the_recomputing_backward_conforms() -> None:
    outcomes = check_backward()
    assert outcomes.ok, str(outcomes)


# --- what the cases cover -------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_the_grid_covers_what_it_promises(full: bool) -> None:
    cases = grid.cases(full=full)
    dims = [c.dims for c in cases]
    assert {1, 2, 63, 64, 65, 129} <= {d.q_len for d in dims}
    assert {16, 60, 64, 128} <= {d.head_dim for d in dims}
    assert {1, 3, 8} <= {d.heads // d.kv_heads for d in dims}
    assert {(1, 65), (20, 65), (65, 20)} <= {(d.q_len, d.kv_len) for d in dims}
    assert {c.dtype for c in cases} == {torch.float32, torch.bfloat16, torch.float16}
    assert {c.layout for c in cases} == set(LAYOUTS)
    assert {c.hidden for c in cases} == {"left", "right", "all"}
    softmax = [c.spec for c in cases if isinstance(c.spec, SoftmaxSpec)]
    assert {spec.masked for spec in softmax} == {"zero", "mean", "add", "nan"}
    assert {c.name.split(", ")[0] for c in cases} >= {name.split(", ")[0] for name in BASES}
    assert len({c.text for c in cases}) == len(cases)
    assert {c.logits for c in grid.extremes(full=full)} == {1e4, 30.0}


def test_operands_are_the_same_every_time_and_lie_between_nans() -> None:
    for layout in LAYOUTS:
        case = Case.of("alibi", Dims(q_len=5, kv_len=7), layout=layout)
        x, again = operands(case), operands(case)
        for one, other in zip(
            (x.q, x.k, x.v, *x.tensors), (again.q, again.k, again.v, *again.tensors), strict=True
        ):
            assert torch.equal(one, other)
            assert one.isfinite().all()
            whole = torch.tensor([], dtype=one.dtype).set_(one.untyped_storage())  # type: ignore[call-overload]
            assert whole[:256].isnan().all()
            assert whole[-256:].isnan().all()


def test_a_tensor_has_the_same_values_in_every_spec_that_reads_it() -> None:
    one, two = (operands(Case.of(name)) for name in ("padding", "sink, padding"))
    assert torch.equal(one.tensors[0], two.tensors[1])


def test_the_size_of_an_unknown_tensor_follows_from_its_reads() -> None:
    (keys,) = operands(Case.of("key bias", Dims(q_len=3, kv_len=5))).tensors
    assert keys.shape == (2, 5)


def test_a_case_reads_back_from_json() -> None:
    for case in grid.cases()[::7]:
        assert Case.from_dict(case.to_dict()) == case


# --- faults are caught ----------------------------------------------------------------------------


def around(change: Callable[..., Tensor]) -> Lowering:
    """The reference with something changed."""

    def forward(spec: SoftmaxSpec, *given: Any) -> Tensor:
        return change(spec, *given)

    return Lowering("faulty", BLOCKED.supports, forward, records=True)


def last_key_dropped(spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    if k.shape[2] == 65 and not spec.tensors and spec.is_unmasked:
        return reference(spec, q, k[:, :, :64], v[:, :, :64], *rest)
    return reference(spec, q, k, v, *rest)


def contiguous_assumed(spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return reference(spec, q, k.as_strided(k.shape, torch.empty(k.shape).stride()), v, *rest)


def without_gradient_of_bias(
    spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], sizes: Any
) -> Tensor:
    return reference(spec, q, k, v, [x.detach() for x in tensors], sizes)


def exponential_without_maximum(
    spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> Tensor:
    if spec.sink is None and spec.is_unmasked and spec.is_plain_score and not spec.tensors:
        weights = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * spec.scale).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return reference(spec, q, k, v, *rest)


def different_each_time(spec: SoftmaxSpec, q: Tensor, *rest: Any) -> Tensor:
    out = reference(spec, q, *rest)
    return out * (1 + 1e-7 * torch.randint(0, 2, out.shape))


def cache_offset_missing(spec: SoftmaxSpec, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    if spec == Case.of("causal").spec and q.shape[2] < k.shape[2]:
        spec = Case.of("causal from the start").spec
    return reference(spec, q, k, *rest)


def writes_to_its_input(spec: SoftmaxSpec, q: Tensor, *rest: Any) -> Tensor:
    out = reference(spec, q, *rest)
    if not q.requires_grad:
        q *= 1.0001
    return out


def leaves_a_row_unwritten(
    spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> Tensor:
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype)
    made = reference(spec, q, k, v, *rest)
    out[:, :, :64] = made[:, :, :64]
    return out


def in_another_dtype(spec: SoftmaxSpec, *given: Any) -> Tensor:
    return reference(spec, *given).double()


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (last_key_dropped, "output"),
        (contiguous_assumed, "output"),
        (without_gradient_of_bias, "gradient"),
        (exponential_without_maximum, "extremes"),
        (different_each_time, "determinism"),
        (cache_offset_missing, "decode = parallel"),
        (writes_to_its_input, "output"),
        (leaves_a_row_unwritten, "output"),
        (in_another_dtype, "output"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_fault_in_a_lowering_is_caught(fault: Callable[..., Tensor], check: str) -> None:
    rows = lowering_rows(around(fault), grid.plan("call"))
    assert any(row.verdict == "failed" and row.check == check for row in rows)


def test_a_backward_without_the_gradient_of_a_bias_is_caught() -> None:
    def faulty(*given: Any, **more: Any) -> list[Tensor | None]:
        found = torch_backward.backward(*given, **more)
        return [*found[:3], *(None for _ in found[3:])]

    outcomes = check_backward(faulty)
    assert "the gradient of slope" in " ".join(row.reason for row in outcomes.failures)


def test_a_lowering_that_raises_fails() -> None:
    def broken(*given: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    outcomes = check_lowering(replace(SDPA, forward=broken, records=False))
    assert outcomes.failures[0].reason == "RuntimeError: no such kernel"


# --- nothing is not enough ------------------------------------------------------------------------


def test_a_lowering_that_supports_nothing_does_not_pass() -> None:
    def supports(spec: SoftmaxSpec, shapes: Shapes) -> str | None:
        return "the moon is in the wrong phase"

    outcomes = check_lowering(Lowering("shy", supports, REFERENCE.forward))
    assert not outcomes.failures
    assert not outcomes.ok
    assert "NOTHING WAS CHECKED" in str(outcomes)
    assert "the moon is in the wrong phase" in str(outcomes)


def test_a_backend_that_cannot_run_is_a_loud_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda name: None)
    outcomes = check_lowering(TRITON)
    assert not outcomes.ok
    assert outcomes.rows[0].reason == "NOT RUN: triton is not installed"


def test_a_worker_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    worker._worker.cache_clear()
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    (row,) = worker.interpreted([Case.of("plain")])
    assert row.verdict == "failed"
    assert row.reason == "the process of Triton's interpreter ended: it said nothing"


def test_unrecorded_gradients_are_said_to_be_missing() -> None:
    rows = list(
        spec_rows(replace(BLOCKED, name="mine"), [Case.of("plain", Dims(q_len=3, kv_len=3))])
    )
    assert [row.verdict for row in rows] == ["skipped", "passed"]
    assert "the recomputing backward" in rows[0].reason
