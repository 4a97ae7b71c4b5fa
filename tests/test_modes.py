"""The ways in which a model is used: caches, checkpointing, dropout, autocast, compilers, adapters.

In each of them the rewritten model computes what the original does, and its sites stay rewritten,
or the report says why not.
"""

from __future__ import annotations

import copy
import filecmp
import io
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import rewriter
import zoo
from rewriter.errors import InputError

FUSE = "fuse(from_scores=0)"
NEW = 8


def pair(name: str, implementation: str = "eager", **options: Any) -> tuple[Any, Any]:
    """A model of `zoo`, and a copy of it that is rewritten."""
    original = zoo.architecture(name).build(implementation, **options)
    return original, rewriter.optimize(copy.deepcopy(original), FUSE)


def decisions(model: nn.Module, *, graph: int | None = None) -> list[tuple[str, str]]:
    """Decision and reason of each attention, in one graph or in all."""
    sites = rewriter.report_of(model).attention
    return [(s.decision, s.reason) for s in sites if graph in (None, s.graph)]


def assert_rewritten(model: nn.Module, sites: int) -> None:
    report = rewriter.report_of(model)
    assert decisions(model) == [("rewritten", "")] * sites, str(report)
    assert report.notes == ()


def assert_same(found: Tensor, expected: Tensor, gold: Tensor | None = None) -> None:
    """Twice the error of the original at most, or some roundings; without a float64 original a
    fixed tolerance for float32."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if gold is None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return
    rounding = 4 * torch.finfo(expected.dtype).eps * float(gold.abs().mean())
    for measure in (torch.mean, torch.amax):
        ours, theirs = (float(measure((x.double() - gold).abs())) for x in (found, expected))
        assert ours <= 2 * theirs + rounding


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Those of one training step, by the name of the parameter."""
    model.train()
    model.zero_grad()
    output = model(**inputs)[0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights.to(output.dtype)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Some are zero but for rounding, such as that of a bias on all keys: the scale is that of
    all of them."""
    assert found.keys() == expected.keys()
    assert len(found) > 3
    scale = max(float(x.abs().max()) for x in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * scale)


# --- generate -------------------------------------------------------------------------------------


STATIC = {"cache_implementation": "static"}
BEAMS = {"num_beams": 3}


def on_every_device() -> transformers.CompileConfig:
    """What `generate` does with a static cache on a GPU: it compiles the forward of one token."""
    config = transformers.CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize(
    ("name", "implementation", "case"),
    [
        pytest.param("gemma2", "eager", STATIC, id="static with a sliding window"),
        pytest.param("llama", "sdpa", STATIC | {"compile_config": None}, id="static, compiled"),
        pytest.param("mistral", "eager", BEAMS, id="beams with a sliding window"),
    ],
)
def test_text_is_the_same_with_every_cache(
    name: str, implementation: str, case: dict[str, Any]
) -> None:
    """Prompts padded on the left, longer than the window; `test_architectures` has dynamic
    caches."""
    original, model = pair(name, implementation)
    if "compile_config" in case:
        case = case | {"compile_config": on_every_device()}
    prompt = zoo.architecture(name).prompt()
    wanted = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    wanted |= {"output_logits": True}
    without = {n: x for n, x in case.items() if n != "compile_config"}
    with torch.no_grad():
        expected = original.generate(**prompt, **wanted, **without)
        found = model.generate(**prompt, **wanted, **case)
    kinds = [type(x.past_key_values).__name__ for x in (expected, found)]
    assert kinds == ["StaticCache" if "cache_implementation" in case else "DynamicCache"] * 2
    assert torch.equal(found.sequences, expected.sequences)
    for x, y in zip(found.logits, expected.logits, strict=True):
        assert_same(x, y)
    assert_rewritten(model, 2 * 2)  # layers, and a graph each for the prompt and one token


@pytest.mark.parametrize("case", [BEAMS, STATIC], ids=["beams", "static"])
def test_text_of_an_encoder_and_a_decoder_is_the_same(case: dict[str, Any]) -> None:
    original, model = pair("t5", num_layers=1)
    rewriter.optimize(model.get_encoder(), FUSE)
    prompt = zoo.architecture("t5").prompt() | {"max_new_tokens": NEW, "do_sample": False}
    with torch.no_grad():
        expected, found = original.generate(**prompt, **case), model.generate(**prompt, **case)
    assert torch.equal(found, expected)
    assert_rewritten(model.get_encoder(), 1)
    made, again = decisions(model, graph=0), decisions(model, graph=1)
    assert made == [("rewritten", "")] * 2
    if case is BEAMS:
        assert again == made
    else:  # its bias reads how full the cache is, which the cache counts on in place
        why = "past_key_values is written in place while the attention is computed"
        assert sorted(again) == [("kept", why), ("rewritten", "")]


# --- returned weights -----------------------------------------------------------------------------


def test_weights_are_the_originals_whenever_they_are_asked_for() -> None:
    original, model = pair("llama", num_hidden_layers=1)
    inputs = zoo.architecture("llama").inputs()
    for asked in (True, False, True):
        with torch.no_grad():
            expected = original(**inputs, output_attentions=asked)
            found = model(**inputs, output_attentions=asked)
        if asked:
            (weights,), (theirs,) = found.attentions, expected.attentions
            assert torch.equal(weights, theirs)
            assert torch.equal(found.logits, expected.logits)
        else:
            assert found.attentions is None
            assert_same(found.logits, expected.logits)
    why = "its weights are also used by the output, so they have to be computed anyway"
    with_weights, without = (
        {s for s in decisions(model) if s[0] == d} for d in ("kept", "rewritten")
    )
    assert with_weights == {("kept", why)}
    assert without == {("rewritten", "")}


class LastWeights(nn.Module):
    """Three layers; the last one returns its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            y, weights = layer(x, x, x, average_attn_weights=False)
            x = x + y
        return x, weights


def test_only_the_layer_that_returns_its_weights_is_left_alone() -> None:
    original = LastWeights().double()
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), original(x), rtol=0, atol=1e-13)
    assert [d for d, _ in decisions(model)] == ["rewritten", "rewritten", "kept"]


