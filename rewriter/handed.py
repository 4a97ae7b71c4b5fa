"""Masks that one graph of a model makes and hands to the next.

Where torch cannot go on with a graph, a model falls into several: its causal mask is made in the
first, and the others are given a tensor of queries x keys that says nothing of itself. A graph that
makes such a mask from small inputs leaves a recipe here: its nodes, and the inputs that they read.
A graph that is given the mask is captured with the recipe in it, so that the mask is read as what
it is, and takes those inputs as its own; whether it still is given that mask is looked at in each
call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from sympy import Expr, Symbol
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils.weak import WeakIdKeyDictionary

from rewriter.reading import value_of

__all__ = ["Handed", "Made", "Recipe", "recipes_of"]

MOST_NODES = 200
"""Nodes of a recipe, and elements of each constant that it holds."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a mask is made.

    Attributes:
        module: takes the leaves and then the numbers, and gives the mask.
        leaves: the positions of the inputs that it reads, among those of the graph.
        origins: a short name for each of them, and where it comes from in words.
        shapes: the shape of each of them.
        kinds: dtype and device of each of them.
        numbers: what else it is given: sizes, in the symbols of the mask's own and of `given`.
        given: the symbols of whole numbers that the graph was given, with their positions.
        shape: the shape of the mask.
    """

    module: fx.GraphModule
    leaves: tuple[int, ...]
    origins: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[Any, ...], ...]
    kinds: tuple[tuple[torch.dtype, torch.device], ...]
    numbers: tuple[Any, ...]
    given: tuple[tuple[Symbol, int], ...]
    shape: tuple[Any, ...]

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for two recipes that make the same mask from the same leaves, whatever torch calls
        the sizes."""
        names = {x: Symbol(f"given{n}") for n, (x, _) in enumerate(self.given)}
        names |= {x: Symbol(f"dim{n}") for n, x in reversed([*enumerate(self.shape)])}
        told = [[_renamed(x, names) for x in xs] for xs in (*self.shapes, self.numbers, self.shape)]
        constants = [x.tolist() for x in self.module.buffers()]
        return str(self.module.graph), str(told), self.kinds, str(constants)

    def sizes(self, mask: Tensor, given: Sequence[int]) -> dict[Any, Any]:
        """What each symbol is, for a mask that is at hand."""
        found: dict[Any, Any] = {x: n for (x, _), n in zip(self.given, given, strict=True)}
        dims = reversed([*enumerate(self.shape)])
        return found | {x: mask.shape[n] for n, x in dims if isinstance(x, Symbol)}


def _renamed(x: Any, names: Mapping[Any, Symbol]) -> str:
    return str(x.xreplace(names)) if isinstance(x, Expr) else str(x)


def _number(x: Any, sizes: Mapping[Any, Any]) -> Any:
    if not isinstance(x, Expr):
        return x
    return int(x) if x.is_Integer else sympy_interp(PythonReferenceAnalysis, dict(sizes), x)


@dataclass(frozen=True)
class Made:
    """A mask that a graph has made, and from what."""

    recipe: Recipe
    given: tuple[int, ...]
    version: int = 0
    leaves: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()

    def way(self) -> Made:
        """How it was made, without the tensors."""
        return Made(self.recipe, self.given)

    def same_way(self, other: Made) -> bool:
        if self.given != other.given:
            return False
        return self.recipe is other.recipe or self.recipe.key == other.recipe.key

    def leaves_like(self, mask: Tensor, mode: FakeTensorMode) -> list[Tensor]:
        """Fake leaves for a fake mask."""
        recipe, sizes = self.recipe, self.recipe.sizes(mask, self.given)
        with mode:
            return [
                torch.empty([_number(n, sizes) for n in shape], dtype=dtype, device=device)
                for shape, (dtype, device) in zip(recipe.shapes, recipe.kinds, strict=True)
            ]

    def again(self, mask: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """The mask, made anew; of the mask itself only the sizes are used."""
        sizes = self.recipe.sizes(mask, self.given)
        numbers = [_number(n, sizes) for n in self.recipe.numbers]
        return cast(Tensor, self.recipe.module(*leaves, *numbers))

    def still(self, mask: Tensor) -> bool:
        """Neither the mask nor what it was made from has been written to since."""
        now = tuple(x._version for x in self.leaves)
        return mask._version == self.version and now == self.versions


@dataclass
class Handed:
    """The masks that the graphs of one model have made, while they live."""

    made: Any = field(default_factory=WeakIdKeyDictionary)

    def keep(self, mask: Any, recipe: Recipe, args: Sequence[Any]) -> None:
        """Remembers that the mask came from the recipe and these inputs of its graph."""
        leaves = tuple(args[n] for n in recipe.leaves)
        if any(x.is_inference() for x in (mask, *leaves)):  # torch counts no writes to them
            return
        versions = tuple(x._version for x in leaves)
        given = tuple(int(args[n]) for _, n in recipe.given)
        self.made[mask] = Made(recipe, given, mask._version, leaves, versions)

    def find(self, mask: Any) -> Made | None:
        """How a tensor was made, if it is a mask that is known here."""
        made = self.made.get(mask) if isinstance(mask, Tensor) else None
        return made if made is not None and made.still(mask) else None

    def leaves_of(self, args: Sequence[Any], ways: Mapping[int, Made]) -> list[Tensor] | None:
        """The leaves of the masks at these positions, one after the other; None if one of them was
        not made in this way."""
        leaves: list[Tensor] = []
        for n, way in ways.items():
            made = self.find(args[n])
            if made is None or not made.same_way(way):
                return None
            leaves.extend(made.leaves)
        return leaves


def recipes_of(facts: Any) -> dict[int, Recipe]:
    """The outputs of a captured graph that are made from small inputs of it, by position."""
    graph: fx.Graph = facts.graph
    inputs = {n: place for place, n in enumerate(x for x in graph.nodes if x.op == "placeholder")}
    (output,) = graph.find_nodes(op="output")
    results = output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)
    found = {}
    for place, node in enumerate(results):
        recipe = _recipe(node, facts, inputs) if isinstance(node, fx.Node) else None
        if recipe is not None:
            found[place] = recipe
    return found


