"""Runs the kernels for few queries: says when, in how many runs of keys, and starts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from rewriter.kernels.triton_codegen import KernelSpec
from rewriter.kernels.triton_decode_code import COMBINE, DECODE, DecodeSpec, decode_source, parts_of
from rewriter.kernels.triton_ranges import key_ranges
from rewriter.kernels.triton_source import launch
from rewriter.kernels.triton_tiles import FEW

__all__ = ["decode", "runs_of"]

_MOST_ROWS = 64
"""Queries of the heads that share keys, together."""
_LEAST_KEYS = 512
"""Keys of a run: fewer are not worth a second kernel."""
_INTERPRETED = 4
"""Processors that the interpreter is said to have."""


def decode(kernel: KernelSpec, named: Mapping[str, Tensor], numbers: Mapping[str, int]) -> bool:
    """Fills `o` if the call has few queries, and several heads that share keys or keys for several
    runs; says whether it has.

    Args:
        kernel: what the plain kernel would be made for.
        named: the tensors of the call, by what `Argument.of` calls them.
        numbers: B, H, G, L, M and the sizes of the spec.
    """
    rows = numbers["G"] * numbers["L"]
    if numbers["L"] > FEW or rows > _MOST_ROWS or kernel.lse or kernel.spec.dropout:
        return False
    q = named["q"]
    programs = numbers["B"] * numbers["H"] // numbers["G"]
    keys = kernel.tile.keys
    run = runs_of(programs, numbers["M"], keys, _processors(str(q.device)))
    split = run < numbers["M"] and _may_split(kernel)
    if not split and numbers["G"] == 1:
        return False
    tile = replace(kernel.tile, queries=max(16, 1 << (rows - 1).bit_length()))
    made = DecodeSpec(replace(kernel, tile=tile), split)
    source = decode_source(made)
    if not split:
        launch(source, DECODE, programs, named, numbers)
        return True
    runs = -(-numbers["M"] // run)
    parts, shape = parts_of(made), (runs, numbers["B"], numbers["H"], numbers["L"])
    named = {
        **named,
        "maxima": q.new_empty(shape, dtype=torch.float32),
        "sums": q.new_empty((len(parts.sums), *shape), dtype=torch.float32),
        "parts": q.new_empty((len(parts.values), *shape, parts.block), dtype=torch.float32),
    }
    numbers = {**numbers, "n_run": run, "n_s": runs}
    launch(source, DECODE, programs * runs, named, numbers)
    launch(source, COMBINE, numbers["B"] * numbers["H"], named, numbers)
    return True


def runs_of(programs: int, kv_len: int, tile: int, processors: int) -> int:
    """How many keys a run has, a multiple of a tile; `kv_len` or more for a single run.

    Args:
        programs: without runs.
        tile: keys of a tile.
        processors: how many programs run at the same time; twice as many are started.
    """
    wanted = max(1, min(2 * processors // programs, kv_len // _LEAST_KEYS))
    return -(-kv_len // (wanted * tile)) * tile


@lru_cache(maxsize=1024)
def _may_split(kernel: KernelSpec) -> bool:
    """A window is short: its keys are found by their bounds, in one run."""
    ranges = key_ranges(kernel.lowered[0].mask)
    return len(ranges) == 1 and not ranges[0].low


@lru_cache(maxsize=16)
def _processors(device: str) -> int:
    if not device.startswith("cuda"):
        return _INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count
