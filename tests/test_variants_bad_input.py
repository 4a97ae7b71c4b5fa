"""What the four kinds are given wrongly: one clear error each, or a line of the report and a model
that runs as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rewriter
import zoo
from rewriter.errors import InputError, PassError, PlanError
from rewriter.testing.small import SmallAttention, inputs_for

VAR = "sinks.var(dims=[0, 3], tau=1, first_layer=0, last_layer=True)"
PROMPT = 11
TOKENS = torch.randint(3, zoo.VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(1))


def labels(*shape: int, value: int = 1) -> Tensor:
    return torch.full(shape, value, dtype=torch.int64)


# --- options that no model makes right ------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ("linear.lightning(rule=alibi)", "rule is 'alibi'; it is one of tnl, minimax, paper"),
        ("linear.lightning", "linear.lightning needs rule"),
        ("linear.window_tail(window=0)", "window is 0; it has to be at least 1"),
        ("linear.features(map=taylor)", "map is 'taylor'; it is one of elu, relu, exp"),
        ("sparse.moba(topk=0)", "topk is 0; it has to be at least 1"),
        ("sparse.moba(block=0)", "block is 0; it has to be at least 1"),
        ("sparse.biformer(regions=2, topk=5)", "topk is 5, and 2 x 2 regions are 4"),
        ("sparse.biformer(regions=2, topk=1, grid=[4])", "grid is rows and columns"),
        ("heads.moh(active=0)", "active is 0; it has to be above 0"),
        ("heads.moh(active=1.5)", "active is 1.5; it has to be at most 1"),
        ("heads.moh(router=mlp)", "router is 'mlp'; it is one of linear, norm"),
        ("heads.moh(shared=1, shared_heads=[0, 1])", "shared=1, and shared_heads names 2 heads"),
        ("sinks.var", "D_sink is unknown for the base model: give dims=[...]"),
        ("sinks.var(dims=[-1])", "dims are counted from 0, got -1"),
        ("sinks.var(dims=[0], mode=code)", "mode is 'code'; it is one of paper, released"),
        ("sinks.remove", "needs first= or label=, and not both"),
        ("sinks.remove(first=1, label=2)", "needs first= or label=, and not both"),
        ("sinks.learned(initial=1, off_by_one=True)", "off_by_one is the logit 0"),
    ],
)
def test_an_option_out_of_range_is_an_error_before_anything_runs(
    request_text: str, message: str
) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(PassError) as error:
        rewriter.optimize(model, request_text)
    assert message in str(error.value)
    assert rewriter.report_of(model).sites == ()


# --- requests that do not fit this model ----------------------------------------------------------


@pytest.mark.parametrize(
    ("request_text", "pattern", "reason"),
    [
        (
            "sparse.biformer(regions=4, topk=13, grid=[1, 11])",
            "noncausal self",
            "topk is 13, and a grid of 1 x 11 has 4 regions",
        ),
        ("sparse.biformer(regions=2, topk=1)", "noncausal self", "its 11 tokens are no square"),
        ("sparse.moba(block=2, topk=1)", "noncausal self", "the site is not causal, so no block"),
        (
            "heads.moh(shared=3, routed=2)",
            "causal self",
            "2 heads are to be picked from the 1 of 4",
        ),
        ("heads.moh(shared_heads=[0, 4])", "causal self", "head 4 does not exist; this site has 4"),
        ("heads.ablate(heads=[4])", "causal self", "head 4 does not exist; this site has 4 heads"),
        ("linear.lightning(rule=tnl)", "causal self", "needs the layer and the number of layers"),
        ("sinks.var(dims=[0])", "causal self", "the number of the layer is not known"),
        (
            "sinks.var(dims=[32], first_layer=0, last_layer=True)",
            "causal self",
            "the hidden state has dimensions 0 to 31, not 32",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_told_and_the_model_runs_as_it_was(
    request_text: str, pattern: Any, reason: str
) -> None:
    model, given = SmallAttention(pattern).eval(), inputs_for(pattern)
    with torch.no_grad():
        before = model(**given)
        torch._dynamo.mark_static(given["x"], 1)  # images have the size that they have
        after = rewriter.optimize(model, request_text)(**given)
    (site,) = rewriter.report_of(model).attention
    assert site.decision == "kept"
    assert site.passes == ()
    assert reason in site.reason
    assert torch.equal(after, before)
    assert not hasattr(model, "rewriter")


class Broken(nn.Module):
    """Torch captures a layer with a break once, and calls it with the weights of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SmallAttention("causal self")

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return cast(Tensor, self.attention(x))


