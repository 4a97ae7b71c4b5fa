"""What the work on linearising pretrained models gives to test by: LoLCATs (arXiv 2410.10254),
Hedgehog (arXiv 2402.04347).

The toy of attention transfer: two layers of width 64 learn to copy; each new attention learns to
give the head outputs of the old one, fed by the old one's hidden states; then the whole model is
fine-tuned. A control is fine-tuned without the transfer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from sympy import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from rewriter import symbols as sym
from rewriter.linear import LinearSpec
from rewriter.op import attention
from rewriter.passbase import Pass
from rewriter.passes.linear import FeatureMaps, WindowTail
from rewriter.reference_linear import features
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec

WORDS, HALF, WIDTH, H, D = 32, 6, 64, 4, 16
SITE = Site("layers.0.attn", 0, heads=H, kv_heads=H, head_dim=D, value_dim=D, layers=2)
CAUSAL = SoftmaxSpec(Float(D**-0.5), mask=sym.k <= sym.q + sym.M - sym.L)


# --- feature maps ---------------------------------------------------------------------------------


def test_halves_of_the_exponential_map_are_those_of_hedgehog_before_their_softmax() -> None:
    """Features lie in [0, 1] and each half has a 1 in it; divided by their sums, the halves are
    `softmax(x)` and `softmax(-x)`, which sum to 1 each, and `phi(q) . phi(k) <= 2`."""
    phi = FeatureMaps(map="exp").rewrite(SITE, CAUSAL).q_map
    one = torch.eye(D, dtype=torch.float64).expand(H, D, D)
    q, k = (3 * torch.randn(2, H, 9, D, dtype=torch.float64) for _ in range(2))
    halves = []
    for x in (q, k):
        found = features(x, phi, {phi.weight: one})
        assert found.min() >= 0
        assert found.max() == 1
        two = found.unflatten(-1, (2, D))
        assert (two.amax(-1) == 1).all()
        want = torch.stack([x, -x], dim=-2).softmax(-1)
        normal = two / two.sum(-1, keepdim=True)
        torch.testing.assert_close(normal, want, rtol=1e-9, atol=1e-9)
        halves.append(normal.flatten(-2))
    assert (halves[0] @ halves[1].mT).amax() <= 2


def hybrid(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The hybrid of LoLCATs with maps of identity, one query at a time, in float64: softmax weights
    minus the largest score of the window, times g = sigmoid(-2.197), and linear weights of older
    keys, over one denominator."""
    q, k, v = (x.double() for x in (q, k, v))
    phi = [torch.cat([x - x.amax(-1, True), x.amin(-1, True) - x], dim=-1).exp() for x in (q, k)]
    g, out = 1 / (1 + math.exp(2.197)), torch.zeros_like(v)
    for n in range(q.shape[2]):
        first = max(0, n + 1 - window)
        s = (q[:, :, n : n + 1] * k[:, :, first : n + 1]).sum(-1) * D**-0.5
        near = g * (s - s.amax(-1, keepdim=True)).exp()
        far = (phi[0][:, :, n : n + 1] * phi[1][:, :, :first]).sum(-1)
        weights = torch.cat([far, near], dim=-1)[..., None]
        out[:, :, n] = (weights * v[:, :, : n + 1]).sum(2) / weights.sum(2)
    return out


@pytest.mark.parametrize("window", range(1, 13))
def test_decoding_equals_the_prefill_to_1e_5_in_float32_whatever_the_window(window: int) -> None:
    """Sliding form, w = 1 to N; with w = N both are the softmax of the model."""
    spec = WindowTail(window=window).rewrite(SITE, CAUSAL)
    maps = initial(spec)
    q, k, v = (torch.randn(1, H, 12, D) for _ in range(3))
    with torch.no_grad():
        whole = attention(q, k, v, maps, [], spec, "torch")
        past = [k[:, :, :0], v[:, :, :0]]
        for n in range(12):
            full, row = [x[:, :, : n + 1].clone() for x in (k, v)], slice(n, n + 1)
            step = torch.ops.rewriter.attention.default(
                q[:, :, row],
                *full,
                maps,
                [],
                spec.to_json(),
                "torch",
                full,
                past,
                f"window {window}",
            )
            torch.testing.assert_close(step, whole[:, :, row], rtol=1e-5, atol=1e-5)
            past = full
    want = hybrid(q, k, v, window)
    torch.testing.assert_close(whole.double(), want, rtol=1e-5, atol=1e-5)
    softmax = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(whole[:, :, :window], softmax[:, :, :window], rtol=1e-5, atol=1e-5)


# --- the toy --------------------------------------------------------------------------------------


def initial(spec: LinearSpec) -> list[Tensor]:
    """The parameters that the spec reads, as they are made."""
    made = []
    for arg in spec.tensors:
        assert arg.source is not None
        (p,) = arg.source.parameters
        start = torch.eye(*p.shape[-2:]) if p.initial == "eye" else torch.tensor(float(p.initial))
        made.append(start.expand(p.shape).clone())
    return made