def _recipe(result: fx.Node, facts: Any, inputs: Mapping[fx.Node, int]) -> Recipe | None:
    value = value_of(result)
    if result.op != "call_function" or not isinstance(value, Tensor) or value.dim() < 3:
        return None
    if value.dtype != torch.bool and not value.is_floating_point():
        return None
    shape = _shape(value)
    symbols = {x for x in shape if isinstance(x, Symbol)}
    nodes = _above(result, facts)
    if nodes is None:
        return None
    graph, moved, held = fx.Graph(), dict[fx.Node, fx.Node](), fx.GraphModule({}, fx.Graph())
    leaves = [n for n in nodes if n.op == "placeholder" and isinstance(value_of(n), Tensor)]
    numbers = [n for n in nodes if not isinstance(value_of(n), Tensor)]
    if not leaves or not all(_is_leaf(n, facts) for n in leaves):
        return None
    told = [
        *(x for n in leaves for x in _shape(value_of(n))),
        *(_expr(value_of(n)) for n in numbers),
    ]
    loose = {x for expr in told if isinstance(expr, Expr) for x in expr.free_symbols} - symbols
    sources = {_expr(value_of(n)): place for n, place in inputs.items()}
    if not loose <= sources.keys():
        return None
    for n in (*leaves, *numbers):
        moved[n] = graph.placeholder(f"given{len(moved)}")
    for n in (x for x in nodes if x not in moved):
        if n.op == "get_attr":
            name = f"held{len(moved)}"
            held.register_buffer(name, facts.constant(n))
            moved[n] = graph.get_attr(name)
        else:
            moved[n] = graph.node_copy(n, moved.__getitem__)
    graph.output(moved[result])
    return Recipe(
        fx.GraphModule(held, graph),
        tuple(inputs[n] for n in leaves),
        tuple(facts.inputs[n] for n in leaves),
        tuple(_shape(value_of(n)) for n in leaves),
        tuple((value_of(n).dtype, value_of(n).device) for n in leaves),
        tuple(_expr(value_of(n)) for n in numbers),
        tuple((x, sources[x]) for x in sorted(loose, key=str)),
        shape,
    )


def _above(result: fx.Node, facts: Any) -> list[fx.Node] | None:
    """The nodes that a result is made from, in order; None if they are too many, or not the same in
    each call."""
    seen, open_nodes = {result}, [result]
    while open_nodes:
        node = open_nodes.pop()
        target = node.target
        if node in facts.written or len(seen) > MOST_NODES:
            return None
        if not isinstance(value_of(node), Tensor | int | torch.SymInt):
            return None
        if node.op == "get_attr":
            constant = facts.constant(node)
            if constant is None or constant.numel() > MOST_NODES:
                return None
        if node.op == "call_function" and (
            not isinstance(target, torch._ops.OpOverload)
            or torch.Tag.nondeterministic_seeded in target.tags
            or target._schema.is_mutable
        ):
            return None
        new = [] if not isinstance(value_of(node), Tensor) else node.all_input_nodes
        new = [x for x in new if x not in seen]
        seen.update(new)
        open_nodes.extend(new)
    return sorted(seen)


def _is_leaf(node: fx.Node, facts: Any) -> bool:
    """An input of a call, with an element a token at most."""
    value = value_of(node)
    return bool(value.dim() <= 2 and facts.inputs[node][1].startswith("input")) and not (
        value.requires_grad
    )


def _expr(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else value


def _shape(value: Tensor) -> tuple[Any, ...]:
    return tuple(_expr(n) for n in value.shape)
