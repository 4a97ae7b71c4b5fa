"""Round trips: an honest model makes them all, and each one notices the fault that it is for."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewriter.errors import CheckFailed, ExportError, InputError
from rewriter.export import export_onnx
from rewriter.optimize import optimize, requests_of
from rewriter.testing.bits import different
from rewriter.testing.outcome import Outcome, Outcomes
from zoo import architecture

module: Any = import_module("rewriter.testing.round_trips")  # the function has the same name
WINDOW = "sparse.window(window=2)"
SCALE = "heads.scale(heads=[0], by=0.5)"


class Attention(nn.Module):
    """The smallest model that there is something to rewrite in."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("seen", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT * 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


def trips(model: nn.Module, passes: Any = WINDOW, **options: Any) -> Outcomes:
    options = {"onnx": False} | options
    return module.round_trips(model, passes, torch.randn(2, 5, 8), **options)


def row(found: Outcomes, check: str) -> Outcome:
    return next(x for x in found.rows if x.check == check)


def fault(found: Outcomes, check: str) -> str:
    """Why a check failed; it has to."""
    assert not found.ok
    assert row(found, check).verdict == "failed", str(found)
    return row(found, check).reason


def test_a_model_that_is_optimized_already_is_taken_as_it_was() -> None:
    model = optimize(Attention(), "heads.gate", inputs=torch.randn(2, 5, 8))
    plain = module._plain(model)
    assert requests_of(plain) == ()
    assert [name for name, _ in plain.named_parameters() if name.startswith("rewriter.")] == []
    assert requests_of(model) != ()


# --- honest models -------------------------------------------------------------------------------


def test_an_honest_model_makes_every_round_trip(tmp_path: Path) -> None:
    found = trips(Attention(), onnx=True, directory=tmp_path)
    verdicts = {x.check: x.verdict for x in found.rows}
    assert verdicts == {
        "rewrite": "passed",
        "restore": "passed",
        "optimize twice": "passed",
        "plan": "passed",
        "save and load": "skipped",
        "plain load": "skipped",
        "export": "passed",
        "no trace": "passed",
    }, str(found)
    reason = "Attention is not a Hugging Face model: there is nothing to load it by"
    assert row(found, "save and load").reason == reason
    assert row(found, "export").case == f"Attention, {WINDOW}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "plan.json"]


def small() -> nn.Module:
    return architecture("bert").build(num_hidden_layers=1)


def saved_trips(passes: Any = WINDOW, **options: Any) -> Outcomes:
    given = architecture("bert").inputs(length=8)
    return module.round_trips(small(), passes, given, onnx=False, **options)


def test_a_checkpoint_makes_them_too_and_eager_code_stays_eager() -> None:
    found = saved_trips([])
    assert [x.verdict for x in found.rows] == ["passed"] * 7, str(found)
    assert row(found, "plain load").case == "BertModel, fuse"


def test_nothing_is_left_on_a_model_in_any_state() -> None:
    model = optimize(Attention().train(), SCALE)
    x = torch.randn(1, 3, 8)
    model(x).sum().backward()
    call, grad = model._compiled_call_impl, model.q.weight.grad
    found = trips(model, only=("rewrite", "restore"))
    assert found.ok, str(found)
    assert (model._compiled_call_impl, model.q.weight.grad) == (call, grad)
    assert [r.text for r in requests_of(model)] == [SCALE]
    assert model.training


# --- what shows nothing is not green -------------------------------------------------------------


def test_a_model_without_attention_fails() -> None:
    found = trips(nn.Sequential(nn.Linear(8, 8)), "fuse", only=("rewrite", "restore"))
    reason = "no site was rewritten, so the round trips show nothing: no attention was found"
    assert fault(found, "rewrite") == reason


