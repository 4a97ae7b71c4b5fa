"""Programs beside the attention: nodes that compute the tensors that a pass adds to a spec.

In a graph that runs, a program is one node that calls its function. In an exported graph it is
traced into the graph's own dialect, so that it can be written to a file.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rewriter.additions import NAME, addition, additions_of, given_to
from rewriter.beside import beside
from rewriter.capture import Captured
from rewriter.errors import InputError
from rewriter.frame import Lifted
from rewriter.reading import value_of
from rewriter.spec import TensorArg
from rewriter.stages import Parameter, Source, Tap
from rewriter.taps import Link, Tapped, input_of, link_of, residual_of

__all__ = ["Programs"]

aten = torch.ops.aten


class Programs:
    """Writes the programs of one site into its graph."""

    def __init__(
        self,
        captured: Captured,
        lifted: Lifted,
        model: nn.Module,
        call: Callable[[Any, tuple[Any, ...]], fx.Node],
        current: Callable[[fx.Node], fx.Node],
        operands: tuple[fx.Node, fx.Node, fx.Node],
    ) -> None:
        self.captured, self.lifted, self.model = captured, lifted, model
        self.call, self.current = call, current
        self.operands = dict(zip("qkv", operands, strict=True))
        self.link: Link | None = link_of(lifted)
        self.site = lifted.site.name

    def node(self, arg: TensorArg) -> fx.Node:
        """The node of a tensor that its source computes."""
        source = cast(Source, arg.source)
        taps = [self._tap(tap) for tap in source.taps]
        parameters = [self._parameter(arg.name, wanted) for wanted in source.parameters]
        if self.captured.is_exported:
            return self._of_keys(arg, self._traced(source, (*taps, *parameters)))
        if source.later is None:
            return self.call(self._program(arg.name, source), (*taps, *parameters))
        full, past = (
            (self.current(self.link.full), self.current(self.link.past))
            if self.link is not None
            else (self.operands["k"], None)
        )
        run = self._kept(arg)
        return self.call(run, (full, past, self.operands["k"], *taps, *parameters))

    def _of_keys(self, arg: TensorArg, value: fx.Node) -> fx.Node:
        """In an exported graph: what the prompt decides, for all its keys."""
        source = cast(Source, arg.source)
        if source.later is None:
            return value
        keys = self.operands["k"]
        if self.link is not None and statically_known_true(value_of(self.link.past).numel() != 0):
            return self._handed_on(f"{self.site}.{arg.name}", value, source.later)
        more = value_of(keys).shape[2] - value_of(value).shape[1]
        if statically_known_true(more == 0):
            return value
        sizes = (self.call(aten.sym_size.int, (x, d)) for x, d in ((keys, 2), (value, 1)))
        missing = self.call(operator.sub, tuple(sizes))
        return self.call(aten.constant_pad_nd.default, (value, [0, missing], source.later))

    def _handed_on(self, name: str, value: fx.Node, later: int) -> fx.Node:
        """In an exported graph with a cache: what earlier calls decided, and behind it the value of
        this call's keys, which is `later` unless they are the first."""
        captured, call = self.captured, self.call
        if captured.present is None:
            raise InputError(
                f"{self.site}: what a pass says of cached keys is decided with the prompt, and a "
                "file has no memory of it; export with state=True, or inputs without a cache"
            )
        batch, length = (call(aten.sym_size.int, (self.operands["q"], d)) for d in (0, 2))
        cached = call(operator.sub, (call(aten.sym_size.int, (self.operands["k"], 2)), length))
        past = captured.past.get(name) or call(aten.new_zeros.default, (value, [batch, cached]))
        new = call(aten.constant_pad_nd.default, (value, [0, length], later))
        new = call(aten.slice.Tensor, (new, 1, 0, length))
        is_first = call(aten.eq.Scalar, (call(aten.scalar_tensor.default, (cached,)), 0))
        new = call(aten.where.ScalarOther, (is_first, new, later))
        captured.present[name] = call(aten.cat.default, ([past, new], 1))
        return captured.present[name]

    # --- functions that run in the graph ----------------------------------------------------------

    def _program(self, name: str, source: Source) -> Callable[..., Tensor]:
        options, alive, term = dict(source.options), weakref.ref(self.model), f"{self.site}.{name}"

        def program(*args: Tensor) -> Tensor:
            model, device = cast(nn.Module, alive()), args[0].device.type
            if torch.is_autocast_enabled(device):  # routers and gates decide in full precision
                args = tuple(x.float() if x.is_floating_point() else x for x in args)
            with torch.autocast(device, enabled=False):
                if source.loss is not None and torch.is_grad_enabled() and model.training:
                    given_to(model).losses[term] = source.loss(*args, **options)
                return source.compute(*args, **options)

        return program

    def _kept(self, arg: TensorArg) -> Callable[..., Tensor]:
        """A program for keys, which runs with the prompt and is kept beside the cache."""
        name, source, dtype = arg.name, cast(Source, arg.source), getattr(torch, arg.dtype)
        run, site, later = self._program(name, source), self.site, source.later
        grows = self.link is not None

        def program(full: Tensor, past: Tensor | None, k: Tensor, *args: Tensor) -> Tensor:
            if _is_fake(full):
                return k.new_zeros((k.shape[0], k.shape[2]), dtype=dtype)
            taps = dict(zip(source.taps, args, strict=False))
            if not grows and any(
                taps[x].shape[1] < k.shape[2] for x in ("input", "residual") if x in taps
            ):
                raise InputError(
                    f"{site}: {name} is decided for the tokens of a call, and this cache does not "
                    "grow with them; use one that does, such as a dynamic cache"
                )
            memory = beside(full, past, (site, name), by_place=True)
            before = past is not None and past.numel() > 0
            if before:
                known = None if memory is None else memory.recall()
                if known is None:
                    raise InputError(
                        f"{site}: what {name} says of the cached keys is not known: this cache was "
                        "filled by another model, or reordered (beam search), cropped or cloned "
                        "since; run the prompt again with this model, with num_beams=1"
                    )
                value = known
                if "labels" in taps and bool(taps["labels"][:, known.shape[-1] :].any()):
                    raise InputError(
                        f"{site}: labels are read with the first call of a cache, which had "
                        f"{known.shape[-1]} tokens, and these name later ones; run the whole "
                        "prompt in one call"
                    )
            else:
                value = run(*args)
            more = k.shape[2] - value.shape[-1]
            value = torch.nn.functional.pad(value, (0, more), value=cast(int, later))
            if memory is not None:
                memory.keep(value)
            return value

        return program

    # --- what they read ---------------------------------------------------------------------------

    def _tap(self, tap: Tap) -> fx.Node:
        if tap in self.operands:
            return self.operands[tap]
        if tap in ("input", "residual"):
            find = input_of if tap == "input" else residual_of
            found = find(self.lifted, self.captured)
            if found is None:
                raise InputError(f"{self.site}: its {tap} was not found in the graph")
            return self._rows(found)
        return self._given(tap)

    def _rows(self, found: Tapped) -> fx.Node:
        """The node as `[B, L, C]`."""
        node = self.current(found.node)
        if found.is_transposed:
            return self.call(aten.transpose.int, (node, 0, 1))
        if value_of(node).dim() == 3:
            return node
        batch = self.call(aten.sym_size.int, (self.operands["q"], 0))
        return self.call(aten.reshape.default, (node, [batch, -1, found.dim]))

    def _given(self, tap: str) -> fx.Node:
        if self.captured.is_exported:
            return self._input(tap)
        alive, site = weakref.ref(self.model), self.site

        def given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            model = cast(nn.Module, alive())
            if tap == "labels":
                return _labels(given_to(model).labels, k, site)
            return _patch(given_to(model).patches.get(site), q, v, site)

        return self.call(given, tuple(self.operands.values()))

    def _input(self, tap: str) -> fx.Node:
        """The input of an exported graph that holds what the user gives."""
        node = self.captured.given.get(tap if tap == "labels" else f"patches.{self.site}")
        if node is not None:
            return node
        if tap == "labels":
            raise InputError(_no_labels(self.site))
        raise InputError(_no_patch(self.site))

    def _parameter(self, tensor: str, wanted: Parameter) -> fx.Node:
        like = value_of(self.operands["q"])
        path = addition(self.model, f"{self.site}.{tensor}", wanted, like.dtype, like.device)
        node = self.captured.parameter(path)
        if node is not None:
            return node
        # The holder itself goes into the graph, so that a replaced parameter is seen.
        self.captured.module.add_module(NAME, cast(nn.Module, additions_of(self.model)))
        node = self.captured.graph.get_attr(path)
        mode = self.captured.fake_mode
        with torch.no_grad():
            value = self.captured.module.get_parameter(path) if wanted.trained else None
            real = value if value is not None else self.captured.module.get_buffer(path)
            node.meta["val"] = real if mode is None else mode.from_tensor(real.detach())
        return node

    def _traced(self, source: Source, args: Sequence[fx.Node]) -> fx.Node:
        """The program as nodes of the graph's own dialect."""
        options = dict(source.options)
        values = [value_of(x) for x in args]

        def compute(*given: Tensor) -> Tensor:
            return source.compute(*given, **options)

        body = make_fx(compute, tracing_mode="fake", pre_dispatch=True)(*values)
        nodes: dict[fx.Node, Any] = {}
        inputs = iter(args)
        result: Any = None
        for node in body.graph.nodes:
            if node.op == "placeholder":
                nodes[node] = next(inputs)
            elif node.op == "output":
                result = nodes[node.args[0]]
            elif node.op == "get_attr":
                name = f"_{source.compute.__name__}_{len(self.captured.graph.nodes)}"
                value = getattr(body, cast(str, node.target))
                self.captured.module.register_buffer(name, value, persistent=False)
                nodes[node] = self.captured.graph.get_attr(name)
                nodes[node].meta["val"] = value
            else:
                nodes[node] = self.captured.graph.node_copy(node, lambda n: nodes[n])
        return cast(fx.Node, result)


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor)


