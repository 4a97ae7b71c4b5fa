"""Files that hand a state on: what a call leaves behind is an output, and an input of the next.

It is the input `past_state.<site>` and the output `present_state.<site>`. A causal linear site
needs of earlier tokens one sum of a fixed size, `[B, H, P, Dv]` in float32, all 0 before the first
token: its keys and values are cached no more, and a token costs the same after any number of
others. A site whose queries choose blocks of keys takes beside its cache the sum of the keys of
each block, `[B, H, C, D]` in float32: it adds the new keys to it instead of averaging all of them
again. What a pass decides of keys once, with the prompt, is `past_state.<site>.<tensor>`, int64
`[B, M]`. Before the first token there is no block and no key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.errors import ExportError, InputError
from rewriter.export_given import LABELS, GivenCall, measured_elsewhere
from rewriter.kernels.onnx_state import States
from rewriter.program import length_axis
from rewriter.runtime import compare, resized, run_file
from rewriter.trees import Tree

__all__ = ["StateCall", "check_in_pieces", "states_of", "without_caches"]

PAST, PRESENT = "past_state.", "present_state."


class StateCall(GivenCall):
    """A call with the state of each site behind its other tensors."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        left: Mapping[str, Tensor],
        like: GivenCall | None = None,
    ) -> None:
        """left: what a call leaves behind, by name, with symbolic sizes."""
        super().__init__(model, inputs, like)
        self.as_long.pop(LABELS, None)  # they are the prompt's in every call
        counts: dict[str, int] = {}
        states = {
            f"{PAST}{name}": self._state(f"{PAST}{name}", left[name], counts) for name in left
        }
        self.states = tuple(states)
        old = self.tree
        self.tree = Tree((*old.names, *states), (*old.tensors, *states.values()), old.build)

    def _state(self, name: str, left: Tensor, counts: dict[str, int]) -> Tensor:
        """An example; sizes that differ in the graph differ in it too."""
        grown = [axis for axis, n in enumerate(left.shape) if axis and not isinstance(n, int)]
        self.extra[name] = (0, *grown)
        sizes = list(left.shape[1:])
        for axis in grown:
            sizes[axis - 1] = counts.setdefault(str(left.shape[axis]), 2 + len(counts))
        if left.ndim == 2:  # of keys
            self.as_past[name], sizes = 1, [self._cached()]
        return torch.zeros(self.rows, *sizes, dtype=left.dtype)

    def _cached(self) -> int:
        """How many keys there are before the call."""
        pairs = zip(self.tree.names, self.tree.tensors, strict=True)
        caches = (x.shape[length_axis(n, x)] for n, x in pairs if n.startswith("past"))
        return next(caches, 0)

    def _most_labels(self) -> None:
        return None

    def at_start(self, name: str, state: Tensor) -> Tensor:
        """The state before the first token."""
        for axis in self.extra[name][1:]:
            state = state.narrow(axis, 0, 0)
        return torch.zeros_like(state)

    def handed_on(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        named = dict(zip(self.tree.names, tensors, strict=True))
        return {name.replace(PAST, PRESENT, 1): named[name].clone() for name in self.states}


def states_of(given: Mapping[str, fx.Node], program: Any, outputs: Sequence[str]) -> States:
    """The states that come into a graph, and the outputs that stand for those that leave it."""
    (end,) = program.graph.find_nodes(op="output")
    named = zip(outputs, end.args[0], strict=True)
    return States(
        {n.removeprefix(PAST): x for n, x in given.items() if n.startswith(PAST)},
        {n.removeprefix(PRESENT): x for n, x in named if n.startswith(PRESENT)},
    )


def without_caches(call: GivenCall, program: Any, states: States, onnx: Any) -> None:
    """Takes the keys and values of sites out of the file whose states stand in their place."""
    nodes = dict(zip(program.graph_signature.user_inputs, call.tree.names, strict=True))
    graph = onnx.model.graph
    for value in [x for x in graph.inputs if x.name in {nodes[n] for n in states.caches}]:
        grown = [use.node for use in value.uses() if use.node.op_type == "Concat"]
        if any(node.outputs[0].uses() for node in grown):
            continue
        for node in grown:
            graph.outputs.remove(node.outputs[0])
            graph.remove(node, safe=True)
        others = [x for x in graph.inputs if x is not value]
        if all(measured_elsewhere(use.node, value, others) for use in list(value.uses())):
            graph.inputs.remove(value)


# --- agreement ------------------------------------------------------------------------------------


def check_in_pieces(
    call: StateCall,
    outputs: Sequence[str],
    file: Path,
    tensors: Sequence[Tensor],
    tolerance: float | None,
    where: str,
) -> float:
    """Runs a sequence in two calls of the file, and compares it with one call of the model.

    The tokens of `tensors` are the second piece; what stands in their caches is not used.

    Raises:
        ExportError: if they differ, or the file does not run.
    """
    pieces = _Pieces(call, tensors)
    wanted = dict(zip(outputs, call(list(pieces.whole.values())).tensors, strict=False))
    first = run_file(file, pieces.first)
    handed = {name: first[name.replace(PAST, PRESENT, 1)] for name in call.states}
    caches = (name for name in pieces.caches if _present(name) in first)
    handed |= {name: first[_present(name)] for name in caches}
    second = run_file(file, {**pieces.second, **handed})
    found = {name: x for name, x in second.items() if not name.startswith(PRESENT)}
    for name in [n for n in found if not n.startswith("present")]:
        found[name] = torch.cat([first[name], found[name]], 1)
    real, expected = ({n: pieces.real(x[n]) for n in found} for x in (found, wanted))
    try:
        return compare(real, expected, tolerance, where)
    except ExportError as error:
        if pieces.caches:
            raise
        raise ExportError(
            f"in two calls: {error}. The inputs hold no key-value cache: a model that numbers its "
            "tokens then begins again with each call; give a cache, or positions"
        ) from None


def _present(name: str) -> str:
    """What an output is called that continues an input."""
    return ".".join(["present", *name.split(".")[1:]])


class _Pieces:
    """One sequence, whole and in two pieces, as named tensors; the caches and states are empty."""

    def __init__(self, call: StateCall, tensors: Sequence[Tensor]) -> None:
        named = dict(zip(call.tree.names, tensors, strict=True))
        axes = {name: call.tokens(name, x) for name, x in named.items()}
        own = [name for name in named if name not in call.extra]
        self.caches = [n for n in own if n.startswith("past") and axes[n]]
        tokens = next((x.shape[axes[n]] for n, x in named.items() if n in own and axes[n]), 0)
        if tokens < 2 and not self.caches:
            raise InputError("a state is handed on between tokens: give inputs of two or more")
        past = named[self.caches[0]].shape[axes[self.caches[0]]] if self.caches else tokens // 2
        length = past + tokens if self.caches else tokens
        self.whole: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        for name, x in named.items():
            axis = axes[name]
            if name in self.caches:
                whole = first = second = x.narrow(axis, 0, 0)
            elif name in call.states:
                whole = first = second = call.at_start(name, x)
            elif name == LABELS:  # what comes later has none
                whole = first = second = x[:, :past]
            elif not axis or x.shape[axis] not in (tokens, length):
                whole = first = second = x
            else:
                is_of_all = x.shape[axis] == length != tokens
                shape = list(x.shape)
                shape[axis] = length
                whole = resized(x, shape)
                first = whole.narrow(axis, 0, past)
                second = whole if is_of_all else whole.narrow(axis, past, length - past)
            self.whole[name], self.first[name], self.second[name] = whole, first, second
        masks = (x for n, x in self.whole.items() if "mask" in n and x.shape[1:] == (length,))
        self.mask = next(masks, None)

    def real(self, x: Tensor) -> Tensor:
        """An output `[B, N, ...]`, or a cache `[B, H, N, D]`, 0 at padding: what stands there is no
        part of the sequence, and may depend on how many tokens there are."""
        if self.mask is None:
            return x
        for axis in range(1, x.ndim - 1):
            if x.shape[axis] == self.mask.shape[1]:
                shape = [1] * x.ndim
                shape[0], shape[axis] = self.mask.shape
                return x * (self.mask != 0).view(shape)
        return x
