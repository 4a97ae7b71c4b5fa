"""Formulas read wrongly: a rule of lifting is replaced, or what was lifted is changed.

`Spellings` has one attention for each feature; it is captured once, and lifted again under every
mutant. What is to see it is the check of each formula at capture, which runs real numbers through
the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from mutants.catalogue import Mutant
from rewriter import capture, contraction, decide, lift_softmax, operands, rules
from rewriter import rules_arithmetic as arithmetic
from rewriter import rules_layout as layout
from rewriter.capture import Captured, from_exported
from rewriter.decide import lifted_sites
from rewriter.frame import Lifted
from rewriter.indices import as_number
from rewriter.reading import argument, source_of

__all__ = ["MUTANTS", "Broken", "Spellings", "captured", "complaints"]

MUTANTS: list[Mutant] = []

H, HKV, D = 4, 2, 4
Attend = Callable[["Spellings", Tensor, Tensor, Tensor, Tensor], Tensor]
SPELLINGS: dict[str, Attend] = {}


def spelling(attend: Attend) -> Attend:
    SPELLINGS[attend.__name__] = attend
    return attend


def out(s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1) @ v


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.5


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(H // HKV, dim=1)


@spelling
def grouped(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return out(scores_of(q, repeated(k)), repeated(v))


@spelling
def scaled_before(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return out((q / 3.0) @ (repeated(k) * 0.7).mT, repeated(v))


@spelling
def causal_by_comparison(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    seen = place <= place[:, None]
    return out(scores_of(q, repeated(k)).masked_fill(~seen, -math.inf), repeated(v))


@spelling
def causal_by_triangle(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    s = torch.where(ones.tril(), scores_of(q, repeated(k)), -math.inf)
    return out(s, repeated(v))


@spelling
def padded(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    hidden = (1.0 - pad[:, None, None, :].float()) * torch.finfo(torch.float32).min
    return out(scores_of(q, repeated(k)) + hidden, repeated(v))


@spelling
def alibi(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    bias = m.slopes.view(-1, 1, 1) * (place - place[:, None])
    return out(scores_of(q, repeated(k)) + bias, repeated(v))


@spelling
def relative(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    distance = (place - place[:, None]).clamp(-3, 2) + 3
    return out(scores_of(q, repeated(k)) + m.table[distance].permute(2, 0, 1), repeated(v))


@spelling
def buckets(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    place = torch.arange(1, q.shape[2] + 1)
    near = (place[:, None] - place).abs()
    far = 2 + (torch.log(near.float().clamp(min=1) / 2) / math.log(4) * 4).long()
    bucket = torch.where(near < 2, near, far.clamp(max=5))
    bias = nn.functional.embedding(bucket, m.table).permute(2, 0, 1)
    return out(scores_of(q, repeated(k)) + bias, repeated(v))


@spelling
def capped(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return out(torch.tanh(scores_of(q, repeated(k)) / 3.0) * 3.0, repeated(v))


@spelling
def sliced_bias(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    n = q.shape[2]
    bias = m.positions[2 : n + 2].unsqueeze(0) - 0.5 * m.positions[:n].unsqueeze(1)
    return out(scores_of(q, repeated(k)) + bias, repeated(v))


@spelling
def transposed_bias(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    n = q.shape[2]
    bias = m.positions[:n].unsqueeze(1) * m.positions[1 : n + 1].unsqueeze(0)
    return out(scores_of(q, repeated(k)) + bias.transpose(0, 1), repeated(v))


@spelling
def sink(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    column = m.slopes.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    s = torch.cat([scores_of(q, repeated(k)), column], -1)
    return s.softmax(-1)[..., :-1] @ repeated(v)


@spelling
def window(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    back = place[:, None] - place
    seen = ((back >= 0) & (back < 3)) | (place < 1)
    return out(scores_of(q, repeated(k)).masked_fill(~seen, -math.inf), repeated(v))


@spelling
def documents(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    kind = pad.long()
    seen = (kind[:, None, :, None] == kind[:, None, None, :]).expand(-1, H, -1, -1)
    return out(torch.where(seen, scores_of(q, repeated(k)), -1e30), repeated(v))


@spelling
def by_einsum(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, repeated(k), repeated(v)))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@spelling
def by_bmm(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, x.shape[2], D) for x in (q, repeated(k), repeated(v)))
    return torch.bmm((torch.bmm(q, k.mT) * 0.5).softmax(-1), v)


@spelling
def by_sdpa(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=True
    )


@spelling
def joined_masks(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    seen = (place > 2)[None, :] & (place[:, None] > 3) | (place <= place[:, None])
    bias = m.slopes.roll(1).view(-1, 1, 1) * place.flip(0)
    return out(torch.where(seen, scores_of(q, repeated(k)) + bias, -math.inf), repeated(v))


@spelling
def counted_from_one(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    place = torch.arange(1, q.shape[2] + 1)
    return out(scores_of(q, repeated(k)) + m.slopes.view(-1, 1, 1) * place, repeated(v))


@spelling
def own_heads(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return out(scores_of(q, repeated(k).tanh()), repeated(v).tanh())


@spelling
def heads_in_turn(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return out(scores_of(q, k.repeat(1, H // HKV, 1, 1)), v.repeat(1, H // HKV, 1, 1))


@spelling
def empty_rows(m: Spellings, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    s = scores_of(q, repeated(k)).masked_fill(place[:, None] <= place, -1e30)
    return out(s, repeated(v))


class Spelling(nn.Module):
    def __init__(self, attend: Attend, whole: Spellings) -> None:
        super().__init__()
        self.attend, self.whole = attend, [whole]

    def forward(self, *args: Tensor) -> Tensor:
        return self.attend(self.whole[0], *args)


class Spellings(nn.Module):
    """Every spelling on the same projections of x `[B, L, 16]`; `pad` is `[B, L]`."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(16, n * D) for n in (H, HKV, HKV))
        self.slopes = nn.Parameter(torch.randn(H))
        self.table = nn.Parameter(torch.randn(8, H))
        self.positions = nn.Parameter(torch.randn(64))
        self.all = nn.ModuleDict({name: Spelling(f, self) for name, f in SPELLINGS.items()})

    def forward(self, x: Tensor, pad: Tensor) -> dict[str, Tensor]:
        q, k, v = (p(x).unflatten(-1, (-1, D)).transpose(1, 2) for p in self.projections)
        return {name: spelled(q, k, v, pad) for name, spelled in self.all.items()}


