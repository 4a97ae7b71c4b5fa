"""The kinds in decoders, a pass for each layer: generated text is the text of full runs, padding on
either side changes nothing, a saved model is the same model, and a file agrees at other shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewriter
import zoo

LENGTH, PAD, NEW = 14, 4, 4


@dataclass(frozen=True)
class Layers:
    """A decoder, and what each of its layers becomes."""

    model: str
    implementation: str
    passes: tuple[str, ...]


CASES = {
    "llama-sdpa": Layers(
        "llama",
        "sdpa",
        (
            "linear.lightning(rule=tnl)",
            "linear.window_tail(window=4)",
            "sparse.moba(block=3, topk=2, dense_below=0)",
            "sinks.redirect(label=1, to=2, keep_fraction=0.3)",
            "heads.moh(active=0.5)",
            "sinks.var(dims=[0, 3], tau=1, min_mass=0.05, min_nonsink_ratio=0.1)",
            "heads.gate",  # the last layer, which sinks.var leaves alone
        ),
    ),
    # masks that are added: rows of padding see no key and give a mean of all values
    "gpt2-eager": Layers(
        "gpt2",
        "eager",
        (
            "linear.features(map=exp)",
            "linear.window_tail(window=4)",
            "sparse.moba(block=3, topk=2, dense_below=0)",
            "sinks.learned(initial=0.5)",
            "heads.moh(active=0.75, router=norm)",
            "sinks.remove(label=1)",
            "heads.ablate(heads=[1], by=0.3)",
        ),
    ),
}


TOKENS = torch.randint(3, zoo.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))
LABELS = torch.zeros_like(TOKENS).index_fill_(1, torch.arange(5, 9), 1)
LABELS = LABELS.index_fill_(1, torch.arange(9, 11), 2)


def run(model: Any, tokens: Tensor, mask: Tensor, labels: Tensor = LABELS) -> Tensor:
    """Logits of a run without a cache; positions count the tokens that are not padding."""
    place = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), rewriter.give(model, labels=labels):
        out = model(
            input_ids=tokens * mask, attention_mask=mask, position_ids=place, use_cache=False
        )
    logits: Tensor = out.logits
    return logits


def padded(side: slice) -> Tensor:
    """A mask that hides a part of the second row."""
    mask = torch.ones_like(TOKENS)
    mask[1, side] = 0
    return mask


LEFT, RIGHT = padded(slice(None, PAD)), padded(slice(-PAD, None))


def rewritten(case: Layers) -> Any:
    """A model whose new parameters are not as they were made, so that each of them matters."""
    count = len(case.passes)
    name = {"gpt2": "n_layer", "llama": "num_hidden_layers"}[case.model]
    model: Any = zoo.architecture(case.model).build(case.implementation, **{name: count})
    texts = [f"{text} @ {layer}" for layer, text in enumerate(case.passes)]
    rewriter.optimize(model, *texts)
    run(model, TOKENS, LEFT)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("rewriter."):
                p.add_(0.4 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cached_text_padding_and_a_saved_model_agree_with_full_runs(
    case: Layers, tmp_path: Path
) -> None:
    """One test, because each one captures the model anew."""
    model = rewritten(case)
    every_layer_is_another_spec(model)
    generated_text_is_that_of_full_runs(model)
    for mask, there in ((LEFT, slice(PAD, None)), (RIGHT, slice(-PAD))):
        a_padded_row_is_that_row_alone(model, mask, there)
    a_saved_model_is_the_same_bit_for_bit(model, tmp_path / "saved")
    a_file_agrees_at_other_shapes(model, tmp_path / "model.onnx")


def every_layer_is_another_spec(model: Any) -> None:
    sites = rewriter.report_of(model).attention
    assert all(s.decision == "rewritten" and len(s.passes) == 1 for s in sites)
    assert len({s.after for s in sites}) == 7
    notes = [s.site.notes for s in sites if any("gives 0" in n for n in s.site.notes)]
    is_eager = model.config._attn_implementation == "eager"
    assert len(notes) == (3 if is_eager else 0)  # two linear ones, and a learned sink


def generated_text_is_that_of_full_runs(model: Any) -> None:
    with torch.no_grad(), rewriter.give(model, labels=LABELS):
        found = model.generate(
            input_ids=TOKENS * LEFT,
            attention_mask=LEFT,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    text, mask = TOKENS * LEFT, LEFT
    for step in found.logits:
        logits = run(model, text, mask)[:, -1]
        torch.testing.assert_close(step, logits, rtol=2e-4, atol=2e-4)
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    assert torch.equal(found.sequences, text)


def a_padded_row_is_that_row_alone(model: Any, mask: Tensor, there: slice) -> None:
    found = run(model, TOKENS, mask)[1, there]
    alone = TOKENS[1:, there].repeat(2, 1)
    labels = LABELS[1:, there].repeat(2, 1)
    want = run(model, alone, torch.ones_like(alone), labels)[1]
    torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-4)


def a_saved_model_is_the_same_bit_for_bit(model: Any, folder: Path) -> None:
    rewriter.save(model, folder)
    again: Any = rewriter.load(folder)
    again.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(run(again, TOKENS, LEFT), run(model, TOKENS, LEFT))


def a_file_agrees_at_other_shapes(model: Any, path: Path) -> None:
    place = (LEFT.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": TOKENS * LEFT, "attention_mask": LEFT, "position_ids": place}
    with rewriter.give(model, labels=LABELS):
        report = rewriter.export_onnx(model, inputs | {"use_cache": False}, path)
    assert (report.sites, report.rewritten) == (7, 7)
    assert "labels" in report.inputs
    assert len({check.shapes["input_ids"] for check in report.checks}) > 2
    assert max(check.error for check in report.checks) < 1e-5
