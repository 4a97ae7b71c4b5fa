"""`verify` on small hand-written models: honest rewrites pass, planted faults do not."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.errors import InputError, NotEquivalent
from rewriter.verify import verify
from rewriter.verify.call import Run, coarsest_dtype
from rewriter.verify.judge import Judge
from rewriter.verify.leaves import Leaves
from verify.small_models import FAULTS, FORMS, Shape, Tower, batch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tower(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    return Tower(shape).to(dtype)


def random_case(seed: int) -> tuple[Tower, Tower, dict[str, Tensor]]:
    """A random model in two honest forms, and inputs."""
    pick = random.Random(seed)
    heads = pick.choice([1, 2, 4])
    shape = Shape(
        dim=pick.choice([16, 32, 64]),
        heads=heads,
        kv_heads=pick.choice([h for h in (1, 2, 4) if heads % h == 0]),
        layers=pick.choice([1, 1, 2, 3]),
        causal=pick.random() < 0.5,
        cap=pick.choice([0.0, 5.0]),
        slopes=pick.random() < 0.3,
        classes=pick.choice([0, 0, 2, 3]),
    )
    dtype = pick.choice(DTYPES)
    original = tower(shape, dtype, seed).set(form=pick.choice(FORMS))
    new = copy.deepcopy(original).set(form=pick.choice(FORMS))
    length, rows = pick.choice([1, 2, 5, 11, 33]), pick.choice([1, 2, 3])
    return original, new, batch(seed, rows=rows, length=length, dim=shape.dim, dtype=dtype)


@pytest.mark.parametrize("block", range(8))
def test_there_is_no_false_alarm_in_two_hundred_honest_rewrites(block: int) -> None:
    alarms = []
    for seed in range(25 * block, 25 * block + 25):
        report = verify(*random_case(seed), raises=False)
        alarms += [(seed, row.name, row.reason) for row in report.failures]
        assert report.rows
        assert any(row.kind == "gradient" for row in report.rows)
    assert not alarms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_of_two_layers_is_caught(fault: str, dtype: torch.dtype) -> None:
    shape = Shape(
        cap=2.0 if fault == "cap missing" else 0.0,
        slopes=fault in ("bias transposed", "slope of the next head", "cast dropped"),
    )
    for seed in range(2):
        original = tower(shape, dtype, seed)
        wrong = copy.deepcopy(original).set(fault=fault, layers=slice(0, 1))
        # a narrow cast hurts where the sum is large: far keys and steep slopes
        inputs = batch(seed, length=300 if fault == "cast dropped" else 11, dtype=dtype)
        assert not verify(original, wrong, inputs, raises=False).ok


class Scaled(nn.Module):
    """`weight * x`, with a gradient that can be planted wrong."""

    def __init__(self, *, detach: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1.0, 2.0, 8))
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 0.5 + self.weight.detach() * 0.5 if self.detach else self.weight
        return weight * x


def test_a_wrong_gradient_behind_right_outputs_is_caught() -> None:
    x = torch.randn(3, 8)
    report = verify(Scaled(), Scaled(detach=True), x, raises=False)
    assert {row.name: row.ok for row in report.rows} == {
        "output": True,
        "weight": False,
        "inputs.0": True,
    }
    assert verify(Scaled(), Scaled(detach=True), x, gradients=False).ok


def test_a_gradient_that_the_model_lost_counts_as_zero() -> None:
    class Cut(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight.detach() * x

    report = verify(Scaled(), Cut(), torch.randn(3, 8), raises=False)
    assert [row.name for row in report.failures] == ["weight"]


def test_a_failure_raises_with_numbers_and_a_next_step() -> None:
    original = tower(Shape(), torch.float32)
    wrong = copy.deepcopy(original).set(fault="mask off by one")
    with pytest.raises(
        NotEquivalent, match=r"`hidden`: max error .* is allowed .*See report.rows$"
    ) as info:
        verify(original, wrong, batch(0))
    assert info.value.report.failures[0].name == "hidden"
    assert "NOT EQUIVALENT" in str(info.value.report)


def function(body: Callable[[Tensor], Any]) -> nn.Module:
    class Function(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return body(x)

    return Function()


@pytest.mark.parametrize(
    ("ours", "name", "reason"),
    [
        (lambda x: {"a": x}, "b", "the model does not return it"),
        (lambda x: {"a": x, "b": x, "c": x}, "c", "the original does not return it"),
        (lambda x: {"a": x, "b": x[:1]}, "b", "its shape is [1, 8]"),
        (lambda x: {"a": x, "b": x.bfloat16()}, "b", "it is bfloat16, the original gives float32"),
        (lambda x: {"a": x, "b": x / 0}, "b", "where the original is finite"),
    ],
    ids=["missing", "extra", "shape", "dtype", "inf"],
)
def test_another_structure_of_outputs_fails(
    ours: Callable[[Tensor], Any], name: str, reason: str
) -> None:
    report = verify(
        function(lambda x: {"a": x, "b": x}), function(ours), torch.ones(3, 8) * 2, raises=False
    )
    (row,) = [r for r in report.failures if r.kind == "output"]
    assert row.name == name
    assert reason in row.reason


def test_a_model_that_raises_where_the_original_runs_is_not_equivalent() -> None:
    report = verify(nn.Identity(), function(lambda x: x.nope), torch.ones(2), raises=False)
    assert not report.ok
    assert "the original runs, the model raises AttributeError" in report.failures[0].reason


def test_nothing_to_compare_is_not_fine() -> None:
    silent = function(lambda x: {})
    report = verify(silent, silent, torch.ones(2), raises=False)
    assert not report.ok
    with pytest.raises(NotEquivalent, match="nothing was compared"):
        report.raise_if_failed()


@pytest.mark.parametrize(
    "body",
    [lambda x: x[:0], lambda x: {"loss": None}, lambda x: [x[:0], None], lambda x: ()],
    ids=["no elements", "None", "both", "empty"],
)
def test_outputs_without_a_value_are_nothing_to_compare(body: Callable[[Tensor], Any]) -> None:
    report = verify(function(body), function(body), torch.ones(2, 3), raises=False)
    assert not report.ok
    assert "NOT SHOWN: no output was compared" in str(report)


def test_what_weakens_a_result_is_noted() -> None:
    report = verify(nn.Identity(), nn.Identity(), torch.ones(2, dtype=torch.int64))
    assert any("no gradient was compared" in note for note in report.notes)
    model = nn.Linear(2, 2)
    notes = verify(model, model, torch.ones(1, 2)).notes
    assert any("compared with itself" in note for note in notes)
    notes = verify(function(torch.zeros_like), function(torch.zeros_like), torch.ones(1, 2)).notes
    assert any("`output` is one number everywhere" in note for note in notes)


def test_an_original_that_is_not_deterministic_in_its_dtype_bounds_nothing_and_fails() -> None:
    calls = iter(range(100))
    noisy = function(lambda x: x * next(calls))
    report = verify(noisy, noisy, torch.randn(4, 8), gradients=False, raises=False)
    assert "nothing can be said" in report.failures[0].reason


def test_inputs_that_the_original_cannot_take_are_named() -> None:
    with pytest.raises(
        InputError, match=r"cannot be run on these inputs: RuntimeError: mat1 and mat2"
    ):
        verify(nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 3))
    with pytest.raises(InputError, match="inputs of type int cannot be passed"):
        verify(nn.Linear(2, 2), nn.Linear(2, 2), 3)


@pytest.mark.parametrize(
    "inputs", [{"x": "x", "pad": "pad"}, ("x", "pad"), ["x", "pad"]], ids=["dict", "tuple", "list"]
)
def test_inputs_are_keywords_or_positions(inputs: Any) -> None:
    values = batch(0)
    filled = (
        {k: values[k] for k in inputs}
        if isinstance(inputs, dict)
        else type(inputs)(values[k] for k in inputs)
    )
    report = verify(tower(Shape(), torch.float32), tower(Shape(), torch.float32), filled)
    assert sum(row.name.startswith("inputs.") for row in report.rows) == 1


def test_state_is_afterwards_as_before() -> None:
    model = tower(Shape(), torch.float32).train()
    model.blocks[0].attention.eval()
    model.blocks[0].up.weight.grad = torch.ones_like(model.blocks[0].up.weight)
    inputs = batch(0)
    before = copy.deepcopy(inputs)
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    verify(model, copy.deepcopy(model).set(form="sdpa"), inputs)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["blocks.0.up.weight"]
    assert torch.equal(grads["blocks.0.up.weight"], torch.ones_like(grads["blocks.0.up.weight"]))
    assert all(torch.equal(inputs[n], before[n]) and not inputs[n].requires_grad for n in inputs)


def test_state_is_restored_when_a_model_raises() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).train()
    with pytest.raises(InputError):
        verify(model, model, torch.ones(1, 3))
    assert model.training
    assert torch.get_default_dtype() == torch.float32


def test_dropout_is_off_in_the_comparison() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    assert verify(model, copy.deepcopy(model), torch.randn(4, 8)).ok


def test_a_model_compiled_in_place_is_compared_with_what_it_was() -> None:
    model = tower(Shape(), torch.float32)
    inputs = batch(0)
    calls = []

    def wrong(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return {"hidden": model._call_impl(*args, **kwargs)["hidden"] * 1.01}

    model._compiled_call_impl = wrong
    assert verify(model, model, inputs, raises=False).failures[0].name == "hidden"
    assert calls == [1]
    assert model._compiled_call_impl is wrong
    model._compiled_call_impl = lambda *args, **kwargs: model._call_impl(*args, **kwargs)
    report = verify(model, model, inputs)
    assert not any("itself" in note for note in report.notes)


def test_inputs_that_the_model_writes_into_are_fresh_for_every_run() -> None:
    adds = function(lambda x: x.add_(1.0))
    x = torch.zeros(3)
    assert verify(adds, function(lambda x: x + 1.0), x).ok
    assert torch.equal(x, torch.zeros(3))


def test_the_verdict_is_the_same_under_no_grad_and_inference_mode() -> None:
    original = tower(Shape(), torch.float32)
    new = copy.deepcopy(original).set(form="sdpa")
    with torch.inference_mode():
        report = verify(original, new, batch(0))
    assert any(row.kind == "gradient" for row in report.rows)


def test_under_autocast_the_floor_is_that_of_the_autocast_dtype() -> None:
    original = tower(Shape(), torch.float32)
    new = copy.deepcopy(original).set(form="sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = verify(original, new, batch(0), raises=False)
    assert report.ok, str(report)
    assert report.rows[0].err_ref is not None
    assert report.rows[0].err_ref.max > 1e-4  # bfloat16 was really used, and gold was not


class HardCoded(nn.Module):
    """Casts to float32 by name, in every way that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((8,), -3.0, dtype=torch.float32)
        table = torch.tensor([0.1] * 8, dtype=torch.float32)
        x = self.linear(x).float() + mask + torch.arange(8, dtype=torch.float32) / 7
        x = (
            functional.softmax(x, -1, dtype=torch.float32)
            @ torch.eye(8, dtype=torch.float32)
            * table
        )
        return (x + torch.ones(8).to(torch.float32)).type_as(self.linear.weight)


