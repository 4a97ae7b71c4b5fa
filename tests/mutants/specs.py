"""Wrong edits of a spec: a pass that says it is exact and changes the function.

Each is a small function from the spec to the spec that it makes of it; a spec that lacks the
feature stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy
from sympy import Expr, Float, Integer
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from mutants.catalogue import Mutant
from rewriter import symbols as sym
from rewriter.spec import SoftmaxSpec
from rewriter.symbols import Formula, IDiv, Read, Where, b, h, k, q, s

__all__ = ["MUTANTS", "Edit"]

Edit = Callable[[SoftmaxSpec], SoftmaxSpec]

MUTANTS: list[Mutant] = []


def wrong(name: str, breaks: str, expected: str = "identity") -> Callable[[Edit], Edit]:
    def add(edit: Edit) -> Edit:
        MUTANTS.append(Mutant(name, "spec", breaks, expected, edit))
        return edit

    return add


# --- helpers --------------------------------------------------------------------------------------


def comparisons(mask: Boolean, edit: Callable[[Relational], Formula]) -> Boolean:
    """The mask with every comparison of positions (which reads no tensor) edited."""
    found = [r for r in mask.atoms(Relational) if not r.has(Read)]
    return mask.xreplace({r: edit(r) for r in found})


def is_causal(term: Relational) -> bool:
    """`k <= something in q`."""
    if not isinstance(term, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        return False
    rest = term.gts - term.lts + k
    return rest.has(q) and not rest.has(k)


def causal_terms(spec: SoftmaxSpec, edit: Callable[[Relational], Formula]) -> SoftmaxSpec:
    return replace(
        spec, mask=comparisons(spec.mask, lambda r: edit(r) if is_causal(r) else r)
    ).without_unused()


def with_reads(formula: Formula, edit: Callable[[Read], Expr]) -> Formula:
    return formula.xreplace({r: edit(r) for r in sym.reads(formula)})


def reindexed(formula: Formula, names: dict[Expr, Expr]) -> Formula:
    """The formula with the indices of its reads renamed, and nothing else."""
    return with_reads(formula, lambda r: Read(r.args[0], *(i.xreplace(names) for i in r.index)))


def bias_edit(spec: SoftmaxSpec, edit: Callable[[Expr], Expr]) -> SoftmaxSpec:
    """The spec with another bias; as it is, where the score is not s plus a bias."""
    bias = spec.bias
    if bias is None or bias == 0:
        return spec
    return replace(spec, score=s + edit(bias)).without_unused()


def and_terms(spec: SoftmaxSpec, keep: Callable[[Boolean], bool]) -> SoftmaxSpec:
    terms = [t for t in sympy.And.make_args(spec.mask) if keep(t)]
    return replace(spec, mask=sympy.And(*terms)).without_unused()


# --- the mask -------------------------------------------------------------------------------------


@wrong("mask off by one: the next key is seen", "k <= q + 1 instead of k <= q")
def future_key(spec: SoftmaxSpec) -> SoftmaxSpec:
    return causal_terms(spec, lambda r: r.func(r.lhs, r.rhs).xreplace({q: q + 1}))


@wrong("mask off by one: the own key is hidden", "k < q instead of k <= q")
def own_key_hidden(spec: SoftmaxSpec) -> SoftmaxSpec:
    return causal_terms(spec, lambda r: r.xreplace({q: q - 1}))


@wrong("mask transposed", "the mask of keys and queries taken as that of queries and keys")
def mask_transposed(spec: SoftmaxSpec) -> SoftmaxSpec:
    swap = {q: k, k: q}
    return replace(spec, mask=comparisons(spec.mask, lambda r: r.xreplace(swap)))


@wrong("mask forgotten", "no key is hidden any more")
def mask_forgotten(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, mask=sympy.true).without_unused()


@wrong("causal mask forgotten", "the terms of the mask that read nothing are lost")
def causality_forgotten(spec: SoftmaxSpec) -> SoftmaxSpec:
    return and_terms(spec, lambda t: bool(t.has(Read)))


@wrong("padding ignored", "the terms of the mask that read a tensor are lost")
def padding_ignored(spec: SoftmaxSpec) -> SoftmaxSpec:
    return and_terms(spec, lambda t: not t.has(Read))


@wrong("padding inverted", "True meant hidden in torch.nn.MultiheadAttention, seen elsewhere")
def padding_inverted(spec: SoftmaxSpec) -> SoftmaxSpec:
    terms = [~t if t.has(Read) else t for t in sympy.And.make_args(spec.mask)]
    return replace(spec, mask=sympy.And(*terms))


@wrong("padding of the query", "pad[b, q] instead of pad[b, k]")
def padding_of_query(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, mask=reindexed(spec.mask, {k: q}))


@wrong("padding of the first row of the batch", "pad[0, k] for every row")
def padding_of_first_row(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, mask=reindexed(spec.mask, {b: Integer(0)}))


@wrong("padding shifted by one", "pad[b, k - 1], as with a mask that lacks the start token")
def padding_shifted(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, mask=reindexed(spec.mask, {k: sym.Maximum(k - 1, 0)}))


@wrong("causal mask at the wrong corner", "top left taken for bottom right, where L != M")
def wrong_corner(spec: SoftmaxSpec) -> SoftmaxSpec:
    def moved(r: Relational) -> Formula:
        return r.xreplace({q: q + sym.M - sym.L}) if not r.has(sym.M) else r

    return causal_terms(spec, moved)


@wrong("cache offset missing", "k <= q instead of k <= q + M - L: a decode step sees one key")
def cache_offset_missing(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(
        spec, mask=comparisons(spec.mask, lambda r: r.xreplace({sym.M: sym.L}))
    ).without_unused()


@wrong("cached length ignored", "an integer that the graph gives is taken as 0")
def size_ignored(spec: SoftmaxSpec) -> SoftmaxSpec:
    zero = {sym.size_symbol(n): Integer(0) for n in spec.sizes}
    return replace(spec, mask=spec.mask.xreplace(zero), score=spec.score.xreplace(zero))


@wrong("window of w + 1", "q - k <= w, as in attention-gym, for q - k < w, as in transformers")
def window_plus_one(spec: SoftmaxSpec) -> SoftmaxSpec:
    return _window(spec, 1)


@wrong("window of w - 1", "the query itself counted twice")
def window_minus_one(spec: SoftmaxSpec) -> SoftmaxSpec:
    return _window(spec, -1)


def _window(spec: SoftmaxSpec, by: int) -> SoftmaxSpec:
    def edit(r: Relational) -> Formula:
        if is_causal(r) or not (r.has(q) and r.has(k)) or not hasattr(r, "gts"):
            return r
        return r.func(r.lhs, r.rhs + by) if r.gts == r.rhs else r.func(r.lhs + by, r.rhs)

    return replace(spec, mask=comparisons(spec.mask, edit))


@wrong("window forgotten", "only k <= q is left of a sliding window")
def window_forgotten(spec: SoftmaxSpec) -> SoftmaxSpec:
    return and_terms(spec, lambda t: t.has(Read) or is_causal(t) or not (t.has(q) and t.has(k)))


@wrong("first keys of a window forgotten", "the other branch of an `or` in the mask is lost")
def first_branch_only(spec: SoftmaxSpec) -> SoftmaxSpec:
    return _branch(spec, 0)


@wrong("prefix forgotten", "the last branch of an `or` in the mask is lost")
def last_branch_lost(spec: SoftmaxSpec) -> SoftmaxSpec:
    return _branch(spec, -1)


def _branch(spec: SoftmaxSpec, lost: int) -> SoftmaxSpec:
    def kept(term: Boolean) -> Boolean:
        if not isinstance(term, sympy.Or):
            return term
        args = sorted(term.args, key=str)
        del args[lost]
        return sympy.Or(*args)

    terms = [kept(t) for t in sympy.And.make_args(spec.mask)]
    return replace(spec, mask=sympy.And(*terms)).without_unused()


@wrong("mask terms joined by or", "a key is seen where any term of the mask holds")
def joined_by_or(spec: SoftmaxSpec) -> SoftmaxSpec:
    terms = sympy.And.make_args(spec.mask)
    return replace(spec, mask=sympy.Or(*terms)) if len(terms) > 1 else spec


@wrong("mask of the next head", "head h reads the mask of head h + 1")
def mask_of_next_head(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, mask=spec.mask.xreplace({h: sym.IMod(h + 1, sym.H)}))


@wrong("mask as a number", "hidden keys get -10000 added, which logits of that size outweigh")
def mask_as_number(spec: SoftmaxSpec) -> SoftmaxSpec:
    if spec.is_unmasked:
        return spec
    return replace(spec, mask=sympy.true, score=Where(spec.mask, spec.score, spec.score - 1e4))


@wrong("hidden keys score 0", "the mask is multiplied onto the scores")
def mask_multiplied(spec: SoftmaxSpec) -> SoftmaxSpec:
    if spec.is_unmasked:
        return spec
    return replace(spec, mask=sympy.true, score=Where(spec.mask, spec.score, Float(0.0)))


@wrong("empty row: mean instead of zero", "a row that sees no key averages the values")
def zero_to_mean(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, masked="mean") if spec.masked == "zero" else spec


@wrong("empty row: NaN instead of zero", "minus infinity less minus infinity")
def zero_to_nan(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, masked="nan") if spec.masked == "zero" else spec


@wrong("empty row: zero instead of mean", "scores filled with the most negative number, read as -∞")
def mean_to_zero(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, masked="zero") if spec.masked in ("mean", "add") else spec


@wrong("empty row: zero instead of NaN", "a NaN of the model is hidden")
def nan_to_zero(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, masked="zero") if spec.masked == "nan" else spec


@wrong(
    "empty row: gradient lost", "the mask was added, and is filled now: no gradient to the scores"
)
def add_to_mean(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, masked="mean") if spec.masked == "add" else spec


# --- the scale ------------------------------------------------------------------------------------


@wrong("scale missing", "scores are not divided by the root of D")
def scale_missing(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, scale=Integer(1)).without_unused()


@wrong("scale doubled", "")
def scale_doubled(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, scale=2 * spec.scale)


@wrong("scale applied twice", "on the queries and in the kernel: 1/D")
def scale_twice(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, scale=spec.scale**2)


@wrong("scale not read from the graph", "BiFormer scales by C^-0.5; a kernel's default is D^-0.5")
def scale_default(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, scale=Float(0.125)).without_unused()


@wrong("bias scaled as well", "scale (q·k + bias), as T5 would be with a scale")
def bias_scaled(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: bias * spec.scale)


@wrong("scale of the head lost", "a scale that a tensor holds, read for head 0 only")
def scale_of_first_head(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, scale=spec.scale.xreplace({h: Integer(0)}))


# --- score and bias -------------------------------------------------------------------------------


@wrong("soft cap missing", "")
def cap_missing(spec: SoftmaxSpec) -> SoftmaxSpec:
    caps = [x for x in spec.score.atoms(sympy.tanh) if x.has(s)]
    if not caps:
        return spec
    return replace(spec, score=_without_caps(spec.score)).without_unused()


def _without_caps(score: Expr) -> Expr:
    """`c · tanh(x / c)` replaced by x."""
    for m in score.atoms(sympy.Mul):
        caps = [a for a in m.args if isinstance(a, sympy.tanh)]
        if len(caps) == 1:
            rest = sympy.Mul(*(a for a in m.args if a not in caps))
            return score.xreplace({m: sympy.expand(rest * caps[0].args[0])})
    return score


@wrong("soft cap after the mask", "hidden keys are capped to -c and get a weight")
def cap_after_mask(spec: SoftmaxSpec) -> SoftmaxSpec:
    for m in spec.score.atoms(sympy.Mul):
        caps = [a for a in m.args if isinstance(a, sympy.tanh)]
        if len(caps) == 1 and not spec.is_unmasked:
            lowest = -sympy.Mul(*(a for a in m.args if a not in caps))
            score = Where(spec.mask, spec.score, spec.score.xreplace({m: lowest}))
            return replace(spec, mask=sympy.true, score=score)
    return spec


@wrong("soft cap of the score and the bias", "the bias is added before the cap, not after")
def cap_after_bias(spec: SoftmaxSpec) -> SoftmaxSpec:
    bias = spec.score.xreplace({s: Integer(0)})
    if bias == 0 or not spec.score.has(sympy.tanh):
        return spec
    return replace(spec, score=(spec.score - bias).xreplace({s: s + bias}))


@wrong("soft cap twice as high", "c · tanh(s / c) with 2c")
def cap_doubled(spec: SoftmaxSpec) -> SoftmaxSpec:
    if not spec.score.has(sympy.tanh):
        return spec
    return replace(spec, score=spec.score.xreplace({s: s / 2}) * 2)


@wrong("bias missing", "")
def bias_missing(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: Integer(0))


@wrong("bias subtracted", "the sign of slope · (k - q)")
def bias_sign(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: -bias)


@wrong("bias added twice", "two masks are collected where one is shared (Swin v2 the other way)")
def bias_twice(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: 2 * bias)


@wrong("bias transposed", "bias[k, q] instead of bias[q, k]")
def bias_transposed(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: bias.xreplace({q: k, k: q}))


@wrong("bias of the next head", "heads of a table counted from 1")
def bias_of_next_head(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: bias.xreplace({h: sym.IMod(h + 1, sym.H)}))


@wrong("bias of the key head", "bias[h // 2] where query heads share a key head")
def bias_of_key_head(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: bias.xreplace({h: IDiv(h, 2)}))


@wrong("slope off by a power", "slopes 2^(-8h/H) begin at the wrong exponent")
def slope_power(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: bias / 2)


@wrong("distance clipped at the near half", "of the buckets of k - q only those with k <= q")
def far_half_lost(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: Where(k <= q, bias, Integer(0)) if bias.has(q, k) else bias)


@wrong("bias of the first row of the batch", "a bias with a batch axis, read at row 0")
def bias_of_first_row(spec: SoftmaxSpec) -> SoftmaxSpec:
    return bias_edit(spec, lambda bias: bias.xreplace({b: Integer(0)}))


# --- sink, dropout, heads -------------------------------------------------------------------------


def sink_edit(spec: SoftmaxSpec, edit: Callable[[Expr], Expr | None]) -> SoftmaxSpec:
    if spec.sink is None:
        return spec
    return replace(spec, sink=edit(spec.sink)).without_unused()


@wrong("sink dropped", "the flash wrapper of a library drops the sink without an error")
def sink_dropped(spec: SoftmaxSpec) -> SoftmaxSpec:
    return sink_edit(spec, lambda sink: None)


@wrong("sink scaled", "the sink is a logit already: it is not multiplied by the scale")
def sink_scaled(spec: SoftmaxSpec) -> SoftmaxSpec:
    return sink_edit(spec, lambda sink: sink * spec.scale)


@wrong("sink of the key head", "sinks are one a query head; reshaped as one a key head")
def sink_of_key_head(spec: SoftmaxSpec) -> SoftmaxSpec:
    return sink_edit(spec, lambda sink: sink.xreplace({h: IDiv(h, 2)}))


@wrong("sink of the next head", "")
def sink_of_next_head(spec: SoftmaxSpec) -> SoftmaxSpec:
    return sink_edit(spec, lambda sink: sink.xreplace({h: sym.IMod(h + 1, sym.H)}))


@wrong("sink counted twice", "once a split, with two splits")
def sink_twice(spec: SoftmaxSpec) -> SoftmaxSpec:
    return sink_edit(spec, lambda sink: sink + sympy.log(Float(2.0)))


@wrong("sink of logit 0", "softmax-off-by-one instead of a learned sink")
def sink_zero(spec: SoftmaxSpec) -> SoftmaxSpec:
    return sink_edit(spec, lambda sink: Integer(0))


@wrong("sink made up", "a sink of logit 0 where there was none: rows sum to less than 1")
def sink_made_up(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, sink=Integer(0)) if spec.sink is None else spec


@wrong("dropout at inference", "the dropout of training is left on")
def dropout_at_inference(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, dropout=0.1)


@wrong("edit normalised twice", "rows of the weights sum to 2")
def rows_sum_to_two(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, heads=2 * spec.heads)


@wrong("gate of the heads lost", "the factor of the heads is forgotten")
def gate_lost(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, heads=Integer(1)).without_unused()


@wrong("gate applied twice", "")
def gate_twice(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, heads=spec.heads**2)


@wrong("gate applied to the bias", "the factor of the heads multiplies the score, not the output")
def gate_on_bias(spec: SoftmaxSpec) -> SoftmaxSpec:
    if spec.heads == 1:
        return spec
    return replace(spec, heads=Integer(1), score=spec.heads * spec.score)


@wrong("gate of the next head", "heads counted from 1")
def gate_of_next_head(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, heads=spec.heads.xreplace({h: sym.IMod(h + 1, sym.H)}))


@wrong("gate of the first query", "a gate of each token, read for the first one")
def gate_of_first_query(spec: SoftmaxSpec) -> SoftmaxSpec:
    return replace(spec, heads=spec.heads.xreplace({q: Integer(0)}))
