"""Whole modules, layout by layout: the same numbers, and a reason where a site is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewriter
from rewriter.report import Report

FUSE = "fuse(from_scores=0)"
WIDTH = 8
PLAIN = "softmax( s ) · v, s = q·k/2"


class Attention(nn.Module):
    """Projections of x, and any function of the module and the inputs as its forward.

    Inputs after the first have the name `others` in formulas.
    """

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor, *others: Any) -> Any:
        return self.function(self, x, *others)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as `[B, 2, L, 4]`."""
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def tokens(batch: int = 2, length: int = 7, width: int = WIDTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64) * 2


def padding() -> Tensor:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    return mask


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    formulas: tuple[str, ...]
    """How the formula of each site begins, which is to be rewritten."""


CASES: dict[str, Case] = {}


def case(*formulas: str, inputs: tuple[Tensor, ...] = (), **members: Any) -> Any:
    """A forward of `Attention` as a case."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        build = lambda: Attention(function, **copy.deepcopy(members))  # noqa: E731
        CASES[function.__name__] = Case(build, inputs or (tokens(),), formulas)
        return function

    return add


def parameter(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(1)
    return nn.Parameter(torch.randn(*shape, generator=generator))


# --- layouts --------------------------------------------------------------------------------------


@case("softmax( s ) · v, s = 0.353553·q·k")
def one_head_without_an_axis(self, x):
    return (self.q(x) @ self.k(x).transpose(1, 2) / 8**0.5).softmax(-1) @ self.v(x)


@case("softmax( s ) · v, s = 0.353553·q·k", inputs=(tokens()[0],))
def no_batch(self, x):
    return (self.q(x) @ self.k(x).T / 8**0.5).softmax(-1) @ self.v(x)


@case(
    "softmax( s ) · v",
    inputs=(tokens(2, 8, 15).view(2, 8, 5, 3),),
    a=nn.Conv2d(8, 4, 1),
    c=nn.Conv2d(8, 8, 1),
)
def pixels_of_a_convolution(self, x):
    batch, width, rows, columns = x.shape
    q, k = (self.a(x).view(batch, -1, rows * columns) for _ in range(2))
    weights = torch.bmm(q.permute(0, 2, 1), k).softmax(-1)
    out = torch.bmm(self.c(x).view(batch, -1, rows * columns), weights.permute(0, 2, 1))
    return out.view(batch, width, rows, columns) + x


@case(PLAIN, inputs=(tokens(2, 12),))
def windows_before_heads(self, x):
    batch, length, _ = x.shape
    parts = x.view(batch, length // 4, 4, WIDTH)
    q, k, v = (p(parts).unflatten(-1, (2, 4)).transpose(2, 3) for p in (self.q, self.k, self.v))
    return attend(q, k, v).transpose(2, 3).reshape(batch, length, WIDTH)


@case(PLAIN, inputs=(tokens(2, 12),))
def windows_behind_heads(self, x):
    batch, length, _ = x.shape
    q, k, v = (
        p(x).view(batch, length // 4, 4, 2, 4).permute(0, 3, 1, 2, 4)
        for p in (self.q, self.k, self.v)
    )
    out = F.scaled_dot_product_attention(q, k, v)
    return out.permute(0, 2, 3, 1, 4).reshape(batch, length, WIDTH)


@case(
    "softmax( s + table[",
    inputs=(tokens(2, 12),),
    table=parameter(7, 2),
)
def shifted_windows(self, x):
    """Windows on the batch axis, a table of relative positions, and a soft mask for each window."""
    batch, length, _ = x.shape
    count = length // 4
    parts = x.view(batch * count, 4, WIDTH)
    q, k, v = (p(parts).view(-1, 4, 2, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
    score = (q * 0.5) @ k.transpose(-2, -1)
    index = torch.arange(4)[:, None] - torch.arange(4)[None] + 3
    score = score + self.table[index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
    group = torch.arange(length).view(count, 4) // 3
    differ = group[:, None, :] - group[:, :, None] != 0
    mask = torch.zeros(count, 4, 4, dtype=x.dtype).masked_fill(differ, -100.0)
    score = score.view(batch, count, 2, 4, 4) + mask.unsqueeze(1).unsqueeze(0)
    out = score.view(-1, 2, 4, 4).softmax(-1) @ v
    return out.transpose(1, 2).reshape(batch, length, WIDTH)


@case("softmax( s ) · v, s = 0.7·q·k")
def groups_of_heads_as_an_axis(self, x):
    batch, length, _ = x.shape
    q = self.q(x).view(batch, length, 2, 2, 2).permute(0, 2, 3, 1, 4)
    k, v = (
        p(x)[..., :4].view(batch, length, 2, 1, 2).permute(0, 2, 3, 1, 4) for p in (self.k, self.v)
    )
    out = (q @ k.mT * 0.7).softmax(-1) @ v
    return out.permute(0, 3, 1, 2, 4).reshape(batch, length, WIDTH)


@case("softmax( s ) · v, s = 0.7·q·k")
def groups_of_heads_in_an_einsum(self, x):
    batch, length, _ = x.shape
    q = self.q(x).view(batch, length, 2, 2, 2)
    k, v = (p(x)[..., :4].view(batch, length, 2, 2) for p in (self.k, self.v))
    weights = (torch.einsum("bqhgd,bkhd->bhgqk", q, k) * 0.7).softmax(-1)
    return torch.einsum("bhgqk,bkhd->bqhgd", weights, v).reshape(batch, length, WIDTH)


# --- queries and keys from elsewhere --------------------------------------------------------------


@case(PLAIN, latent=parameter(1, 3, 8))
def learned_queries(self, x):
    return attend(self.latent, self.k(x), self.v(x))


@case(PLAIN, latent=parameter(1, 1, 3, 4))
def learned_queries_for_all_heads(self, x):
    _, k, v = self.heads(x)
    return attend(self.latent, k, v).transpose(1, 2).flatten(2)


@case(PLAIN, latent=parameter(1, 2, 3, 4))
def learned_queries_of_a_fused_operation(self, x):
    _, k, v = self.heads(x)
    return F.scaled_dot_product_attention(self.latent, k, v).transpose(1, 2).flatten(2)


@case(PLAIN, memory=parameter(2, 5, 4), content=parameter(1, 2, 5, 4))
def learned_keys_and_values(self, x):
    q, _, _ = self.heads(x)
    return attend(q, self.memory, self.content).transpose(1, 2).flatten(2)


@case("softmax( s ) · v", latent=parameter(8, 3))
def pooling_by_learned_queries(self, x):
    return (x @ self.latent).softmax(1).transpose(1, 2) @ x


@case(PLAIN, inputs=(tokens(), tokens(2, 5, seed=3)))
def keys_of_another_sequence(self, x, y):
    return attend(self.q(x), self.k(y), self.v(y))


@case(
    "softmax( s | k ≤ M + q - L ) · v, s = q·k/2",
    inputs=(tokens(), tokens(2, 5, seed=3), tokens(2, 5, seed=4)),
)
def keys_behind_a_cache(self, x, past_k, past_v):
    k, v = torch.cat([past_k, self.k(x)], 1), torch.cat([past_v, self.v(x)], 1)
    i, j = torch.arange(x.shape[1])[:, None] + past_k.shape[1], torch.arange(k.shape[1])[None]
    return (self.q(x) @ k.mT * 0.5).masked_fill(j > i, -torch.inf).softmax(-1) @ v


@case(
    "softmax( s | k ≤ others[q] ) · v, s = q·k/2",
    inputs=(tokens(), torch.arange(3, 10)),
    ks=torch.zeros(2, 16, 8),
    vs=torch.zeros(2, 16, 8),
)
def keys_in_a_static_cache(self, x, position):
    self.ks[:, position], self.vs[:, position] = self.k(x), self.v(x)
    hidden = torch.arange(self.ks.shape[1])[None] > position[:, None]
    return (self.q(x) @ self.ks.mT * 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ self.vs


# --- biases ---------------------------------------------------------------------------------------


@case(
    "softmax( s | k ≤ q ∧ others[b, q] = others[b, k] ) · v, s = 0.353553·q·k",
    inputs=(tokens(), torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2]])),
)
def documents(self, x, document):
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mask = ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
    q, k, v = (p(x)[:, None] for p in (self.q, self.k, self.v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]


@case(
    "softmax( s + einsum[b, ⌊q/4⌋, (q mod 4), ⌊k/4⌋] + einsum_1[b, ⌊q/4⌋, (q mod 4), (k mod 4)] )"
    " · v, s = 0.3·q·k",
    inputs=(tokens(2, 3, 32).view(2, 3, 4, 8),),
    rows=parameter(16, 8),
    columns=parameter(16, 8),
)
def decomposed_relative_positions(self, x):
    batch, rows, columns, _ = x.shape
    q, k, v = (p(x).view(batch, -1, WIDTH) for p in (self.q, self.k, self.v))
    grid = q.view(batch, rows, columns, WIDTH)
    i, j = (torch.arange(n)[:, None] - torch.arange(n)[None] + n - 1 for n in (rows, columns))
    by_row = torch.einsum("bhwc,hkc->bhwk", grid, self.rows[i])
    by_column = torch.einsum("bhwc,wkc->bhwk", grid, self.columns[j])
    score = ((q * 0.3) @ k.mT).view(batch, rows, columns, rows, columns)
    score = score + by_row[:, :, :, :, None] + by_column[:, :, :, None, :]
    return score.view(batch, rows * columns, rows * columns).softmax(-1) @ v


# --- modules of torch -----------------------------------------------------------------------------


def multihead(function: Callable[..., Any], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Attention(function, inner=nn.MultiheadAttention(WIDTH, 2, **options))


CASES |= {
    "multihead": Case(
        multihead(lambda self, x: self.inner(x, x, x, need_weights=False)[0], batch_first=True),
        (tokens(),),
        (PLAIN,),
    ),
    "multihead_with_weights_that_nobody_takes": Case(
        multihead(lambda self, x: self.inner(x, x, x)[0]), (tokens(),), (PLAIN,)
    ),
    "multihead_with_masks": Case(
        multihead(
            lambda self, x, pad: self.inner(
                x,
                x,
                x,
                key_padding_mask=~pad,
                attn_mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1),
                need_weights=False,
            )[0],
            batch_first=True,
        ),
        (tokens(), padding()),
        ("softmax( s | k ≤ q ∧ others[b, k] ) · v, s = q·k/2",),
    ),
    "multihead_with_masks_on_batches_of_heads": Case(
        multihead(
            lambda self, x, pad: self.inner(x, x, x, key_padding_mask=~pad)[0], batch_first=True
        ),
        (tokens(), padding()),
        ("softmax( s | others[b, k] ) · v, s = q·k/2",),
    ),
    "multihead_with_other_keys_and_an_added_one": Case(
        multihead(
            lambda self, x, y: self.inner(x, y, y, need_weights=False)[0],
            batch_first=True,
            add_bias_kv=True,
            add_zero_attn=True,
        ),
        (tokens(), tokens(2, 5, seed=3)),
        (PLAIN,),
    ),
    "encoder_in_training_mode": Case(
        lambda: Attention(
            lambda self, x, pad: self.inner(x, src_key_padding_mask=~pad),
            inner=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True),
                2,
                enable_nested_tensor=False,
            ),
        ),
        (tokens(), padding()),
        ("softmax( s | others[b, k] ) · v, s = q·k/2",) * 2,
    ),
}


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)]


def _difference(before: Any, after: Any) -> float:
    pairs = list(zip(_tensors(before), _tensors(after), strict=True))
    assert all(x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan()) for x, y in pairs)
    return max(float((x - y).detach().nan_to_num().abs().max()) for x, y in pairs)


def _report(model: nn.Module, *inputs: Any) -> Report:
    """What optimize does with the model, after the same numbers were seen."""
    before = copy.deepcopy(model)(*inputs)
    rewriter.optimize(model, FUSE)
    assert _difference(before, model(*inputs)) < 5e-14
    report = rewriter.report_of(model)
    assert report.notes == ()
    return report


@pytest.mark.parametrize("name", CASES)
def test_a_module_is_rewritten_and_gives_the_same_numbers(name: str) -> None:
    case = CASES[name]
    report = _report(case.build().double(), *case.inputs)
    assert [s.reason for s in report.sites if s.decision != "rewritten"] == []
    texts = [str(s.site.spec) for s in report.sites]
    assert len(texts) == len(case.formulas)
    assert all(t.startswith(f) for t, f in zip(texts, case.formulas, strict=True)), texts
    assert not any(s.site.notes for s in report.sites)


# --- more than one site ---------------------------------------------------------------------------


def test_two_sites_of_a_module_are_numbered() -> None:
    def twice(self, x):
        y = attend(self.q(x), self.k(x), self.v(x))
        return attend(y, self.k(x), self.v(y))

    report = _report(
        Attention(lambda self, x: self.inner(x), inner=Attention(twice)).double(), tokens()
    )
    assert [s.site.name for s in report.rewritten] == ["inner", "inner#1"]


def test_a_submodule_that_is_called_twice_has_two_sites() -> None:
    inner = Attention(lambda self, x: attend(self.q(x), self.k(x), self.v(x)))
    report = _report(
        Attention(lambda self, x: self.inner(self.inner(x)), inner=inner).double(), tokens()
    )
    assert [s.site.name for s in report.rewritten] == ["inner", "inner#1"]


def test_layers_of_a_list_are_numbered() -> None:
    layers = nn.ModuleList(
        Attention(lambda self, x: attend(self.q(x), self.k(x), self.v(x))) for _ in range(2)
    )

    def run(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

    report = _report(Attention(run, layers=layers).double(), tokens())
    assert [(s.site.path, s.site.layer) for s in report.rewritten] == [
        ("layers.0", 0),
        ("layers.1", 1),
    ]


# --- left alone, with a reason --------------------------------------------------------------------


def test_returned_weights_keep_the_site_as_it_was() -> None:
    module = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    report = _report(
        Attention(lambda self, x: self.inner(x, x, x), inner=module).double(), tokens()
    )
    (site,) = report.attention
    assert site.decision == "kept"
    assert (
        site.reason == "its weights are also used by aten.mean, so they have to be computed anyway"
    )


def test_weights_that_are_an_output_keep_the_site_as_it_was() -> None:
    def forward(self, x):
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        return weights @ self.v(x), weights

    (site,) = _report(Attention(forward).double(), tokens()).attention
    assert (
        site.reason == "its weights are also used by the output, so they have to be computed anyway"
    )


def test_returned_scores_are_computed_beside_the_attention() -> None:
    def forward(self, x):
        score = self.q(x) @ self.k(x).mT
        return score.softmax(-1) @ self.v(x), score

    (site,) = _report(Attention(forward).double(), tokens()).attention
    assert site.decision == "rewritten"


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(
            lambda self, x: F.dropout(self.weights(x), 0.5, self.training) @ self.v(x),
            id="function",
        ),
        pytest.param(lambda self, x: self.drop(self.weights(x)) @ self.v(x), id="module"),
        pytest.param(
            lambda self, x: F.scaled_dot_product_attention(
                *(p(x)[:, None] for p in (self.q, self.k, self.v)), dropout_p=0.5
            )[:, 0],
            id="sdpa",
        ),
    ],
)
def test_active_dropout_is_read_and_not_fused(forward: Callable[..., Any]) -> None:
    class Dropping(Attention):
        def weights(self, x: Tensor) -> Tensor:
            return (self.q(x) @ self.k(x).mT * 0.5).softmax(-1)

    model = Dropping(forward, drop=nn.Dropout(0.5)).double().train()
    torch.manual_seed(4)
    before = model(tokens())
    rewriter.optimize(model, FUSE)
    torch.manual_seed(4)
    assert _difference(before, model(tokens())) == 0.0
    (site,) = rewriter.report_of(model).attention
    assert site.decision == "kept"
    assert str(site.site.spec).startswith("dropout(0.5, softmax( s )) · v")
    assert "dropout of 0.5 is active" in site.reason


def test_attention_between_channels_of_a_fixed_length_is_not_rewritten() -> None:
    def forward(self, x):
        q, k, v = (p(x).reshape(2, 7, 2, 4).permute(0, 2, 3, 1) for p in (self.q, self.k, self.v))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1)
        return (weights @ v).permute(0, 3, 1, 2).reshape(2, 7, 8)

    (site,) = _report(Attention(forward).double(), tokens()).sites
    assert (site.site.kind, site.decision) == ("channel", "named")


# --- random masks ---------------------------------------------------------------------------------

TERMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "causal": lambda i, j, pad, document: j <= i,
    "anticausal": lambda i, j, pad, document: j > i - 1,
    "window": lambda i, j, pad, document: (i - j).abs() < 3,
    "band": lambda i, j, pad, document: (j + 2 >= i) & (i + 4 > j),
    "prefix": lambda i, j, pad, document: (j <= i) | (j < 2),
    "padding": lambda i, j, pad, document: pad[:, None, None, :],
    "rows": lambda i, j, pad, document: pad[:, None, :, None],
    "documents": lambda i, j, pad, document: (document[:, :, None] == document[:, None, :])[
        :, None
    ],
    "blocks": lambda i, j, pad, document: i // 3 == j // 3,
    "even": lambda i, j, pad, document: j % 2 == 0,
}
HIDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fill": lambda score, mask: score.masked_fill(~mask, torch.finfo(score.dtype).min),
    "where": lambda score, mask: torch.where(mask, score, torch.finfo(score.dtype).min),
    "infinite": lambda score, mask: score.masked_fill(~mask, -torch.inf),
    "add": lambda score, mask: score + (1.0 - mask.to(score.dtype)) * torch.finfo(score.dtype).min,
    "soft": lambda score, mask: score + (1.0 - mask.to(score.dtype)) * -100.0,
    "in_place": lambda score, mask: score.clone().masked_fill_(~mask, torch.finfo(score.dtype).min),
}
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: q @ k.mT * 0.5,
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q * 0.5, k),
    "capped": lambda q, k: torch.tanh(q @ k.mT * 0.1) * 5.0,
    "biased": lambda q, k: q @ k.mT * 0.5 - 0.25 * torch.arange(k.shape[2]),
}


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(TERMS)), st.sampled_from("&|"), st.booleans()), max_size=3
    ),
    st.sampled_from(sorted(SCORES)),
    st.lists(st.sampled_from(sorted(HIDING)), min_size=1, max_size=2),
)
def test_any_composition_of_masks_gives_the_same_numbers(
    terms: list[tuple[str, str, bool]], score: str, hiding: list[str]
) -> None:
    def forward(self, x, pad, document):
        q, k, v = self.heads(x)
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        for name, sign, negated in terms:
            term = TERMS[name](i, j, pad, document)
            term = ~term if negated else term
            mask = mask & term if sign == "&" else mask | term
        result = SCORES[score](q, k)
        for n, way in enumerate(hiding):
            result = HIDING[way](result, mask if n == 0 else pad[:, None, None, :])
        return result.softmax(-1) @ v

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Attention(forward).double()
    inputs = tokens(), padding(), torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2]])
    with torch.no_grad():
        before = model(*inputs)
        after = rewriter.optimize(model, FUSE)(*inputs)
    (site,) = rewriter.report_of(model).attention
    assert site.decision == "rewritten", site.reason
    assert _difference(before, after) < 5e-14