@lru_cache(maxsize=1)
def captured() -> Captured:
    """The graph of all spellings, with a batch and a length that are free."""
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch", min=2, max=32), torch.export.Dim("n", min=6, max=60)
    x, pad = torch.randn(2, 9, 16), torch.rand(2, 9) < 0.7
    free = {"x": {0: batch, 1: length}, "pad": {0: batch, 1: length}}
    return from_exported(capture.export(Spellings(), (x, pad), dynamic_shapes=free))


def complaints() -> list[str]:
    """What the checks at capture say of the spellings: `path: reason`."""
    found = []
    for lifted in lifted_sites(captured()):
        site = lifted.site
        texts = [n for n in site.notes if "did not pass its check" in n]
        texts += [site.reason] if site.spec is None else []
        found += [f"{site.path or '?'}: {text}" for text in texts]
    return found


# --- what is broken -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """Items of tables and attributes that are replaced for a while."""

    items: tuple[tuple[Any, str, Any], ...]

    @contextmanager
    def active(self) -> Iterator[None]:
        before = [_get(owner, name) for owner, name, _ in self.items]
        for owner, name, value in self.items:
            _set(owner, name, value)
        try:
            yield
        finally:
            for (owner, name, _), value in zip(self.items, before, strict=True):
                _set(owner, name, value)


def _get(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, dict) else getattr(owner, name)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        if value is None:
            del owner[name]
        else:
            owner[name] = value
    else:
        setattr(owner, name, value)


def broken(name: str, *items: tuple[Any, str, Any], breaks: str = "") -> None:
    MUTANTS.append(Mutant(name, "lift", breaks, "at capture", Broken(items)))


def rule(operation: str, name: str, function: Any, breaks: str = "") -> None:
    broken(f"read wrongly: {name}", (rules.RULES, f"aten.{operation}", function), breaks=breaks)


def lifted_as(name: str, edit: Callable[[Lifted], Lifted], breaks: str = "") -> None:
    """What was lifted is changed before it is checked."""
    honest = decide.lift

    def lift(*args: Any, **kwargs: Any) -> Lifted:
        found = honest(*args, **kwargs)
        return edit(found) if found.site.spec is not None else found

    broken(name, (decide, "lift", lift), breaks=breaks)


# --- rules ----------------------------------------------------------------------------------------


