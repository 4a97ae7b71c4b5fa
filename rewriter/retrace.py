"""Running Dynamo's graph while torch traces it to ATen; what was traced once is not traced again.

Layers repeat each other: the same functions of tensors of the same kind, on other tensors. Torch's
tracer runs each of them on fake tensors with symbolic sizes, which takes milliseconds. Here the
first one is traced, and for those after it the same ATen nodes are written again. Two calls are the
same if function, literals, symbolic sizes and modes are equal, and their tensors in shape, strides,
dtype, device and whatever else a trace can depend on. What writes to memory, changes a mode,
depends on the values of tensors or is not torch's own code is traced each time.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewriter.recompute import enter, leave, mark, recomputed
from rewriter.transforms import flat, grouped, transformed

__all__ = ["Tracing"]

aten = torch.ops.aten

_TOLD = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom", "recompute")
"""What a node knows from the call that it was traced from."""
_OF_VALUE = ("val", "tensor_meta")

_ONE_NODE = ("autograd_function_apply", "associative_scan", "scan", "while_loop", "map_impl")

_HELD = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_FORMATS = (torch.memory_format, type(Ellipsis))


class _Other(Exception):
    """A call that is not repeated from memory."""


@dataclass(eq=False)
class _Repeated:
    """The result of a call that was not traced: a node, and a tensor of its kind. It becomes a
    tensor of its own where one is needed."""

    like: Tensor
    kind: int
    node: fx.Node
    real: Tensor | None = None


@dataclass
class _Recipe:
    """What a call left in the graph."""

    sources: list[fx.Node]
    """The nodes of its tensors, in the order in which they occur."""
    nodes: list[fx.Node]
    result: Any
    """As the call gave it, with `_Source` and `_Made` in the place of tensors."""
    moved: list[tuple[int, fx.Node]]
    """Sources that are the result of another node from now on: torch gives a tensor itself for the
    cast to its own dtype, and traces a node."""


@dataclass(frozen=True)
class _Source:
    position: int


@dataclass(frozen=True, eq=False)
class _Made:
    node: fx.Node
    like: Tensor
    kind: int


@dataclass
class _Call:
    """A call that may be the repetition of another one."""

    key: tuple[Any, ...]
    values: list[Any] = field(default_factory=list)
    """Its tensors, each once."""


class Tracing(fx.Interpreter):
    """Runs a graph inside `make_fx`. Regions that are recomputed are opened; autograd functions of
    the model, scans and loops stay one node.

    Tracing through an autograd function would record its forward alone, and lose its own backward.
    """

    def __init__(self, gm: fx.GraphModule, repeats: bool = True) -> None:
        """
        Args:
            repeats: calls that repeat an earlier one are not traced again.
        """
        super().__init__(grouped(gm))
        self.repeats = repeats
        self.traced = self.repeated = 0
        self._recipes: dict[tuple[Any, ...], _Recipe | None] = {}
        self._kinds: dict[tuple[Any, ...], int] = {}
        self._modes = _modes()

    def run_node(self, n: fx.Node) -> Any:
        if not self.repeats or n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        if n.target is operator.getitem and type(found := self._element(n)) is _Repeated:
            return found
        try:
            call = self._call(n)
        except _Other:
            return self._traced(n)
        if call.key not in self._recipes:
            return self._recorded(n, call)
        recipe = self._recipes[call.key]
        return self._again(n, call, recipe) if recipe is not None else self._traced(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return super().fetch_args_kwargs_from_env(n) if not self.repeats else self._fetched(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is recomputed:
            mark(_tracer(), enter, args[0], kwargs)
            out = Tracing(args[0], self.repeats).run(*args[1:])
            mark(_tracer(), leave, args[0], {})
            return out
        if target is transformed:
            return Tracing(flat(args[0], args[1:]), repeats=False).run(*args[1:])
        if getattr(target, "__name__", "") not in _ONE_NODE:
            return super().call_function(target, args, kwargs)
        leaves, form = tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor | torch.SymInt)]
        inputs = [leaves[i] for i in places]
        rest = [None if i in places else x for i, x in enumerate(leaves)]

        def one_node(*inputs: Any) -> Any:
            given = list(rest)
            for i, x in zip(places, inputs, strict=True):
                given[i] = x
            own_args, own_kwargs = tree_unflatten(given, form)
            return target(*own_args, **own_kwargs)

        mode = cast(Any, get_proxy_mode())
        with disable_proxy_modes_tracing():
            out = one_node(*inputs)
        proxies = [mode.tracer.unwrap_proxy(x) for x in inputs]
        node = mode.tracer.create_proxy("call_function", one_node, tuple(proxies), {})
        return track_tensor_tree(out, node, constant=None, tracer=mode.tracer)

    # --- tensors ----------------------------------------------------------------------------------

    def _fetched(self, n: fx.Node) -> Any:
        """The arguments of a node, all tensors of their own; results of the graph may be nodes."""
        made = self._made_proxy if n.op == "output" else self._made_real
        return fx.map_arg((n.args, n.kwargs), lambda x: made(self.env[x]))

    def _made_real(self, value: Any) -> Any:
        if type(value) is _Repeated:
            return self._own(value)
        if type(value) in (tuple, list):
            return type(value)(self._made_real(x) for x in value)
        return value

    def _made_proxy(self, value: Any) -> Any:
        if type(value) is _Repeated and value.real is None:
            return fx.Proxy(value.node, _tracer())
        return self._made_real(value)

    def _own(self, value: _Repeated) -> Tensor:
        """A tensor that torch's tracer takes for the result of the node."""
        if value.real is None:
            like = value.like
            with (
                disable_proxy_modes_tracing(),
                torch._C.DisableTorchFunction(),
                torch.set_grad_enabled(like.requires_grad),
            ):
                real = like.view_as(like)  # no leaf, where it wants a gradient
            proxy = fx.Proxy(value.node, _tracer())
            track_tensor_tree(real, proxy, constant=None, tracer=_tracer())
            value.real = real
        return value.real

    def _element(self, n: fx.Node) -> Any:
        """What a node picks from several results."""
        source, index = cast(Any, n.args)
        values: Any = self.env[source] if isinstance(source, fx.Node) else None
        if type(values) in (tuple, list) and type(index) is int:
            return values[index]
        return None

    # --- which calls are the same -----------------------------------------------------------------

    def _call(self, n: fx.Node) -> _Call:
        """
        Raises:
            _Other: if it cannot be told which calls repeat this one.
        """
        if n.op == "call_function" and not _is_torch(n.target):
            raise _Other
        call = _Call(())
        target = (n.op, n.target)
        parts = (self._part(n.args, call.values), self._part(n.kwargs, call.values))
        call.key = (target, parts, self._modes)
        return call

    def _part(self, arg: Any, values: list[Any]) -> Any:
        """An argument as a part of a key; its tensors are added to `values`."""
        if isinstance(arg, fx.Node):
            arg = self.env[arg]
        kind = type(arg)
        if kind is _Repeated or isinstance(arg, Tensor):
            for position, value in enumerate(values):
                if value is arg:
                    return "same", position
            values.append(arg)
            return "tensor", arg.kind if kind is _Repeated else self._kind(arg)
        if isinstance(arg, tuple | list):
            return kind, *(self._part(x, values) for x in arg)
        if isinstance(arg, Mapping):
            return kind, *((k, self._part(x, values)) for k, x in arg.items())
        if kind is slice:
            return kind, *(self._part(x, values) for x in (arg.start, arg.stop, arg.step))
        if kind is torch.SymInt:
            return kind, arg.node.expr
        if kind in _HELD:
            return kind, repr(arg) if kind is float else arg
        if kind in _FORMATS:
            return kind, str(arg)
        raise _Other

    def _kind(self, x: Tensor) -> int:
        """A number for everything that a trace can depend on."""
        if type(x) not in (FakeTensor, nn.Parameter) or x.layout != torch.strided:
            raise _Other
        slot = get_proxy_slot(x, _tracer(), cast(Any, None))
        known = (
            (x.constant, slot.constant) if slot is not None and isinstance(x, FakeTensor) else ()
        )
        if not known or any(c is not None and c.numel() for c in known):
            raise _Other
        key = (
            *(_expr(n) for n in (*x.shape, *x.stride(), x.storage_offset())),
            (x.dim(), x.dtype, x.device, x.requires_grad, isinstance(x, nn.Parameter)),
            (x.is_conj(), x.is_neg(), x.is_inference()),
        )
        return self._kinds.setdefault(key, len(self._kinds))

    # --- tracing once, writing again --------------------------------------------------------------

    def _traced(self, n: fx.Node) -> Any:
        self.traced += 1
        result = super().run_node(n)
        self._modes = _modes()  # what is not traced changes none
        return result

    def _recorded(self, n: fx.Node, call: _Call) -> Any:
        """The result of a call that is traced, and its recipe for later."""
        own = [self._made_real(x) for x in call.values]
        sources = [_node_of(x) for x in own]
        last = next(iter(reversed(_tracer().graph.nodes)))
        modes = self._modes
        result = self._traced(n)
        new = []
        while (last := last.next).op != "root":
            # Constants and numbers are those of the first call: equal symbols have equal values.
            if last.op != "get_attr" and not isinstance(last.meta.get("val"), _SYMBOLIC):
                new.append(last)
        known = {*new, *sources}
        recipe = None
        if (
            modes == self._modes  # what changes a mode does so each time
            and len({*sources}) == len(sources)
            and all(_can_repeat(x, known) for x in new)
        ):
            with suppress(_Other):
                moved = [(i, x) for i, x in enumerate(map(_node_of, own)) if x is not sources[i]]
                form = self._form(result, own, {*new})
                recipe = _Recipe(sources, new, form, moved) if new or own else None
        self._recipes[call.key] = recipe
        return result

    def _form(self, result: Any, own: Sequence[Tensor], nodes: set[fx.Node]) -> Any:
        if isinstance(result, Tensor):
            for position, source in enumerate(own):
                if result is source:
                    return _Source(position)
            node = _node_of(result)
            if node not in nodes:
                raise _Other
            return _Made(node, result, self._kind(result))
        if type(result) in (tuple, list):
            return type(result)(self._form(x, own, nodes) for x in result)
        raise _Other

    def _again(self, n: fx.Node, call: _Call, recipe: _Recipe) -> Any:
        """The result of a call whose nodes are written without tracing it."""
        self.repeated += 1
        tracer = _tracer()
        now = dict(zip(recipe.sources, map(_node_of, call.values), strict=True))
        told = {name: n.meta[name] for name in _TOLD if name in n.meta}
        for node in recipe.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: now.get(x, x))
            made = tracer.graph.call_function(node.target, args, kwargs)
            made.meta = told | {name: node.meta[name] for name in _OF_VALUE if name in node.meta}
            now[node] = made
        for position, node in recipe.moved:
            value = call.values[position]
            if type(value) is _Repeated and value.real is None:
                value.node = now[node]
            else:
                real = value.real if type(value) is _Repeated else value
                proxy = fx.Proxy(now[node], tracer)
                track_tensor_tree(real, proxy, constant=None, tracer=tracer)

        def result(form: Any) -> Any:
            if type(form) is _Source:
                return call.values[form.position]
            if type(form) is _Made:
                return _Repeated(form.like, form.kind, now[form.node])
            return type(form)(result(x) for x in form)

        return result(recipe.result)


