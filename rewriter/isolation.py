"""Contexts in which a model runs and which leave no trace: mode, buffers, randomness, precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["COMPILED", "evaluating", "is_compiled", "kept_buffers", "precise", "seeded"]

COMPILED = "_compiled_call_impl"
"""Where a module has what `Module.compile` installed, which torch calls in its place."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode, afterwards each submodule in the mode that it was in."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


def is_compiled(module: nn.Module) -> bool:
    """True if this very module runs through `Module.compile`."""
    return module.__dict__.get(COMPILED) is not None


@contextlib.contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """What a call writes into buffers (a counter, a cache) is undone."""
    before = [(b, b._version, b.detach().clone()) for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version:
                    buffer.copy_(value)


@contextlib.contextmanager
def seeded(seed: int, devices: set[torch.device]) -> Iterator[None]:
    """Torch's random numbers start at `seed`, and are afterwards where they were."""
    cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def precise(dtype: torch.dtype) -> Iterator[None]:
    """Everything floating is computed in `dtype` or wider, also where the model asks for less.

    Models cast to float32 by name (`softmax(dtype=torch.float32)`, masks, rotary angles). In gold
    that would round, or fail on mixed dtypes. Autocast does nothing here. Random numbers are drawn
    in the dtype asked for, then widened, so that they are the numbers that the original draws.
    """
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(_Widen(dtype, default))
            yield
    finally:
        torch.set_default_dtype(default)


class _Widen(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
    """Replaces narrower floating dtypes that operators are asked for."""

    def __init__(self, dtype: torch.dtype, default: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch leaves it untyped
        self.dtype, self.default = dtype, default
        eps = torch.finfo(dtype).eps
        self.narrow = frozenset(d for d in _FLOATS if torch.finfo(d).eps > eps)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("dtype")
        if torch.Tag.nondeterministic_seeded in func.tags and _takes_dtype(func):
            # Asked for in the default dtype, which is wider now, or in that of a wider tensor.
            if asked in (None, self.dtype):
                kwargs["dtype"] = self.default
            result = func(*args, **kwargs)
            return result.to(self.dtype) if result.dtype in self.narrow else result
        if asked in self.narrow:
            kwargs["dtype"] = self.dtype
        result = func(*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default and result.dtype in self.narrow:
            return result.to(self.dtype)  # torch.tensor([...], dtype=torch.float32)
        return result


def _takes_dtype(func: Any) -> bool:
    return any(argument.name == "dtype" for argument in func._schema.arguments)