@pytest.mark.parametrize(
    ("request_text", "reason"),
    [
        ("linear.lightning(rule=tnl)", "needs the layer and the number of layers"),
        ("heads.gate", "all layers would share the new parameters"),
    ],
)
def test_layers_that_share_a_graph_do_not_share_what_is_made_for_one(
    request_text: str, reason: str
) -> None:
    model, x = nn.Sequential(Broken(), Broken()).eval(), inputs_for("causal self")["x"]
    with torch.no_grad():
        before = model(x)
        after = rewriter.optimize(model, request_text)(x)
    (site,) = rewriter.report_of(model).attention
    assert site.decision == "kept"
    assert reason in site.reason
    assert torch.equal(after, before)


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rewriter.label_spans([], length=4), "no image span: give at least one"),
        (lambda: rewriter.label_spans([(2, 5)], length=4), "is not inside a prompt of 4 tokens"),
        (lambda: rewriter.label_spans([(3, 3)], length=4), "is not inside a prompt of 4 tokens"),
        (lambda: rewriter.label_spans([(-2, 1)], length=4), "is not inside a prompt of 4 tokens"),
        (lambda: rewriter.label_spans([(1, 2)], length=4, label=0), "is 1 or more, got 0"),
        (lambda: labels(PROMPT), "labels are integers [B, M], one for each token"),
        (lambda: labels(1, 2, 3), "labels are integers [B, M], one for each token"),
        (lambda: torch.ones(1, PROMPT), "got torch.float32 of shape (1, 11)"),
        (lambda: [[0, 1]], "got list"),
        (lambda: labels(1, PROMPT, value=-1), "labels are 0, 1, 2, ...; got -1"),
        (lambda: labels(1, PROMPT, value=0), "no group and no image span is named"),
    ],
)
def test_labels_that_name_no_group_are_refused_when_they_are_given(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        rewriter.give(nn.Linear(1, 1), labels=make())
    assert message in str(error.value)


@pytest.fixture(scope="module")
def decoder() -> Any:
    """One layer, whose sinks give their weight to an image."""
    model = zoo.architecture("llama").build("sdpa", num_hidden_layers=1)
    rewriter.optimize(model, VAR)
    return model


def prompted(model: Any) -> Any:
    return model(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=True)


def test_labels_that_do_not_fit_the_prompt_are_refused_by_the_call(decoder: Any) -> None:
    with torch.no_grad():
        with pytest.raises(InputError, match="labels of the tokens are not known"):
            prompted(decoder)
        for wrong in (labels(3, PROMPT), labels(1, PROMPT + 1), labels(2, PROMPT + 5)):
            with (
                rewriter.give(decoder, labels=wrong),
                pytest.raises(InputError, match=r"the prompt has 2 rows of 11 tokens"),
            ):
                prompted(decoder)
        with rewriter.give(decoder, labels=labels(1, PROMPT - 2)):  # later tokens are ordinary
            assert prompted(decoder).logits.isfinite().all()


def test_a_cache_that_another_model_filled_is_refused(decoder: Any) -> None:
    plain = zoo.architecture("llama").build("sdpa", num_hidden_layers=1)
    step = {"input_ids": TOKENS[:, :1], "attention_mask": labels(2, PROMPT + 1)}
    with torch.no_grad(), rewriter.give(decoder, labels=labels(1, 4)):
        foreign = prompted(plain).past_key_values
        with pytest.raises(InputError, match="this cache was filled by another model"):
            decoder(**step, past_key_values=foreign)
        own = prompted(decoder).past_key_values
        assert decoder(**step, past_key_values=own).logits.isfinite().all()


# --- states of another plan -----------------------------------------------------------------------


def test_the_router_of_another_plan_is_refused(tmp_path: Path) -> None:
    """It picks from two heads, where the plan has three to pick from."""
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    model = zoo.architecture("llama").build("sdpa", num_hidden_layers=1)
    rewriter.optimize(model, "heads.moh(shared=1, routed=2)", inputs=inputs)
    rewriter.save(model, tmp_path / "saved")
    file = tmp_path / "saved" / "rewriter.safetensors"
    other = {n: x[:2].clone() for n, x in load_file(file).items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for rewriter\.model\.layers\.0"):
        model.load_state_dict(other, strict=False)
    save_file(other, file)
    with pytest.raises((PlanError, InputError), match="another plan"):
        rewriter.load(tmp_path / "saved")(**inputs)