# --- gradient checkpointing -----------------------------------------------------------------------


class Attention(nn.Module):
    """Two causal heads, and dropout of weights and of the output."""

    def __init__(self, weights: float = 0.0, output: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.weights, self.drop = weights, nn.Dropout(output)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        p = self.weights if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))


class Layers(nn.Module):
    """Two layers, each run by `run(layer, x)`."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(**dropout) for _ in range(2))
        self.run = run

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            x = x + self.run(layer, x)
        return (x,)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def again(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def nested(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda y: again(layer, y).tanh(), x, use_reentrant=False)


def keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = op is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def selective(layer: nn.Module, x: Tensor) -> Tensor:
    kept = partial(create_selective_checkpoint_contexts, keep_products)
    return checkpoint(layer, x, use_reentrant=False, context_fn=kept)


X = {"x": torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "reentrant", "dropout"),
    [("llama", False, {}), ("bert", True, {"hidden_dropout_prob": 0.3})],
)
def test_checkpointing_of_transformers_gives_the_same_gradients(
    name: str, reentrant: bool, dropout: dict[str, float]
) -> None:
    original, model = pair(name, **dropout)
    found = []
    for each in (original, model):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        found.append(gradients(each, zoo.architecture(name).inputs()))
    assert_same_gradients(found[1], found[0])
    assert_rewritten(model, 2)


@pytest.mark.parametrize("run", [again, nested, selective])
def test_what_is_drawn_in_a_region_is_drawn_again(run: Any) -> None:
    original = Layers(run, output=0.5)
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    torch.manual_seed(5)
    expected = gradients(original, X)
    torch.manual_seed(5)
    assert_same_gradients(gradients(model, X), expected)
    assert_rewritten(model, 2)


def test_what_is_drawn_in_a_region_without_a_rewritten_site_is_drawn_again() -> None:
    original = Layers(again, output=0.5, weights=0.3)
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    torch.manual_seed(5)
    expected = gradients(original, X)
    torch.manual_seed(5)
    assert_same_gradients(gradients(model, X), expected)
    (why,) = set(decisions(model))
    assert why[0] == "kept"
    assert "dropout of 0.3 is active" in why[1]


def kept_bytes(model: nn.Module) -> int:
    """What a forward keeps for the backward pass."""
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel() * x.element_size()) or x, lambda x: x
    )
    model.train()
    model(**X)
    with hooks:
        model(**X)
    return sum(kept)


def test_a_rewritten_region_keeps_its_inputs_alone() -> None:
    """With the parameters: those of one layer are 1,248 bytes."""
    runs = (plain, again)
    models = [rewriter.optimize(Layers(run), FUSE) for run in runs]
    without, with_regions = map(kept_bytes, models)
    originals = [kept_bytes(Layers(run)) for run in runs]
    for model in models:
        assert_rewritten(model, 2)
    assert originals[1] < originals[0] / 3
    assert with_regions < without / 3


@pytest.mark.parametrize("text", ["heads.gate", "fuse(from_scores=0, dropout=True)"])
def test_other_passes_are_trained_with_checkpointing(text: str) -> None:
    found = []
    for run in (plain, again):
        torch.manual_seed(0)
        model = rewriter.optimize(Layers(run, weights=0.3), text, inputs=X)
        torch.manual_seed(5)
        found.append(gradients(model, X))
        assert {d for d, _ in decisions(model)} == {"rewritten"}
    assert ("rewriter.layers.0.gate.weight" in found[0]) == (text == "heads.gate")
    assert_same_gradients(found[1], found[0])


# --- dropout --------------------------------------------------------------------------------------


def test_fused_dropout_follows_the_seed_in_training_and_leaves_evaluation_alone() -> None:
    """That the default leaves active dropout alone is in `test_optimize`."""
    original = zoo.architecture("bert").build(attention_probs_dropout_prob=0.3)
    model = rewriter.optimize(copy.deepcopy(original), "fuse(from_scores=0, dropout=True)")
    inputs = zoo.architecture("bert").inputs()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(gradients(model, inputs))
    assert_rewritten(model, 2)
    assert all(torch.equal(x, runs[1][n]) for n, x in runs[0].items())
    assert not all(torch.equal(x, runs[2][n]) for n, x in runs[0].items())
    with torch.no_grad():
        found, expected = model.eval()(**inputs)[0], original(**inputs)[0]
    assert_same(found, expected)


def test_fused_dropout_of_a_model_has_the_expectation_of_the_original() -> None:
    """4,096 rows draw for themselves; behind one attention the output is linear in the weights."""
    torch.manual_seed(0)
    original = nn.MultiheadAttention(8, 2, dropout=0.25, batch_first=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(original)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    model = rewriter.optimize(Model(), "fuse(from_scores=0, dropout=True)").train()
    x = torch.randn(1, 6, 8).expand(4096, 6, 8)
    with torch.no_grad():
        expected = original.eval()(x[:1], x[:1], x[:1])[0][0]
        found = model(x).double()
        theirs = original.train()(x, x, x, need_weights=False)[0].double()
    assert_rewritten(model, 1)
    error = found.std(0) / 4096**0.5
    assert bool(((found.mean(0) - expected).abs() < 5 * error).all())
    torch.testing.assert_close(found.std(0), theirs.std(0), rtol=0.1, atol=0)


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_autocast_around_a_call_keeps_dtype_and_precision(name: str) -> None:
    original, model = pair(name)
    inputs = zoo.architecture(name).inputs(batch=2 if name == "bert" else 1)
    with torch.no_grad():
        gold = copy.deepcopy(original).double()(**inputs)[0]
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = model(**inputs)[0], original(**inputs)[0]
        assert_same(found, expected, gold)
        assert_rewritten(model, 2)
        outside = model(**inputs)[0]  # not what was compiled under autocast
        assert_same(outside, original(**inputs)[0], gold)
    assert_rewritten(model, 4)
    assert float((outside - gold).abs().mean()) < float((found - gold).abs().mean()) / 100


# --- compilers ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # when inductor is imported
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiler_around_a_rewritten_model_leaves_its_sites_rewritten(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    original, model = pair("llama", num_hidden_layers=1)
    inputs = zoo.architecture("llama").inputs()
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert_same(compiled(**inputs)[0], original(**inputs)[0])
    assert_rewritten(model, 1)
    assert_same_gradients(gradients(compiled._orig_mod, inputs), gradients(original, inputs))
    assert_rewritten(model, 2)


def test_a_rewritten_model_that_is_compiled_stays_rewritten() -> None:
    original, model = pair("llama", num_hidden_layers=1)
    inputs = zoo.architecture("llama").inputs()
    model.compile(backend="eager")
    with torch.no_grad():
        assert_same(model(**inputs)[0], original(**inputs)[0])
    assert decisions(model) == [("rewritten", "")]
    assert rewriter.report_of(model).notes == (
        "model.compile() did nothing: an optimized model is compiled already",
    )
    twin = copy.deepcopy(model)
    twin.compile()
    assert len(rewriter.report_of(model).notes) == 1
    rewriter.restore(model).compile(backend="eager")
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], original(**inputs)[0])


# --- moves ----------------------------------------------------------------------------------------


def test_a_model_that_changes_its_dtype_is_rewritten_in_the_new_one() -> None:
    original, model = pair("gemma2", num_hidden_layers=1)
    inputs = zoo.architecture("gemma2").inputs(batch=1)
    with torch.no_grad():
        gold = copy.deepcopy(original).double()(**inputs)[0]
        for calls, dtype in enumerate([torch.float32, torch.bfloat16], start=1):
            found, expected = model.to(dtype)(**inputs)[0], original.to(dtype)(**inputs)[0]
            assert_same(found, expected, gold)
            assert_rewritten(model, calls)


def test_a_model_that_was_on_meta_computes_with_what_it_loads() -> None:
    original = Layers(plain)
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    model(**X)
    other = Layers(plain)
    model.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict())
    with torch.no_grad():
        assert_same(model(**X)[0], other(**X)[0])
    assert {d for d, _ in decisions(model)} == {"rewritten"}


@pytest.mark.parametrize("moved_first", [False, True])
def test_weights_that_are_fetched_for_each_call_are_those_that_count(
    moved_first: bool, tmp_path: Path
) -> None:
    """Hooks break the graph at every linear layer; attention between two of them is rewritten, and
    one graph serves both layers."""
    original = Layers(plain)
    model = copy.deepcopy(original)
    with torch.no_grad():
        if moved_first:
            accelerate.cpu_offload(model, execution_device="cpu")
        rewriter.optimize(model, FUSE)
        assert_same(model(**X)[0], original(**X)[0])
        if not moved_first:
            assert_rewritten(model, 2)
            places = {"layers.0": "cpu", "layers.1": "disk"}
            accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
        assert_same(model(**X)[0], original(**X)[0])
    assert_rewritten(model, 1 if moved_first else 2 + 1)


# --- files ----------------------------------------------------------------------------------------


def test_a_rewritten_model_is_saved_as_the_original(tmp_path: Path) -> None:
    original, model = pair("llama", num_hidden_layers=1)
    inputs = zoo.architecture("llama").inputs()
    with torch.no_grad():
        expected = original(**inputs)[0]
        model(**inputs)
        with pytest.raises(InputError, match=r"use rewriter\.save"):
            torch.save(model, io.BytesIO())
        original.save_pretrained(tmp_path / "original")
        model.save_pretrained(tmp_path / "model")
        names = sorted(p.name for p in (tmp_path / "original").iterdir())
        assert sorted(p.name for p in (tmp_path / "model").iterdir()) == names
        same, *others = filecmp.cmpfiles(*tmp_path.iterdir(), names, shallow=False)
        assert (sorted(same), others) == (names, [[], []])
        loaded = type(original).from_pretrained(tmp_path / "model", attn_implementation="eager")
        assert torch.equal(loaded(**inputs)[0], expected)
    assert_rewritten(model, 1)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_are_trained_switched_off_and_merged(when: str) -> None:
    """Added to a model that is rewritten then, or to one that is rewritten already."""

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    plain = zoo.architecture("llama").build(num_hidden_layers=1)
    inputs = zoo.architecture("llama").inputs()
    original = adapted(copy.deepcopy(plain))
    if when == "before":
        model = rewritten = adapted(copy.deepcopy(plain))
        rewriter.optimize(rewritten, FUSE)
    else:
        rewritten = rewriter.optimize(copy.deepcopy(plain), FUSE, inputs=inputs)
        model = adapted(rewritten)
        rewriter.optimize(rewritten, FUSE)  # a report of what comes now
    assert_same_gradients(gradients(model, inputs), gradients(original, inputs))
    assert len(gradients(model, inputs)) == 2 * 2
    with torch.no_grad():
        original.eval(), model.eval()
        expected = original(**inputs)[0]
        assert_same(model(**inputs)[0], expected)
        with model.disable_adapter():
            off = model(**inputs)[0]
        assert_same(off, plain(**inputs)[0])
        assert not torch.allclose(off, expected, rtol=1e-2, atol=1e-2)
        assert_same(model(**inputs)[0], expected)
        sites = len(decisions(rewritten))
        assert_rewritten(rewritten, sites)
        assert sites >= 3
        merged = model.merge_and_unload()
        assert_same(merged(**inputs)[0], expected)
    assert (merged is rewritten) == (when == "after")
    assert_rewritten(merged, sites + 1 if when == "after" else 0)


# --- quantised layers -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
def test_quantised_linear_layers_stay_and_attention_between_them_is_rewritten() -> None:
    """torch breaks the graph at each of them."""
    original = torch.ao.quantization.quantize_dynamic(Layers(plain), {nn.Linear}, dtype=torch.qint8)
    model = rewriter.optimize(copy.deepcopy(original), FUSE)
    with torch.no_grad():
        assert_same(model(**X)[0], original(**X)[0])
    quantised = torch.ao.nn.quantized.dynamic.Linear
    assert sum(isinstance(m, quantised) for m in model.modules()) == 4
    assert decisions(model) == [("rewritten", "")]  # one graph serves both layers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
def test_attention_that_hands_its_weights_past_a_quantised_layer_says_so() -> None:
    original = torch.ao.quantization.quantize_dynamic(
        zoo.architecture("bert").build(num_hidden_layers=1), {nn.Linear}, dtype=torch.qint8
    )
    model: Any = rewriter.optimize(copy.deepcopy(original), FUSE)
    inputs = zoo.architecture("bert").inputs()
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], original(**inputs)[0])
    why = "its weights are also used by the output, so they have to be computed anyway"
    assert decisions(model) == [("kept", why)]
