"""The tensors in nested inputs and outputs: mappings, tuples, output classes, key-value caches.

A graph takes and gives flat lists of tensors; a model takes and gives objects. `flatten` reads the
tensors out of an object, names each, and can build the object again around other tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Tree", "flatten"]

Build = Callable[[Sequence[Tensor]], Any]

_SINGULAR = {"keys": "key", "values": "value"}
_CONSTANT = (
    str,
    bytes,
    int,
    float,
    complex,
    torch.dtype,
    torch.device,
    nn.Module,
    type,
    type(None),
)


@dataclass(frozen=True)
class Tree:
    """A nested value, taken apart."""

    names: tuple[str, ...]
    """One name a tensor, of the keys and positions that lead to it: `"past_key_values.0.key"`."""
    tensors: tuple[Tensor, ...]
    build: Build
    """Gives the value again with other tensors in it; a model may change its containers."""

    @property
    def roots(self) -> tuple[str, ...]:
        """For each tensor the first part of its name: tensors of one argument share it."""
        return tuple(name.split(".")[0] for name in self.names)


def flatten(value: Any, name: str = "") -> Tree:
    """Takes a nested value apart.

    Args:
        value: tensors in mappings, sequences, named tuples, dataclasses and objects, nested in
            any way. Anything else in it is a constant, and stands in what is built again.
        name: what the names begin with.
    """
    leaves: list[tuple[str, Tensor]] = []
    build = _walk(value, (name,) if name else (), leaves, ())
    names = (".".join(path) or "output" for path, _ in leaves)
    return Tree(tuple(names), tuple(x for _, x in leaves), build)


def _walk(value: Any, path: tuple[str, ...], leaves: list[Any], above: tuple[int, ...]) -> Build:
    """Appends the tensors of the value to `leaves`; returns what builds it again."""
    if isinstance(value, Tensor):
        position = len(leaves)
        leaves.append((path, value))
        return lambda tensors: tensors[position]
    if isinstance(value, _CONSTANT) or callable(value) or id(value) in above:
        return lambda _: value

    above = (*above, id(value))

    def children(items: Iterable[tuple[Any, Any]]) -> dict[Any, Build]:
        return {key: _walk(x, (*path, str(key)), leaves, above) for key, x in items}

    if isinstance(value, Mapping):
        parts = children(value.items())
        return lambda tensors: _mapping(value, {key: part(tensors) for key, part in parts.items()})
    if isinstance(value, list | tuple):
        parts = children(enumerate(value))
        return lambda tensors: _sequence(value, [part(tensors) for part in parts.values()])
    if hasattr(value, "__dict__"):
        # a cache writes its layers' tensors as "0.key", not "layers.0.keys"
        parts = {
            key: _walk(
                x, (*path, _SINGULAR.get(key, key)) if key != "layers" else path, leaves, above
            )
            for key, x in vars(value).items()
        }
        return lambda tensors: _object(value, {key: part(tensors) for key, part in parts.items()})
    return lambda _: value


def _mapping(value: Any, items: dict[Any, Any]) -> Any:
    if type(value) is dict or not hasattr(value, "__dataclass_fields__"):
        return items
    return type(value)(**items)


def _sequence(value: Any, items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _object(value: Any, attributes: dict[str, Any]) -> Any:
    built = copy.copy(value)
    built.__dict__.update(attributes)
    return built
