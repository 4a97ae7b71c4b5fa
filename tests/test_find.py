"""Every softmax of a graph is found, and said to be what it is."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from rewriter.capture import Captured, export, from_exported
from rewriter.find import clean_path, comes_from_one_sequence, find, layer_of
from rewriter.lift import lift
from rewriter.reading import op_name

X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    def __init__(self, function: Callable[[Function, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def captured(function: Callable[[Function, Tensor], Tensor]) -> Captured:
    dynamic = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    return from_exported(export(Function(function), (X,), dynamic_shapes=dynamic))


KINDS: dict[str, tuple[Callable[[Function, Tensor], Tensor], list[str]]] = {
    "attention": (lambda m, x: (m.a(x) @ m.b(x).mT).softmax(-1) @ m.c(x), ["attention"]),
    "fused": (
        lambda m, x: F.scaled_dot_product_attention(m.a(x), m.b(x), m.c(x)),
        ["attention"],
    ),
    "through_layout_and_dropout": (
        lambda m, x: (
            F.dropout((m.a(x) @ m.b(x).mT).softmax(-1), 0.1, False)[:, None].contiguous()
            @ m.c(x)[:, None]
        ),
        ["attention"],
    ),
    "two": (
        lambda m, x: (x @ x.mT).softmax(-1) @ m.b(x) + (m.a(x) @ x.mT).softmax(-1) @ m.c(x),
        ["attention", "attention"],
    ),
    "router": (lambda m, x: m.a(x).softmax(-1).topk(2, -1).values, ["router"]),
    "router_that_chooses_first": (lambda m, x: m.a(x).topk(2, -1).values.softmax(-1), ["router"]),
    "router_that_sorts": (lambda m, x: m.a(x).softmax(-1).sort(-1).values, ["router"]),
    "pointer": (lambda m, x: (m.a(x) @ m.b(x).mT).softmax(-1), ["pointer"]),
    "classifier": (lambda m, x: m.a(x).softmax(-1), ["pointer"]),
    "draw": (lambda m, x: m.a(x).softmax(-1).argmax(-1), ["draw"]),
    "selection_of_branches": (
        lambda m, x: (m.a(x).softmax(-1)[..., None] * torch.stack([m.b(x)] * 8, -2)).sum(-2),
        ["unknown"],
    ),
    "logarithm": (lambda m, x: F.log_softmax(m.a(x), -1), []),
    "by_hand": (
        lambda m, x: (lambda e: e / e.sum(-1, keepdim=True) @ m.c(x))((m.a(x) @ m.b(x).mT).exp()),
        [],
    ),
}
"""A softmax written out as exponentials and their sum is not found: nothing marks it as one."""


@pytest.mark.parametrize("name", KINDS)
def test_a_softmax_is_said_to_be_what_it_is(name: str) -> None:
    function, kinds = KINDS[name]
    assert [f.kind for f in find(captured(function).graph)] == kinds


def test_pooling_by_learned_scores_is_told_apart_by_lifting() -> None:
    graph = captured(lambda m, x: m.a(x).softmax(-1) @ torch.stack([m.b(x)] * 8, 1)[:, :, 0])
    (found,) = find(graph.graph)
    site = lift(found, graph).site
    assert site.kind == "pooling"
    assert site.spec is None


def test_the_product_with_the_values_is_found_behind_a_transpose() -> None:
    graph = captured(lambda m, x: (m.c(x).mT @ (m.a(x) @ m.b(x).mT).softmax(-1).mT).mT).graph
    (found,) = find(graph)
    assert found.reason == ""
    assert found.product is not None
    assert op_name(found.product) == "aten.matmul"
    assert found.product is not found.anchor.args[0]


def test_weights_that_meet_two_values_are_left_alone() -> None:
    def two_values(m: Function, x: Tensor) -> Tensor:
        weights = (m.a(x) @ m.b(x).mT).softmax(-1)
        return weights @ m.c(x) + weights @ x

    (found,) = find(captured(two_values).graph)
    assert found.reason.startswith("its weights are multiplied with 2 tensors")


def test_mixing_of_heads_is_not_taken_for_a_gate() -> None:
    def talking(m: Function, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (8, 1)).transpose(1, 2) for p in (m.a, m.b, m.c))
        weights = m.a((q @ k.mT).softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights @ v

    (found,) = find(captured(talking).graph)
    assert found.kind == "attention"
    assert found.reason == "its weights are changed by aten.linear before they meet the values"


def test_weights_that_are_dropped_twice_are_left_alone() -> None:
    def dropped(m: Function, x: Tensor) -> Tensor:
        weights = F.dropout((m.a(x) @ m.b(x).mT).softmax(-1), 0.5, True)
        return F.dropout(weights, 0.3, True) @ m.c(x)

    graph = captured(dropped)
    (found,) = find(graph.graph)
    assert lift(found, graph).site.reason == "its weights are dropped out twice"


@pytest.mark.parametrize(
    ("spelled", "path"),
    [
        ("L['self'].model.layers.3.self_attn", "model.layers.3.self_attn"),
        ("L['self']._modules['0'].b", "0.b"),
        ("L['module'].layers[3].attention", "layers.3.attention"),
        ("layers.3", "layers.3"),
        ("L['self'].__dict__['_modules']['blocks']._modules['0'].attn", "blocks.0.attn"),
        ("L['self']._modules['a']._parameters['weight']", "a.weight"),
        ("", ""),
    ],
)
def test_a_module_path_has_one_spelling(spelled: str, path: str) -> None:
    assert clean_path(spelled) == path


def test_a_layer_is_the_first_number_of_a_path() -> None:
    assert layer_of("decoder.layers.11.blocks.2") == 11
    assert layer_of("embeddings") is None


def test_queries_and_keys_of_one_tensor_are_one_sequence() -> None:
    graph = captured(lambda m, x: (m.a(x) @ m.b(x).mT).softmax(-1) @ m.c(m.a(x)))
    linears = [n for n in graph.graph.nodes if op_name(n) == "aten.linear"]
    assert comes_from_one_sequence(linears[0], linears[1])


def test_reading_a_site_is_fast() -> None:
    def site(m: Function, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (m.a, m.b, m.c))
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]
        mask = (j <= i) & (i - j < 3) | (j < 2)
        return (q @ k.mT * 0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    graph = captured(site)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (found,) = find(graph.graph)
        assert lift(found, graph).site.spec is not None
        best = min(best, time.perf_counter() - start)
    assert best < 0.05, f"{best * 1e3:.0f} ms for one site"