def test_gold_is_float64_all_through_though_the_model_says_float32() -> None:
    report = verify(HardCoded(), HardCoded(), torch.randn(3, 8), raises=False)
    assert report.gold == "the original in float64"
    seen = []
    model = HardCoded()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.linear.reset_parameters()
    model.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    x = torch.randn(3, 8)
    verify(model, copy.deepcopy(model), x, raises=False)
    assert torch.float64 in seen


def test_the_error_of_the_original_is_the_true_one() -> None:
    model = HardCoded()
    x = torch.randn(3, 8)
    report = verify(model, copy.deepcopy(model), x)
    w, b = model.linear.weight.double(), model.linear.bias.double()
    exact = x.double() @ w.T + b + torch.arange(8, dtype=torch.float64) / 7
    exact = exact.softmax(-1) * torch.tensor(0.1).double() + 1  # 0.1 as float32 holds it
    error = float((model(x).double() - exact).detach().abs().max())
    assert report.rows[0].err_ref is not None
    assert report.rows[0].err_ref.max == pytest.approx(error, rel=0.2)


class NoDouble(nn.Module):
    """A stand-in for a kernel that has no float64, or neither float64 nor float32."""

    def __init__(self, *refused: torch.dtype) -> None:
        super().__init__()
        self.refused, self.tower, self.fault = refused, Tower(Shape()), ""

    def forward(self, x: Tensor, pad: Tensor) -> Any:
        if x.dtype in self.refused:
            raise RuntimeError(f"no kernel for {x.dtype}")
        return self.tower(x, pad)


