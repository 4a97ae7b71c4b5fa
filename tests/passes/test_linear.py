"""linear.lightning, linear.features, linear.window_tail: closed forms of decays, what is kept of a
spec, identities, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from sympy import Float, Symbol
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewriter import symbols as sym
from rewriter.errors import Declined, PassError
from rewriter.evaluate import evaluate
from rewriter.families import from_json
from rewriter.kernels import torch_linear
from rewriter.linear import LinearSpec
from rewriter.lowering import Shapes
from rewriter.passbase import Pass
from rewriter.passes.decay import decay_of
from rewriter.passes.linear import FeatureMaps, Lightning, WindowTail
from rewriter.reference import reference
from rewriter.registry import read_requests
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.stages import Edit, Patch, Route

SITE = Site(
    "layers.3.attn", 3, heads=4, kv_heads=2, head_dim=8, value_dim=8, layers=24, q_len=0, kv_len=0
)
CROSS = replace(SITE, is_cross=True)
CAUSAL = SoftmaxSpec(Float(8**-0.5), mask=sym.k <= sym.q + sym.M - sym.L)
SEEN = sympy.Ne(sym.Read(Symbol("pad"), sym.b, sym.k), 0)
PADDED = replace(CAUSAL, mask=CAUSAL.mask & SEEN, tensors=(TensorArg("pad", "bool", 2),))
CAPPED = replace(CAUSAL, score=5 * sympy.tanh(sym.s / 5))


def qkv(n: int = 20, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(batch, heads, n, 8, generator=generator, dtype=dtype) for heads in (4, 2, 2)
    )


def initial(spec: LinearSpec) -> list[Tensor]:
    """The parameters that the spec reads, as they are made."""
    found = []
    for arg in spec.tensors:
        assert arg.source is not None
        (p,) = arg.source.parameters
        x = torch.eye(*p.shape[-2:]) if p.initial == "eye" else torch.tensor(float(p.initial))
        found.append(arg.source.compute(x.expand(p.shape)).double())
    return found


# --- decays ---------------------------------------------------------------------------------------


def slopes(rule: str, heads: int, layer: int, layers: int) -> list[float]:
    """What the state is multiplied by at each key is `exp` of minus this."""
    values: Any = {"h": torch.arange(heads).double()}
    found = evaluate(decay_of(rule, heads, layer, layers), values, {}, torch.float64)
    assert isinstance(found, Tensor)
    return (-found).tolist()


def alibi(heads: int) -> list[float]:
    """The sequence as its authors' code makes it."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return first if power == heads else first + alibi(2 * power)[0::2][: heads - power]


