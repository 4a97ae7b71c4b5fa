"""Generation: tokens, logits, caches, padded prompts; and transformers models in `verify`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.errors import InputError, NotEquivalent
from rewriter.verify import GenerationReport, token_agreement, verify
from zoo import architecture

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
    assert (found.rows, found.new_tokens, found.notes) == (2, 32, ())
    assert [report.name for report in found.padded] == ["alone", "left padding", "right padding"]
    for report in (found, *found.padded):
        assert [check.name for check in report.checks] == ["logits", "cache"]
        assert 0 < report.checks[0].used < 1
        assert len(report.steps) > 0
        assert all(0 <= step.kl < 1e-2 for step in report.steps)
    if dtype == torch.float32:
        assert found.agreement == 1.0
        assert len(found.steps) == 32
        assert str(found).startswith("generation: 100.0% of 2 x 32 greedy tokens agree; KL of a")
        end = "as in the original: logits, cache, alone, left padding, right padding"
        assert str(found).endswith(end)


def test_an_encoder_and_a_decoder_are_joined_in_one_call_too() -> None:
    original, new = (architecture("t5").build(x) for x in ("eager", "sdpa"))
    found = token_agreement(original, new, architecture("t5").prompt(), new_tokens=4)
    assert found.ok, str(found)
    assert [check.name for check in found.checks] == ["logits", "cache"]
    assert len(found.padded) == 3


def test_what_is_not_compared_is_said() -> None:
    model = architecture("whisper").build()
    found = token_agreement(model, model, architecture("whisper").prompt(), new_tokens=4)
    assert found.ok
    assert found.notes == ("padding was not tried: the prompt is no tensor of token numbers",)
    assert "note: padding was not tried" in str(found)


def test_a_cache_that_is_off_for_one_call_is_on_for_the_text() -> None:
    given = tokens(left=True) | {"use_cache": False}
    model = tiny("Llama")
    found = token_agreement(model, faulty(late_positions), given, new_tokens=3, padding=False)
    assert [check.name for check in found.checks if not check.ok] == ["logits", "cache"]
    model.generation_config.use_cache = False
    found = token_agreement(model, model, given, new_tokens=3, padding=False)
    assert [check.name for check in found.checks] == ["logits"]
    assert found.notes[0] == "no step had a cache, so that none was compared with one call"
    found = token_agreement(tiny("Llama"), model, tokens(), new_tokens=1, padding=False)
    assert found.notes[0].startswith("no step had a cache")


def test_a_text_of_one_token_is_worth_a_note() -> None:
    model: Any = tiny("Llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = token_agreement(model, copy.deepcopy(model), tokens(), new_tokens=3, padding=False)
    assert "the original repeats one token: that tokens agree shows little" in found.notes


def test_without_gold_the_bound_is_wider_and_the_report_says_so() -> None:
    original, new = tiny("Llama"), tiny("Llama", attention="sdpa")
    refuse(original, torch.float64)
    found = token_agreement(original, new, tokens(left=True), new_tokens=4, padding=False)
    assert found.ok
    assert found.checks[0].err_ref == (0, 0)
    assert "no gold for the logits of the steps: RuntimeError: not in float64" in found.notes[0]


def refuse(model: Any, dtype: torch.dtype) -> None:
    """Makes the model raise in a dtype."""
    forward = model.lm_head.forward

    def refusing(x: Tensor) -> Any:
        if x.dtype == dtype:
            raise RuntimeError("not in float64")
        return forward(x)

    model.lm_head.forward = refusing


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
    assert found.steps[-1].rows <= 2
    logits, cache = found.checks
    assert not logits.ok
    assert cache.ok  # another function, but its cache is sound
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


# --- planted faults ------------------------------------------------------------------------------


def faulty(change: Callable[[dict[str, Any], bool], None], **options: Any) -> nn.Module:
    """A model whose arguments are changed before each call; told if the call is a decoding step."""
    model = tiny("Llama", **options)

    def wrong(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        past, mask = cache.get_seq_length() if cache else 0, kwargs.get("attention_mask")
        if mask is None:  # generate leaves out a mask that hides nothing
            B, L = kwargs["input_ids"].shape
            mask = torch.ones(B, past + L, dtype=torch.long)
        kwargs["attention_mask"] = mask.clone()
        change(kwargs, past > 0)
        return args, kwargs

    model.register_forward_pre_hook(wrong, with_kwargs=True)
    return model


def late_positions(kwargs: dict[str, Any], decoding: bool) -> None:
    """The rotation of a decoding step is that of the next position."""
    if decoding:
        kwargs["position_ids"] = kwargs["position_ids"] + 1


def first_key_lost(kwargs: dict[str, Any], decoding: bool) -> None:
    """A window that begins one key too late, in decoding alone."""
    if decoding:
        kwargs["attention_mask"][:, 0] = 0


@pytest.mark.parametrize("fault", [late_positions, first_key_lost])
def test_a_wrong_offset_in_the_cache_shows_although_the_tokens_agree(fault: Any) -> None:
    original = tiny("Llama")
    prompt = {name: x[:1, :6] for name, x in tokens().items()}
    found = token_agreement(original, faulty(fault), prompt, new_tokens=3, padding=False)
    assert found.agreement == 1.0
    assert not found.ok
    logits, cache = found.checks
    assert "; the largest in row 0, step " in logits.reason
    assert cache.reason.startswith("steps with a cache differ from one call over the same text")
    assert cache.used > 10
    assert found.steps[0].kl < 1e-9 < found.steps[1].kl
    assert "the model differs: logits: " in str(found)


def test_a_fault_of_one_call_alone_shows_too() -> None:
    """Whoever trains the model sees it, whoever writes with it does not."""

    def change(kwargs: dict[str, Any], decoding: bool) -> None:
        if kwargs.get("past_key_values") is None:
            kwargs["position_ids"] = 2 * kwargs["position_ids"]

    found = token_agreement(
        tiny("Llama"), faulty(change), tokens(left=True), new_tokens=3, padding=False
    )
    assert [check.ok for check in found.checks] == [True, False]


def padding_on_the_right(kwargs: dict[str, Any], decoding: bool) -> None:
    """The mask is read as a number of tokens, as if the padding were always on the right."""
    mask = kwargs["attention_mask"]
    kwargs["attention_mask"] = mask.sort(descending=True).values


def padding_of_the_first_row(kwargs: dict[str, Any], decoding: bool) -> None:
    kwargs["attention_mask"] = kwargs["attention_mask"][:1].expand_as(kwargs["attention_mask"])


def padding_ignored(kwargs: dict[str, Any], decoding: bool) -> None:
    kwargs["attention_mask"].fill_(1)


def one_row_wrong(kwargs: dict[str, Any], decoding: bool) -> None:
    if len(kwargs["input_ids"]) == 1:
        kwargs["position_ids"] = 2 * kwargs["position_ids"]


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (padding_on_the_right, ["left padding", "right padding"]),
        (padding_of_the_first_row, ["left padding", "right padding"]),
        (padding_ignored, ["left padding", "right padding"]),
        (one_row_wrong, ["alone"]),
    ],
)
def test_padding_that_is_treated_wrongly_shows_on_a_prompt_without_any(
    fault: Any, wrong: list[str]
) -> None:
    prompt = {name: x[:, :6] for name, x in tokens().items()}
    assert bool(prompt["attention_mask"].all())
    found = token_agreement(tiny("Llama"), faulty(fault), prompt, new_tokens=4)
    assert all(check.ok for check in found.checks)
    assert found.partings == ()
    assert [report.name for report in found.padded if not report.ok] == wrong
    assert not found.ok
    assert f"the model differs: {wrong[0]}: " in str(found)


def test_a_model_that_fails_in_decoding_is_a_failure_and_not_an_exception() -> None:
    def change(kwargs: dict[str, Any], decoding: bool) -> None:
        if decoding:
            raise ValueError("no cache here")

    found = token_agreement(tiny("Llama"), faulty(change), tokens(), new_tokens=3, padding=False)
    reason = "generate: the original runs, the model raises ValueError: no cache here"
    assert found.failures == (reason,)


def test_nan_in_one_step_is_a_failure_and_plain_json() -> None:
    new: Any = tiny("Llama")
    calls: list[int] = []

    def poison(*_: Any) -> Any:
        calls.append(1)
        return _[2] * float("nan") if len(calls) == 3 else None

    new.lm_head.register_forward_hook(poison)
    found = token_agreement(tiny("Llama"), new, tokens(left=True), new_tokens=3, padding=False)
    assert not found.ok
    assert any("values are like nan where the original is finite" in x for x in found.failures)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_the_models_are_as_before() -> None:
    model: Any = tiny("Llama").train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    attributes = set(vars(model))
    prompt = tokens(left=True)
    mask = prompt["attention_mask"].clone()
    token_agreement(model, faulty(padding_ignored), prompt, new_tokens=2)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert set(vars(model)) == attributes
    assert torch.equal(prompt["attention_mask"], mask)
    assert model.training


def test_a_model_compiled_in_place_generates_as_it_did() -> None:
    model = tiny("Llama")
    calls = []

    def compiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return model._call_impl(*args, **kwargs)

    model._compiled_call_impl = compiled
    assert token_agreement(model, model, tokens(left=True), new_tokens=4, padding=False).ok
    assert len(calls) == 4 + 1  # its own text and one call over it, not those of the original
    assert model._compiled_call_impl is compiled


def test_a_model_that_cannot_generate_is_named() -> None:
    with pytest.raises(InputError, match="Linear has no `generate`"):
        token_agreement(nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(InputError, match="the original cannot generate from these inputs: "):
        token_agreement(tiny("Llama"), tiny("Llama"), torch.ones(1, 2))


def test_notes_of_padded_prompts_are_in_the_text() -> None:
    padded = GenerationReport(1, 4, (), name="left padding", notes=("no gold",))
    text = str(GenerationReport(2, 4, (), padded=(padded,), notes=("no cache",)))
    assert text.endswith("note: no cache; note: left padding: no gold")


def test_no_token_is_not_agreement() -> None:
    assert not GenerationReport(0, 4, ()).ok
    assert not GenerationReport(2, 0, ()).ok
