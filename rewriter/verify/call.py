"""One run of one model: fresh copies of the inputs, outputs by path, gradients by name."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import InputError
from rewriter.isolation import evaluating, seeded
from rewriter.verify.leaves import Leaves, copied, leaves_of

__all__ = ["Call", "Run", "coarsest_dtype", "one_line"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Run:
    """What a model gave."""

    outputs: Leaves
    gradients: dict[str, Tensor | None]
    """By name of the parameter or `inputs.<path>`; None where the outputs do not depend on it."""


@dataclass(frozen=True)
class Call:
    """The arguments that every model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seed: int
    gradients: bool

    @classmethod
    def of(cls, inputs: Any, seed: int, gradients: bool) -> Call:
        """Read `inputs`: a mapping of keyword arguments, a tuple or list of arguments, or one
        tensor."""
        if isinstance(inputs, Mapping):
            return cls((), {str(name): value for name, value in inputs.items()}, seed, gradients)
        if isinstance(inputs, (tuple, list)):
            return cls(tuple(inputs), {}, seed, gradients)
        if isinstance(inputs, Tensor):
            return cls((inputs,), {}, seed, gradients)
        raise InputError(
            f"inputs of type {type(inputs).__name__} cannot be passed to a model: give a mapping "
            "of keyword arguments, a tuple of arguments, or one tensor"
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the arguments by path."""
        return leaves_of((*self.args, self.kwargs) if self.args else self.kwargs).tensors

    def run(self, module: nn.Module, dtype: torch.dtype | None = None) -> Run:
        """Call `module` in eval mode; floating inputs are cast to `dtype` if it is given."""
        wanted: dict[str, Tensor] = {}
        if self.gradients:
            wanted = {
                n: p
                for n, p in module.named_parameters()
                if p.requires_grad and p.is_floating_point()
            }

        def fresh(name: str, tensor: Tensor) -> Tensor:
            copy = tensor.detach().clone()
            if not tensor.is_floating_point():
                return copy
            copy = copy if dtype is None else copy.to(dtype)
            if self.gradients:
                wanted[f"inputs.{name}"] = copy.requires_grad_()
                copy = copy.clone()  # no leaf, so that the model may write into it
            return copy

        devices = {t.device for t in (*module.parameters(), *self.tensors.values())}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            stack.enter_context(evaluating(module))
            stack.enter_context(seeded(self.seed, devices))
            args, kwargs = copied(
                (self.args, self.kwargs), lambda path, t: fresh(_argument(path), t)
            )
            outputs = leaves_of(module(*args, **kwargs))
            gradients = self._gradients(outputs, wanted)
        values = {n: x.detach() if isinstance(x, Tensor) else x for n, x in outputs.values.items()}
        return Run(Leaves(values, outputs.unread), gradients)

    def _gradients(self, outputs: Leaves, wanted: dict[str, Tensor]) -> dict[str, Tensor | None]:
        ends = {n: x for n, x in outputs.tensors.items() if x.requires_grad}
        if not ends or not wanted:
            return dict.fromkeys(wanted)
        cotangents = [_cotangent(name, x, self.seed) for name, x in ends.items()]
        found = torch.autograd.grad(
            list(ends.values()), list(wanted.values()), cotangents, allow_unused=True
        )
        return dict(zip(wanted, found, strict=True))


def coarsest_dtype(module: nn.Module, inputs: Iterable[Tensor]) -> torch.dtype:
    """The dtype with the largest rounding among parameters (inputs, if there are none) and active
    autocast. It sets the floor of the error-ratio rule."""
    tensors: list[Tensor] = [p for p in module.parameters() if p.dtype in _FLOATS]
    tensors = tensors or [t for t in inputs if t.dtype in _FLOATS]
    dtypes = {t.dtype for t in tensors} or {torch.get_default_dtype()}
    for device in {t.device.type for t in tensors}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def one_line(error: Exception) -> str:
    """`ValueError: what happened`, one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _argument(path: str) -> str:
    """`1.attention_mask` -> `attention_mask`, `0.2` -> `2`: the path without the place in (args,
    kwargs)."""
    return path.split(".", 1)[1]


def _cotangent(name: str, like: Tensor, seed: int) -> Tensor:
    """Random sixteenths in [-2, 2]: exact in every dtype, so that all models see the same
    numbers."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    steps = torch.randint(-32, 33, like.shape, generator=generator)
    return (steps / 16).to(device=like.device, dtype=like.dtype)