@pytest.mark.parametrize("heads", [8, 12, 32])
@pytest.mark.parametrize("layers", [2, 24])
def test_slopes_are_the_closed_forms_of_every_rule(heads: int, layers: int) -> None:
    plain = [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    for layer in range(layers):
        released = 1 - layer / (layers - 1) + 1e-5
        minimax = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        paper = [8 * h / heads * (1 - layer / layers) for h in range(heads)]
        retnet = [-math.log(1 - 2.0 ** (-5 - h)) for h in range(heads)]
        for rule, want in (
            ("tnl", [x * released for x in alibi(heads)]),
            ("minimax", [x * minimax for x in plain]),
            ("paper", paper),
            ("retnet", retnet),
            ("supra", alibi(heads)),
        ):
            assert slopes(rule, heads, layer, layers) == pytest.approx(want, rel=1e-6, abs=1e-12)


def test_eight_heads_have_the_slopes_of_the_paper() -> None:
    assert slopes("supra", 8, 0, 1) == pytest.approx([2.0**-n for n in range(1, 9)])
    assert slopes("supra", 12, 0, 1)[8:] == pytest.approx(
        [0.7071, 0.3536, 0.1768, 0.0884], abs=1e-4
    )


def test_the_last_layer_hardly_decays_and_minimax_takes_a_single_layer() -> None:
    assert slopes("tnl", 8, 23, 24)[0] == pytest.approx(0.5e-5)
    assert slopes("minimax", 8, 0, 1)[0] == pytest.approx(0.5 * (1 + 1e-5))


# --- lightning ------------------------------------------------------------------------------------


def test_lightning_is_the_operator_of_the_paper() -> None:
    """SiLU of q and k; (Q Kᵀ · decay) V; the root of the mean square over all heads."""
    spec = Lightning(rule="tnl").rewrite(SITE, CAUSAL)
    q, k, v = qkv()
    decay = torch.tensor(slopes("tnl", 4, 3, 24), dtype=torch.float64)[:, None, None]
    distance = (torch.arange(20)[:, None] - torch.arange(20)).double()
    k2, v2 = (x.repeat_interleave(2, dim=1) for x in (torch.nn.functional.silu(k), v))
    scores = torch.nn.functional.silu(q) @ k2.mT
    out = (scores * torch.exp(-decay * distance.clamp_min(0)).tril()) @ v2
    out = out * torch.rsqrt(out.square().mean((1, 3), keepdim=True) + 1e-6)
    for f in (reference, torch_linear.forward):
        torch.testing.assert_close(f(spec, q, k, v, [], []), out, rtol=1e-6, atol=1e-6)


def test_lightning_prints_as_a_formula() -> None:
    spec = Lightning(rule="none", map="identity", norm="none").rewrite(SITE, CAUSAL)
    assert str(spec) == "linear( q · k | k ≤ M + q - L ) · v"
    spec = Lightning(rule="paper").rewrite(SITE, PADDED)
    assert str(spec) == (
        "linear( exp(-1.75·(M + q - L - k)·h)·silu(q) · silu(k)"
        " | k ≤ M + q - L ∧ pad[b, k] ) · v / rms"
    )


def test_a_request_may_say_none() -> None:
    (request,) = read_requests(["linear.lightning(rule=none, map=elu, norm=none)"])
    assert request.action == Lightning(rule="none", map="elu", norm="none")
    assert read_requests([request.text]) == (request,)


def test_without_a_decay_noncausal_and_cross_attention_are_one_product() -> None:
    action = Lightning(rule="none", map="identity", norm="none")
    q, k, v = qkv()
    want = q @ (k.mT @ v).repeat_interleave(2, dim=1)
    for site in (SITE, CROSS):
        spec = action.rewrite(site, SoftmaxSpec())
        torch.testing.assert_close(torch_linear.forward(spec, q, k, v, [], []), want)


@pytest.mark.parametrize(
    "action", [Lightning(rule="supra"), FeatureMaps(map="elu"), WindowTail(window=3)]
)
def test_heads_active_patch_and_their_tensors_are_kept(action: Pass) -> None:
    gate = sym.Read(Symbol("gate"), sym.b, sym.h, sym.q)
    spec = replace(
        PADDED,
        heads=gate,
        active=2,
        patch=Patch("other", sympy.Eq(sym.h, 1)),
        tensors=(
            *PADDED.tensors,
            TensorArg("gate", "float32", 3),
            TensorArg("other", "float32", 4),
        ),
    )
    new = action.rewrite(SITE, spec)
    assert (new.heads, new.active, new.patch) == (gate, 2, spec.patch)
    assert new.tensors[:3] == spec.tensors
    assert from_json(new.to_json()) == new


@pytest.mark.parametrize(
    "action", [Lightning(rule="tnl"), FeatureMaps(map="elu"), WindowTail(window=3)]
)
def test_a_step_of_decoding_is_causal_though_its_mask_hides_nothing(action: Pass) -> None:
    """Models leave the mask out where a single query sees every key of the cache."""
    step = action.rewrite(replace(SITE, q_len=1), replace(CAUSAL, mask=sympy.true))
    assert step == action.rewrite(SITE, CAUSAL)


@pytest.mark.parametrize("end", [sympy.Integer(0), sym.M - 1, sym.size_symbol("past")], ids=str)
@pytest.mark.parametrize("action", [Lightning(rule="tnl"), WindowTail(window=3)], ids=str)
def test_a_mask_of_a_single_query_says_where_it_stands_without_it(
    action: Pass, end: sympy.Expr
) -> None:
    """The first token of a generation, `k <= 0`, and a cache with free room at its end."""
    sizes = ("past",) if end.has(sym.size_symbol("past")) else ()
    step = replace(PADDED, mask=(sym.k <= end) & SEEN, sizes=sizes)
    spec = action.rewrite(replace(SITE, q_len=1), step)
    assert spec == action.rewrite(SITE, replace(step, mask=(sym.k <= sym.q + end) & SEEN))
    shapes = Shapes("cpu", torch.float32, 2, 4, 2, 1, 9, 8, 8, False, (4,) * len(sizes))
    assert torch_linear.supports(spec, shapes) is None


# --- feature maps ---------------------------------------------------------------------------------


def test_elu_has_no_parameters_and_is_the_kernel_of_the_paper() -> None:
    spec = FeatureMaps(map="elu").rewrite(SITE, SoftmaxSpec())
    q, k, v = qkv()
    a, c = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    weights = a @ c.repeat_interleave(2, dim=1).mT
    want = weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(2, dim=1)
    assert spec.tensors == ()
    torch.testing.assert_close(torch_linear.forward(spec, q, k, v, [], []), want)


@pytest.mark.parametrize(("map", "width"), [("relu", 0), ("relu", 5), ("exp", 0), ("exp", 4)])
def test_trained_maps_are_parameters_that_start_as_the_identity(map: str, width: int) -> None:
    spec = FeatureMaps(map=map, width=width).rewrite(SITE, CAUSAL)
    shapes = [p.shape for t in spec.tensors if t.source for p in t.source.parameters]
    columns = width or 8
    matrices = [(4, 8, columns), (2, 8, columns)]
    biases = [(4, columns), (2, columns)] if map == "relu" else []
    assert sorted(shapes) == sorted(matrices + biases)
    q, k, v = qkv()
    tensors = initial(spec)
    x, y = (z[..., :columns] for z in (q, k))
    if map == "relu":
        a, c = x.clamp_min(1e-12), y.clamp_min(1e-12)
    else:
        a, c = (torch.cat([z - z.amax(-1, True), z.amin(-1, True) - z], -1).exp() for z in (x, y))
        assert ((a >= 0) & (a <= 1)).all()
    weights = (a @ c.repeat_interleave(2, dim=1).mT).tril()
    want = weights / (weights.sum(-1, keepdim=True) + 1e-12) @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(torch_linear.forward(spec, q, k, v, tensors, []), want)


def test_maps_and_factor_have_gradients() -> None:
    spec = WindowTail(window=3).rewrite(SITE, CAUSAL)
    q, k, v = qkv()
    tensors = initial(spec)
    wanted = [False] * 3 + [True] * len(tensors)
    grad = torch.randn(2, 4, 20, 8, generator=torch.Generator().manual_seed(1)).double()
    found = torch_linear.backward(spec, grad, q, k, v, tensors, [], wanted)
    assert found[:3] == [None] * 3
    assert all(g is not None and g.abs().amax() > 0 for g in found[3:])


# --- a window with a tail -------------------------------------------------------------------------


def test_factor_is_a_tenth_at_first() -> None:
    spec = WindowTail(window=3, map="elu").rewrite(SITE, CAUSAL)
    assert spec.near is not None
    values: Any = {"h": torch.arange(4)}
    named = dict(zip((t.name for t in spec.tensors), initial(spec), strict=True))
    factor = evaluate(spec.near.factor, values, named, torch.float64)
    assert factor.tolist() == pytest.approx([0.1] * 4, abs=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("map", ["elu", "relu", "exp"])
@pytest.mark.parametrize("window", [20, 10**9])
def test_a_window_over_all_keys_is_the_softmax_of_the_model(map: str, window: int) -> None:
    spec = WindowTail(window=window, map=map).rewrite(SITE, CAUSAL)
    q, k, v = qkv()
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for f in (reference, torch_linear.forward):
        torch.testing.assert_close(f(spec, q, k, v, initial(spec), []), want)


def test_scores_of_the_model_are_kept_in_the_window() -> None:
    spec = WindowTail(window=20, map="elu").rewrite(SITE, CAPPED)
    q, k, v = qkv()
    want = reference(CAPPED, q, k, v)
    torch.testing.assert_close(torch_linear.forward(spec, q, k, v, initial(spec), []), want)


def test_a_narrow_window_keeps_the_first_outputs_and_changes_later_ones() -> None:
    spec = WindowTail(window=6).rewrite(SITE, CAUSAL)
    q, k, v = qkv()
    out = torch_linear.forward(spec, q, k, v, initial(spec), [])
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[:, :, :6], want[:, :, :6])
    assert float((out - want)[:, :, 6:].abs().amax((0, 1, 3)).min()) > 1e-3


# --- refusals -------------------------------------------------------------------------------------

TNL, ELU, TAIL = Lightning(rule="tnl"), FeatureMaps(map="elu"), WindowTail(window=4)


@pytest.mark.parametrize("action", [TNL, ELU, TAIL])
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(CAUSAL, sink=Float(0.5)), "a sink has no place in linear attention"),
        (replace(CAUSAL, dropout=0.1), "set the dropout to 0"),
        (replace(CAUSAL, edit=Edit(sympy.Integer(0), (Float(2),))), "an edit of weights has no"),
        (replace(CAUSAL, route=Route("query", topk=1, block=4)), "chosen blocks of keys has no"),
        (
            replace(CAUSAL, mask=CAUSAL.mask & (sym.q + sym.M - sym.L - sym.k < 4)),
            "hides later keys, and padding; the mask also says M . q - L - k < 4",
        ),
        (replace(CAUSAL, mask=(sym.k <= sym.q) & (sym.k <= 2 * sym.q)), "ends at two places"),
    ],
    ids=["sink", "dropout", "edit", "route", "window", "two ends"],
)
def test_what_linear_attention_has_no_place_for_is_declined(
    action: Pass, spec: SoftmaxSpec, reason: str
) -> None:
    with pytest.raises(Declined, match=reason):
        action.rewrite(SITE, spec)


