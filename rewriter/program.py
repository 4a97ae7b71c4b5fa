"""A call of a model as an exported program: a function of named tensors of symbolic sizes."""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture import uncompiled
from rewriter.errors import ExportError, InputError
from rewriter.logs import logging_at
from rewriter.optimize import call_arguments
from rewriter.runtime import reason_of, resized
from rewriter.trees import Tree, flatten

__all__ = [
    "Call",
    "axis_names",
    "broken_guard",
    "inference",
    "length_axis",
    "program_of",
    "quiet",
    "shapes_of",
    "widened",
]


class Call:
    """A model and one set of arguments for it, as named tensors."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        args, kwargs = call_arguments(inputs)
        names = list(inspect.signature(model.forward).parameters)
        names += [f"input_{i}" for i in range(len(names), len(args))]
        named = dict(zip(names, args, strict=False)) | kwargs
        self.count = len(args)
        self.tree: Tree = flatten(named)
        self.extra: dict[str, tuple[int, ...]] = {}
        """Tensors behind those of the arguments, which the model does not take, and the axes of
        each that may change."""
        self.as_long: dict[str, int] = {}
        """Those of them that are as long as the tokens of the call, along this axis."""
        self.as_past: dict[str, int] = {}
        """Those of them that are as long as a cache, along this axis."""
        if not self.tree.tensors:
            raise InputError("the inputs hold no tensor; give what one call of the model takes")

    def __call__(
        self, tensors: Sequence[Tensor], forward: Callable[..., Any] | None = None
    ) -> Tree:
        """The outputs of the model on these tensors."""
        values = list(self.tree.build(tensors).items())
        args = [value for _, value in values[: self.count]]
        return flatten((forward or self.model)(*args, **dict(values[self.count :])))

    def tokens(self, name: str, x: Tensor) -> int:
        """The axis of tokens of a tensor, else 0."""
        return (*self.extra[name], 0, 0)[1] if name in self.extra else length_axis(name, x)

    def handed_on(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Further outputs of the graph, by name, which stand for what is yet to be written."""
        return {}

    def outputs(self, tree: Tree) -> tuple[str, ...]:
        """Names for outputs: what continues an input `past...` is `present...`; all differ."""
        names: list[str] = []
        for name in tree.names:
            root, *rest = name.split(".")
            root = (
                "present"
                if root.startswith("past")
                else f"output_{root}"
                if root.isdigit()
                else root
            )
            name = ".".join([root, *rest])
            names.append(
                name if name not in self.tree.names and name not in names else f"{name}.out"
            )
        return tuple(names)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; the mode of each module comes back."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while, and no compiled call; then the instance is as before."""
    before = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    try:
        with uncompiled(model):
            yield
    finally:
        del model.__dict__["forward"]
        if before is not None:
            model.__dict__["forward"] = before


def widened(call: Call) -> Sequence[Tensor]:
    """The example with two rows and two tokens where it has one; torch takes a 1 for a constant."""
    tensors = call.tree.tensors
    rows = next((x.shape[0] for x in tensors if x.ndim), 0)

    axes = [call.tokens(name, x) for name, x in zip(call.tree.names, tensors, strict=True)]

    def grown(batch: bool, lengths: bool) -> list[Tensor]:
        result = []
        for x, length in zip(tensors, axes, strict=True):
            double = {0} if batch and x.ndim and x.shape[0] == rows else set()
            double |= {length} if lengths and length else set()
            result.append(
                resized(x, [n * 2 if axis in double else n for axis, n in enumerate(x.shape)])
            )
        return result

    short = any(axis and x.shape[axis] == 1 for axis, x in zip(axes, tensors, strict=True))
    for batch, lengths in ((rows == 1, short), (rows == 1, False), (False, short)):
        if batch or lengths:
            candidate = grown(batch, lengths)
            try:
                with uncompiled(call.model):
                    call(candidate)
            except Exception:  # the model alone knows what it takes
                continue
            return candidate
    return tensors


def length_axis(name: str, x: Tensor) -> int:
    """The axis of tokens, else 0: tokens [B, L], features [B, L, E], caches [B, H, L, D], positions
    of several axes [., B, L]."""
    if "." in name:
        return x.ndim - 2 if x.ndim > 2 else 0
    if x.ndim == 2 and not x.is_floating_point():
        return 1
    return (1 if x.is_floating_point() else 2) if x.ndim == 3 else 0