@pytest.mark.parametrize("outputs", [torch.zeros(2, 3), None, torch.full((4,), torch.nan)])
def test_outputs_that_say_nothing_are_an_error(outputs: Any) -> None:
    class Says(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return outputs

    with pytest.raises(InputError, match="every output of the model is one number everywhere"):
        trips(Says())


def test_only_skips_are_not_fine() -> None:
    found = Outcomes("t", (Outcome("save and load", "x", "skipped", "no config"),))
    with pytest.raises(CheckFailed, match="nothing was checked"):
        found.raise_if_failed()


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no round trip 'export all' "):
        trips(Attention(), only=("export all",))
    with pytest.raises(InputError, match="nowhere is not a directory; make it first"):
        trips(Attention(), directory=tmp_path / "nowhere")
    with pytest.raises(InputError, match="the model cannot be run on these inputs: "):
        module.round_trips(Attention(), WINDOW, torch.randn(2, 5, 3))


@pytest.mark.parametrize(
    ("only", "why"),
    [((), "it is empty"), (("export",), "it is `export` alone, and `onnx` is False")],
)
def test_asking_for_nothing_is_an_error(only: tuple[str, ...], why: str) -> None:
    with pytest.raises(InputError, match=f"`only` asks for no round trip: {why}"):
        trips(Attention(), only=only)


@pytest.mark.parametrize("name", [n for n in module.CHECKS if n != "rewrite"])
def test_no_round_trip_is_made_without_a_rewritten_site(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(module.CHECKS, name, lambda _: "")
    found = trips(nn.Linear(8, 8), "fuse", onnx=True, only=(name,))
    assert fault(found, "rewrite").startswith("no site was rewritten")
    assert [x.check for x in found.rows] == ["rewrite", name, "no trace"]


def test_a_rewriting_that_alone_cannot_be_exported_is_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(model: Any, *arguments: Any, **options: Any) -> None:
        if requests_of(model):
            raise ExportError("torch has no ONNX form of this model")

    monkeypatch.setattr(module, "export_onnx", wrong)
    reason = fault(trips(Attention(), onnx=True, only=("export",)), "export")
    assert reason == (
        "the plain model is exported, the rewritten one is not: "
        "torch has no ONNX form of this model"
    )


def test_what_cannot_be_exported_is_skipped_with_the_reason() -> None:
    found = module.round_trips(
        Attention().bfloat16(), WINDOW, torch.randn(2, 5, 8).bfloat16(), only=("rewrite", "export")
    )
    assert row(found, "export").verdict == "skipped"
    assert "ONNX Runtime does not run on a CPU" in row(found, "export").reason


# --- planted faults ------------------------------------------------------------------------------


@torch.no_grad()
def doubled(model: Any) -> Any:
    next(model.parameters()).mul_(2)
    return model


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: m, "something is still installed on the model"),
        (lambda m: doubled(module.optimize.__globals__["restore"](m)), "the state of the restored"),
    ],
)
def test_a_restore_that_does_not_restore(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], Any], message: str
) -> None:
    monkeypatch.setattr(module, "restore", wrong)
    assert fault(trips(Attention(), only=("restore",)), "restore").startswith(message)


def test_a_rewriting_that_writes_into_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, *passes: Any, **options: Any) -> Any:
        model.seen.add_(1)  # a buffer that is in no state dict
        return optimize(model, *passes, **options)

    monkeypatch.setattr(module, "optimize", wrong)
    reason = fault(trips(Attention(), only=("restore",)), "restore")
    assert (
        reason == "the state of the restored model: seen differs in 1 of 1 values, by up to 1.0e+00"
    )


def test_outputs_that_change_while_the_state_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any) -> Any:
        model.forward = lambda x: -Attention.forward(model, x)
        return module.optimize.__globals__["restore"](model)

    monkeypatch.setattr(module, "restore", wrong)
    reason = fault(trips(Attention(), only=("restore",)), "restore")
    assert reason.startswith("the outputs of the restored model: output differs in ")


def test_a_rewriting_that_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, *passes: Any, **options: Any) -> Any:
        before = [r for r in requests_of(model) if r.selector.text == ""]
        return optimize(model, *before, *passes, **options)

    monkeypatch.setattr(module, "optimize", wrong)
    reason = fault(trips(Attention(), SCALE, only=("rewrite", "optimize twice")), "optimize twice")
    assert reason.startswith("optimized twice, ")
    assert SCALE in reason