def without(number: int) -> Any:
    """The rule reads one operand and forgets the other."""
    return lambda r, node, index: r.number(node.args[number], index, node)


def slice_without_offset(r: Any, node: fx.Node, index: Any) -> Any:
    return r.at(source_of(node), index)


def arange_from_zero(r: Any, node: fx.Node, index: Any) -> Any:
    return index[0]


def triangle_off_by_one(r: Any, node: fx.Node, index: Any) -> Any:
    return layout._triangle(r, node, (*index[:-2], index[-2] - 1, index[-1]))


def triangle_of_queries(r: Any, node: fx.Node, index: Any) -> Any:
    return layout._triangle(r, node, (*index[:-2], index[-1], index[-2]))


def permuted_backwards(r: Any, node: fx.Node, index: Any) -> Any:
    order = [int(d) % len(index) for d in node.args[1]]
    return r.at(source_of(node), tuple(index[d] for d in order))


def transpose_lost(r: Any, node: fx.Node, index: Any) -> Any:
    return r.at(source_of(node), index)


def subtracted_backwards(r: Any, node: fx.Node, index: Any) -> Any:
    x, y = (r.number(a, index, node) for a in node.args[:2])
    return y - x


def index_shifted(r: Any, node: fx.Node, index: Any) -> Any:
    found = layout._index(r, node, index)
    return found.xreplace({sym_k: sym_k + 1}) if found is not None else None


sym_k = sympy.Symbol("k", integer=True, nonnegative=True)


def embedding_of_next(r: Any, node: fx.Node, index: Any) -> Any:
    row = r.number(node.args[1], index[:-1])
    return r.at(source_of(node), (row, sympy.Integer(0)))


def unsqueezed_elsewhere(r: Any, node: fx.Node, index: Any) -> Any:
    dim = layout.dim_of(node, node.args[1], len(index))
    other = 1 - dim if dim < 2 and len(index) == 2 else dim
    return r.at(source_of(node), index[:other] + index[other + 1 :])


def fill_inverted(r: Any, node: fx.Node, index: Any) -> Any:
    condition = r.truth(node.args[1], index, node)
    x, y = r.broadcast(node.args[2], index, node), r.broadcast(node.args[0], index, node)
    return arithmetic._either(node, sympy.Not(condition), x, y)


def branches_swapped(r: Any, node: fx.Node, index: Any) -> Any:
    condition = r.truth(node.args[0], index, node)
    x, y = r.broadcast(node.args[1], index, node), r.broadcast(node.args[2], index, node)
    return arithmetic._either(node, condition, y, x)


def clamped_below_only(r: Any, node: fx.Node, index: Any) -> Any:
    low = argument(node, 1, "min")
    value = r.number(node.args[0], index, node)
    return value if low is None else arithmetic.Maximum(value, r.number(low, index, node))


def rolled_the_other_way(r: Any, node: fx.Node, index: Any) -> Any:
    shifts = node.args[1]
    size = layout.shape_of(node)[0]
    return r.at(source_of(node), (arithmetic.IMod(index[0] + r.size(shifts[0]), size),))


rule("le", "comparison strict", arithmetic._compare("<"), "k < q for k <= q")
rule("le", "comparison turned round", arithmetic._compare(">="), "a mask transposed")
rule("lt", "comparison inclusive", arithmetic._compare("<="), "a window of w + 1")
rule("eq", "equality of documents lost", arithmetic._compare("<="))
rule("slice", "offset of a slice lost", slice_without_offset)
rule("arange", "start of a range lost", arange_from_zero)
rule("tril", "triangle off by one", triangle_off_by_one)
rule("tril", "triangle of the other side", triangle_of_queries)
rule("permute", "permutation inverted", permuted_backwards)
rule("transpose", "transpose lost", transpose_lost)
rule("bitwise_not", "negation lost", without(0))
rule("sub", "difference turned round", subtracted_backwards, "the sign of a distance")
rule("div", "division lost", without(0))
rule("mul", "factor lost", without(0))
rule("add", "summand lost", without(0))
rule("clamp", "upper bound lost", clamped_below_only, "buckets beyond the table")
rule("index", "gather off by one", index_shifted)
rule("embedding", "gather of the first head", embedding_of_next)
rule("unsqueeze", "dimension at the wrong place", unsqueezed_elsewhere)
rule("masked_fill", "fill inverted", fill_inverted)
rule("where", "branches swapped", branches_swapped)
rule("tanh", "tanh read as its argument", without(0), "a soft cap missing")
rule("log", "logarithm of base 2", arithmetic._unary(lambda x: sympy.log(x) / math.log(2)))
rule("abs", "absolute value lost", without(0), "buckets without the far half")
rule("roll", "roll in the other direction", rolled_the_other_way)
rule("flip", "flip lost", transpose_lost)
rule("__and__", "and read as or", arithmetic._logic(sympy.Or))
rule("__or__", "or read as and", arithmetic._logic(sympy.And))