@pytest.mark.parametrize("action", [TNL, ELU])
@pytest.mark.parametrize("score", [CAPPED.score, sym.s + sym.k], ids=["cap", "bias"])
def test_products_of_features_take_no_bias_and_no_cap(action: Pass, score: sympy.Expr) -> None:
    with pytest.raises(Declined, match="no score bias and no soft cap; the score is"):
        action.rewrite(SITE, replace(CAUSAL, score=score))


@pytest.mark.parametrize("masked", ["mean", "add", "nan"])
def test_rows_of_padding_give_0_whatever_hides_the_keys(masked: Any) -> None:
    """The window holds all keys, so the other rows are the softmax itself."""
    spec = replace(PADDED, masked=masked)
    new = WindowTail(window=99, map="elu").rewrite(SITE, spec)
    assert not WindowTail.empty_rows
    q, k, v = qkv(9)
    pad = torch.ones(2, 9, dtype=torch.bool)
    pad[1, :3] = False
    got = reference(new, q, k, v, [pad, torch.zeros(4)])
    want = reference(spec, q, k, v, [pad])
    there = pad[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(got[there], want[there])
    assert not got[~there].any()
    assert bool(want[~there].any())


@pytest.mark.parametrize(
    ("action", "site", "spec", "reason"),
    [
        (TNL, replace(SITE, layer=0, layers=1), CAUSAL, "divides by the number of layers less 1"),
        (TNL, replace(SITE, layer=None), CAUSAL, "needs the layer and the number of layers"),
        (TNL, replace(SITE, heads=0), CAUSAL, "needs the number of heads"),
        (TNL, SITE, SoftmaxSpec(), "a decay needs a causal mask; rule=none does without"),
        (TNL, CROSS, CAUSAL, "a decay needs one axis of positions"),
        (TAIL, CROSS, CAUSAL, "this site is cross-attention"),
        (TAIL, SITE, SoftmaxSpec(), "a linear tail needs a causal mask"),
        (TAIL, replace(SITE, heads=0), CAUSAL, "how many heads this site has is not known"),
        (FeatureMaps(map="exp"), replace(SITE, head_dim=0), CAUSAL, "has a matrix for each head"),
    ],
)
def test_each_pass_says_why_it_declines(
    action: Pass, site: Site, spec: SoftmaxSpec, reason: str
) -> None:
    with pytest.raises(Declined, match=reason):
        action.rewrite(site, spec)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("linear.lightning(rule=alibi)", "it is one of tnl, minimax, paper, retnet, supra"),
        ("linear.lightning", "linear.lightning needs rule"),
        ("linear.lightning(rule=tnl, norm=sum)", "features of silu may be negative"),
        ("linear.features(map=elu, width=4)", "the map elu has no matrix"),
        ("linear.window_tail(window=0)", "it has to be at least 1"),
        ("linear.features(map=taylor)", "it is one of elu, relu, exp"),
    ],
)
def test_options_that_make_no_sense_are_errors(text: str, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        read_requests([text])
