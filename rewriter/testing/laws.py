"""Laws of attention, as checks of a function `f(q, k, v)`: no reference and no spec is needed.

    laws.future(f, Case.of("causal"))

Each gives one `Outcome`, and each compares f with itself, so f may be anything: a lowering, a model
part, another library. What f reads besides q, k and v has to be the same for every sequence, since
some laws take sequences apart. `LAWS` has them by the name under which a pass claims them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.testing.cases import Case
from rewriter.testing.operands import operands, shuffled
from rewriter.testing.outcome import Outcome, Verdict

__all__ = [
    "CAUSAL_LAWS",
    "LAWS",
    "UNORDERED_LAWS",
    "Attention",
    "Law",
    "batch",
    "decode",
    "forms_agree",
    "future",
    "heads",
    "keys",
    "past",
    "queries",
    "row_sums",
    "shift",
    "sink_sums",
    "tolerance",
    "values",
]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Law = Callable[[Attention, Case], Outcome]

_MATTERS = 100.0
"""What has to matter moves the output by this many times the tolerance."""


def tolerance(dtype: torch.dtype, size: float) -> float:
    """The largest difference of two ways to compute numbers of this size: 8 roundings of a narrow
    dtype, 256 of float32 or of what is wider."""
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    narrow = torch.finfo(dtype).eps if torch.finfo(dtype).bits < 32 else 0.0
    return (8 * narrow + 256 * wide) * max(size, 1e-3)


@dataclass
class _Trial:
    """One law on one case: says what was compared, and refuses to have compared nothing."""

    law: str
    case: Case
    used: float = 0.0
    reason: str = ""
    compared: int = 0

    def equal(self, x: Tensor, y: Tensor, what: str) -> None:
        """x and y are the same up to rounding."""
        if x.shape != y.shape:
            self.fail(f"{what}: shapes {list(x.shape)} and {list(y.shape)}")
            return
        if not x.numel():
            return
        self.compared += x.numel()
        difference, size = float((x - y).abs().max()), float(y.abs().max())
        allowed = tolerance(x.dtype, size)
        if not difference <= allowed:  # NaN is not
            self.fail(f"{what}: outputs differ by {difference:.1e}, {allowed:.1e} is rounding")
        self.used = max(self.used, difference / allowed)

    def moved(self, x: Tensor, y: Tensor, what: str) -> None:
        """Every position of x and y `[B, H, L, Dv]` differs in some head by more than rounding."""
        self.compared += x.numel()
        least = float((x - y).abs().amax((1, 3)).min())
        needed = _MATTERS * tolerance(x.dtype, float(y.abs().max()))
        if not least > needed:
            self.fail(f"{what}: an output moves by {least:.1e} only, {needed:.1e} is expected")

    def fail(self, reason: str) -> None:
        self.reason = self.reason or reason

    def outcome(self) -> Outcome:
        name = f"law: {self.law}"
        if not self.compared and not self.reason:
            return Outcome(name, self.case.text, "skipped", "the case is too small for this law")
        verdict: Verdict = "failed" if self.reason else "passed"
        return Outcome(name, self.case.text, verdict, self.reason, self.used or None)


def _run(f: Attention, *x: Tensor) -> Tensor:
    with torch.no_grad():
        return f(*x)


def _qkv(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    x = operands(case)
    return x.q, x.k, x.v


def _noise(x: Tensor, seed: int = 7) -> Tensor:
    """Other values of the same shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(x)