class Layer(nn.Module):
    """A layer with two forms of attention: the softmax, and a linear one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def insert(self, action: Pass) -> None:
        self.spec = action.rewrite(SITE, CAUSAL)
        self.maps = nn.ParameterList(initial(self.spec))

    def heads(self, x: Tensor) -> list[Tensor]:
        return [
            y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(self.norms[0](x)).chunk(3, -1)
        ]

    def attend(self, x: Tensor, *, linear: bool) -> Tensor:
        """The head outputs `[B, H, N, D]`."""
        if not linear:
            return attention(*self.heads(x), [], [], CAUSAL, "torch")
        return attention(*self.heads(x), list(self.maps), [], self.spec, "torch")

    def rest(self, x: Tensor, heads: Tensor) -> Tensor:
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Reads a text of `2 HALF` words whose second half is the first one again."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(torch.randn(2 * HALF, WIDTH) / 2)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, text: Tensor, *, linear: bool = False) -> Tensor:
        x = self.words(text) + self.places
        for layer in self.layers:
            x = layer.rest(x, layer.attend(x, linear=linear))
        return self.head(x)

    def insert(self, action: Pass) -> None:
        for layer in self.layers:
            layer.insert(action)

    @property
    def maps(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer.maps]

    def transfer_loss(self, text: Tensor) -> Tensor:
        """The mean over layers of the mean square on head outputs; the softmax is passed on."""
        x, total = self.words(text) + self.places, torch.zeros(())
        for layer in self.layers:
            teacher = layer.attend(x, linear=False)
            total = total + (layer.attend(x, linear=True) - teacher).square().mean()
            x = layer.rest(x, teacher)
        return total / len(self.layers)

    def loss(self, text: Tensor, *, linear: bool) -> Tensor:
        logits = self(text, linear=linear)[:, HALF - 1 : -1]
        return cross_entropy(logits.flatten(0, 1), text[:, HALF:].flatten())


def texts(count: int) -> Tensor:
    half = torch.randint(WORDS, (count, HALF))
    return torch.cat([half, half], dim=1)


def train(
    loss: Callable[[Tensor], Tensor], parameters: Iterable[Tensor], n: int, lr: float
) -> None:
    optimiser = torch.optim.Adam(parameters, lr=lr)
    for _ in range(n):
        optimiser.zero_grad()
        loss(texts(32)).backward()
        optimiser.step()


def frozen(model: Model) -> Model:
    """Everything but the maps."""
    model.requires_grad_(False)
    for p in model.maps:
        p.requires_grad_()
    return model


@dataclass(frozen=True)
class Toy:
    """Perplexities and losses on one held-out set."""

    teacher: float
    swapped: float
    transferred: float
    finetuned: float
    control: float
    mse_before: float
    mse_after: float
    is_same_teacher: bool


@pytest.fixture(scope="module")
def toy() -> Toy:
    torch.manual_seed(3)
    test = texts(256)

    def perplexity(model: Model, *, linear: bool) -> float:
        with torch.no_grad():
            return math.exp(float(model.loss(test, linear=linear)))

    def mse() -> float:
        with torch.no_grad():
            return float(model.transfer_loss(test))

    def finetuned(model: Model) -> float:
        model.requires_grad_(True)
        train(lambda text: model.loss(text, linear=True), model.parameters(), 8, 1e-3)
        return perplexity(model, linear=True)

    model = Model()
    train(lambda text: model.loss(text, linear=False), model.parameters(), 250, 3e-3)
    logits, teacher = model(test).detach(), perplexity(model, linear=False)
    model.insert(FeatureMaps(map="exp", width=32))
    control, before, swapped = copy.deepcopy(model), mse(), perplexity(model, linear=True)
    train(frozen(model).transfer_loss, model.maps, 140, 0.03)
    return Toy(
        is_same_teacher=torch.equal(model(test), logits),
        teacher=teacher,
        swapped=swapped,
        transferred=perplexity(model, linear=True),
        mse_before=before,
        mse_after=mse(),
        finetuned=finetuned(model),
        control=finetuned(control),
    )


def test_the_transfer_loss_falls_below_a_tenth_and_the_perplexity_by_more_than_five(
    toy: Toy,
) -> None:
    """Before any fine-tuning; a model whose operator is swapped is broken."""
    assert toy.mse_after < 0.1 * toy.mse_before
    assert toy.swapped > 5 * toy.transferred


def test_fine_tuning_comes_within_a_tenth_of_the_teacher_and_without_a_transfer_it_does_not(
    toy: Toy,
) -> None:
    assert toy.finetuned <= 1.1 * toy.teacher
    assert toy.control > 1.1 * toy.teacher


def test_the_softmax_model_has_the_same_logits_bit_for_bit_beside_its_student(toy: Toy) -> None:
    assert toy.is_same_teacher


@pytest.mark.parametrize(
    "action", [FeatureMaps(map="relu"), FeatureMaps(map="exp"), WindowTail(window=2)], ids=str
)
def test_gradients_of_the_transfer_reach_maps_and_factors_and_nothing_else(action: Pass) -> None:
    model = Model()
    model.insert(action)
    frozen(model).transfer_loss(texts(8)).backward()
    maps = {id(p) for p in model.maps}
    assert maps
    for p in model.parameters():
        assert (p.grad is not None) == (id(p) in maps)
        assert p.grad is None or p.grad.abs().amax() > 0