# --- around the rules -----------------------------------------------------------------------------

_step_up, _split_mask, _sink_of = operands.step_up, lift_softmax.split_mask, lift_softmax.sink_of


def step_without_factor(*args: Any) -> Any:
    found = _step_up(*args)
    return found if found is None else replace(found, factor=1)


def step_multiplying(*args: Any) -> Any:
    found = _step_up(*args)
    return found if found is None else replace(found, divides=False)


def repeat_as_groups(r: Any, node: fx.Node, source: fx.Node, index: Any) -> Any:
    counts = node.args[1]
    whole = tuple(
        r.bounds.split(i, sympy.Integer(n))[0] if n > 1 else i
        for i, n in zip(index, counts, strict=True)
    )
    return contraction.Step(source, whole)


def without_sink(*args: Any) -> None:
    return None


def sink_negated(*args: Any) -> Any:
    found = _sink_of(*args)
    return None if found is None else -found


def rows_give_zero(*args: Any) -> Any:
    rest, mask, _ = _split_mask(*args)
    return rest, mask, "zero"


def rows_give_nan(*args: Any) -> Any:
    rest, mask, _ = _split_mask(*args)
    return rest, mask, "nan"


def mask_lost(*args: Any) -> Any:
    rest, _, way = _split_mask(*args)
    return rest, sympy.true, way


broken("scale on an operand lost", (operands, "step_up", step_without_factor))
broken("scale on an operand inverted", (operands, "step_up", step_multiplying))
broken(
    "heads in turn read as groups",
    (contraction._OTHERS, "aten.repeat", repeat_as_groups),
    breaks="repeat is not repeat_interleave: query heads interleaved",
)
broken("column of a sink forgotten", (lift_softmax, "sink_of", without_sink))
broken("column of a sink negated", (lift_softmax, "sink_of", sink_negated))
broken("empty rows read as zero", (lift_softmax, "split_mask", rows_give_zero))
broken("empty rows read as NaN", (lift_softmax, "split_mask", rows_give_nan))
broken("what hides keys forgotten", (lift_softmax, "split_mask", mask_lost))


# --- what was lifted ------------------------------------------------------------------------------


def spec_edit(**changes: Any) -> Callable[[Lifted], Lifted]:
    def edit(lifted: Lifted) -> Lifted:
        spec = lifted.site.spec
        assert spec is not None
        values = {name: change(getattr(spec, name)) for name, change in changes.items()}
        return replace(lifted, site=replace(lifted.site, spec=replace(spec, **values)))

    return edit


def keys_for_values(lifted: Lifted) -> Lifted:
    return replace(lifted, v=lifted.k)


def queries_for_keys(lifted: Lifted) -> Lifted:
    same = lifted.q is not None and lifted.k is not None and lifted.q.heads == lifted.k.heads
    return replace(lifted, q=lifted.k, k=lifted.q) if same else lifted


def layout_of_output(lifted: Lifted) -> Lifted:
    return replace(lifted, out_order=tuple(range(len(lifted.out_order))))


def operand_steps_lost(lifted: Lifted) -> Lifted:
    def bare(x: Any) -> Any:
        moved = [s for s in x.steps if s[0] is not torch.ops.aten.permute.default]
        return replace(x, steps=tuple(moved))

    return replace(lifted, q=bare(lifted.q), k=bare(lifted.k), v=bare(lifted.v))


lifted_as("scale read as the default", spec_edit(scale=lambda x: sympy.Float(D**-0.5)))
lifted_as("scale read twice", spec_edit(scale=lambda x: x * x))
lifted_as("keys taken for values", keys_for_values, "the same shape, another projection")
lifted_as("queries and keys taken for each other", queries_for_keys)
lifted_as("output layout not put back", layout_of_output, "[B, L, H, D] of an einsum")
lifted_as("operand layout not put back", operand_steps_lost)
lifted_as(
    "bias read as its double",
    spec_edit(score=lambda x: x + (x - as_number(sympy.Symbol("s", real=True)))),
)