def _cuts(case: Case) -> Iterator[tuple[int, int]]:
    """Some queries, and where they stand on the key axis."""
    q_len, ahead = case.dims.q_len, case.dims.kv_len - case.dims.q_len
    for row in sorted({0, q_len // 2, q_len - 2, q_len - 1}):
        if row >= 0 and row + ahead >= 0:
            yield row, row + ahead


def future(f: Attention, case: Case) -> Outcome:
    """Other keys and values behind a position change nothing at it or before it."""
    trial, (q, k, v) = _Trial("future", case), _qkv(case)
    whole = _run(f, q, k, v)
    for row, place in _cuts(case):
        if place + 1 < k.shape[2]:
            changed = (
                torch.cat([x[:, :, : place + 1], _noise(x)[:, :, place + 1 :]], dim=2)
                for x in (k, v)
            )
            new, rows = _run(f, q, *changed), slice(0, row + 1)
            trial.equal(new[:, :, rows], whole[:, :, rows], f"keys after {place} changed")
    return trial.outcome()


def past(f: Attention, case: Case) -> Outcome:
    """Other keys and values at a position change the output there; and so does the query."""
    trial, (q, k, v) = _Trial("past", case), _qkv(case)
    whole = _run(f, q, k, v)
    for row, place in _cuts(case):
        here = slice(row, row + 1)
        for name, changed in (("values", (k, _until(v, place))), ("keys", (_until(k, place), v))):
            if name == "values" or place > 0:  # the weight of a single key is 1
                new = _run(f, q, *changed)[:, :, here]
                trial.moved(new, whole[:, :, here], f"{name} up to {place} changed")
        if place > 0:
            new = _run(f, _noise(q), k, v)[:, :, here]
            trial.moved(new, whole[:, :, here], "queries changed")
    return trial.outcome()


def _until(x: Tensor, place: int) -> Tensor:
    return torch.cat([_noise(x)[:, :, : place + 1], x[:, :, place + 1 :]], dim=2)


def batch(f: Attention, case: Case) -> Outcome:
    """A sequence has the same output alone, in another order, and beside other sequences."""
    trial, (q, k, v) = _Trial("batch", case), _qkv(case)
    whole = _run(f, q, k, v)
    for i in range(q.shape[0]):
        one = slice(i, i + 1)
        trial.equal(_run(f, q[one], k[one], v[one]), whole[one], f"sequence {i} alone")
    order = shuffled(q.shape[0], 3)
    trial.equal(_run(f, q[order], k[order], v[order]), whole[order], "sequences in another order")
    more = (torch.cat([x, _noise(x)[:1]]) for x in (q, k, v))
    trial.equal(_run(f, *more)[:-1], whole, "one sequence more")
    return trial.outcome()


def queries(f: Attention, case: Case) -> Outcome:
    """Queries in another order give the same outputs in that order: positions do not matter."""
    trial, (q, k, v) = _Trial("queries", case), _qkv(case)
    order = shuffled(q.shape[2], 4)
    new, old = _run(f, q[:, :, order], k, v), _run(f, q, k, v)[:, :, order]
    trial.equal(new, old, "queries in another order")
    return trial.outcome()


def keys(f: Attention, case: Case) -> Outcome:
    """Keys, with their values, in another order change nothing: positions do not matter."""
    trial, (q, k, v) = _Trial("keys", case), _qkv(case)
    order = shuffled(k.shape[2], 5)
    new = _run(f, q, k[:, :, order], v[:, :, order])
    trial.equal(new, _run(f, q, k, v), "keys in another order")
    return trial.outcome()


def heads(f: Attention, case: Case) -> Outcome:
    """Heads do not know their number: key heads in another order, each with the query heads that
    share it, give outputs in that order; so do query heads that share one key head."""
    trial, (q, k, v) = _Trial("heads", case), _qkv(case)
    whole, group = _run(f, q, k, v), q.shape[1] // k.shape[1]
    order = shuffled(k.shape[1], 6)
    rows = torch.arange(q.shape[1]).view(-1, group)[order].flatten()
    trial.equal(_run(f, q[:, rows], k[:, order], v[:, order]), whole[:, rows], "key heads in order")
    rows = torch.arange(q.shape[1]).view(-1, group).flip(1).flatten()
    trial.equal(_run(f, q[:, rows], k, v), whole[:, rows], "query heads of one key head in order")
    return trial.outcome()


def row_sums(f: Attention, case: Case) -> Outcome:
    """Weights sum to 1: values of 1 give 1."""
    trial, (q, k, v) = _Trial("row sums", case), _qkv(case)
    out = _run(f, q, k, torch.ones_like(v))
    trial.equal(out, torch.ones_like(out), "values of 1")
    return trial.outcome()


def sink_sums(f: Attention, case: Case) -> Outcome:
    """Weights are not negative and sum to less than 1: a sink takes a share."""
    trial, (q, k, v) = _Trial("sums below 1", case), _qkv(case)
    out = _run(f, q, k, torch.ones_like(v))
    trial.compared += out.numel()
    low, high = float(out.min()), float(out.max())
    if not (low >= 0.0 and high < 1.0):
        trial.fail(f"values of 1 give {low:.6g} to {high:.6g}")
    trial.equal(out, out[..., :1].expand_as(out), "values of 1, all dims")
    return trial.outcome()


def values(f: Attention, case: Case) -> Outcome:
    """The output is linear in v: weights do not depend on values."""
    trial, (q, k, v) = _Trial("values", case), _qkv(case)
    other = _noise(v)
    both = _run(f, q, k, 0.5 * v - 2.0 * other)
    trial.equal(both, 0.5 * _run(f, q, k, v) - 2.0 * _run(f, q, k, other), "v of two parts")
    return trial.outcome()


def shift(f: Attention, case: Case) -> Outcome:
    """The same vector added to every key adds a constant to the scores of a row: no change."""
    trial, (q, k, v) = _Trial("shift", case), _qkv(case)
    trial.equal(_run(f, q, k + _noise(k)[:, :, :1], v), _run(f, q, k, v), "keys moved together")
    return trial.outcome()


def decode(f: Attention, case: Case) -> Outcome:
    """Queries one by one, each with the keys that there were then, give the rows of all at once."""
    trial, (q, k, v) = _Trial("decode", case), _qkv(case)
    whole, ahead = _run(f, q, k, v), k.shape[2] - q.shape[2]
    for i in range(max(0, -ahead), q.shape[2]):
        seen = slice(0, ahead + i + 1)
        step = _run(f, q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen])
        trial.equal(step, whole[:, :, i : i + 1], f"query {i} alone")
    return trial.outcome()


def forms_agree(f: Attention, g: Attention, case: Case) -> Outcome:
    """Two forms of one function, such as recurrent and parallel, give the same, and not the same
    for all inputs."""
    trial, x = _Trial("forms agree", case), _qkv(case)
    one = _run(f, *x)
    trial.equal(one, _run(g, *x), "the two forms")
    other = tuple(_noise(y, seed) for seed, y in enumerate(x))
    two = _run(f, *other)
    trial.equal(two, _run(g, *other), "the two forms, on other inputs")
    trial.moved(one, two, "all inputs changed")
    return trial.outcome()


LAWS: dict[str, Law] = {
    "future": future,
    "past": past,
    "decode": decode,
    "queries": queries,
    "keys": keys,
    "batch": batch,
    "heads": heads,
    "row sums": row_sums,
    "values": values,
    "shift": shift,
}
CAUSAL_LAWS = ("future", "decode")
"""They hold for causal attention only."""
UNORDERED_LAWS = ("queries", "keys")
"""They hold only where no position matters."""
