"""Labels and head outputs that are given to passes are inputs of an exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import rewriter
import zoo
from rewriter.errors import InputError
from rewriter.export import export_onnx

VAR = (
    "sinks.var(dims=[0, 3], tau=1, min_nonsink_ratio=0.1, min_mass=0, first_layer=0, "
    "last_layer=True) @ 0"
)
PATCHED = "heads.patch(heads=[0, 2], last=3) @ 1"
CASE = zoo.architecture("gpt2")
SITE = "transformer.h.1.attn"


def labels_of(batch: int, length: int) -> Tensor:
    labels = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        labels[row, 1 + row : length - 2] = 1
    return labels


def given_of(batch: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    heads = torch.randn(batch, 4, length, 8, generator=generator)
    return {"labels": labels_of(batch, length), "patches": {SITE: heads}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Any]:
    """One model, and its file with the report."""
    path = tmp_path_factory.mktemp("given") / "model.onnx"
    model = rewriter.optimize(CASE.build("eager"), VAR, PATCHED)
    given = given_of(2, 9)
    given["labels"] = given["labels"][:, :7]  # of a prompt, to which two tokens were added
    with rewriter.give(model, **given):
        report = export_onnx(model, CASE.inputs(length=9), path)
    return model, path, report


def test_what_is_given_is_an_input_with_axes_that_may_change(exported: Any) -> None:
    _, path, report = exported
    assert report.inputs["labels"] == ("batch", "labels_length")
    assert report.inputs[f"patches.{SITE}"] == ("batch", 4, "length", 8)
    assert [c.shapes["labels"] for c in report.checks] == [(2, 7), (4, 14), (3, 8)]
    assert report.rewritten == 2
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_the_file_agrees_with_the_model_that_is_given_other_values(exported: Any) -> None:
    model, path, _ = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, length, prompt in [(2, 13, 13), (3, 9, 8)]:
        inputs, given = CASE.inputs(batch=batch, length=length), given_of(batch, length)
        given["labels"] = given["labels"][:, :prompt]
        with rewriter.give(model, **given), torch.no_grad():
            expected = model(**inputs).logits
        feed = {n: x.numpy() for n, x in inputs.items() if isinstance(x, Tensor)}
        feed[f"patches.{SITE}"] = given["patches"][SITE].numpy()
        (found,) = session.run(None, {**feed, "labels": given["labels"].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
        (other,) = session.run(None, {**feed, "labels": (1 - given["labels"]).numpy()})
        assert (torch.from_numpy(other) - expected).abs().max() > 1e-3  # the labels matter


def test_a_model_that_needs_labels_and_has_none_is_refused(tmp_path: Path) -> None:
    model = rewriter.optimize(CASE.build("eager", n_layer=1), VAR)
    with pytest.raises(InputError, match=r"give them first: rewriter\.give\(model, labels="):
        export_onnx(model, CASE.inputs(length=9), tmp_path / "model.onnx")
    with (
        rewriter.give(model, labels=labels_of(3, 9)),
        pytest.raises(InputError, match=r"shape \(3, 9\).*have 2 rows of 9 tokens"),
    ):
        export_onnx(model, CASE.inputs(length=9), tmp_path / "model.onnx")


def test_what_no_pass_reads_is_no_input(tmp_path: Path) -> None:
    model = CASE.build("eager", n_layer=1)
    with rewriter.give(model, labels=labels_of(2, 9)):
        report = export_onnx(model, CASE.inputs(length=9), tmp_path / "model.onnx", check_inputs=[])
    assert "labels" not in report.inputs