@pytest.mark.parametrize(
    ("dtype", "refused", "gold"),
    [
        (torch.bfloat16, (torch.float64,), "the original in float32"),
        (torch.float32, (torch.float64,), "the original itself"),
        (torch.bfloat16, (torch.float64, torch.float32), "the original itself"),
    ],
    ids=["half falls back to float32", "float32 to itself", "half to itself"],
)
def test_without_float64_gold_falls_back_and_says_so(
    dtype: torch.dtype, refused: tuple[torch.dtype, ...], gold: str
) -> None:
    torch.manual_seed(0)
    original = NoDouble(*refused).to(dtype)
    honest, wrong = copy.deepcopy(original), copy.deepcopy(original)
    honest.tower.set(form="sdpa")
    wrong.tower.set(fault="mask off by one")
    inputs = batch(0, dtype=dtype)
    report = verify(original, honest, inputs, raises=False)
    assert report.ok, str(report)
    assert report.gold == gold
    assert any("no kernel for torch.float64" in note for note in report.notes)
    assert not verify(original, wrong, inputs, raises=False).ok


def test_the_gradient_of_a_bias_on_keys_is_no_false_alarm() -> None:
    original = tower(Shape(classes=2), torch.float16)
    report = verify(
        original, copy.deepcopy(original).set(form="sdpa"), batch(0, dtype=torch.float16)
    )
    row = next(r for r in report.rows if r.name == "blocks.0.attention.key.bias")
    assert row.allowed is not None
    assert row.allowed.max > 0