def test_a_plan_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    read = module.Plan.read

    def wrong(path: Path) -> Any:
        path.write_text(path.read_text().replace("window=2", "window=3"))
        return read(path)

    monkeypatch.setattr(module.Plan, "read", staticmethod(wrong))
    reason = fault(trips(Attention(), only=("plan",)), "plan")
    assert "sparse.window(window=3)" in reason


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A rewritten checkpoint on the disk, which the tests below read and none changes."""
    given, place = architecture("bert").inputs(length=8), tmp_path_factory.mktemp("saved")
    requests, call = module._everywhere([WINDOW]), module._call(given)
    made = module._Trips(small().eval(), requests, "auto", call, given, place)
    assert made.saved.is_dir()
    return made


def saved_wrongly(saved: Any, place: Path, change: Callable[[Path], None]) -> Any:
    """The same with a directory in which something is changed."""
    made = copy.copy(saved)
    made.__dict__["saved"] = shutil.copytree(saved.saved, place / "wrong")
    change(made.saved)
    return made


def reason_of(name: str, made: Any) -> str:
    found = module._outcome(name, "bert", module.CHECKS[name], made)
    assert found.verdict == "failed"
    return found.reason


def test_a_directory_that_is_loaded_with_other_weights_or_passes(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = module.load
    monkeypatch.setattr(module, "load", lambda path: doubled(load(path)))
    assert reason_of("save and load", saved).startswith("the state of the loaded model: ")
    monkeypatch.setattr(module, "load", lambda path: optimize(load(path), SCALE))
    assert reason_of("save and load", saved).startswith("the outputs of the loaded model: ")


def test_a_directory_in_which_others_do_not_find_the_original(saved: Any, tmp_path: Path) -> None:
    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        save_file({n: x * 2 for n, x in load_file(path).items()}, path, {"format": "pt"})

    made = saved_wrongly(saved, tmp_path, change)
    assert "plain transformers loads: embeddings" in reason_of("plain load", made)


def test_a_directory_that_cannot_be_loaded_is_a_failure_and_not_a_skip(
    saved: Any, tmp_path: Path
) -> None:
    def change(directory: Path) -> None:
        (directory / "config.json").write_text("{}")

    made = saved_wrongly(saved, tmp_path, change)
    assert reason_of("save and load", made).startswith("it raises PlanError: ")


def test_a_file_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, *arguments: Any, **options: Any) -> Any:
        plain = Attention()
        plain.load_state_dict(model.state_dict())
        return export_onnx(plain, *arguments, **options)  # the pass is forgotten

    monkeypatch.setattr(module, "export_onnx", wrong)
    reason = fault(trips(Attention(), onnx=True, only=("export",)), "export")
    assert reason.startswith("ONNX Runtime and torch differ by ")


def test_a_check_that_changes_the_given_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention()

    def careless(_: Any) -> str:
        doubled(model)
        return ""

    monkeypatch.setitem(module.CHECKS, "restore", careless)
    found = trips(model, only=("restore",))
    assert fault(found, "no trace").startswith("the model that was given: q.weight differs")
    monkeypatch.setitem(module.CHECKS, "restore", lambda _: "" if model.eval() else "x")
    assert fault(trips(model.train(), only=("restore",)), "no trace").startswith("its mode")


def test_bits_are_compared_and_not_values() -> None:
    zero = {"x": torch.zeros(2)}
    assert different("a", zero, {"x": -torch.zeros(2)}) != ""
    nan = {"x": torch.full((2,), torch.nan)}
    assert different("a", nan, {"x": nan["x"].clone()}) == ""
    assert different("a", zero, {}) == "a: no x"
    assert different("a", {}, zero) == "a: also x"
    reason = different("a", zero, {"x": torch.zeros(3)})
    assert reason == "a: x is torch.float32 [3], was torch.float32 [2]"
