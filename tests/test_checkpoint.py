"""Saved checkpoints: what is written, what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from rewriter.checkpoint import changed_sites, load, save
from rewriter.errors import CheckpointError, PlanError
from rewriter.hub import load_model
from rewriter.optimize import inspect, optimize, report_of, requests_of
from zoo import architecture

PASSES = ("sparse.window(window=4) @ 0", "heads.scale(heads=[1], by=0) @ 1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint with some of the files that travel with one."""
    path = tmp_path_factory.mktemp("source") / "plain"
    architecture("bert").build().save_pretrained(str(path))
    (path / "tokenizer.json").write_text("{}")
    (path / "pooling").mkdir()
    (path / "pooling" / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"a pickle")
    (path / "modeling_own.py").write_text("raise SystemExit")
    (path / ".gitattributes").write_text("")
    return path


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with two passes, saved after a run."""
    path = tmp_path_factory.mktemp("saved") / "rewritten"
    model = optimize(load_model(source), *PASSES)
    with torch.no_grad():
        model(**inputs())
    save(model, path)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A rewritten checkpoint to break."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def inputs() -> dict[str, Any]:
    return architecture("bert").inputs()


@torch.no_grad()
def hidden(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(**inputs()).last_hidden_state
    return found


def edited(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))


# --- what is written -----------------------------------------------------------------------------


def test_loading_gives_the_rewritten_model_again(source: Path, saved: Path) -> None:
    want = hidden(optimize(load_model(source), *PASSES))
    model = load(saved)
    assert tuple(r.text for r in requests_of(model)) == PASSES
    assert torch.equal(hidden(model), want)
    assert not torch.allclose(want, hidden(load_model(source)), atol=1e-3)
    assert changed_sites(saved, model) == []


def test_plain_transformers_gets_the_original_model(source: Path, saved: Path) -> None:
    plain = transformers.AutoModel.from_pretrained(str(saved)).eval()
    assert torch.equal(hidden(plain), hidden(load_model(source)))
    weights, original = (load_file(d / "model.safetensors") for d in (saved, source))
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in weights)


def test_small_files_travel_and_pickles_and_code_do_not(saved: Path) -> None:
    found = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    assert found == {
        "config.json",
        "model.safetensors",
        "rewriter.json",
        "tokenizer.json",
        "pooling/config.json",
    }


def test_plan_says_what_was_done_to_each_site(saved: Path) -> None:
    plan = json.loads((saved / "rewriter.json").read_text())
    assert plan["format"] == 1
    assert plan["passes"] == list(PASSES)
    assert plan["versions"]["rewriter"] == version("rewriter")
    assert plan["versions"]["transformers"] == transformers.__version__
    assert len(plan["sites"]) == 2
    first, second = (found[0] for found in plan["sites"].values())
    assert first["passes"] == [PASSES[0]]
    assert first["before"] != first["after"]
    assert "< 4" in first["formula"]
    assert "h = 1" in second["formula"]
    assert second["spec"]["family"] == "softmax"
    assert plan["model"]["parameters"]["embeddings.word_embeddings.weight"] == [97, 32]


def test_saving_before_the_first_run_records_no_site(source: Path, tmp_path: Path) -> None:
    save(optimize(load_model(source)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "rewriter.json").read_text())["sites"] == {}
    assert report_of(load(tmp_path / "out")).sites == ()


def test_target_comes_back(source: Path, tmp_path: Path) -> None:
    save(optimize(load_model(source), target="reference"), tmp_path / "out")
    model = load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "rewriter.json").read_text())["target"] == "reference"
    assert torch.equal(hidden(model), hidden(optimize(load_model(source), target="reference")))


def test_trained_weights_are_saved_as_they_are(source: Path, tmp_path: Path) -> None:
    model = optimize(load_model(source), *PASSES)
    with torch.no_grad():
        model.get_parameter("embeddings.word_embeddings.weight").mul_(2)
    want = hidden(model)
    save(model, tmp_path / "out")
    assert torch.equal(hidden(load(tmp_path / "out")), want)


def test_site_with_another_formula_than_recorded_is_named(copy: Path) -> None:
    plan = json.loads((copy / "rewriter.json").read_text())
    name = next(iter(plan["sites"]))
    plan["sites"][name][0] |= {"after": "0" * 16, "formula": "softmax( s ) · v"}
    (copy / "rewriter.json").write_text(json.dumps(plan))
    model = load(copy)
    inspect(model, inputs())
    (line,) = changed_sites(copy, model)
    assert line.startswith(f"{name}: softmax( ")
    assert line.endswith("recorded softmax( s ) · v")


# --- what save refuses ---------------------------------------------------------------------------


def test_existing_output_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    model = optimize(load_model(source))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("link", "empty", "file"):
        with pytest.raises(CheckpointError, match=f"{name} exists, and nothing is overwritten"):
            save(model, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_output_without_a_parent_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a is not a directory; create it first"):
        save(optimize(load_model(source)), tmp_path / "a" / "b")


def test_model_without_a_plan_is_not_saved(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the model is not optimized"):
        save(load_model(source), tmp_path / "out")
    with pytest.raises(CheckpointError, match="Linear is not a Hugging Face model"):
        save(optimize(nn.Linear(2, 2)), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["config", "weights", "rest", "plan", "rename"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_behind_when_saving_stops(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    fault: BaseException,
) -> None:
    """A full disk or Ctrl-C at every stage of a save, each after the stage has done its work."""
    model = optimize(load_model(source))
    owner, name = {
        "config": (type(model.config), "save_pretrained"),
        "weights": (transformers.modeling_utils, "safe_save_file"),
        "rest": (shutil, "copyfile"),
        "plan": (Path, "write_text"),
        "rename": (os, "fsync"),
    }[moment]
    done = getattr(owner, name)

    def stopped(*args: Any, **kwargs: Any) -> None:
        done(*args, **kwargs)
        assert len(os.listdir(tmp_path)) == 1
        raise fault

    monkeypatch.setattr(owner, name, stopped)
    if isinstance(fault, OSError):
        with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
            save(model, tmp_path / "out")
    else:
        with pytest.raises(KeyboardInterrupt):
            save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


# --- what load refuses ---------------------------------------------------------------------------


def test_plain_directory_has_no_plan_to_load(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no rewriter\.json: it is a plain checkpoint"):
        load(source)


def test_plan_of_another_configuration_names_the_setting(copy: Path) -> None:
    edited(copy / "config.json", num_attention_heads=2)
    message = "num_attention_heads is 2 in config.json and 4 in rewriter.json"
    with pytest.raises(PlanError, match=message):
        load(copy)


def test_checkpoint_without_a_weight_is_refused_by_name(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"no weights for encoder\.layer\.1\.output\.dense\.b"
    ):
        load(copy)


def test_plan_names_the_first_parameter_that_differs(copy: Path) -> None:
    from rewriter.plan import Plan

    plan = Plan.read(copy / "rewriter.json")
    model = load_model(copy)
    name = "encoder.layer.0.output.dense.bias"
    cases = [
        ({**plan.parameters, "gate": [3]}, "the plan has a parameter gate, and the model has not"),
        (
            {**plan.parameters, name: [7]},
            rf"parameter {name} has shape \[32\], and \[7\] in the plan",
        ),
        ({k: v for k, v in plan.parameters.items() if k != name}, f"model has a parameter {name}"),
    ]
    for parameters, message in cases:
        with pytest.raises(PlanError, match=message):
            Plan(plan.passes, kind=plan.kind, parameters=parameters).check_model(copy, model)


def test_plan_with_a_site_that_the_model_has_not_is_refused(copy: Path) -> None:
    plan = json.loads((copy / "rewriter.json").read_text())
    edited(copy / "rewriter.json", sites=plan["sites"] | {"encoder.layer.9.attention.self": []})
    with pytest.raises(
        PlanError, match=r"has a site encoder\.layer\.9\.attention\.self, and the mo"
    ):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "has format 99, and this rewriter reads 1; it was written by rewriter 0"),
        (
            {"passes": ["sparse.lost"]},
            "asks for what this rewriter does not have: there is no pass",
        ),
        ({"passes": None}, "is not a plan: 'NoneType' object is not iterable"),
        ({"model": {}}, "is not a plan: it has no 'class'"),
    ],
)
def test_plan_that_cannot_be_read_says_why(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    edited(copy / "rewriter.json", **changes)
    with pytest.raises(PlanError, match=message):
        load(copy)


def test_plan_that_was_edited_or_cut_is_refused(copy: Path) -> None:
    plan = json.loads((copy / "rewriter.json").read_text())
    plan["model"]["parameters"]["gate"] = [3]
    (copy / "rewriter.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="was changed: its sha256 is not that"):
        load(copy)
    (copy / "rewriter.json").write_text('{"format": 1,')
    with pytest.raises(PlanError, match="is not a plan: Expecting property name"):
        load(copy)