def _tracer() -> Any:
    return cast(Any, get_proxy_mode()).tracer


def _node_of(value: Any) -> fx.Node:
    """The node that computes a tensor; after an operation in place, the node of that."""
    if type(value) is _Repeated:
        if value.real is None:
            return value.node
        value = value.real
    return cast(fx.Node, cast(Any, get_proxy_slot(value, _tracer())).proxy.node)


def _can_repeat(node: fx.Node, known: set[fx.Node]) -> bool:
    """A node computes values from the call's tensors, from integers, and from nothing else."""
    if node.op != "call_function":
        return False
    if any(
        x not in known and x.op != "get_attr" and not isinstance(x.meta.get("val"), _SYMBOLIC)
        for x in node.all_input_nodes
    ):
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.is_mutable and not _is_new_constant(node):
        return False
    by_value = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return not any(tag in node.target.tags for tag in by_value)


def _is_new_constant(node: fx.Node) -> bool:
    """What `torch.tensor` ends with: a copy that was made just now is detached in place."""
    copy = cast(fx.Node, node.args[0]).target
    return node.target is aten.detach_.default and copy is aten.lift_fresh_copy.default


def _is_torch(target: Any) -> bool:
    """Torch's own code, or an operator of Python."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True
    module = str(getattr(target, "__module__", None) or "")
    if module.partition(".")[0] in ("torch", "_operator"):
        return True
    return type(target).__name__ in ("builtin_function_or_method", "method_descriptor")


def _modes() -> tuple[Any, ...]:
    """What a call depends on besides its arguments."""
    kinds = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._functorch.maybe_current_level(),
        *((torch.is_autocast_enabled(x), torch.get_autocast_dtype(x)) for x in kinds),
    )


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
