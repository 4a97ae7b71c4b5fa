"""The laws of attention: plain and causal attention obey them, and each one can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rewriter.testing import laws
from rewriter.testing.cases import Case, Dims

DIMS = Dims(batch=3, heads=4, kv_heads=2, q_len=9, kv_len=9)
CASE = Case.of("plain", DIMS, dtype=torch.float64)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None = None,
    change: Callable[[Tensor], Tensor] = lambda s: s,
) -> Tensor:
    """Attention in three lines, that shares nothing with the package."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = change(q @ k.mT * q.shape[-1] ** -0.5)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


def lower(q: Tensor, k: Tensor, late: int = 0) -> Tensor:
    ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return ones.tril(k.shape[2] - q.shape[2] + late)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, lower(q, k))


def late_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, lower(q, k, 1))


def constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ones(*q.shape[:3], v.shape[3], dtype=v.dtype)


def from_the_start(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The causal mask without the offset of a cache."""
    return attend(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril())


def with_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q + torch.arange(q.shape[2])[:, None] / 9, k, v)


def with_key_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k + torch.linspace(-1, 1, k.shape[2])[:, None] ** 3, v)


def batch_means(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k - 0.1 * k.mean(0, keepdim=True), v)


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return attend(q, *(x.repeat(1, group, 1, 1) for x in (k, v)))


def slopes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slope = torch.arange(1.0, q.shape[1] + 1).view(-1, 1, 1) / 4
    return attend(q, k, v, change=lambda s: s * slope)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return 0.99 * plain(q, k, v)


def clipped_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k, v.clamp(-1, 1))


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, change=lambda s: 2 * torch.tanh(s / 2))


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One key more, with a score of 0 and a value of 0."""
    return attend(q, *(torch.cat([x, torch.zeros_like(x[:, :, :1])], dim=2) for x in (k, v)))


def negative_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_sink(q, k, v) - 0.2 * v.mean(2, keepdim=True).repeat_interleave(2, 1) * 6


FAULTS = [
    ("future", late_by_one),
    ("past", constant),
    ("decode", from_the_start),
    ("queries", with_positions),
    ("keys", with_key_positions),
    ("batch", batch_means),
    ("heads", interleaved),
    ("heads", slopes),
    ("row sums", scaled),
    ("values", clipped_values),
    ("shift", capped),
]


@pytest.mark.parametrize("name", laws.LAWS)
def test_attention_obeys_the_law(name: str) -> None:
    function = causal if name in laws.CAUSAL_LAWS else plain
    for case in (CASE, replace(CASE, dtype=torch.float32)):
        outcome = laws.LAWS[name](function, case)
        assert outcome.verdict == "passed", outcome


@pytest.mark.parametrize(("name", "faulty"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_law_can_fail(name: str, faulty: Callable[..., Tensor], dtype: torch.dtype) -> None:
    case = replace(CASE, dtype=dtype)
    if name == "decode":
        case = replace(case, dims=replace(DIMS, kv_len=14))
    outcome = laws.LAWS[name](faulty, case)
    assert outcome.verdict == "failed"
    assert outcome.reason


def test_every_law_has_a_planted_fault() -> None:
    assert {name for name, _ in FAULTS} == set(laws.LAWS)


def test_past_sees_values_that_do_not_matter() -> None:
    def without_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, torch.ones_like(v))

    assert laws.past(without_values, CASE).verdict == "failed"


def test_sums_below_one_with_a_sink() -> None:
    assert laws.sink_sums(with_sink, CASE).verdict == "passed"
    assert laws.sink_sums(plain, CASE).verdict == "failed"
    assert laws.sink_sums(negative_weights, CASE).verdict == "failed"


def test_forms_agree_and_can_disagree() -> None:
    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [causal(q[:, :, : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]) for i in range(9)]
        return torch.cat([row[:, :, -1:] for row in rows], dim=2)

    assert laws.forms_agree(one_by_one, causal, CASE).verdict == "passed"
    assert laws.forms_agree(late_by_one, causal, CASE).verdict == "failed"
    outcome = laws.forms_agree(constant, constant, CASE)
    assert outcome.verdict == "failed", "constants agree, and prove nothing"


def test_a_law_that_compared_nothing_has_not_passed() -> None:
    one = replace(CASE, dims=replace(DIMS, q_len=1, kv_len=1))
    outcome = laws.future(causal, one)
    assert outcome.verdict == "skipped"
    assert outcome.reason == "the case is too small for this law"


@pytest.mark.parametrize("name", laws.LAWS)
def test_nan_breaks_every_law(name: str) -> None:
    def nans(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v) * torch.nan

    assert laws.LAWS[name](nans, CASE).verdict == "failed"
