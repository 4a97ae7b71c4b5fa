"""What a user gives beside the arguments of a call, as inputs of an exported graph.

`rewriter.give` hands labels and head outputs to passes; a file has nobody to ask, so there they are
inputs: `labels` `[B, M]`, and `patches.<site>` `[B, H, L, Dv]`. The model itself takes neither.
Labels that are fewer than the tokens of the call, those of a prompt, have a length of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from rewriter.additions import Gift, given_to
from rewriter.errors import InputError
from rewriter.program import Call, length_axis
from rewriter.runtime import resized
from rewriter.trees import Tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["LABELS", "GivenCall", "given_nodes", "measured_elsewhere", "without_unused"]

LABELS, PATCHES = "labels", "patches."


class GivenCall(Call):
    """A call whose tensors are those of the arguments and, behind them, what was given."""

    def __init__(self, model: nn.Module, inputs: Any, like: GivenCall | None = None) -> None:
        super().__init__(model, inputs)
        own = self.tree
        self.rows = next((x.shape[0] for x in own.tensors if x.ndim), 1)
        self.length = self._length(own)
        given = self._given(like)
        taken = [name for name in given if name in own.names]
        if taken:
            raise InputError(
                f"{taken[0]} is an argument of the model and given to its passes too; leave it out "
                "of the inputs of an export"
            )
        axes = {name: 1 if name == LABELS else 2 for name in given}
        self.as_long = {n: i for n, i in axes.items() if given[n].shape[i] == self.length}
        self.extra = {
            n: (0, i) if n == LABELS or n in self.as_long else (0,) for n, i in axes.items()
        }
        self.tree = Tree((*own.names, *given), (*own.tensors, *given.values()), own.build)

    @staticmethod
    def _length(tree: Tree) -> int | None:
        """The tokens of one call; None if no argument has an axis of tokens."""
        named = ((name, x) for name, x in zip(tree.names, tree.tensors, strict=True))
        plain = ((x, length_axis(name, x)) for name, x in named if "." not in name)
        return next((x.shape[axis] for x, axis in plain if axis), None)

    def _given(self, like: GivenCall | None) -> dict[str, Tensor]:
        """What was given, in the size of this call; where that is another one than the call for
        which it was given, it is repeated or cut."""
        given, found = given_to(self.model), {}
        if given.labels is not None:
            found[LABELS] = self._labels(given.labels, like)
        for site, patch in given.patches.items():
            shape = list(patch.shape)
            if like is not None:
                shape[0] = self.rows
                if self.length is not None and shape[2] == like.length:
                    shape[2] = self.length
            found[f"{PATCHES}{site}"] = resized(patch, shape)
        return found

    def _labels(self, labels: Tensor, like: GivenCall | None) -> Tensor:
        most = self._most_labels()
        length = labels.shape[1] if most is None else most
        if like is None and (labels.shape[0] not in (1, self.rows) or labels.shape[1] > length):
            raise InputError(
                f"labels of shape {tuple(labels.shape)} were given, and the inputs of the export "
                f"have {self.rows} rows of {length} tokens; give labels [B, M] of these inputs"
            )
        if like is None or labels.shape[1] != like.length:  # of a prompt, which may be shorter
            length = min(length, labels.shape[1])
        return resized(labels, (self.rows, length))

    def _most_labels(self) -> int | None:
        """How many tokens may have labels; None: any number."""
        return self.length

    def __call__(
        self, tensors: Sequence[Tensor], forward: Callable[..., Any] | None = None
    ) -> Tree:
        """The outputs on these tensors; a forward that is traced knows nothing of what was
        given."""
        if forward is not None:
            return super().__call__(tensors, forward)
        with _giving(self.model, dict(zip(self.tree.names, tensors, strict=True))):
            return super().__call__(tensors)


@contextmanager
def _giving(model: nn.Module, named: Mapping[str, Tensor]) -> Iterator[None]:
    """The model is given these tensors for a while."""
    given = given_to(model)
    patches = {site: named.get(f"{PATCHES}{site}", x) for site, x in given.patches.items()}
    gift = Gift(named.get(LABELS), patches)
    given.gifts.append(gift)
    try:
        yield
    finally:
        given.gifts.remove(gift)


def given_nodes(call: GivenCall, program: Any) -> dict[str, fx.Node]:
    """The input of the exported graph that holds each tensor that was given, by name."""
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    names = zip(call.tree.names, program.graph_signature.user_inputs, strict=True)
    return {name: nodes[node] for name, node in names if name in call.extra}


def without_unused(call: GivenCall, onnx: Any) -> None:
    """Takes inputs from the file that were given and that no pass reads."""
    inputs = onnx.model.graph.inputs
    for value in [x for x in inputs if x.name in call.extra]:
        others = [x for x in inputs if x is not value]
        if all(measured_elsewhere(use.node, value, others) for use in list(value.uses())):
            inputs.remove(value)


def measured_elsewhere(node: Any, value: Any, others: Sequence[Any]) -> bool:
    """The node only takes one size of the value, and from now on takes it of other inputs: of one
    that has it, or as the sum of keys `past + new` less the new ones."""
    import onnx_ir

    if node.op_type != "Shape":
        return False
    size = str(value.shape[node.attributes["start"].as_int()])
    sizes = {str(n): (x, axis) for x in others for axis, n in enumerate(x.shape)}
    if size in sizes:
        found = _size(*sizes[size], node)
    else:
        sums = [(n, n.removeprefix(f"{size} + ")) for n in sizes if n.startswith(f"{size} + ")]
        both = next((pair for pair in sums if pair[1] in sizes), None)
        if both is None:
            return False
        parts = [_size(*sizes[n], node) for n in both]
        last = onnx_ir.node("Sub", parts)
        node.graph.insert_before(node, last)
        found = last.outputs[0]
    node.outputs[0].replace_all_uses_with(found)
    node.graph.remove(node, safe=True)
    return True


def _size(value: Any, axis: int, before: Any) -> Any:
    """One size of a value, `[1]`, by a new node."""
    import onnx_ir

    node = onnx_ir.node("Shape", [value], {"start": axis, "end": axis + 1})
    before.graph.insert_before(before, node)
    return node.outputs[0]
