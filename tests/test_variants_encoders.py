"""The kinds in an image encoder, a pass for each layer: it is its reference, also in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import rewriter
import zoo

PASSES = (
    "sparse.biformer(regions=2, topk=1, local=True)",
    "linear.features(map=elu)",
    "heads.moh(active=0.5)",
    "sinks.remove(first=1)",
    "sinks.learned(initial=0.5)",
    "heads.gate",
)


def test_each_layer_is_its_reference_in_torch_saved_and_in_a_file(tmp_path: Path) -> None:
    architecture = zoo.architecture("vit")
    inputs = architecture.inputs()
    model: Any = architecture.build("sdpa", num_hidden_layers=len(PASSES))
    rewriter.optimize(model, *(f"{p} @ {n}" for n, p in enumerate(PASSES)), inputs=inputs)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("rewriter."):
                p.add_(0.4 * torch.randn(p.shape, generator=generator))
    original = architecture.build("sdpa", num_hidden_layers=len(PASSES))
    original.load_state_dict(model.state_dict(), strict=False)
    sites = rewriter.report_of(model).attention
    assert [len(s.passes) for s in sites] == [1] * len(PASSES)

    report = rewriter.verify(original, model, inputs, against="reference", gradients=False)
    assert report.ok, str(report)

    rewriter.save(model, tmp_path / "saved")
    again: Any = rewriter.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])

    found = rewriter.export_onnx(model, inputs, tmp_path / "model.onnx")
    assert (found.sites, found.rewritten) == (len(PASSES), len(PASSES))
    assert len({check.shapes["pixel_values"] for check in found.checks}) > 1
    assert max(check.error for check in found.checks) < 1e-5
