"""A sample of the architectures that `make coverage` measures, and the measuring itself."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
coverage = importlib.import_module("coverage")
count = importlib.import_module("coverage_count")
page = importlib.import_module("coverage_page")
measuring = importlib.import_module("coverage_measure")
zoo = importlib.import_module("coverage_zoo")
reviewed = importlib.import_module("coverage_reviewed")

SAMPLE = """
albert bart beit blenderbot chinese_clip_vision_model clip codegen cohere2 data2vec-audio deberta
deepseek_v3 distilbert dpr electra falcon falcon-alibi gemma3_text glm gpt_neox hubert jamba lxmert
m2m_100 maskformer-swin mobilebert modernbert moonshine_streaming_encoder opt phi3 prophetnet
qwen2_vl_text roformer sam_vision_model segformer siglip_vision_model splinter timesformer wavlm
xlnet diffusers/DiTTransformer2DModel
""".split()  # noqa: SIM905 - a list would be forty lines
"""Forty, one a form or a part of a library; those of `test_architectures` are not repeated."""

ROW: dict[str, Any] = measuring.Row("a", "eager", "float32", "measured").to_dict()


@pytest.mark.parametrize("name", SAMPLE)
def test_every_attention_of_a_sample_is_found_read_and_rewritten_into_the_same(name: str) -> None:
    library = zoo.named(name).library
    row = measuring.measure(name, library, "eager", "float32", verify=True, inductor=False)
    assert row["status"] == "measured", row["why"]
    assert row["sites"] > 0
    assert row["lifted"] == row["rewritten"] == row["found"] == row["sites"], row["left"]
    assert row["missing"] == row["unreviewed"] == {}
    assert row["opaque_masks"] == 0, row["formulas"]
    assert row["equal"] is True, row["difference"]


class Hidden(nn.Module):
    """Two attentions, one of them where no graph sees it, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.router = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x, x, x, need_weights=False)[0]
        x = _unseen(self.layers[1], x)
        return x * self.router(x).softmax(-1)[..., :1]


@torch._dynamo.disable
def _unseen(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def test_the_count_sees_what_no_graph_sees() -> None:
    model = Hidden().eval()
    with torch.no_grad(), count.counted(model) as calls:
        model(torch.randn(2, 5, 8))
    assert calls == {"layers.*": 2, "": 1}


def test_an_attention_without_a_line_is_missing_and_so_is_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "build", lambda *_: Hidden().eval())
    monkeypatch.setattr(measuring, "inputs_of", lambda *_: {"x": torch.randn(2, 5, 8)})
    row = measuring.measure("a", "", "eager", "float32", verify=True, inductor=True)
    assert (row["status"], row["counted"], row["found"]) == ("measured", 3, 1), row["why"]
    assert row["missing"] == {"layers.*": 1}
    assert row["equal"] is True
    assert page.trouble_of(row) == "not found: `layers.*` 1"
    missed = {name for name, _, met in page.targets([row]) if not met}
    assert "every attention is found, or named with a reviewed reason" in missed


def test_places_are_paths_without_numbers() -> None:
    assert count.place_of("layers.3.attn1") == "layers.*.attn1"
    assert count.place_of("blocks.0.1") == "blocks.*.*"


def test_a_reviewed_reason_is_for_its_models_and_places_alone() -> None:
    assert reviewed.not_attention("convbert", "encoder.layer.*.attention.self")
    assert not reviewed.not_attention("bert", "encoder.layer.*.attention.self")
    assert reviewed.not_attention("anything", "layers.*.mlp.router")
    assert not reviewed.not_attention("anything", "layers.*.router.attention")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"status": "crash", "why": "it fell"}, "crash: it fell"),
        ({"equal": False, "difference": "0.5"}, "differs: 0.5"),
        ({"unreviewed": {"a.b": "gate"}}, "not reviewed: `a.b` gate"),
        ({"left": {"a.b": "why"}}, "left alone: `a.b` why"),
        ({"opaque_masks": 2, "opaque_biases": 1}, "opaque: 2 masks, 1 biases"),
        ({}, ""),
    ],
)
def test_trouble_is_said_and_written_on_the_page(changes: dict[str, Any], says: str) -> None:
    row = ROW | {"counted": 1, "sites": 1, "found": 1, "lifted": 1, "equal": True} | changes
    assert page.trouble_of(row) == says
    text = page.page({"rows": [row], "versions": {"torch": "1"}})
    assert (says or "Nothing.") in text


def test_a_process_that_ends_or_hangs_is_a_row() -> None:
    rows: list[dict[str, Any]] = []
    jobs = [coverage.Job("no such architecture", "transformers", "eager", "float32")]
    coverage.run(jobs, rows.append, processes=1, limit=240, preload=())
    assert rows[0]["status"] == "not built"
    coverage.run(jobs, rows.append, processes=1, limit=0, preload=())
    assert rows[1]["status"] == "timeout"