def _no_labels(site: str) -> str:
    return (
        f"{site}: the labels of the tokens are not known (which of them are an image, say); give "
        "them first: rewriter.give(model, labels=...)"
    )


def _no_patch(site: str) -> str:
    return (
        f"{site}: its head outputs of another run were not given; give them first: rewriter.give("
        "model, patches=rewriter.head_outputs(model, other_inputs))"
    )


def _labels(labels: Tensor | None, k: Tensor, site: str) -> Tensor:
    if _is_fake(k):
        return k.new_zeros((k.shape[0], k.shape[2]), dtype=torch.int64)
    if labels is None:
        raise InputError(_no_labels(site))
    batch, keys = k.shape[0], k.shape[2]
    if labels.shape[0] not in (1, batch) or labels.shape[1] > keys:
        raise InputError(
            f"{site}: labels of shape {tuple(labels.shape)} were given, and the prompt has {batch} "
            f"rows of {keys} tokens; give labels [B, M] of the prompt, or spans inside it"
        )
    return labels.to(k.device).expand(batch, -1)


def _patch(patch: Tensor | None, q: Tensor, v: Tensor, site: str) -> Tensor:
    shape = (*q.shape[:3], v.shape[3])
    if _is_fake(q):
        return q.new_zeros(shape)
    if patch is None:
        raise InputError(_no_patch(site))
    if tuple(patch.shape) != shape:
        raise InputError(
            f"{site}: head outputs of shape {tuple(patch.shape)} were given for a call whose heads "
            f"give {shape}"
        )
    return patch.to(q.device)