def test_gradients_in_which_the_original_is_far_off_are_counted_in_one_note() -> None:
    def run(**gradients: Tensor) -> Run:
        return Run(Leaves({"out": torch.ones(1)}, ()), dict(gradients))

    exact = torch.linspace(-1.0, 1.0, 8)
    gold = run(**{"a.w": exact, "b.w": exact, "c.w": exact, "c.zero": torch.zeros(8)})
    ref = run(**{"a.w": exact + 0.4, "b.w": 1.9 * exact, "c.w": exact, "c.zero": 1e-7 * exact})
    (note,) = Judge.of(ref, gold, torch.float64, torch.float32).notes(None)
    assert note.startswith("2 of 4 gradients: the original is off by so much that the bound is wi")
    assert note.endswith("most at `b.w`: by up to 9.0e-01")


def test_the_coarsest_dtype_is_that_of_parameters_and_of_autocast() -> None:
    half = torch.ones(2, dtype=torch.float16)
    assert coarsest_dtype(nn.Linear(2, 2), [half]) == torch.float32
    assert coarsest_dtype(nn.Identity(), [half]) == torch.float16
    assert coarsest_dtype(nn.Identity(), [torch.ones(2, dtype=torch.int64)]) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert coarsest_dtype(nn.Linear(2, 2), []) == torch.bfloat16


def test_noise_drawn_by_the_model_is_the_same_in_all_runs() -> None:
    for draw in (lambda x: torch.rand(x.shape), torch.randn_like, lambda x: torch.rand(3, 8)):
        noisy = function(lambda x, draw=draw: x + draw(x))  # type: ignore[misc]
        report = verify(noisy, copy.deepcopy(noisy), torch.randn(3, 8))
        assert report.rows[0].err_ref is not None
        assert report.rows[0].err_ref.max < 1e-6  # gold drew the same numbers


def test_a_parameter_of_only_one_model_is_noted() -> None:
    class Folded(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.weight.requires_grad_(False)

    notes = verify(Scaled(), Folded(), torch.randn(3, 8), sites=False).notes
    assert notes == ("1 gradients were not compared: the model has no trainable `weight`",)
