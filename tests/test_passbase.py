"""Requests, selectors and options: what can be written, and how a mistake is answered."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import sympy
import torch

from rewriter import registry
from rewriter import symbols as sym
from rewriter.errors import Declined, PassError, SelectorError
from rewriter.families import from_json
from rewriter.passbase import (
    Pass,
    Selector,
    apply,
    blend,
    option,
    parse_request,
    unmatched,
)
from rewriter.reference import mask_of, reference
from rewriter.selectors import Indices
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg

CAUSAL = SoftmaxSpec(mask=sym.k <= sym.q)


def site(path: str = "model.layers.3.attn", layer: int | None = 3, heads: int = 4) -> Site:
    return Site(path, layer, heads=heads, kv_heads=heads, head_dim=8, value_dim=8)


def sites(count: int) -> list[Site]:
    return [site(f"model.layers.{i}.attn", i) for i in range(count)]


def selected(text: str, count: int = 6) -> list[int | None]:
    selector = Selector.parse(text)
    return [x.layer for x in sites(count) if selector.matches(x, count)]


# --- selectors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", [0, 1, 2, 3, 4, 5]),
        ("@ 4-5", [4, 5]),
        ("@4-", [4, 5]),
        ("@ -1", [5]),
        ("@ -2-", [4, 5]),
        ("@ 1--2", [1, 2, 3, 4]),
        ("@ 0,3,5", [0, 3, 5]),
        ("@ 0, 2-3", [0, 2, 3]),
        ("@ even", [0, 2, 4]),
        ("@ odd", [1, 3, 5]),
        ("@ path=layers\\.[23]", [2, 3]),
        ("@ path='layers.[23]'", [2, 3]),
        ("@ 2- path=[0-4]", [2, 3, 4]),
        ("@ 2-3 @ heads=0", [2, 3]),
    ],
)
def test_selector_picks_layers(text: str, layers: list[int]) -> None:
    assert selected(text) == layers


@pytest.mark.parametrize(
    "text",
    ["4-7", "4-", "-1", "0,3", "even", "2-9 heads=1", "path=a\\.b", 'path="a b" heads=0,2-3'],
)
def test_selector_text_reads_back(text: str) -> None:
    selector = Selector.parse(text)
    assert selector.text == text
    assert Selector.parse(selector.text) == selector


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@ 3-1", "the range 3-1 is empty"),
        ("@ 1 2", "gives layers twice"),
        ("@ last", "write layers as 4-7, 4-, -1, 0,3 or even"),
        ("@ 0,,1", "cannot be read"),
        ("@ heads=a", "cannot be read"),
        ("@ path=(", "is not a regular expression: missing )"),
    ],
)
def test_selector_that_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(SelectorError, match=message.replace("(", "\\(").replace(")", "\\)")):
        Selector.parse(text)


def test_layer_range_never_holds_for_a_site_without_a_layer() -> None:
    assert not Selector.parse("0-").matches(site("pooler", None), 6)
    assert Selector.parse("path=pool").matches(site("pooler", None), 6)


def test_path_finds_the_second_site_of_a_module_by_its_name() -> None:
    second = Site("layers.0.attn", 0, ordinal=1)
    assert Selector.parse("path='attn#1$'").matches(second, 1)
    assert not Selector.parse("path='attn#1$'").matches(site("layers.0.attn", 0), 1)


def test_indices_outside_names_only_what_does_not_exist() -> None:
    assert Indices.parse("0,9,-7,2-12").outside(6) == (9, -7, 12)
    assert Indices.parse("even").outside(6) == ()


# --- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("fuse", "fuse"),
        ("  fuse ( )  ", "fuse"),
        ("fuse(from_scores=None, dropout=false)", "fuse"),
        ("fuse(dropout=true)@-1", "fuse(dropout=True) @ -1"),
        ("sparse.window(sinks=1,window=4) @ 3-5", "sparse.window(window=4, sinks=1) @ 3-5"),
        ("heads.scale(heads=2, by=0.0)", "heads.scale(heads=[2], by=0)"),
        ("heads.scale(heads='0, 3', by=0.5) @ odd", "heads.scale(heads=[0, 3], by=0.5) @ odd"),
        ("heads.scale(heads=(0,-1), by=-2)", "heads.scale(heads=[0, -1], by=-2)"),
    ],
)
def test_request_text_is_canonical(text: str, canonical: str) -> None:
    request = parse_request(text, registry)
    assert request.text == canonical
    assert parse_request(request.text, registry) == request


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fus", "there is no pass called 'fus'; did you mean fuse? (passes: fuse, sparse.window"),
        ("zzz", "there is no pass called 'zzz' (passes: fuse, "),
        (
            "sparse.window(windw=4)",
            "no option 'windw'; did you mean window? (it takes window,",
        ),
        ("sparse.window", "sparse.window needs window"),
        ("sparse.window(4)", "options are given by name; they are window, sinks=0"),
        ("sparse.window(window=0)", "option window is 0; it has to be at least 1"),
        ("sparse.window(window=2.5)", "option window takes an integer, got 2.5"),
        ("sparse.window(window=True)", "option window takes an integer, got True"),
        ("sparse.window(window=4, window=5)", "option window is given twice"),
        ("sparse.window(window=4", "has a bracket that is never closed"),
        ("heads.scale(heads=[], by=1)", "takes a list of integers such as [0, 3], got []"),
        ("heads.scale(heads=[0], by=1e999)", "option by is inf; it has to be finite"),
        ("fuse then", "expected '@' or the end after the pass, got 'then'"),
        ("", "does not start with the name of a pass"),
    ],
)
def test_request_that_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(PassError) as caught:
        parse_request(text, registry)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_selector_sign_with_nothing_behind_it_is_refused() -> None:
    with pytest.raises(SelectorError, match="has nothing after '@'"):
        parse_request("fuse @ ", registry)


def test_values_are_read_and_never_run() -> None:
    with pytest.raises(PassError, match="cannot be read from"):
        parse_request("sparse.window(window=__import__('os').getpid())", registry)
    with pytest.raises(PassError):
        parse_request("sparse.window(window=" + "(" * 5000 + ")" * 5000 + ")", registry)


def test_find_takes_the_exact_name() -> None:
    assert registry.find("sparse.window").name == "sparse.window"
    with pytest.raises(PassError, match="did you mean heads\\.scale"):
        registry.find("head.scale")


def test_read_requests_takes_texts_and_passes() -> None:
    made = registry.find("fuse")(dropout=True)  # type: ignore[call-arg]
    first, second = registry.read_requests(["fuse @ 1", made])
    assert (first.text, second.text) == ("fuse @ 1", "fuse(dropout=True)")
    with pytest.raises(PassError, match="a pass is a text such as"):
        registry.read_requests([3])  # type: ignore[list-item]


# --- options -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Every(Pass):
    """Has an option of each kind."""

    name = "every"
    contract = "limit"
    stage = "none"
    identity = "every"
    count: int = option("a count", default=1, at_least=0, at_most=9)
    share: float = option("a share", default=0.5, at_most=1)
    mode: str = option("a mode", default="paper", choices=("paper", "released"))
    flag: bool = option("a flag", default=False)
    picks: tuple[int, ...] | None = option("some integers", default=None, at_least=0)

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        return spec


def test_options_have_their_declared_type() -> None:
    made = Every(share=1, picks=[3, 1])
    assert (made.share, type(made.share), made.picks) == (1.0, float, (3, 1))
    assert hash(made) == hash(Every(share=1.0, picks=(3, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 10}, "every: option count is 10; it has to be at most 9"),
        ({"share": 1.5}, "every: option share is 1.5; it has to be at most 1"),
        ({"mode": "fast"}, "every: option mode is 'fast'; it is one of paper, released"),
        ({"flag": 1}, "every: option flag takes True or False, got 1"),
        ({"picks": [2, -1]}, "every: option picks is -1; it has to be at least 0"),
        ({"picks": "x"}, "every: option picks takes a list of integers such as [0, 3], got 'x'"),
    ],
)
def test_option_outside_of_its_bounds_names_value_and_bound(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(PassError) as caught:
        Every(**options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


# --- apply, blend, unmatched ---------------------------------------------------------------------


def test_apply_runs_matching_requests_in_order() -> None:
    texts = ["sparse.window(window=2) @ 0-2", "heads.scale(heads=0, by=0) @ 3", "fuse"]
    requests = [parse_request(t, registry) for t in texts]
    spec, applied, refusals = apply(requests, site(), CAUSAL, 6)
    assert applied == ("heads.scale(heads=[0], by=0) @ 3", "fuse")
    assert refusals == ()
    assert spec.mask == CAUSAL.mask


def test_apply_reports_a_refusal_and_goes_on() -> None:
    requests = [parse_request(t, registry) for t in ("sparse.window(window=2)", "fuse")]
    spec, applied, refusals = apply(requests, replace(site(), is_cross=True), CAUSAL, 6)
    assert spec == CAUSAL
    assert applied == ("fuse",)
    assert refusals == (
        "sparse.window(window=2): a window needs query and key positions on one axis; "
        "this site is cross-attention",
    )


def test_selected_heads_alone_get_the_new_mask() -> None:
    request = parse_request("sparse.window(window=1) @ heads=0,-1", registry)
    spec, _, _ = apply([request], site(), CAUSAL, 6)
    masks = mask_of(spec, q_len=3, kv_len=3, heads=4)[0].int()
    assert masks[0].tolist() == masks[3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert masks[1].tolist() == masks[2].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_selecting_a_head_that_does_not_exist_is_refused_with_the_count() -> None:
    for count, text in ((4, "this site has 4 heads, 0 to 3"), (1, "this site has 1 head")):
        request = parse_request("sparse.window(window=1) @ heads=4", registry)
        spec, applied, refusals = apply([request], site(heads=count), CAUSAL, 6)
        assert (spec, applied) == (CAUSAL, ())
        assert refusals[0].endswith(f"head 4 is selected; {text}")


def test_blend_computes_each_head_as_the_spec_it_belongs_to() -> None:
    """Every stage differs between the two specs, and each head must equal its own spec alone."""
    torch.manual_seed(0)
    old = SoftmaxSpec(
        scale=sympy.Float(0.5),
        mask=(sym.k <= sym.q) & sympy.Ne(sym.Read(sympy.Symbol("pad"), sym.b, sym.k), 0),
        tensors=(TensorArg("pad", "bool", 2),),
    )
    new = SoftmaxSpec(
        scale=sympy.Float(0.25),
        score=4 * sympy.tanh(sym.s / 4) + sym.Read(sympy.Symbol("slope"), sym.h) * sym.k,
        sink=sym.Read(sympy.Symbol("slope"), sym.h),
        heads=sympy.Integer(3),
        tensors=(TensorArg("slope", "float64", 1),),
    )
    pad = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    slope = torch.randn(4, dtype=torch.float64)
    q, k, v = (torch.randn(2, n, 7, 8, dtype=torch.float64) for n in (4, 2, 2))
    mixed = blend(new, old, (1, 2), 4)
    assert [t.name for t in mixed.tensors] == ["pad", "slope"]
    out = reference(mixed, q, k, v, [pad, slope])
    want_new, want_old = reference(new, q, k, v, [slope]), reference(old, q, k, v, [pad])
    torch.testing.assert_close(out[:, [1, 2]], want_new[:, [1, 2]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[:, [0, 3]], want_old[:, [0, 3]], rtol=1e-12, atol=1e-12)
    assert from_json(mixed.to_json()) == mixed


def test_blend_of_all_heads_is_the_new_spec() -> None:
    new = replace(CAUSAL, heads=sympy.Integer(2))
    assert blend(new, CAUSAL, range(4), 4) == new


def test_blend_declines_what_cannot_differ_between_heads() -> None:
    with pytest.raises(Declined, match="changes dropout"):
        blend(replace(CAUSAL, dropout=0.1), CAUSAL, (0,), 4)


def test_unmatched_names_requests_without_a_site() -> None:
    texts = ["fuse", "fuse @ 9", "fuse @ 2-9", "fuse @ path=decoder", "fuse @ -1"]
    requests = [parse_request(t, registry) for t in texts]
    assert unmatched(requests, sites(6), 6) == [
        "fuse @ 9: layer 9 does not exist; the model has layers 0 to 5",
        "fuse @ 2-9: layer 9 does not exist; the model has layers 0 to 5",
        "fuse @ path=decoder: matches none of the 6 sites (model.layers.0.attn, "
        "model.layers.1.attn, model.layers.2.attn, ...); the model has layers 0 to 5",
    ]
    assert unmatched(requests[:1], [], 0) == ["fuse: no attention was found in the model"]
