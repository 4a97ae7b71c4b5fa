"""Where a comparison was made: what a reader needs to repeat it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

__all__ = ["environment_of"]


def environment_of(tensors: Sequence[Tensor], dtype: torch.dtype, seed: int) -> dict[str, str]:
    """Versions, the machine in words, and what the models ran with.

    Args:
        tensors: parameters and inputs; they say the device.
        dtype: the coarsest dtype that the original computes in.
        seed: of cotangents and of what the models draw.
    """
    devices = sorted({x.device.type for x in tensors}) or ["cpu"]
    found = {
        "rewriter": _version("rewriter"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "Python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "device": ", ".join(_device(kind) for kind in devices),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": str(seed),
    }
    return {name: value for name, value in found.items() if value}


def _device(kind: str) -> str:
    if kind == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"{kind} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
