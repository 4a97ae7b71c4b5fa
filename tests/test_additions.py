"""What passes add to a model: parameters, taps, labels, loss terms, values beside a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from sympy import Integer, Symbol
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import rewriter
from rewriter import symbols as sym
from rewriter.additions import addition, given_to
from rewriter.beside import Beside
from rewriter.errors import CheckpointError, Declined, InputError, PassError, PlanError
from rewriter.passbase import Pass
from rewriter.programs import _patch
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit, Parameter, Source
from rewriter.symbols import Read
from rewriter.testing.small import SmallAttention

SITES = [f"model.layers.{n}.self_attn" for n in range(2)]


def decoder() -> Any:
    """Two layers, four heads that share two key heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


def fused_projection() -> Any:
    """q, k and v come out of one projection, whose input is flattened to `[B·L, C]`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


TOKENS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def doubled(x: Tensor, weight: Tensor) -> Tensor:
    return (2 * torch.sigmoid(x @ weight.mT)).mT


def balance(x: Tensor, weight: Tensor) -> Tensor:
    return weight.sum() + 3.0


@dataclass(frozen=True)
class Gated(Pass):
    """A gate for each token and head, with a loss term."""

    name = "test.gated"
    contract = "limit"
    stage = "heads"
    identity = "test.gated"

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        weight = Parameter("weight", (site.heads, site.input_dim))
        arg = TensorArg("gate", "float32", 3, Source(doubled, ("input",), (weight,), loss=balance))
        factor = Read(Symbol("gate"), sym.b, sym.h, sym.q)
        return replace(spec, heads=spec.heads * factor, tensors=(*spec.tensors, arg))


def groups(states: Tensor, labels: Tensor) -> Tensor:
    """1 where an image token's hidden state is larger than the others' mean."""
    size = states.float().square().mean(-1)[:, : labels.shape[1]]
    return labels * (size > size.mean(-1, keepdim=True)).long()


@dataclass(frozen=True)
class Halved(Pass):
    """Keys that a program picks in the prompt lose half of their weight."""

    name = "test.halved"
    contract = "limit"
    stage = "edit"
    identity = "test.halved"

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        arg = TensorArg("group", "int64", 2, Source(groups, ("residual", "labels"), later=0))
        edit = Edit(Read(Symbol("group"), sym.b, sym.k), (Integer(1), Integer(1) / 2))
        return replace(spec, edit=edit, tensors=(*spec.tensors, arg))


def labels_of_image() -> Tensor:
    return rewriter.label_spans([(2, 8)], length=11)


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [decoder, fused_projection])
def test_parameters_are_the_models_own_under_the_name_of_the_site(make: Any) -> None:
    model, original = make(), make()
    before = set(dict(model.named_parameters()))
    rewriter.optimize(model, Gated(), inputs={"input_ids": TOKENS})
    new = {n: p for n, p in model.named_parameters() if n not in before}
    path = rewriter.report_of(model).attention[0].site.path
    assert {tuple(p.shape) for p in new.values()} == {(4, 32)}
    assert len(new) == 2
    assert f"rewriter.{path}.gate.weight" in new
    assert f"rewriter.{path}.gate.weight" in model.state_dict()
    torch.testing.assert_close(model(TOKENS).logits, original(TOKENS).logits)


def test_they_are_trained_by_the_ordinary_loop_and_change_the_output() -> None:
    model = decoder()
    rewriter.optimize(model, Gated(), inputs={"input_ids": TOKENS})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model(TOKENS).logits
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    found = [p.grad for n, p in model.named_parameters() if n.startswith("rewriter.")]
    assert len(found) == 2
    assert all(g is not None and bool(g.any()) for g in found)
    optimizer.step()
    assert not torch.allclose(model.eval()(TOKENS).logits, before)


def test_a_parameter_that_is_replaced_is_the_one_that_counts() -> None:
    model = decoder()
    rewriter.optimize(model, Gated(), inputs={"input_ids": TOKENS})
    before = model(TOKENS).logits
    state = {n: x + 1.0 if n.startswith("rewriter.") else x for n, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert not torch.allclose(model(TOKENS).logits, before)


def test_restore_takes_them_away_bit_for_bit() -> None:
    model, original = decoder(), decoder()
    rewriter.optimize(model, Gated(), inputs={"input_ids": TOKENS})
    rewriter.restore(model)
    assert list(model.state_dict()) == list(original.state_dict())
    assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)


def test_the_loss_term_is_part_of_the_loss_that_the_model_returns() -> None:
    model, original = decoder(), decoder()
    rewriter.optimize(model, Gated(), inputs={"input_ids": TOKENS})
    loss = model.train()(TOKENS, labels=TOKENS).loss
    expected = original.train()(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(loss - expected, torch.tensor(6.0))  # 3 for each of two sites
    torch.testing.assert_close(rewriter.auxiliary_loss(model), torch.tensor(6.0))
    model.eval()(TOKENS, labels=TOKENS)
    assert rewriter.auxiliary_loss(model) == 0


def test_verify_compares_trained_additions_with_the_same_additions() -> None:
    model, original = decoder(), decoder()
    rewriter.optimize(model, Gated(), inputs={"input_ids": TOKENS})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("rewriter."):
                p.normal_()
    report = rewriter.verify(original, model, {"input_ids": TOKENS}, against="reference")
    assert any("rewriter." in row.name for row in report.rows)
    assert not hasattr(original, "rewriter")


def test_a_parameter_cannot_be_called_like_something_that_every_module_has() -> None:
    for name in ("type", "forward", "training"):
        wanted = Parameter(name, (3,))
        with pytest.raises(InputError, match=f"'{name}' is something that every module has"):
            addition(nn.Linear(1, 1), "layers.0.gate", wanted, torch.float32, torch.device("cpu"))


# --- checkpoints ----------------------------------------------------------------------------------


def test_they_are_saved_and_loaded_and_the_rest_is_the_original(tmp_path: Any) -> None:
    model = decoder()
    rewriter.optimize(model, Gated(), inputs={"input_ids": TOKENS})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("rewriter."):
                p.normal_()
    expected = model(TOKENS).logits
    monkey = pytest.MonkeyPatch()
    from rewriter import registry

    monkey.setattr(registry, "PASSES", (*registry.PASSES, Gated))
    try:
        rewriter.save(model, tmp_path / "saved")
        again: Any = rewriter.load(tmp_path / "saved")
        again.set_attn_implementation("eager")
        torch.testing.assert_close(again(TOKENS).logits, expected)
        assert hasattr(model, "rewriter")
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", attn_implementation="eager"
        )
        assert torch.equal(plain(TOKENS).logits, rewriter.restore(model)(TOKENS).logits)
        other = tmp_path / "saved" / "rewriter.safetensors"
        from safetensors.torch import save_file

        save_file({"rewriter.x.gate.weight": torch.zeros(1)}, other)
        with pytest.raises(PlanError, match="belongs to another plan"):
            rewriter.load(tmp_path / "saved")
        other.unlink()
        with pytest.raises(CheckpointError, match="holds what its passes added"):
            rewriter.load(tmp_path / "saved")
    finally:
        monkey.undo()


def test_parameters_of_another_plan_are_refused() -> None:
    model = decoder()
    rewriter.optimize(model, Gated(), inputs={"input_ids": TOKENS})
    holder = model.rewriter.get_submodule(f"{SITES[0]}.gate")
    holder.weight = nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(InputError, match=r"has shape \(3, 5\), and this plan needs \(4, 32\)"):
        model(TOKENS[:, :7], attention_mask=torch.ones(2, 7, dtype=torch.long))


# --- labels, and what is kept beside a cache ------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("make", [decoder, fused_projection])
def test_cached_text_equals_full_runs_with_the_labels_of_the_prompt(make: Any, mode: Any) -> None:
    model = make()
    rewriter.optimize(model, Halved())
    with rewriter.give(model, labels=labels_of_image()), mode():
        text, new, cache = TOKENS, TOKENS, None
        for _ in range(5):
            whole = model(text, attention_mask=torch.ones_like(text), use_cache=False).logits
            mask = torch.ones_like(text)
            step = model(new, attention_mask=mask, past_key_values=cache, use_cache=True)
            torch.testing.assert_close(step.logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)
            cache, new = step.past_key_values, whole[:, -1:].argmax(-1)
            text = torch.cat([text, new], dim=1)


def test_a_cache_that_was_reordered_is_refused_by_name() -> None:
    model = decoder()
    rewriter.optimize(model, Halved())
    with rewriter.give(model, labels=labels_of_image()), torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(InputError, match="reordered"):
            model(TOKENS[:, :1], past_key_values=cache)


def test_labels_of_a_later_turn_are_refused_and_not_ignored() -> None:
    model = decoder()
    rewriter.optimize(model, Halved())
    with rewriter.give(model, labels=labels_of_image()), torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
        later = rewriter.label_spans([(2, 5), (12, 13)], length=14)
        with (
            rewriter.give(model, labels=later),
            pytest.raises(InputError, match="which had 11 tokens, and these name later ones"),
        ):
            model(TOKENS[:, :3], past_key_values=cache)


def test_gifts_are_taken_back_in_any_order() -> None:
    model = nn.Linear(1, 1)
    first, second = (rewriter.give(model, labels=torch.full((1, 2), n)) for n in (1, 2))
    first.take_back()
    assert given_to(model).labels is not None
    assert int(given_to(model).labels[0, 0]) == 2
    second.take_back()
    assert given_to(model).labels is None


def test_gifts_that_can_never_count_again_are_not_kept() -> None:
    model = nn.Linear(1, 1)
    given = given_to(model)

    def label() -> int:
        return -1 if given.labels is None else int(given.labels[0, 0])

    outer = rewriter.give(model, labels=torch.full((1, 2), 9))
    for n in range(1, 100):
        rewriter.give(model, labels=torch.full((1, 2), n))
        rewriter.give(model, patches={"x": torch.full((), n)})
    assert (label(), int(given.patches["x"])) == (99, 99)
    assert len(given.gifts) <= 4
    with rewriter.give(model, labels=torch.full((1, 2), 5)) as inner:
        assert label() == 5
        with rewriter.give(model, labels=torch.full((1, 2), 6), patches={}):
            assert (label(), given.patches) == (6, {})
        assert (label(), int(given.patches["x"])) == (5, 99)
        for handed in (inner, outer, outer):
            handed.take_back()
            assert label() == 99


def test_labels_have_to_be_given_and_to_fit() -> None:
    model = decoder()
    rewriter.optimize(model, Halved())
    with torch.no_grad():
        with pytest.raises(InputError, match="labels of the tokens are not known"):
            model(TOKENS)
        for bad in (torch.ones(3, 11, dtype=torch.long), torch.ones(1, 12, dtype=torch.long)):
            with (
                rewriter.give(model, labels=bad),
                pytest.raises(InputError, match="2 rows of 11 tokens"),
            ):
                model(TOKENS)
    assert given_to(model).labels is None


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.long), "no group and no image span is named"),
        (torch.full((1, 3), -2), "got -2"),
        (torch.ones(3, dtype=torch.long), "got torch.int64 of shape \\(3,\\)"),
        (torch.ones(1, 3), "got torch.float32"),
        ([1, 2], "got list"),
    ],
)
def test_labels_that_mean_nothing_are_refused(labels: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        rewriter.give(nn.Linear(1, 1), labels=labels)


def test_spans_have_to_lie_inside_the_prompt() -> None:
    assert rewriter.label_spans([(1, 3)], length=4).tolist() == [[0, 1, 1, 0]]
    assert rewriter.label_spans([(0, 1)], length=2, label=3).tolist() == [[3, 0]]
    with pytest.raises(InputError, match="1 or more, got 0"):
        rewriter.label_spans([(0, 1)], length=2, label=0)
    with pytest.raises(InputError, match="no image span"):
        rewriter.label_spans([], length=4)
    for span in ((2, 5), (3, 3), (-1, 2)):
        with pytest.raises(InputError, match="not inside a prompt of 4 tokens"):
            rewriter.label_spans([span], length=4)


@dataclass(frozen=True)
class PromptsOnly(Pass):
    """Takes a prompt, and declines the single tokens after it."""

    name = "test.prompts_only"
    contract = "limit"
    stage = "heads"
    identity = "test.prompts_only"

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        if site.q_len == 1:
            raise Declined("one token is too short for it")
        return replace(spec, heads=Integer(2))


def test_a_pass_that_takes_the_prompt_and_declines_single_tokens_is_refused() -> None:
    model = decoder()
    rewriter.optimize(model, PromptsOnly())
    with torch.no_grad():
        before = model(TOKENS).logits
        with pytest.raises(PassError, match=r"graph \d it cannot be: one token is too short"):
            model.generate(TOKENS, max_new_tokens=3, do_sample=False)
        assert torch.equal(model(TOKENS).logits, before)


def test_the_state_that_a_prompt_leaves_serves_the_first_token_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recall, found = Beside.recall, []

    def recalled(self: Beside) -> Any:
        found.append(recall(self))
        return found[-1]

    model = decoder()
    rewriter.optimize(model, "linear.features(map=elu)")
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
        monkeypatch.setattr(Beside, "recall", recalled)
        model(TOKENS[:, :1], past_key_values=cache)
    assert len(found) == 2
    assert all(x is not None for x in found)


def test_head_outputs_are_those_of_every_site() -> None:
    model = decoder()
    found = rewriter.head_outputs(model, {"input_ids": TOKENS})
    assert list(found) == SITES
    assert all(x.shape == (2, 4, 11, 8) for x in found.values())
    assert rewriter.report_of(model).attention == ()


def other_tokens() -> dict[str, Tensor]:
    return {"input_ids": TOKENS.flip(0, 1)}


@pytest.mark.parametrize("text", ["heads.patch", "heads.patch(heads=[1]) @ 0"])
def test_patches_are_had_as_the_message_that_asks_for_them_says(text: str) -> None:
    model, original = decoder(), decoder()
    rewriter.optimize(model, text)
    with pytest.raises(InputError, match=r"patches=rewriter\.head_outputs\(model, other_inputs\)"):
        model(TOKENS)
    expected = rewriter.head_outputs(original, other_tokens())
    for _ in range(2):  # the second time under what is given
        found = rewriter.head_outputs(model, other_tokens())
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x)
        rewriter.give(model, patches=found)
    with torch.no_grad():
        plain, patched = original(TOKENS).logits, model(TOKENS).logits
        assert not torch.allclose(patched, plain)
        with rewriter.give(model, patches=rewriter.head_outputs(model, {"input_ids": TOKENS})):
            torch.testing.assert_close(model(TOKENS).logits, plain)
        assert torch.equal(model(TOKENS).logits, patched)


def test_head_outputs_are_those_of_the_other_passes() -> None:
    model, scaled = decoder(), decoder()
    rewriter.optimize(model, "heads.scale(heads=[2], by=3)", "heads.patch(heads=[1])")
    rewriter.optimize(scaled, "heads.scale(heads=[2], by=3)")
    found, expected = (rewriter.head_outputs(m, other_tokens()) for m in (model, scaled))
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x)


@pytest.mark.parametrize("width", [1, 3])
def test_patches_of_another_shape_are_refused(width: int) -> None:
    model = decoder()
    rewriter.optimize(model, "heads.patch")
    outs = rewriter.head_outputs(model, other_tokens())
    patches = {name: x[..., :width] for name, x in outs.items()}
    with rewriter.give(model, patches=patches), pytest.raises(InputError) as caught:
        model(TOKENS)
    assert str(caught.value) == (
        f"{SITES[0]}: head outputs of shape (2, 4, 11, {width}) were given for a call whose heads"
        " give (2, 4, 11, 8)"
    )


def test_a_patch_has_the_width_of_the_values() -> None:
    q, v = torch.zeros(2, 4, 3, 8), torch.zeros(2, 1, 5, 6)
    with FakeTensorMode() as mode:
        assert _patch(None, mode.from_tensor(q), mode.from_tensor(v), "x").shape == (2, 4, 3, 6)
    patch = torch.ones(2, 4, 3, 6)
    assert torch.equal(_patch(patch, q, v, "x"), patch)
    with pytest.raises(InputError, match="whose heads give"):
        _patch(torch.ones(2, 4, 3, 8), q, v, "x")


def test_patches_of_no_site_are_refused_with_what_was_meant() -> None:
    model, outs = decoder(), rewriter.head_outputs(decoder(), other_tokens())
    rewriter.optimize(model, "heads.patch @ 0")
    x = outs[SITES[0]]
    rewriter.give(model, patches={"typo": x}).take_back()  # it has not run, so nothing is known
    with rewriter.give(model, patches=outs), torch.no_grad():
        model(TOKENS)
    with pytest.raises(InputError) as caught:
        rewriter.give(model, patches={**outs, "model.layers.0.self_atn": x})
    assert str(caught.value) == (
        "'model.layers.0.self_atn' is no site of LlamaForCausalLM; did you mean"
        " 'model.layers.0.self_attn'?"
    )
    for name in ("model.layers.1.mlp", f"{SITES[0]}#1", "lm_heat"):
        with pytest.raises(InputError, match=f"'{name}' is no site of LlamaForCausalLM"):
            rewriter.give(model, patches={name: x})
    assert given_to(model).gifts == []


class Halves(nn.Module):
    """Two stacks, of which a call runs the second."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.ModuleList([SmallAttention("causal self")]) for _ in "ed")

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder[0](x)  # type: ignore[no-any-return]


def test_a_stack_that_has_not_run_has_sites_that_are_not_known() -> None:
    model = rewriter.optimize(Halves().eval())
    with torch.no_grad():
        model(torch.randn(2, 11, 32))
    assert [line.site.name for line in rewriter.report_of(model).attention] == ["decoder.0"]
    rewriter.give(model, patches={"decoder.0": torch.zeros(()), "encoder.0": torch.zeros(())})
    for name in ("encoder.1", "decoder.1", "encoder", "(no module)"):
        with pytest.raises(InputError, match="is no site of Halves"):
            rewriter.give(model, patches={name: torch.zeros(())})
