"""Wrong lowerings: one step of an honest one is replaced, or something is done around one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mutants.catalogue import Mutant
from mutants.toy import Toy, lowering_of
from rewriter.spec import SoftmaxSpec

__all__ = ["HONEST", "MUTANTS"]

HONEST = lowering_of(Toy())
MUTANTS: list[Mutant] = []


def step(method: str, name: str, breaks: str = "", expected: str = "output") -> Any:
    """A `Toy` in which the function takes the place of a step."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        kind = type(function.__name__, (Toy,), {method: function})
        MUTANTS.append(Mutant(name, "lowering", breaks, expected, lowering_of(kind())))
        return function

    return add


# --- operands -------------------------------------------------------------------------------------


@step("repeated", "query heads interleaved", "head h reads key head h % Hkv (some ports stride)")
def interleaved(toy: Toy, x: Tensor, heads: int) -> Tensor:
    return x.repeat(1, heads // x.shape[1], 1, 1)


@step("inputs", "keys used as values")
def keys_as_values(toy: Toy, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q, k, k if k.shape == v.shape else v


@step("inputs", "values of another row of the batch")
def values_of_another_row(toy: Toy, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q, k, v.roll(1, 0)


@step("inputs", "values of another head")
def values_of_another_head(toy: Toy, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q, k, v.roll(1, 1)


@step("inputs", "queries and keys swapped", "scores transposed, where there are as many of both")
def swapped(toy: Toy, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (k, q, v) if q.shape == k.shape else (q, k, v)


def packed(x: Tensor) -> Tensor:
    """The memory of x read as if it were contiguous."""
    end = x.storage_offset() + x.numel()
    if x.is_contiguous() or end > x.untyped_storage().nbytes() // x.element_size():
        return x
    strides, step_ = [], 1
    for n in reversed(x.shape):
        strides.insert(0, step_)
        step_ *= n
    return x.as_strided(x.shape, strides)


@step("inputs", "strides ignored", "a kernel that takes its inputs as contiguous", "output")
def strides_ignored(toy: Toy, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return packed(q), packed(k), packed(v)


@step("inputs", "strides of the values taken from the keys", "one set of strides for both")
def strides_of_keys(toy: Toy, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    room = v.untyped_storage().nbytes() // v.element_size() - v.storage_offset()
    last = sum((n - 1) * s for n, s in zip(v.shape, k.stride(), strict=True)) + 1
    return q, k, v.as_strided(v.shape, k.stride()) if last <= room else v


@step("inputs", "head dim padded with garbage", "D = 60 in tiles of 64, loaded without a mask")
def padded_with_garbage(toy: Toy, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    more = -q.shape[3] % 16
    beyond = [torch.cat([x, x[..., :more].roll(1, 2)], dim=-1) for x in (q, k)]
    return beyond[0], beyond[1], v


@step("inputs", "head dim cut to 64", "a kernel with one tile of D")
def head_dim_cut(toy: Toy, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q[..., :64], k[..., :64], v


@step("cast", "queries and keys in bfloat16", "a product on tensor cores without being asked")
def products_in_bf16(toy: Toy, x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(toy.wide)


@step(
    "cast", "queries written in place", "the scale is multiplied into the caller's tensor", "output"
)
def scaled_in_place(toy: Toy, x: Tensor) -> Tensor:
    if x.dtype == toy.wide and x.data_ptr() and not hasattr(toy, "done"):
        return x.mul_(1.0001).to(toy.wide)
    return x.to(toy.wide)


@step("tensors", "tensors in the wrong order")
def wrong_order(toy: Toy, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    names = [t.name for t in toy.spec.tensors]
    kinds = [(x.dim(), x.shape) for x in tensors]
    if len(names) < 2 or kinds[0] != kinds[1]:
        return dict(zip(names, tensors, strict=True))
    return dict(zip(names, [tensors[1], tensors[0], *tensors[2:]], strict=True))


@step(
    "tensors", "tensors of the first row of the batch", "the second row reads the first's padding"
)
def tensors_of_first_row(toy: Toy, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    found = [x[:1].expand(x.shape) if x.dim() > 1 else x for x in tensors]
    return dict(zip((t.name for t in toy.spec.tensors), found, strict=True))


@step("sizes", "integers handed over are ignored", "0 for the length of a cache")
def sizes_ignored(toy: Toy, sizes: Sequence[int]) -> Sequence[int]:
    return [0 for _ in sizes]


# --- cutting --------------------------------------------------------------------------------------


@step(
    "cuts",
    "last partial block of keys dropped",
    "floor(M / block) blocks",
)
def partial_block_dropped(toy: Toy, q_len: int, kv_len: int) -> Iterator[tuple[int, int]]:
    for start in range(0, max(1, kv_len // toy.block) * toy.block, toy.block):
        yield start, min(start + toy.block, kv_len)


@step("cuts", "last block moved back", "keys at a ragged end are counted twice")
def last_block_moved(toy: Toy, q_len: int, kv_len: int) -> Iterator[tuple[int, int]]:
    for start in range(0, kv_len, toy.block):
        start = max(0, min(start, kv_len - toy.block))
        yield start, min(start + toy.block, kv_len)


@step("cuts", "blocks up to the number of queries", "the keys of a cache are left out")
def blocks_of_queries(toy: Toy, q_len: int, kv_len: int) -> Iterator[tuple[int, int]]:
    for start in range(0, min(q_len, kv_len), toy.block):
        yield start, min(start + toy.block, kv_len)


@step("cuts", "only the first 128 keys", "a loop with a fixed count")
def at_most_128(toy: Toy, q_len: int, kv_len: int) -> Iterator[tuple[int, int]]:
    for start in range(0, min(kv_len, 128), toy.block):
        yield start, min(start + toy.block, kv_len)


@step("places", "key positions restart in every block")
def places_restart(toy: Toy, start: int, stop: int) -> Tensor:
    return torch.arange(stop - start)


@step(
    "places", "positions counted from 1 after the first block", "an off-by-one in the second tile"
)
def places_off(toy: Toy, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop) - (1 if start else 0)


@step("rows", "query positions restart in every block of 64 queries")
def rows_restart(toy: Toy, q_len: int, kv_len: int) -> Tensor:
    return (torch.arange(q_len) % 64).view(-1, 1)


@step("rows", "a single query is taken for the last position", "decode: q = M - 1, not q = 0")
def decode_at_the_end(toy: Toy, q_len: int, kv_len: int) -> Tensor:
    return torch.full((1, 1), kv_len - 1) if q_len == 1 else torch.arange(q_len).view(-1, 1)


# --- scores ---------------------------------------------------------------------------------------


def score_with(edit: Callable[[Toy, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    def score(toy: Toy, q: Tensor, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return edit(toy, *Toy.score(toy, q, k, places))

    score.__name__ = edit.__name__
    return score


@step("score", "scores cast to bfloat16", "before the softmax, of a float32 model")
@score_with
def scores_in_bf16(toy: Toy, s: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    return s.to(torch.bfloat16).to(toy.wide), seen


@step("score", "scores cast to float16", "11 bits of a score of 60 are 0.03")
@score_with
def scores_in_fp16(toy: Toy, s: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    return s.to(torch.float16).to(toy.wide), seen


@step("score", "scores clamped to 88", "so that exp does not overflow", expected="extremes")
@score_with
def scores_clamped(toy: Toy, s: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    return s.clamp(-88, 88), seen


@step("score", "scale of D = 64 for every D", "D = 60 treated as 64")
def scale_of_64(toy: Toy, q: Tensor, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    padded = math.ceil(q.shape[3] / 64) * 64
    return Toy.score(toy, q * math.sqrt(q.shape[3] / padded), k, places)


@step(
    "hide",
    "hidden keys at -10000",
    "a number that scores of that size outweigh",
    expected="extremes",
)
def hidden_at_minus_ten_thousand(toy: Toy, s: Tensor, seen: Tensor) -> Tensor:
    return s.masked_fill(~seen, -1e4)


@step(
    "hide",
    "mask added with a finite number",
    "the score of a hidden key less 10000",
    expected="extremes",
)
def hidden_by_sum(toy: Toy, s: Tensor, seen: Tensor) -> Tensor:
    return s - 1e4 * ~seen


# --- softmax --------------------------------------------------------------------------------------


@step("largest", "maximum not subtracted", "exp overflows at logits of 1e4", expected="extremes")
def no_maximum(toy: Toy, top: Tensor, s: Tensor) -> Tensor:
    return torch.zeros_like(top)


@step(
    "lowest",
    "maximum starts at zero",
    "rows whose scores are all far below 0 underflow",
    expected="extremes",
)
def maximum_from_zero(toy: Toy) -> float:
    return 0.0


@step("lowest", "maximum starts at minus infinity", "a first block that is hidden gives NaN")
def maximum_from_infinity(toy: Toy) -> float:
    return -math.inf


@step("largest", "maximum of the last block", "not the running one: earlier blocks overflow")
def maximum_of_block(toy: Toy, top: Tensor, s: Tensor) -> Tensor:
    return s.amax(-1, keepdim=True).clamp_min(-1e30)


@step("kept", "running sums not rescaled")
def not_rescaled(toy: Toy, top: Tensor, new: Tensor) -> Tensor:
    return torch.ones_like(top)


@step("added", "output not rescaled, the sum is")
def output_not_rescaled(toy: Toy, out: Tensor, keep: Tensor, p: Tensor, v: Tensor) -> Tensor:
    return out + p @ v


@step("kept", "rescaled the wrong way round", "exp(new - old)")
def rescaled_inversely(toy: Toy, top: Tensor, new: Tensor) -> Tensor:
    return (new - top).clamp_max(80).exp()


@step("exp", "exp2 without log2(e)")
def exp2(toy: Toy, x: Tensor) -> Tensor:
    return torch.exp2(x)


@step("kept", "rescaled by exp2, weighted by exp", "bases mixed between tiles")
def bases_mixed(toy: Toy, top: Tensor, new: Tensor) -> Tensor:
    return torch.exp2(top - new)


@step("exp", "exp by its first three terms", "accurate near 0 only")
def short_series(toy: Toy, x: Tensor) -> Tensor:
    return torch.where(x > -1, 1 + x + x**2 / 2 + x**3 / 6, x.exp())


@step("summed", "sum in bfloat16", "the denominator in 8 bits")
def sum_in_bf16(toy: Toy, total: Tensor, keep: Tensor, p: Tensor, top: Tensor) -> Tensor:
    return Toy.summed(toy, total, keep, p, top).to(torch.bfloat16).to(toy.wide)


@step("summed", "sum over the block only", "earlier blocks leave the denominator")
def sum_of_block(toy: Toy, total: Tensor, keep: Tensor, p: Tensor, top: Tensor) -> Tensor:
    return p.sum(-1, keepdim=True)


@step("added", "accumulated in half precision", "the output between blocks in 16 bits")
def accumulated_in_half(toy: Toy, out: Tensor, keep: Tensor, p: Tensor, v: Tensor) -> Tensor:
    return Toy.added(toy, out, keep, p, v).to(torch.bfloat16).to(toy.wide)


@step("added", "weights cast to float16", "as a kernel for half types, of a float32 model")
def weights_in_half(toy: Toy, out: Tensor, keep: Tensor, p: Tensor, v: Tensor) -> Tensor:
    return out * keep + p.to(torch.float16).to(toy.wide) @ v


@step("divided", "weights not normalised")
def not_normalised(toy: Toy, out: Tensor, total: Tensor) -> Tensor:
    return out


@step("divided", "a small number added to the denominator", "1e-3, as a linear attention has")
def denominator_guarded(toy: Toy, out: Tensor, total: Tensor) -> Tensor:
    return out / (total + 1e-3)


class _Splits(Toy):
    """Each block normalised by itself, then joined."""

    def summed(self, total: Tensor, keep: Tensor, p: Tensor, top: Tensor) -> Tensor:
        return total + (p.sum(-1, keepdim=True) > 0)

    def added(self, out: Tensor, keep: Tensor, p: Tensor, v: Tensor) -> Tensor:
        return out + (p @ v) / p.sum(-1, keepdim=True).clamp_min(1e-38)


MUTANTS.append(
    Mutant(
        "splits averaged",
        "lowering",
        "parts of the keys joined by their number, not by their logsumexp",
        "output",
        lowering_of(_Splits()),
    )
)


# --- sink -----------------------------------------------------------------------------------------


@step("with_sink", "sink counted once a split", "the sink joins the sum of every block")
def sink_per_split(
    toy: Toy, top: Tensor, total: Tensor, out: Tensor, sink: Tensor
) -> tuple[Tensor, Tensor]:
    blocks = math.ceil(toy.values["M"] / toy.block)
    return Toy.with_sink(toy, top, total, out, sink + math.log(blocks))


@step(
    "with_sink",
    "logsumexp in bfloat16",
    "a flex path casts it to the values' dtype: 3 % of the sink",
)
def lse_in_bf16(
    toy: Toy, top: Tensor, total: Tensor, out: Tensor, sink: Tensor
) -> tuple[Tensor, Tensor]:
    lse = (top + total.log()).to(torch.bfloat16).to(toy.wide)
    return Toy.with_sink(toy, lse - total.log(), total, out, sink)


@step("with_sink", "sink not relative to the maximum", "exp(sink) instead of exp(sink - max)")
def sink_unshifted(
    toy: Toy, top: Tensor, total: Tensor, out: Tensor, sink: Tensor
) -> tuple[Tensor, Tensor]:
    return total + sink.exp(), out


@step("with_sink", "sink ignored")
def sink_ignored(
    toy: Toy, top: Tensor, total: Tensor, out: Tensor, sink: Tensor
) -> tuple[Tensor, Tensor]:
    return total, out


# --- rows without a key, and the end --------------------------------------------------------------


@step("empty", "empty row: NaN")
def empty_nan(toy: Toy, out: Tensor, found: Tensor, v: Tensor) -> Tensor:
    return torch.where(found, out, torch.nan)


@step("empty", "empty row: the mean of the values")
def empty_mean(toy: Toy, out: Tensor, found: Tensor, v: Tensor) -> Tensor:
    return torch.where(found, out, v.mean(-2, keepdim=True))


@step("empty", "empty row: zero", "where the model averages the values")
def empty_zero(toy: Toy, out: Tensor, found: Tensor, v: Tensor) -> Tensor:
    return torch.where(found, out, 0.0)


@step("empty", "NaN hidden", "torch.nan_to_num at the end")
def nan_hidden(toy: Toy, out: Tensor, found: Tensor, v: Tensor) -> Tensor:
    return Toy.empty(toy, out, found, v).nan_to_num()


@step("gate", "factor of the heads forgotten")
def no_gate(toy: Toy) -> Any:
    return 1.0


@step("gate", "factor of the heads of the last query", "evaluated once for all rows")
def gate_of_last_row(toy: Toy) -> Any:
    gate = Toy.gate(toy)
    return gate[..., -1:, :] if isinstance(gate, Tensor) and gate.dim() > 2 else gate


@step("finished", "output in the layout of another", "[B, L, H, D] in memory, read as [B, H, L, D]")
def wrong_layout(toy: Toy, out: Tensor, gate: Any) -> Tensor:
    return (out * gate).transpose(1, 2).reshape(out.shape)


@step("finished", "last rows not written", "floor(L / 64) blocks of queries: the tail is garbage")
def rows_not_written(toy: Toy, out: Tensor, gate: Any) -> Tensor:
    out = out * gate
    if out.shape[2] > 64:
        out[:, :, out.shape[2] // 64 * 64 :] = 0.123
    return out


@step("finished", "dropout of the output at inference")
def dropout_at_inference(toy: Toy, out: Tensor, gate: Any) -> Tensor:
    return torch.nn.functional.dropout(out * gate, 0.1)


@step("finished", "rounded to bfloat16 at the end", "the output of a float32 model in 8 bits")
def rounded_output(toy: Toy, out: Tensor, gate: Any) -> Tensor:
    return (out * gate).to(torch.bfloat16).to(out.dtype)


# --- whole forwards -------------------------------------------------------------------------------


def forward(name: str, breaks: str = "", expected: str = "output") -> Any:
    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        MUTANTS.append(Mutant(name, "lowering", breaks, expected, lowering_of(function)))
        return function

    return add


@forward("dtype of the result", "float32 out of a bfloat16 model", "output")
def result_in_float32(
    spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], sizes: Any
) -> Tensor:
    return Toy()(spec, q, k, v, tensors, sizes).float()


_KEPT: dict[Any, Tensor] = {}


@forward("result kept from an earlier call", "a cache by shape, of what depends on values")
def stale(
    spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], sizes: Any
) -> Tensor:
    key = (spec.digest(), tuple(x.shape for x in tensors), q.shape, k.shape)
    kept = [_KEPT.setdefault((*key, n), x.clone()) for n, x in enumerate(tensors)]
    return Toy()(spec, q, k, v, kept, sizes)


@forward("softmax over queries")
def softmax_over_queries(
    spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], sizes: Any
) -> Tensor:
    from rewriter.reference import reference_weights

    weights = reference_weights(spec, q.to(torch.float32), k.to(torch.float32), tensors, sizes)
    weights = weights / weights.sum(-2, keepdim=True).clamp_min(1e-6)
    return (weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1).float()).to(v.dtype)


@forward("mask after the softmax", "timm's EVA before July 2024: rows sum to less than 1")
def mask_after_softmax(
    spec: SoftmaxSpec, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], sizes: Any
) -> Tensor:
    from dataclasses import replace

    import sympy

    from rewriter.reference import reference_weights

    open_ = replace(spec, mask=sympy.true)
    weights = reference_weights(open_, q.to(torch.float32), k.to(torch.float32), tensors, sizes)
    toy = Toy()
    toy(spec, q, k, v, tensors, sizes)
    _, seen = toy.score(q.to(toy.wide), toy.repeated(k.to(toy.wide), q.shape[1]), toy.values["k"])
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return ((weights * seen) @ v.float() * toy.gate()).to(v.dtype)
