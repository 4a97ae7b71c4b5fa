"""Greedy token agreement, and transformers models: caches, half types, padded rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.errors import InputError, NotEquivalent
from rewriter.verify import token_agreement, verify

transformers = pytest.importorskip("transformers")


def tiny(
    name: str, dtype: torch.dtype = torch.float32, attention: str = "eager", **options: Any
) -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **sizes | options, attn_implementation=attention
    )
    head = {"Bert": "BertForMaskedLM", "Llama": "LlamaForCausalLM"}[name]
    return getattr(transformers, head)(config).to(dtype).eval()


def tokens(*, left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    if left:
        mask[1, :3] = 0
    else:
        mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), [("Bert", {}), ("Llama", {"num_key_value_heads": 2})])
def test_eager_and_sdpa_attention_are_equivalent(
    name: str, options: dict[str, int], dtype: torch.dtype
) -> None:
    original, new = tiny(name, dtype, **options), tiny(name, dtype, "sdpa", **options)
    report = verify(original, new, tokens(), raises=False)
    assert report.ok, str(report)
    assert report.gold == "the original in float64"
    names = [row.name for row in report.rows if row.kind == "output"]
    assert names[0] == "logits"
    caches = [
        n
        for n in names
        if n.startswith("past_key_values.layers.") and n.endswith((".keys", ".values"))
    ]
    assert len(caches) == (4 if name == "Llama" else 0)
    assert len(report.rows) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_padding_is_caught(dtype: torch.dtype) -> None:
    # with the usual tiny weights attention matters less than bfloat16 rounds
    original = tiny("Bert", dtype, initializer_range=0.2)

    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(original)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.model(input_ids=input_ids)

    report = verify(original, Careless(), tokens(), raises=False)
    assert "logits" in [row.name for row in report.failures]
    assert any("the model has no trainable" in note for note in report.notes)


def test_a_cache_given_as_input_is_fresh_for_every_run() -> None:
    model = tiny("Llama", num_key_value_heads=2)
    with torch.no_grad():
        cache = model(input_ids=tokens()["input_ids"]).past_key_values
    inputs = {"input_ids": torch.tensor([[5], [6]]), "past_key_values": cache}
    report = verify(model, tiny("Llama", attention="sdpa", num_key_value_heads=2), inputs)
    assert cache.get_seq_length() == 9
    assert any(row.name == "inputs.past_key_values.layers.0.keys" for row in report.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_honest_models_write_the_same_tokens(dtype: torch.dtype) -> None:
    original = tiny("Llama", dtype, num_key_value_heads=2)
    new = tiny("Llama", dtype, "sdpa", num_key_value_heads=2)
    found = token_agreement(original, new, tokens(left=True), new_tokens=32)
    assert found.ok, str(found)
    assert (found.rows, found.new_tokens) == (2, 32)
    if dtype == torch.float32:
        assert found.agreement == 1.0
        assert str(found) == "generation: 100.0% of 2 x 32 greedy tokens agree"


def test_another_function_parts_and_the_report_says_where() -> None:
    original = tiny("Llama")
    new = copy.deepcopy(original)
    with torch.no_grad():
        new.lm_head.weight += 0.05 * torch.randn(new.lm_head.weight.shape)
    found = token_agreement(original, new, tokens(left=True)["input_ids"], new_tokens=16)
    assert not found.ok
    assert found.agreement < 1
    assert "token" in str(found)
    assert found.to_dict()["partings"][0]["margin"] > 0
    with pytest.raises(NotEquivalent, match="greedy tokens agree"):
        verify(original, AgreesOnce(original, new), tokens(left=True), generate=16)


class AgreesOnce(nn.Module):
    """One call is right, generation is not: a fault in decoding."""

    def __init__(self, right: nn.Module, wrong: nn.Module) -> None:
        super().__init__()
        self.right = right
        self.generate = wrong.generate

    def forward(self, **inputs: Any) -> Any:
        return self.right(**inputs)


def test_a_model_compiled_in_place_generates_as_it_did() -> None:
    model = tiny("Llama")
    calls = []

    def compiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return model._call_impl(*args, **kwargs)

    model._compiled_call_impl = compiled
    assert token_agreement(model, model, tokens(left=True), new_tokens=4).ok
    assert len(calls) == 4  # not the eight of two generations


def test_a_model_that_cannot_generate_is_named() -> None:
    with pytest.raises(InputError, match="Linear has no `generate`"):
        token_agreement(nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2))
