"""Passes of several kinds on one model: each site is one spec and one op node, and computes what
the dense reference of that spec computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch

import rewriter
import zoo
from rewriter.linear import LinearSpec
from rewriter.spec import SoftmaxSpec, Spec
from rewriter.verify import structure_of

VAR = "sinks.var(dims=[0, 3], tau=1, min_nonsink_ratio=0.1, min_mass=0.05, first_layer=0, {})"
IMAGE = rewriter.label_spans([(9, 15)], length=20)
MOBA = "sparse.moba(block=3, topk=2, dense_below=0)"


def edited_under_a_cap_in_a_window(layer: int, spec: Spec) -> bool:
    """The second layer has no window."""
    assert isinstance(spec, SoftmaxSpec)
    return spec.edit is not None and "tanh" in str(spec.score) and spec.scale != 1


def gated_linear(layer: int, spec: Spec) -> bool:
    return isinstance(spec, LinearSpec) and spec.heads != 1 and spec.active == 2 and spec.decay != 0


def routed_from_2_and_ablated_at_3(layer: int, spec: Spec) -> bool:
    assert isinstance(spec, SoftmaxSpec)
    return (spec.route is not None) == (layer >= 2) and (spec.heads != 1) == (layer == 3)


@dataclass(frozen=True)
class Together:
    model: str
    passes: tuple[str, ...]
    holds: Callable[[int, Spec], bool]
    """Of each layer and its spec."""
    rewritten: range
    labels: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "var on soft-capped windowed GQA": Together(
        "gemma2",
        (VAR.format("last_layer=True"),),
        edited_under_a_cap_in_a_window,
        range(2),
        labels=True,
        options={"sliding_window": 12},
    ),
    "moh on lightning": Together(
        "llama",
        ("linear.lightning(rule=minimax)", "heads.moh(active=0.5)"),
        gated_linear,
        range(2),
    ),
    "moba and an ablated head": Together(
        "llama",
        (f"{MOBA} @ 2-9", "heads.ablate @ 3 heads=1"),
        routed_from_2_and_ablated_at_3,
        range(2, 10),
        options={"num_hidden_layers": 10},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_site_is_one_spec_and_one_node_and_equals_the_reference(
    case: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = []
    module = import_module("rewriter.optimize")  # the function hides it as an attribute
    assembled = module.assembled

    def counted(gm: Any, captured: Any, *rest: Any) -> Any:
        run = assembled(gm, captured, *rest)
        targets = [n.target for n in captured.graph.nodes]
        nodes.append(targets.count(torch.ops.rewriter.attention.default))
        return run

    monkeypatch.setattr(module, "assembled", counted)
    architecture = zoo.architecture(case.model)
    implementation = architecture.implementations[-1]
    original = architecture.build(implementation, **case.options)
    inputs = architecture.inputs()
    there = inputs["attention_mask"].bool()
    found = []
    with torch.no_grad():
        for target in ("auto", "reference"):
            model = architecture.build(implementation, **case.options)
            rewriter.optimize(model, *case.passes, target=target)
            with rewriter.give(model, labels=IMAGE) if case.labels else nullcontext():
                found.append(model(**inputs).logits[there])
            sites = rewriter.report_of(model).attention
            structure_of(model).expect(rewritten=len(case.rewritten), graphs=1, breaks=0)
            assert all(case.holds(n, s.after) for n, s in enumerate(sites))
        before = original(**inputs).logits[there]
    assert nodes == [len(case.rewritten)] * 2
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert (found[0] - before).abs().max() > 1e-2
