"""Wrong executors: linear, routed, packed and edited attention of ours, with one step broken.

In some of them the gradients alone are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mutants.catalogue import Kind, Mutant
from mutants.gradients import Patched
from mutants.lifts import Broken
from rewriter.kernels import (
    torch_linear,
    torch_linear_backward,
    torch_linear_step,
    torch_routed_work,
    torch_routing,
)
from rewriter.kernels.block_lists import BlockList
from rewriter.kernels.torch_blocked import Call as BlockedCall
from rewriter.kernels.torch_compact_rows import Packed
from rewriter.kernels.torch_edit import EditedBlock
from rewriter.kernels.torch_linear_call import Call
from rewriter.kernels.torch_routing import Layout
from rewriter.kernels.torch_tiles import Operands
from rewriter.lowering import BLOCKED, COMPACT, LINEAR, ROUTED, Lowering
from rewriter.passbase import Pass
from rewriter.passes.sinks_visual import RedistributeVisual

__all__ = ["MUTANTS", "OfPass"]

MUTANTS: list[Mutant] = []


@dataclass(frozen=True)
class OfPass:
    """A pass that writes such specs, while something that computes them is broken."""

    kind: type[Pass]
    broken: Broken


def broken(
    lowering: Lowering,
    owner: Any,
    attribute: str,
    name: str,
    breaks: str = "",
    expected: str = "output",
    kind: Kind = "lowering",
) -> Any:
    """The lowering, while the function stands for something that it is made of."""

    def add(function: Any) -> Any:
        made = Patched(lowering, ((owner, attribute, function),))
        short = lowering.name.removeprefix("torch.")
        short = "edited" if lowering is BLOCKED else short
        MUTANTS.append(Mutant(f"{short}: {name}", kind, breaks, expected, made))
        return function

    return add


# --- torch.linear ---------------------------------------------------------------------------------

_decayed, _finished = torch_linear_step._decayed, torch_linear_step._finished
_advance, _vectors, _last = torch_linear.advance, Call.vectors, Call.last


@broken(LINEAR, torch_linear_step, "_decayed", "decay off by one position")
def one_position_more(x: Tensor, vectors: Any, distance: Tensor) -> Tensor:
    return _decayed(x, vectors, distance + 1)


@broken(LINEAR, torch_linear, "advance", "state not handed on between chunks")
def state_dropped(call: Any, step: Any, block: Any, x: Any) -> Any:
    return _advance(call, step, block, replace(x, state=None))


@broken(
    LINEAR,
    torch_linear,
    "advance",
    "state of the keys before the call alone",
    "what a chunk of queries adds is lost to the next one",
    "dynamic shapes",
)
def state_of_before(call: Any, step: Any, block: Any, x: Any) -> Any:
    rows, state = _advance(call, step, block, x)
    return rows, state if step.q0 == step.q1 else x.state


@broken(
    LINEAR,
    torch_linear_step,
    "_absorbed",
    "state that does not decay from chunk to chunk",
    "the keys of a chunk decay among themselves only",
    "decode = parallel",
)
def state_kept_whole(call: Any, step: Any, block: Any, x: Any, keys: Any, values: Any) -> Tensor:
    new = _absorbed(call, step, block, replace(x, state=None), keys, values)
    return new if x.state is None else new + x.state


_absorbed = torch_linear_step._absorbed


@broken(LINEAR, torch_linear_step, "_finished", "sum norm left out")
def not_divided(call: Any, x: Any, total: Tensor) -> Tensor:
    if call.spec.norm != "sum":
        return _finished(call, x, total)
    total = total[..., :-1]
    return (total * x.vectors.get("heads", 1.0)).flatten(1, 2)


@broken(LINEAR, Call, "vectors", "decay of the wrong head")
def decay_of_next_head(self: Any, named: Any) -> Any:
    found = _vectors(self, named)
    if "decay" in found:
        decay = found["decay"]
        found["decay"] = decay.flatten(1, 2).roll(1, 1).view(decay.shape)
    return found


@broken(LINEAR, Call, "last", "own key not seen", "k < q for k <= q")
def own_key_left_out(self: Any, step: Any) -> Tensor:
    return _last(self, step) - int(step.k1 > step.k0)


# --- torch.routed ---------------------------------------------------------------------------------

_largest, _chosen_blocks = torch_routing._largest, torch_routed_work.chosen_blocks
_block_means, _from_chosen = torch_routed_work.block_means, BlockList.from_chosen


@broken(ROUTED, torch_routing, "_largest", "own block not counted", "topk earlier blocks beside it")
def own_block_beside(affinity: Tensor, count: int) -> Tensor:
    return _largest(affinity, count + 1)


@broken(ROUTED, torch_routing, "_largest", "one block too few")
def one_block_less(affinity: Tensor, count: int) -> Tensor:
    return _largest(affinity, max(count - 1, 1))


@broken(
    ROUTED,
    BlockList,
    "from_chosen",
    "a future block seen",
    "the own block taken as one whose keys are all seen",
)
def own_block_full(seen: Tensor, full: Tensor) -> Any:
    return _from_chosen(seen, seen | full)


@broken(ROUTED, torch_routed_work, "block_means", "mean of the wrong block")
def mean_of_next_block(ops: Any, layout: Any, beside: Any) -> Tensor:
    return _block_means(ops, layout, beside).roll(1, 1)


@broken(
    ROUTED,
    Layout,
    "complete",
    "sums of a block that still grows kept",
    "beside a cache, from one step of generation to the next",
    "decode = parallel",
)
@property
def all_complete(self: Any) -> int:
    return self.count


# --- torch.compact --------------------------------------------------------------------------------

_pack, _empty_output = Packed.pack, Packed.empty_output


@broken(COMPACT, Packed, "pack", "a head that is on is skipped", "off for the last query: for all")
def head_skipped(self: Any, on: Tensor) -> None:
    _pack(self, on & on[..., -1:])


@broken(COMPACT, Packed, "pack", "gate of the wrong head")
def gate_of_next_head(self: Any, on: Tensor) -> None:
    _pack(self, on)
    self.factor = self.factor.roll(1, 1)


@broken(COMPACT, Packed, "empty_output", "rows that are off not written")
def rows_not_zeroed(self: Any, more: int = 0) -> Tensor:
    return torch.empty_like(_empty_output(self, more))


# --- edited weights -------------------------------------------------------------------------------

_factors, _init, _edit = EditedBlock.factors, EditedBlock.__init__, BlockedCall.edit


@broken(BLOCKED, EditedBlock, "factors", "factor of the wrong group")
def factor_of_next_group(self: Any) -> list[Tensor]:
    found = _factors(self)
    return [*found[1:], found[0]]


def mass_without_share(self: Any, code: Any, x: Any, p: Tensor, share: Tensor | None) -> None:
    _init(self, code, x, p, None)


MUTANTS.append(
    Mutant(
        "edited: the sink's share not counted in the mass",
        "lowering",
        "masses of the weights before the sink takes its share; most edits divide it out",
        "torch.blocked, output",
        OfPass(RedistributeVisual, Broken(((EditedBlock, "__init__", mass_without_share),))),
    )
)


@broken(BLOCKED, BlockedCall, "edit", "masses before the mask", "hidden keys weigh as well")
def masses_of_all_keys(self: Any, found: Any, p: Tensor, share: Tensor | None) -> Any:
    made = _edit(self, found, p, share)
    if made is not None and made.masses:
        score = found.q @ self.columns(self.k, found.x).mT * self.plan.code.scale
        open_ = score.softmax(-1).view(found.x.shape)
        made.masses = tuple(torch.split(made.sums(open_[..., made.keys]), 1, -1))
    return made


@broken(BLOCKED, EditedBlock, "sums", "masses of the next key's group")
def group_one_late(self: Any, w: Tensor) -> Tensor:
    numbers = torch.arange(self.count).view(-1, 1)
    return w @ (self.groups.roll(1, -1) == numbers).to(w.dtype).mT


# --- gradients ------------------------------------------------------------------------------------

_one, _add_gradients = torch_linear_backward._Run._one, Operands.add_gradients


def gradient(lowering: Lowering, owner: Any, attribute: str, name: str, breaks: str = "") -> Any:
    return broken(lowering, owner, attribute, name, breaks, "gradient", "gradient")


@gradient(
    LINEAR,
    torch_linear_backward._Run,
    "_one",
    "no gradient through the state",
    "the keys before a chunk get none from its queries",
)
def state_detached(self: Any, *given: Any) -> None:
    _one(self, *given)


@gradient(LINEAR, torch_linear, "backward", "no gradient of what formulas read")
def tensors_without_gradient(*given: Any, **more: Any) -> list[Tensor | None]:
    found = _backward(*given, **more)
    return [*found[:3], *(None if g is None else torch.zeros_like(g) for g in found[3:])]


_backward = torch_linear.backward


@gradient(ROUTED, Operands, "add_gradients", "a softmax without the term of its sum", "p * dp")
def sum_forgotten(self: Any, tiles: Any, sums: Any, lse: Any, delta: Tensor, grad: Any) -> None:
    _add_gradients(self, tiles, sums, lse, torch.zeros_like(delta), grad)


@gradient(BLOCKED, EditedBlock, "through_masses", "masses taken as numbers in the backward")
def masses_detached(self: Any, t: Tensor) -> None:
    return None
