"""Relatives of attention are named, each by its kind; what only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

import rewriter
from rewriter.capture import export, from_exported
from rewriter.relatives import relatives

WIDTH = 8


class Parts(nn.Module):
    """Projections of tokens and of pixels, for any function of them."""

    def __init__(self, function: Callable[[Parts, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.spatial = nn.Conv2d(2, 1, 3, padding=1)
        self.decay = nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


TOKENS, IMAGE = torch.randn(2, 6, WIDTH), torch.randn(2, WIDTH, 5, 7)

Compute = Callable[[Parts, Tensor], Tensor]
CASES: dict[str, tuple[Compute, Tensor, str | None]] = {}


def case(kind: str | None, x: Tensor = TOKENS) -> Callable[[Compute], Compute]:
    def kept(function: Compute) -> Compute:
        CASES[function.__name__] = function, x, kind
        return function

    return kept


# --- gates ----------------------------------------------------------------------------------------


@case("gate", IMAGE)
def squeeze_and_excite(m, x):
    y = m.b(F.relu(m.a(x.mean((2, 3))))).sigmoid()
    return x * y[:, :, None, None]


@case("gate", IMAGE)
def hard_sigmoid_by_name(m, x):
    y = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return F.hardsigmoid(m.a(y)).view(-1, WIDTH, 1, 1) * x


@case("gate", IMAGE)
def efficient_channel_attention(m, x):
    y = m.conv(F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2))
    return x * y.transpose(-1, -2).unsqueeze(-1).sigmoid().expand_as(x)


@case("gate", IMAGE)
def gate_over_positions(m, x):
    y = m.spatial(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
    return x * y.sigmoid()


@case("gate")
def gate_of_tokens(m, x):
    return x * m.b(m.a(x.mean(1, keepdim=True)).relu()).sigmoid()


@case(None)
def gated_linear_unit(m, x):
    return m.a(x) * m.b(x).sigmoid()


@case(None)
def swish(m, x):
    return x * x.sigmoid()


@case(None)
def gate_of_the_whole_token(m, x):
    return x * (m.a(x.mean(1, keepdim=True)) + x).sigmoid()


@case(None)
def root_mean_square(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


# --- products -------------------------------------------------------------------------------------


@case("linear")
def linear_attention(m, x):
    q, k, v = F.elu(m.a(x)) + 1, F.elu(m.b(x)) + 1, m.c(x)
    return q @ (k.mT @ v) / (q @ k.sum(1)[:, :, None])


@case("linear")
def linear_attention_of_heads(m, x):
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in m.fused(x).chunk(3, -1))
    state = torch.einsum("bhnd,bhne->bhde", k.relu(), v)
    return torch.einsum("bhnd,bhde->bhne", q.relu(), state).transpose(1, 2).flatten(2)


@case("product")
def sigmoid_attention(m, x):
    return (m.a(x) @ m.b(x).mT).sigmoid() @ m.c(x)


@case("product")
def retention(m, x):
    q, k, v = (t.view(2, 6, 2, 4).transpose(1, 2) for t in m.fused(F.silu(x)).chunk(3, -1))
    place = torch.arange(6)
    decay = 0.9 ** (place[:, None] - place).clamp(min=0) * (place[:, None] >= place)
    return ((q @ k.mT) * decay @ v).transpose(1, 2).reshape(2, 6, WIDTH)


@case(None)
def attention(m, x):
    return (m.a(x) @ m.b(x).mT).softmax(-1) @ m.c(x)


@case(None)
def weights_that_meet_two_products(m, x):
    return (m.a(x) @ m.b(x).mT).softmax(-1) @ m.c(x) @ m.a(x).mT


@case(None)
def experts(m, x):
    return (torch.matmul(x[:, None], m.experts).relu() @ m.experts.mT).sum(1)


@case(None)
def logits(m, x):
    return F.normalize(m.a(x), dim=-1) @ F.normalize(m.b(x), dim=-1).mT


@case(None)
def masks_of_queries(m, x):
    return (m.a(x) @ m.b(x).mT).flatten(1)


@case(None)
def rotation(m, x):
    one, two = m.a(x)[..., ::2], m.a(x)[..., 1::2]
    sin, cos = m.b(x)[..., ::2].sin(), m.b(x)[..., ::2].cos()
    return torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2)


# --- recurrences ----------------------------------------------------------------------------------


@case("recurrence")
def recurrence(m, x):
    a, u = m.a(x).sigmoid(), m.b(x)
    state, states = torch.zeros(2, WIDTH), []
    for t in range(6):
        state = a[:, t] * state + u[:, t]
        states.append(state)
    return torch.stack(states, 1)


@case("recurrence")
def constant_decay(m, x):
    k, v = m.a(x), m.b(x)
    state, out = torch.zeros(2, WIDTH, WIDTH), []
    for t in range(6):
        state = m.decay.sigmoid()[:, None] * state + k[:, t, :, None] * v[:, t, None]
        out.append(state.sum(1))
    return torch.stack(out, 1)


@case("recurrence")
def parallel_scan(m, x):
    a, u = m.a(x).sigmoid(), m.b(x)
    return u[:, 1::2] + a[:, 1::2] * u[:, ::2]


@case("recurrence")
def decays(m, x):
    total = F.logsigmoid(m.a(x)).cumsum(1)
    decay = (total[:, :, None] - total[:, None]).exp()
    return (decay * m.b(x)[:, None]).sum(2)


@case(None)
def residual_layers(m, x):
    for layer in (m.a, m.b, m.c):
        x = x * m.decay + layer(x)
    return x


@case(None)
def pre_emphasis(m, x):
    return x[:, 1:] - 0.97 * x[:, :-1]


@case(None)
def running_mean(m, x):
    return m.a(x).cumsum(1) / torch.arange(1, 7)[:, None]


# --- the cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_relatives_are_named_by_their_kind(name: str) -> None:
    function, x, kind = CASES[name]
    captured = from_exported(export(Parts(function), (x,)))
    found = relatives(captured.graph, captured)
    assert [f.kind for f in found] == ([] if kind is None else [kind])
    assert all(f.reason for f in found)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.mixer, self.attention = (
            Parts(f) for f in (gate_of_tokens, linear_attention, attention)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.mixer(self.gate(x)))


@pytest.fixture(scope="module")
def report() -> rewriter.Report:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval()
    with torch.no_grad():
        before = model(TOKENS)
        rewriter.optimize(model, "fuse(from_scores=0)")
        assert (model(TOKENS) - before).abs().max() < 1e-5
    return rewriter.report_of(model)


def test_a_report_lists_relatives_beside_the_attention(report: rewriter.Report) -> None:
    assert [s.site.path for s in report.attention] == ["0.attention", "1.attention"]
    named = {s.site.path: (s.site.kind, s.decision) for s in report.relatives}
    one = {"gate": ("gate", "named"), "mixer": ("linear", "named")}
    assert named == {f"{n}.{path}": value for n in (0, 1) for path, value in one.items()}
    assert report.headline.endswith("2 rewritten, 0 opaque reads, 4 relatives")
    assert report.to_dict()["relatives"] == 4


def test_a_gate_says_what_it_is_a_mean_of(report: rewriter.Report) -> None:
    gate = next(s for s in report.relatives if s.site.kind == "gate")
    assert gate.reason == (
        "a gate: a sigmoid of layers over the mean of a tensor over dimension 1 multiplies that "
        "tensor"
    )


def test_the_page_has_a_part_for_relatives(report: rewriter.Report, tmp_path) -> None:
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Relatives of attention, left alone" in text
    assert "Softmaxes that are no attention" not in text
    assert "linear attention: keys meet the values before the queries do" in text
