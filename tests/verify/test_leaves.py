"""Flattening nested values to names, and copying them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.verify.leaves import copied, leaves_of

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output:
    logits: Tensor
    extra: int


class Layer:
    def __init__(self, value: float) -> None:
        self.keys, self.values, self.size = torch.full((2,), value), torch.zeros(2), 2


class Store:
    """An unregistered object with tensors deep in its attributes, as key-value caches are."""

    def __init__(self) -> None:
        self.layers = [Layer(1.0), Layer(2.0)]
        self.parent = self  # a cycle


def test_every_tensor_is_named_by_its_path() -> None:
    x = torch.zeros(1)
    value = OrderedDict(
        logits=x, states=(x, [x, Pair(x, 3)]), last=Output(x, 1), cache=Store(), no=None
    )
    leaves = leaves_of(value)
    assert list(leaves.tensors) == [
        "logits",
        "states.0",
        "states.1.0",
        "states.1.1.first",
        "last.logits",
        "cache.layers.0.keys",
        "cache.layers.0.values",
        "cache.layers.1.keys",
        "cache.layers.1.values",
    ]
    assert leaves.values["states.1.1.second"] == 3
    assert leaves.values["no"] is None


def test_a_single_tensor_is_called_output() -> None:
    assert list(leaves_of(torch.zeros(1)).values) == ["output"]


def test_what_holds_no_tensor_is_listed_as_unread() -> None:
    class Empty:
        pass

    leaves = leaves_of({"x": torch.zeros(1), "config": Empty()})
    assert leaves.unread == ("config (Empty)",)


def test_a_copy_is_deep_and_converts_tensors_inside_objects() -> None:
    store = Store()
    double = copied({"cache": store}, lambda _, t: t.double())["cache"]
    assert double is not store
    assert double.parent is double
    assert double.layers[1].keys.dtype == torch.float64
    assert store.layers[1].keys.dtype == torch.float32


def test_a_tensor_that_occurs_twice_stays_shared() -> None:
    x = torch.zeros(1)
    pair = copied((x, x), lambda _, t: t.clone())
    assert pair[0] is pair[1]
    assert pair[0] is not x