def program_of(call: Call, example: Sequence[Tensor], dynamic: bool) -> tuple[Any, tuple[str, ...]]:
    """The exported program of the model over flat tensors, and the names of its outputs."""
    outputs: list[str] = []

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        if dynamic:
            _tie(call, tensors, example)
        tree = call(tensors, original)
        more = call.handed_on(tensors)
        outputs[:] = [*call.outputs(tree), *more]
        return (*tree.tensors, *more.values())

    names = [re.sub(r"\W", "_", n) for n in call.tree.names]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, positional) for n in names])  # type: ignore[attr-defined]
    original = call.model.forward
    shapes = _may_change(call, example) if dynamic else None
    # of a view, as a model leaves them in its cache, torch.export looks at the whole
    example = [x.detach().clone() if x._is_view() else x for x in example]
    with _forward(call.model, forward), quiet():
        try:
            program = torch.export.export(
                call.model, tuple(example), dynamic_shapes=shapes, strict=False
            )
        except Exception as error:
            raise ExportError(
                f"torch.export cannot trace {type(call.model).__name__}: {reason_of(error)}; "
                "try dynamic=False, or inputs with other sizes"
            ) from error
    return program, tuple(outputs)


def _may_change(call: Call, example: Sequence[Tensor]) -> tuple[dict[int, Any], ...]:
    """The axes that torch may leave open: all, but of images and videos the batch alone.

    Sizes of images go through so much division that tracing them takes minutes.
    """
    found = []
    for name, x in zip(call.tree.names, example, strict=True):
        axes = range(1) if x.ndim > 3 and "." not in name else range(x.ndim)
        found.append(dict.fromkeys(call.extra.get(name, axes), torch.export.Dim.AUTO))
    return tuple(found)


def _tie(call: Call, tensors: Sequence[Tensor], example: Sequence[Tensor]) -> None:
    """Tells torch which sizes are one: rows, axes of one argument, and keys = past + new."""
    check: Any = torch._check
    first: dict[Any, Tensor] = {}
    names = zip(call.tree.names, call.tree.roots, tensors, example, strict=True)
    for name, root, x, given in names:
        for axis, size in enumerate(given.shape):
            if axis not in call.extra.get(name, (axis,)):  # fixed
                continue
            key = ("rows", size) if axis == 0 else (root, x.ndim, axis, size)
            check(first.setdefault(key, x).shape[axis] == x.shape[axis])
    nested: list[tuple[Any, int]] = []
    plain: list[tuple[Any, int]] = []
    for name, x, given in zip(call.tree.names, tensors, example, strict=True):
        if name in call.extra:
            if name in call.as_long:
                check(plain[0][0] == x.shape[call.as_long[name]])
            if name in call.as_past:
                check(nested[0][0] == x.shape[call.as_past[name]])
            continue
        axis = length_axis(name, given)
        if axis:
            (nested if "." in name else plain).append((x.shape[axis], given.shape[axis]))
    for (past, past_size), (new, size), (keys, keys_size) in itertools.product(
        nested[:1], plain, plain
    ):
        if keys_size == past_size + size:
            check(keys == past + new)


def shapes_of(program: Any) -> list[tuple[Any, ...]]:
    """The shape of each input in the graph, with symbols."""
    user = program.graph_signature.user_inputs
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    return [tuple(nodes[name].meta["val"].shape) for name in user]


def broken_guard(program: Any, tensors: Sequence[Tensor]) -> str:
    """What torch assumed of sizes while it traced and these tensors break; empty if nothing."""
    guards = getattr(program.module(), "_guards_fn", None)
    try:
        if guards is not None:
            guards(*tensors)
    except AssertionError as error:
        return str(error).removeprefix("Guard failed: ")
    return ""


def axis_names(tree: Tree, shapes: Sequence[Sequence[Any]]) -> dict[str, str]:
    """A name that a person understands for each symbol of the graph."""
    names: dict[str, str] = {}
    for root, shape in zip(tree.roots, shapes, strict=True):
        for axis, size in enumerate(shape):
            symbol = str(size)
            if isinstance(size, int) or symbol in names or not symbol.isidentifier():
                continue
            names[symbol] = _free(_axis_name(root, axis, len(shape)), root, axis, names.values())
    return names


def _axis_name(root: str, axis: int, rank: int) -> str:
    if axis == 0:
        return "batch"
    if root.startswith("past") and axis == rank - 2:
        return "past_blocks" if root == "past_state" else "past_length"
    return "length" if axis == 1 and rank in (2, 3) else f"{root}_{axis}"


def _free(name: str, root: str, axis: int, taken: Any) -> str:
    numbered = (f"{root}_{name}_{i}" for i in itertools.count(axis))
    return next(x for x in itertools.chain((name, f"{root}_{name}"), numbered) if x not in taken)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the exporters, which name nothing that a user can change."""
    with logging_at("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
