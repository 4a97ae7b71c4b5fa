"""What repeats itself is traced once, and the graph is the one that torch traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sympy import Basic
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

import rewriter
import zoo
from rewriter.capture import capturing
from rewriter.retrace import Tracing


class Layer(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.inner, self.between = nn.Linear(8, 8), between

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.inner(x).float().chunk(2, -1)
        x = torch.cat([torch.tensor([]), (q @ k.transpose(-1, -2)).softmax(-1) @ x], -1)
        return x if self.between is None else self.between(x)


class Layers(nn.Module):
    """The same layer again and again, on as many rows or on other ones."""

    def __init__(self, count: int, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(between) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def traced(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[Any, Any, Tracing]]:
    """Each graph of a model: as torch traces it, as we do, and how."""
    found = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        fakes = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        graphs = []
        for repeats in (False, True):
            with torch.fx.traceback.preserve_node_meta(), enable_python_dispatcher():
                tracing = Tracing(gm, repeats)
                run = tracing.run
                graphs.append(make_fx(run, tracing_mode="fake", pre_dispatch=True)(*fakes))
        found.append((described(graphs[0].graph), described(graphs[1].graph), tracing))
        return gm

    torch._dynamo.reset()
    with capturing():
        torch.compile(model, backend=backend, dynamic=True)(*args, **kwargs)
    torch._dynamo.reset()
    return found


def described(graph: fx.Graph) -> list[str]:
    """Every node: what it does with what, the kind of its value, and where it comes from. Equal
    constants of a graph may be one."""
    nodes = [n for n in graph.nodes if n.op != "get_attr"]
    places = dict.fromkeys(graph.nodes, "constant")
    places |= {node: f"%{number}" for number, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        called = node.target if node.op.startswith("call") else node.op
        name = getattr(called, "__name__", called)
        args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: Place(places[n]))
        path = [str(x) for x in (node.meta.get("nn_module_stack") or {}).values()][-1:]
        lines.append(f"{name} {args} {kind(node.meta.get('val'))} {path} {node.stack_trace}")
    return lines


class Place(str):
    __repr__ = str.__str__


def kind(value: Any) -> str:
    if isinstance(value, FakeTensor):
        sizes: list[int | Basic] = [
            n.node.expr if isinstance(n, torch.SymInt) else n
            for n in (*value.shape, *value.stride(), value.storage_offset())
        ]
        return f"{value.dtype} {value.device} {sizes}"
    if isinstance(value, tuple | list):
        return str([kind(x) for x in value])
    return str(value.node.expr) if isinstance(value, torch.SymInt) else str(value)


@pytest.mark.parametrize(("name", "training"), [("llama", True), ("deberta_v2", False)])
def test_the_graph_of_a_model_is_the_one_that_torch_traces(name: str, training: bool) -> None:
    case = next(c for c in zoo.cases() if c.architecture.name == name)
    model = case.build().train(training)
    with torch.set_grad_enabled(training):
        for theirs, ours, tracing in traced(model, **case.inputs()):
            assert ours == theirs
            assert tracing.repeated > tracing.traced / 4


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    y[:, 0] = 0
    return y + x


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.sigmoid()
    return x * y


def cast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.transpose(-1, -2)
    return y.float() @ x


def written_twice(x: Tensor) -> Tensor:
    y = x.to(x.dtype).contiguous()
    z = y.t() if y.dim() == 2 else y.transpose(1, 2)
    return x + y.mul_(z.sum())


def with_a_number(x: Tensor) -> Tensor:
    return x * x.new_tensor(2.0) + (x > 0).sum()


BETWEEN = [None, in_place, without_grad, cast, written_twice, with_a_number]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: getattr(f, "__name__", "nothing"))
def test_the_graph_is_the_one_that_torch_traces(between: Any, grad: bool) -> None:
    model = Layers(4, between)
    with torch.set_grad_enabled(grad):
        for theirs, ours, tracing in traced(model, torch.randn(2, 5, 8)):
            assert ours == theirs
            assert tracing.repeated


def test_more_layers_are_no_more_to_trace() -> None:
    few, many = (traced(Layers(n), torch.randn(2, 5, 8))[0][2] for n in (3, 9))
    assert few.traced == many.traced
    assert many.repeated > 3 * few.repeated


def test_calls_that_differ_in_a_number_or_a_kind_are_traced_each() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = x.sin()
        return x * 2.0, x * 3, x * 2, x.double() * 2, x[:2] * 2, x * x, x * y, y * 2

    ((theirs, ours, tracing),) = traced(Wrapped(model), torch.randn(4, 5))
    assert ours == theirs
    assert tracing.repeated == 1  # y * 2


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def test_a_graph_that_cannot_be_repeated_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no")

    model, x = Layers(3), torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(Tracing, "_made_proxy", broken)
        rewriter.optimize(model, "fuse(from_scores=0)")
        torch.testing.assert_close(model(x), expected)
    assert len(rewriter.inspect(model).rewritten) == 3
