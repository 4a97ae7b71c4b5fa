"""heads.scale, heads.ablate, heads.gate, heads.patch, and that the passes compose in any order."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from rewriter import registry
from rewriter import symbols as sym
from rewriter.errors import Declined
from rewriter.linear import LinearSpec
from rewriter.passbase import apply, parse_request
from rewriter.passes.heads import HeadAblate, HeadGate, HeadPatch, HeadScale
from rewriter.reference import mask_of, reference
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, Spec

SITE = Site(
    "layers.0.attn",
    0,
    heads=4,
    kv_heads=2,
    head_dim=8,
    value_dim=8,
    input_dim=6,
    residual_dim=6,
    layers=2,
)
CAUSAL = SoftmaxSpec(mask=sym.k <= sym.q)


def example() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, n, 7, 8, dtype=torch.float64) for n in (4, 2, 2))


def test_scaled_heads_are_multiplied_and_others_are_not() -> None:
    q, k, v = example()
    spec = HeadScale(heads=(0, -1), by=0.5).rewrite(SITE, CAUSAL)
    factors = torch.tensor([0.5, 1, 1, 0.5], dtype=torch.float64).view(4, 1, 1)
    assert torch.equal(reference(spec, q, k, v), reference(CAUSAL, q, k, v) * factors)


def test_zero_ablates() -> None:
    out = reference(HeadScale(heads=(2,), by=0).rewrite(SITE, CAUSAL), *example())
    assert not out[:, 2].any()
    assert out[:, [0, 1, 3]].all()


def test_scaling_by_one_is_the_same_spec() -> None:
    assert HeadScale(heads=(1,), by=1).rewrite(SITE, CAUSAL) == CAUSAL


def test_head_that_does_not_exist_is_declined_with_the_count() -> None:
    for head in (4, -5):
        with pytest.raises(
            Declined, match=f"head {head} does not exist; this site has 4 heads, 0 to 3"
        ):
            HeadScale(heads=(head,), by=0).rewrite(SITE, CAUSAL)
    with pytest.raises(Declined, match="how many heads this site has is not known"):
        HeadScale(heads=(0,), by=0).rewrite(Site("x", 0), CAUSAL)


# --- ablation -------------------------------------------------------------------------------------


def ablated(text: str) -> Spec:
    spec, _, refusals = apply([parse_request(text, registry)], SITE, CAUSAL, 1)
    assert refusals == ()
    return spec


@pytest.mark.parametrize(
    "text", ["heads.ablate(heads=[2])", "heads.ablate @ heads=2", "heads.scale(heads=[2], by=0)"]
)
def test_ablating_is_pruning_is_scaling_by_zero(text: str) -> None:
    """The sum over the heads without the rows of the output projection that head 2 feeds."""
    q, k, v = example()
    weight = torch.randn(4, 8, 5, dtype=torch.float64)
    out = reference(ablated(text), q, k, v)
    whole, kept = reference(CAUSAL, q, k, v), [0, 1, 3]
    pruned = torch.einsum("bhld,hdc->blc", whole[:, kept], weight[kept])
    masked = torch.einsum("bhld,hdc->blc", out, weight)
    torch.testing.assert_close(masked, pruned, rtol=1e-12, atol=1e-12)
    assert torch.equal(out[:, kept], whole[:, kept])
    assert not out[:, 2].any()


def test_without_names_all_heads_are_ablated() -> None:
    spec = ablated("heads.ablate")
    assert not reference(spec, *example()).any()
    assert spec.active == 0


def test_ablation_says_how_many_heads_are_left() -> None:
    assert ablated("heads.ablate(heads=[0, -1])").active == 2
    assert ablated("heads.ablate(heads=[0], by=0.5)").active is None
    twice = HeadAblate(heads=(1,)).rewrite(SITE, ablated("heads.ablate(heads=[0, 2])"))
    assert twice.active == 2  # at most; that they are others is not known
    assert ablated("heads.ablate @ heads=2").active is None


def test_a_share_of_a_head_may_be_left() -> None:
    q, k, v = example()
    whole, found = reference(CAUSAL, q, k, v), reference(ablated("heads.ablate(by=0.5)"), q, k, v)
    torch.testing.assert_close(found, 0.5 * whole)


# --- gates ----------------------------------------------------------------------------------------


def gate_of(spec: Spec, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    source = spec.tensors[-1].source
    assert source is not None
    assert source.taps == ("input",)
    assert [(p.name, p.shape, p.initial) for p in source.parameters] == [
        ("weight", (4, 6), 0.0),
        ("bias", (4,), 0.0),
    ]
    return source.compute(x, weight, bias, **dict(source.options))


def test_a_new_gate_is_exactly_one() -> None:
    spec = HeadGate().rewrite(SITE, CAUSAL)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = 100 * torch.randn(2, 7, 6).to(dtype)
        gate = gate_of(spec, x, torch.zeros(4, 6, dtype=dtype), torch.zeros(4, dtype=dtype))
        assert torch.equal(gate, torch.ones(2, 4, 7))
        assert gate.dtype == torch.float32


def test_a_gate_is_twice_a_sigmoid_of_the_input() -> None:
    spec = HeadGate().rewrite(SITE, CAUSAL)
    q, k, v = example()
    x, weight, bias = (torch.randn(n, dtype=torch.float64) for n in ((2, 7, 6), (4, 6), (4,)))
    gate = gate_of(spec, x, weight, bias)
    want = torch.zeros(2, 4, 7, dtype=torch.float64)
    for b in range(2):
        for n in range(7):
            for h in range(4):
                logit = float((x[b, n] * weight[h]).sum() + bias[h])
                want[b, h, n] = 2 / (1 + 2.718281828459045**-logit)
    torch.testing.assert_close(gate, want, rtol=1e-9, atol=1e-9)
    out = reference(spec, q, k, v, [gate])
    torch.testing.assert_close(out, reference(CAUSAL, q, k, v) * want[..., None])


def test_a_gate_without_its_input_is_declined() -> None:
    with pytest.raises(Declined, match="which was not found in the graph of this site"):
        HeadGate().rewrite(replace(SITE, input_dim=0), CAUSAL)
    with pytest.raises(Declined, match="how many heads this site has is not known"):
        HeadGate().rewrite(replace(SITE, heads=0), CAUSAL)


# --- patches --------------------------------------------------------------------------------------


def test_patched_heads_are_those_of_the_other_run_and_others_are_not() -> None:
    q, k, v = example()
    other = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    out = reference(HeadPatch(heads=(1, -1)).rewrite(SITE, CAUSAL), q, k, v, [other])
    whole = reference(CAUSAL, q, k, v)
    assert torch.equal(out[:, [1, 3]], other[:, [1, 3]])
    assert torch.equal(out[:, [0, 2]], whole[:, [0, 2]])


def test_the_last_queries_alone_may_be_patched() -> None:
    q, k, v = example()
    other = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    out = reference(HeadPatch(last=2).rewrite(SITE, CAUSAL), q, k, v, [other])
    assert torch.equal(out[:, :, -2:], other[:, :, -2:])
    assert torch.equal(out[:, :, :-2], reference(CAUSAL, q, k, v)[:, :, :-2])


def test_what_is_patched_in_is_not_scaled() -> None:
    q, k, v = example()
    other = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    for order in ((HeadPatch(), HeadScale(heads=(0,), by=3)), (HeadAblate(), HeadPatch())):
        spec: Spec = CAUSAL
        for action in order:
            spec = action.rewrite(SITE, spec)
        assert torch.equal(reference(spec, q, k, v, [other]), other)


def test_a_patch_is_given_by_the_user() -> None:
    spec = HeadPatch(heads=(0,)).rewrite(SITE, CAUSAL)
    (tensor,) = spec.tensors
    assert (tensor.name, tensor.rank) == ("patch", 4)
    assert tensor.source is not None
    assert tensor.source.taps == ("patch",)
    x = torch.randn(1, 4, 2, 8)
    assert torch.equal(tensor.source.compute(x), x)
    with pytest.raises(Declined, match="patched by now"):
        HeadPatch(heads=(1,)).rewrite(SITE, spec)
    with pytest.raises(Declined, match="head 4 does not exist"):
        HeadPatch(heads=(4,)).rewrite(SITE, CAUSAL)


@pytest.mark.parametrize("action", [HeadAblate(heads=(0,)), HeadGate(), HeadPatch()])
def test_linear_attention_has_heads_too(action: HeadAblate) -> None:
    assert isinstance(action.rewrite(SITE, LinearSpec()), LinearSpec)


# --- together -------------------------------------------------------------------------------------


def test_passes_compose_in_any_order() -> None:
    """Window, scale and fuse in all six orders: one spec, and it means the product of the two."""
    texts = ["sparse.window(window=3, sinks=1)", "heads.scale(heads=[1, 3], by=0.25)", "fuse"]
    found = {
        apply([parse_request(t, registry) for t in order], SITE, CAUSAL, 1)[0]
        for order in permutations(texts)
    }
    (spec,) = found
    q, k, v = example()
    seen = torch.tensor([[j <= i and (i - j < 3 or j < 1) for j in range(7)] for i in range(7)])
    weights = (q @ k.repeat_interleave(2, 1).mT).masked_fill(~seen, -torch.inf).softmax(-1)
    want = weights @ v.repeat_interleave(2, 1)
    want[:, [1, 3]] *= 0.25
    torch.testing.assert_close(reference(spec, q, k, v), want, rtol=1e-12, atol=1e-12)


def test_passes_limited_to_heads_compose_in_any_order() -> None:
    texts = ["sparse.window(window=1) @ heads=0-1", "heads.scale(heads=[0], by=2)"]
    forward, backward = (
        apply([parse_request(t, registry) for t in order], SITE, CAUSAL, 1)[0]
        for order in (texts, texts[::-1])
    )
    assert torch.equal(
        mask_of(forward, q_len=5, kv_len=5, heads=4), mask_of(backward, q_len=5, kv_len=5, heads=4)
    )
    assert torch.equal(reference(forward, *example()), reference(backward, *example()))


def initial(spec: Spec) -> list[torch.Tensor]:
    """What the programs of a spec give for a random input and parameters that are not trained."""
    found = []
    for tensor in spec.tensors:
        source = tensor.source
        assert source is not None
        x = {"input": torch.randn(2, 7, 6), "q": example()[0]}
        taps = [x[tap].double() for tap in source.taps]
        start = [torch.full(p.shape, float(p.initial)).double() for p in source.parameters]
        found.append(source.compute(*taps, *start, **dict(source.options)))
    return found


STAGES = ("none", "mask", "heads", "patch")
WITH_IDENTITY = [kind for kind in registry.PASSES if kind.stage in STAGES]
"""The others have sites of their own, and tests of their own."""


@pytest.mark.parametrize("kind", WITH_IDENTITY, ids=lambda kind: kind.name)
def test_identity_setting_changes_no_function(kind: type) -> None:
    q, k, v = example()
    for before in (CAUSAL, SoftmaxSpec()):
        request = parse_request(kind.identity, registry)  # type: ignore[attr-defined]
        spec, applied, refusals = apply([request], SITE, before, 1)
        assert applied == (request.text,)
        assert refusals == ()
        assert torch.equal(reference(spec, q, k, v, initial(spec)), reference(before, q, k, v))
