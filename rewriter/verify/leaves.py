"""Nested inputs and outputs of a model as flat names, and copies of them in another dtype.

Read are tensors, numbers and text in mappings, sequences, dataclasses, nodes that are registered
with `torch.utils._pytree`, and the tensors that any other object (a key-value cache) holds in its
attributes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

__all__ = ["Leaves", "copied", "leaves_of"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """What a nested value holds, by path: `logits`, `past_key_values.layers.0.keys`, `2.1`."""

    values: dict[str, Any]
    """Tensors and plain values in the order of the structure."""
    unread: tuple[str, ...]
    """`path (type)` of each object in which no tensor was found."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.values.items() if isinstance(x, Tensor)}


def leaves_of(value: object, root: str = "output") -> Leaves:
    """The leaves of `value`. A value that is itself a leaf is called `root`."""
    values: dict[str, Any] = {}
    unread: list[str] = []
    for path, leaf in _walk(value, (), frozenset()):
        name = ".".join(path) or root
        if isinstance(leaf, (Tensor, *_PLAIN)):
            values[name] = leaf
        else:
            unread.append(f"{name} ({type(leaf).__name__})")
    return Leaves(values, tuple(unread))


def copied(value: Any, convert: Callable[[str, Tensor], Tensor], root: str = "input") -> Any:
    """A deep copy of `value` in which `convert(name, tensor)` stands for each tensor that can be
    read.

    A tensor that occurs twice is converted once, so sharing stays as it was.
    """
    memo: dict[int, Any] = {}
    for name, tensor in leaves_of(value, root).tensors.items():
        if id(tensor) not in memo:
            memo[id(tensor)] = convert(name, tensor)
    return copy.deepcopy(value, memo)


def _walk(
    value: Any, path: tuple[str, ...], seen: frozenset[int]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, (Tensor, *_PLAIN)):
        yield path, value
        return
    if id(value) in seen:
        return
    seen = seen | {id(value)}
    children = _children(value)
    if children is not None:
        for name, child in children:
            yield from _walk(child, (*path, name), seen)
        return
    found = [
        leaf
        for name, child in _attributes(value)
        for leaf in _walk(child, (*path, name), seen)
        if isinstance(leaf[1], Tensor)
    ]
    yield from found or [(path, value)]


def _children(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a container with their names, None for any other object."""
    if isinstance(value, Mapping):
        return [(str(name), child) for name, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return [(str(i), child) for i, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    node = _pytree.SUPPORTED_NODES.get(type(value))
    if node is not None:
        return [(str(i), child) for i, child in enumerate(node.flatten_fn(value)[0])]
    return None


def _attributes(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, (type, nn.Module)) or callable(value):
        return []
    return [
        (name, child)
        for name, child in getattr(value, "__dict__", {}).items()
        if not name.startswith("__")
    ]
