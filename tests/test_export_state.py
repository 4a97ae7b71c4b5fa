"""Files that hand the state of linear attention on: a prompt, then one token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import transformers

import rewriter
import zoo
from rewriter.errors import InputError
from rewriter.export import export_onnx

LLAMA, GPT2 = zoo.architecture("llama"), zoo.architecture("gpt2")


def inputs_of(model: Any, past: int, new: int) -> dict[str, Any]:
    """One call with a cache, whose values do not matter."""
    config, cache = model.config, transformers.DynamicCache()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(2, heads, past, 8), torch.zeros(2, heads, past, 8), layer)
    mask = torch.ones(2, past + new, dtype=torch.long)
    mask[-1, :2] = 0
    tokens = torch.randint(3, zoo.VOCABULARY, (2, new), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "past_key_values": cache,
        "use_cache": True,
    }


def test_a_prompt_and_then_token_by_token_is_the_whole(tmp_path: Path) -> None:
    """No layer of this model needs a cache: the file takes tokens, a mask and the states."""
    path, model = tmp_path / "model.onnx", LLAMA.build("eager")
    rewriter.optimize(model, "linear.features(map=elu) @ 0", "linear.lightning(rule=retnet) @ 1")
    report = export_onnx(model, inputs_of(model, 3, 5), path, check_inputs=[], state=True)
    first, second = (f"past_state.model.layers.{i}.self_attn" for i in (0, 1))
    assert report.inputs == {
        "input_ids": ("batch", "length"),
        "attention_mask": ("batch", "past_length + length"),
        first: ("batch", 2, 8, 9),  # a head of keys, and the sum of its weights
        second: ("batch", 4, 8, 8),  # each query head decays in its own way
    }
    assert [n.replace("present", "past") for n in report.outputs] == ["logits", first, second]
    onnx.checker.check_model(onnx.load(path), full_check=True)

    tokens = LLAMA.inputs(batch=3, length=12)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    with torch.no_grad():
        whole = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    state = {x.name: torch.zeros(3, *x.shape[1:]).numpy() for x in session.get_inputs()[2:]}
    for start, stop in [(0, 8), (8, 9), (9, 10), (10, 12)]:
        feed = {"input_ids": tokens[:, start:stop], "attention_mask": mask[:, :stop]}
        logits, *after = session.run(None, {n: x.numpy() for n, x in feed.items()} | state)
        state = dict(zip(state, after, strict=True))
        real = mask[:, start:stop] != 0
        found, wanted = torch.from_numpy(logits)[real], whole[:, start:stop][real]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_other_sites_keep_their_caches_beside_the_state(tmp_path: Path) -> None:
    model = rewriter.optimize(GPT2.build("eager"), "linear.lightning(rule=retnet) @ 1")
    inputs = inputs_of(model, 3, 5)
    report = export_onnx(model, inputs, tmp_path / "model.onnx", state=True)
    assert list(report.inputs)[2:] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_state.transformer.h.1.attn",
    ]
    assert len(report.checks) == 3
    assert all(c.error < 1e-5 for c in report.checks)


def test_a_model_without_a_state_is_refused(tmp_path: Path) -> None:
    model = GPT2.build("eager", n_layer=1)
    with pytest.raises(InputError, match=r"no causal linear attention of this model has a state"):
        export_onnx(model, GPT2.inputs(length=9), tmp_path / "model.onnx", state=True)
