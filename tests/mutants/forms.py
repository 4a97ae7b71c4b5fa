"""Wrong forms of attention: linear with decay, normalised, routed by block, windowed, mixed heads.

A family has one plain form that defines it and further forms that compute the same, as kernels do:
in chunks, step by step, from selected blocks. A mutant is a mistake in one of these. It is held
against the plain form (`laws.forms_agree`) and to the laws that the family obeys; where a law sees
it, that law is to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mutants.catalogue import Mutant

__all__ = ["FAMILIES", "MUTANTS", "Family", "Form"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

CHUNK = 8


@dataclass(frozen=True)
class Family:
    """One function, and the forms in which it is computed."""

    name: str
    plain: Attention
    laws: tuple[str, ...]
    forms: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    """By name; each takes q, k, v and the faults as keywords."""


@dataclass(frozen=True)
class Form:
    """A form with a mistake in it."""

    family: Family
    form: Attention


FAMILIES: list[Family] = []
MUTANTS: list[Mutant] = []


def family(name: str, plain: Attention, laws: tuple[str, ...], **forms: Any) -> Family:
    made = Family(name, plain, laws, {n.replace("_", " "): f for n, f in forms.items()})
    FAMILIES.append(made)
    return made


def wrong(
    of: Family, form: str, fault: str, name: str, breaks: str = "", expected: str = ""
) -> None:
    """The form with one of its faults."""
    made = Form(of, partial(of.forms[form], fault=fault))
    MUTANTS.append(Mutant(name, "form", breaks, expected or "law: forms agree", made))


# --- linear attention with decay: `o_i = sum over j <= i of λ^(i - j) (q_i · k_j) v_j` ------------


def decays(q: Tensor) -> Tensor:
    """λ of each head, `[H, 1, 1]`."""
    return 0.5 ** (torch.arange(1.0, q.shape[1] + 1).view(-1, 1, 1) / q.shape[1])


def decay_parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    distance = place[:, None] - place
    weight = torch.where(distance >= 0, decays(q) ** distance.clamp_min(0), 0.0)
    return (q @ k.mT * weight) @ v


def decay_recurrent(q: Tensor, k: Tensor, v: Tensor, *, fault: str = "") -> Tensor:
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for q_t, k_t, v_t in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        before = state
        new = k_t[..., :, None] * v_t[..., None, :]
        if fault == "decay of the new token":
            state = decays(q) * (state + new)
        elif fault == "no decay":
            state = state + new
        elif fault == "decay of another head":
            state = decays(q).flip(0) * state + new
        else:
            state = decays(q) * state + new
        if fault == "state in bf16":
            state = state.to(torch.bfloat16).to(q.dtype)
        read = before if fault == "state before" else state
        rows.append((q_t[..., None, :] @ read)[..., 0, :])
    return torch.stack(rows, 2)


def decay_chunks(q: Tensor, k: Tensor, v: Tensor, *, fault: str = "") -> Tensor:
    return _decay_chunks(q, k, v, fault)[0]


def _decay_chunks(q: Tensor, k: Tensor, v: Tensor, fault: str) -> tuple[Tensor, Tensor]:
    """Blocks of `CHUNK` tokens: inside a block in parallel, between blocks by the state."""
    rate, state = decays(q), q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    length = q.shape[2]
    if fault == "partial block dropped":
        length = length // CHUNK * CHUNK
    out = torch.zeros(*q.shape[:3], v.shape[3])
    for start in range(0, length, CHUNK):
        part = slice(start, min(start + CHUNK, length))
        q_c, k_c, v_c = q[:, :, part], k[:, :, part], v[:, :, part]
        n = q_c.shape[2]
        row = torch.arange(n).view(-1, 1)
        distance = row - torch.arange(n)
        inside = distance > 0 if fault == "strict mask" else distance >= 0
        weight = torch.where(inside, rate ** distance.clamp_min(0), 0.0)
        late = {"query decay": row, "query decay, more": row + 2}.get(fault, row + 1)
        read = k_c if fault == "state before" else q_c
        new_out = (q_c @ k_c.mT * weight) @ v_c + rate**late * (read @ state)
        if fault == "inside first rounded":
            inner = ((q_c @ k_c.mT * weight) @ v_c).to(torch.bfloat16).to(q.dtype)
            new_out = inner + rate**late * (q_c @ state)
        out[:, :, part] = new_out
        length_of = CHUNK if fault == "ragged block decayed by a full one" else n
        early = length_of - row if fault == "key decay" else length_of - 1 - row
        update = (k_c * rate**early).mT @ v_c
        if fault == "state transposed":
            update = update.mT
        if fault == "state reset":
            state = update
        elif fault == "state decayed by one":
            state = rate * state + update
        else:
            state = rate**length_of * state + update
    return out, state


def decay_prefill_decode(q: Tensor, k: Tensor, v: Tensor, *, fault: str = "") -> Tensor:
    """The first part in chunks, the rest token by token from its state."""
    first = q.shape[2] * 2 // 3
    if first % CHUNK == 0:
        first -= 1
    head, state = _decay_chunks(q[:, :, :first], k[:, :, :first], v[:, :, :first], fault)
    if fault == "state of the whole blocks":
        whole = first // CHUNK * CHUNK
        state = _decay_chunks(q[:, :, :whole], k[:, :, :whole], v[:, :, :whole], "")[1]
    rows = [head]
    for t in range(first, q.shape[2]):
        here = slice(t, t + 1)
        state = decays(q) * state + k[:, :, here].mT @ v[:, :, here]
        rows.append(q[:, :, here] @ state)
    return torch.cat(rows, 2)


DECAY = family(
    "linear attention with decay",
    decay_parallel,
    ("future", "batch", "values"),
    recurrent=decay_recurrent,
    chunks=decay_chunks,
    prefill_and_decode=decay_prefill_decode,
)

wrong(
    DECAY,
    "chunks",
    "query decay",
    "decay exponent of the queries off by one",
    "a copy of the kernel pairs two conventions: cross-block terms are too large by exp(s)",
)
wrong(DECAY, "chunks", "query decay, more", "decay exponent of the queries one too many")
wrong(
    DECAY,
    "chunks",
    "key decay",
    "decay exponent of the keys off by one",
    "exp(-s (B - j)) where the state wants exp(-s (B - 1 - j))",
)
wrong(
    DECAY,
    "recurrent",
    "state before",
    "state read before the block is stored",
    "instead of after: a token does not see itself",
)
wrong(DECAY, "recurrent", "decay of the new token", "decay applied to the current token")
wrong(
    DECAY, "recurrent", "no decay", "decay forgotten", "lambda is almost 1 in the last layer only"
)
wrong(
    DECAY,
    "recurrent",
    "decay of another head",
    "decay of another head",
    "slopes in the opposite order",
)
wrong(DECAY, "recurrent", "state in bf16", "state kept in bfloat16", expected="law: values")
wrong(DECAY, "chunks", "strict mask", "mask inside a block strict", "instead of inclusive")
wrong(DECAY, "chunks", "state reset", "state of the last block only")
wrong(DECAY, "chunks", "state decayed by one", "state decayed by a token, not by a block")
wrong(DECAY, "chunks", "state transposed", "state transposed", "v ⊗ k for k ⊗ v")
wrong(
    DECAY,
    "chunks",
    "partial block dropped",
    "last partial block of a linear attention dropped",
    "floor(N / 256) blocks in the official parallel form",
)
wrong(
    DECAY,
    "chunks",
    "inside first rounded",
    "inside term rounded before the sum",
    "the backward adds the inter part to what is rounded to bfloat16 already",
    expected="law: values",
)
wrong(
    DECAY,
    "prefill and decode",
    "ragged block decayed by a full one",
    "ragged last block decayed by a full block",
    "wrong state after a prefill of N mod B != 0",
)
wrong(
    DECAY,
    "prefill and decode",
    "state of the whole blocks",
    "tail missing in the state",
    "the state that prefill hands over ends at the last whole block",
)


# --- normalised linear attention: `phi(q) phi(K)^T V / phi(q) phi(K)^T 1` -------------------------


def phi(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def normalised_parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.shape[3] ** -0.5
    weight = (phi(q * scale) @ phi(k).mT).tril()
    return weight @ v / weight.sum(-1, keepdim=True)


def normalised_chunks(q: Tensor, k: Tensor, v: Tensor, *, fault: str = "") -> Tensor:
    scale = q.shape[3] ** -0.5
    q = phi(q) * scale if fault == "map before the scale" else phi(q * scale)
    k = k if fault == "map of the queries only" else phi(k)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    total = q.new_zeros(*q.shape[:2], q.shape[3], 1)
    if fault == "sum over all keys":
        total = k.sum(2)[..., None]
    out = []
    for start in range(0, q.shape[2], CHUNK):
        q_c, k_c, v_c = (x[:, :, start : start + CHUNK] for x in (q, k, v))
        weight = (q_c @ k_c.mT).tril()
        above = weight @ v_c + q_c @ state
        below = weight.sum(-1, keepdim=True) + q_c @ total
        if fault == "sum without the tail":
            below = q_c @ (total + k_c.sum(2)[..., None]) if q_c.shape[2] == CHUNK else q_c @ total
        if fault == "sum without the block":
            below = below - weight.diagonal(dim1=-2, dim2=-1)[..., None] * 0.5
        if fault == "sum over all keys":
            below = q_c @ total
        out.append(above / (below + (1e-2 if fault == "large epsilon" else 0.0)))
        state = state + k_c.mT @ v_c
        if fault != "sum over all keys":
            total = total + k_c.sum(2)[..., None]
    return torch.cat(out, 2)


NORMALISED = family(
    "normalised linear attention",
    normalised_parallel,
    ("future", "batch", "row sums", "values"),
    chunks=normalised_chunks,
)

wrong(
    NORMALISED,
    "chunks",
    "map before the scale",
    "feature map before the scale",
    "phi(q) · scale for phi(q · scale): the scale cancels",
)
wrong(NORMALISED, "chunks", "map of the queries only", "feature map of the keys forgotten")
wrong(
    NORMALISED,
    "chunks",
    "sum without the tail",
    "normaliser without the tail",
    "the last partial block is missing in the denominator",
    expected="law: row sums",
)
wrong(
    NORMALISED,
    "chunks",
    "sum without the block",
    "normaliser without the current token",
    expected="law: row sums",
)
wrong(
    NORMALISED,
    "chunks",
    "sum over all keys",
    "normaliser over all keys",
    "a causal numerator over a sum that sees the future",
    expected="law: future",
)
wrong(
    NORMALISED,
    "chunks",
    "large epsilon",
    "epsilon of the size of the sum",
    "1e-12 is meant; 1e-2 weighs",
    expected="law: row sums",
)


# --- attention to routed blocks of keys (MoBA) ----------------------------------------------------

TOP = 2


def routed_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees its own block causally, and the `TOP` past blocks whose mean key has the
    largest product with it."""
    return _masked(q, k, v, _routed_mask(q, k))


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def _routed_mask(q: Tensor, k: Tensor) -> Tensor:
    """By the rules, token by token."""
    length = q.shape[2]
    blocks = -(-length // CHUNK)
    seen = torch.zeros(*q.shape[:3], length, dtype=torch.bool)
    for i in range(length):
        own = i // CHUNK
        seen[:, :, i, own * CHUNK : i + 1] = True
        if not own:
            continue
        means = torch.stack(
            [k[:, :, j * CHUNK : (j + 1) * CHUNK].mean(2) for j in range(min(own, blocks))], 2
        )
        gate = (q[:, :, i : i + 1] * means).sum(-1)  # [B, H, own]
        for j in gate.topk(min(TOP, own)).indices.unbind(-1):
            where = j[..., None] == torch.arange(length) // CHUNK
            seen[:, :, i] |= where
    return seen


def routed_by_block(q: Tensor, k: Tensor, v: Tensor, *, fault: str = "") -> Tensor:
    """All gates at once, from means of padded blocks; two branches joined by their logsumexp."""
    batch, heads, length, dim = q.shape
    blocks = -(-length // CHUNK)
    padded = torch.nn.functional.pad(k, (0, 0, 0, blocks * CHUNK - length), value=0.0)
    tiles = padded.view(batch, heads, blocks, CHUNK, dim)
    means = tiles.sum(3) / CHUNK
    if fault == "largest of a block":
        means = tiles.amax(3)
    gate = q @ means.mT  # [B, H, L, blocks]
    if fault == "scores transposed" and blocks > 1:
        gate = gate.flip(-1)
    own = (torch.arange(length) // CHUNK)[:, None]
    block = torch.arange(blocks)
    open_ = block <= own if fault == "current block routed" else block < own
    if fault == "future blocks routed":
        open_ = block != own
    gate = gate.masked_fill(~open_, -torch.inf)
    count = min(blocks, TOP + (fault == "one block more"))
    chosen = torch.zeros_like(gate, dtype=torch.bool)
    chosen.scatter_(-1, gate.topk(count).indices, True)
    if fault == "heads share a route":
        chosen = chosen[:, :1].expand_as(chosen)
    chosen = chosen & open_
    far = chosen.repeat_interleave(CHUNK, -1)[..., :length]
    place = torch.arange(length)
    near = (block == own).repeat_interleave(CHUNK, -1)[..., :length]
    if fault != "own block not causal":
        near = near & (place <= place[:, None])
    if fault == "current block left out":
        near = near & (place == place[:, None])
    scores = q @ k.mT * dim**-0.5
    parts = [scores.masked_fill(~seen, -torch.inf) for seen in (near.expand_as(far), far)]
    outs = [(x - x.amax(-1, keepdim=True).clamp_min(-1e30)).exp() for x in parts]
    tops = [x.amax(-1, keepdim=True).clamp_min(-1e30) for x in parts]
    lse = [
        t + p.sum(-1, keepdim=True).clamp_min(1e-38).log() for t, p in zip(tops, outs, strict=True)
    ]
    weight = torch.softmax(torch.cat(lse, -1), -1)
    if fault == "branches averaged":
        some = far.any(-1, keepdim=True)
        weight = torch.cat([1 - 0.5 * some, 0.5 * some], -1)
    sums = [p.sum(-1, keepdim=True).clamp_min(1e-38) for p in outs]
    return sum(
        weight[..., n : n + 1] * (p / t @ v)
        for n, (p, t) in enumerate(zip(outs, sums, strict=True))
    )


ROUTED = family(
    "attention to routed blocks",
    routed_plain,
    ("future", "batch", "row sums", "values"),
    by_block=routed_by_block,
)

wrong(
    ROUTED,
    "by block",
    "future blocks routed",
    "block summaries include future blocks",
    expected="law: future",
)
wrong(
    ROUTED,
    "by block",
    "current block routed",
    "the current block takes a place of the routed ones",
    "its mean has keys of the future",
    expected="law: future",
)
wrong(
    ROUTED,
    "by block",
    "current block left out",
    "routing leaves out the current block",
    "only the query's own key is left of it",
)
wrong(
    ROUTED,
    "by block",
    "own block not causal",
    "own block not causal",
    "is_causal is accepted, and the kernel is handed False",
    expected="law: future",
)
wrong(
    ROUTED,
    "by block",
    "scores transposed",
    "top-k by a wrong score",
    "blocks in another order",
    expected="law: future",
)
wrong(
    ROUTED,
    "by block",
    "largest of a block",
    "blocks summed up by their largest key",
    "not by the mean",
)
wrong(ROUTED, "by block", "one block more", "one block too many is chosen")
wrong(ROUTED, "by block", "heads share a route", "routes of the first head for all")
wrong(
    ROUTED,
    "by block",
    "branches averaged",
    "two branches averaged",
    "instead of joined by their logsumexp",
)


# --- bidirectional routing between regions, with padding (BiFormer) -------------------------------


def regions_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each region of queries sees the `TOP` regions of keys nearest to it by their means."""
    length = q.shape[2]
    region = torch.arange(length) // CHUNK
    count = int(region[-1]) + 1
    means = [torch.stack([x[:, :, region == r].mean(2) for r in range(count)], 2) for x in (q, k)]
    best = (means[0] @ means[1].mT).topk(min(TOP, count)).indices  # [B, H, regions, TOP]
    allowed = torch.zeros(*q.shape[:2], count, count, dtype=torch.bool).scatter_(-1, best, True)
    return _masked(q, k, v, allowed[:, :, region][..., region])


def regions_padded(q: Tensor, k: Tensor, v: Tensor, *, fault: str = "") -> Tensor:
    """The same on whole tiles, padded at the end."""
    length = q.shape[2]
    count = -(-length // CHUNK)
    size = torch.full((count,), float(CHUNK))
    size[-1] = length - (count - 1) * CHUNK

    def tiles(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, count * CHUNK - length))
        return padded.view(*x.shape[:2], count, CHUNK, -1)

    def mean(x: Tensor) -> Tensor:
        whole = torch.full_like(size, CHUNK)
        return tiles(x).sum(3) / (whole if fault == "padding averaged" else size)[:, None]

    gate = mean(q) @ mean(k).mT
    if fault == "transposed":
        gate = gate.mT
    best = gate.topk(min(TOP, count)).indices
    if fault == "index padding":
        best = torch.where(torch.arange(count)[:, None] == count - 1, 0, best)
    allowed = torch.zeros(*q.shape[:2], count, count, dtype=torch.bool).scatter_(-1, best, True)
    seen = allowed.repeat_interleave(CHUNK, 2).repeat_interleave(CHUNK, 3)
    whole = [tiles(x).flatten(2, 3) for x in (q, k, v)]
    if fault != "padding seen":
        seen[..., length:] = False
        seen[..., length:, 0] = True
    return _masked(*whole, seen)[:, :, :length]


REGIONS = family(
    "routing between regions",
    regions_plain,
    ("batch", "row sums", "values"),
    padded=regions_padded,
)

wrong(REGIONS, "padded", "padding averaged", "padding keys averaged into a block mean")
wrong(
    REGIONS,
    "padded",
    "padding seen",
    "padding of a ragged region attended to",
    expected="law: row sums",
)
wrong(
    REGIONS,
    "padded",
    "transposed",
    "routing by a transposed score",
    "key regions choose query regions",
)
wrong(
    REGIONS,
    "padded",
    "index padding",
    "index padding selects the first block",
    "0 as padding of a list of blocks",
)


# --- a cache with a window and sinks --------------------------------------------------------------

WINDOW, SINKS = 6, 2


def streaming_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    back = place[:, None] - place
    return _masked(q, k, v, (back >= 0) & ((back < WINDOW) | (place < SINKS)))


def streaming_cached(q: Tensor, k: Tensor, v: Tensor, *, fault: str = "") -> Tensor:
    """Token by token, with a ring of the last keys and the first ones kept."""
    ring: list[int] = []
    rows = []
    window = {"ring too long": WINDOW + 1, "evicted early": WINDOW - 1}.get(fault, WINDOW)
    for t in range(q.shape[2]):
        if fault != "appended late":
            ring.append(t)
        kept = [j for j in ring if j < SINKS or t - j < window]
        if fault == "sinks evicted":
            kept = ring[-window:]
        if fault == "sinks inside the window":
            kept = [j for j in ring if j < SINKS or t - j < window - SINKS]
        kept = kept or [t]
        here = slice(t, t + 1)
        seen = torch.ones(1, len(kept), dtype=torch.bool)
        rows.append(_masked(q[:, :, here], k[:, :, kept], v[:, :, kept], seen))
        if fault == "appended late":
            ring.append(t)
    return torch.cat(rows, 2)


STREAMING = family(
    "window with kept sinks",
    streaming_plain,
    ("future", "batch", "row sums", "values"),
    cached=streaming_cached,
)

wrong(STREAMING, "cached", "ring too long", "cache one key too long", "a window of w + 1")
wrong(STREAMING, "cached", "evicted early", "key evicted one step early")
wrong(STREAMING, "cached", "sinks evicted", "first keys evicted from the cache")
wrong(
    STREAMING,
    "cached",
    "sinks inside the window",
    "first keys take places of the window",
    "a cache of w keys in all",
)
wrong(
    STREAMING,
    "cached",
    "appended late",
    "key appended after the step",
    "the token does not see itself",
)


# --- weights edited after the softmax (VAR), and heads routed by token (MoH) ----------------------

KEEP, GROUP = 0.6, 3
"""What the first `GROUP` keys keep of their weight; the rest goes to the others."""


def edited_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ _repeated(k, q).mT * q.shape[3] ** -0.5).softmax(-1)
    sink, rest = p[..., :GROUP], p[..., GROUP:]
    free = (1 - KEEP) * sink.sum(-1, keepdim=True)
    rest = rest * (1 + free / rest.sum(-1, keepdim=True))
    return torch.cat([KEEP * sink, rest], -1) @ _repeated(v, q)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def edited_groups(q: Tensor, k: Tensor, v: Tensor, *, fault: str = "") -> Tensor:
    """From the softmax of each group of keys and the share of each."""
    k, v = _repeated(k, q), _repeated(v, q)
    scores = q @ k.mT * q.shape[3] ** -0.5
    parts = [slice(0, GROUP), slice(GROUP, None)]
    share = torch.cat([scores[..., x].logsumexp(-1, keepdim=True) for x in parts], -1).softmax(-1)
    first, second = (scores[..., x].softmax(-1) @ v[:, :, x] for x in parts)
    keep = {"kept share squared": KEEP**2, "keep and drop mixed up": 1 - KEEP}.get(fault, KEEP)
    a = keep * share[..., :1]
    b = 1 - a
    if fault == "mass lost":
        b = share[..., 1:]
    if fault == "mass to all keys":
        a, b = a / (a + share[..., 1:]), share[..., 1:] / (a + share[..., 1:])
    if fault == "normalised twice":
        a, b = 2 * a, 2 * b
    if fault == "shares of the key head":
        groups = q.shape[1] // 2
        a = a.unflatten(1, (-1, groups))[:, :, :1].expand(-1, -1, groups, -1, -1).flatten(1, 2)
        b = 1 - a
    return a * first + b * second


EDITED = family(
    "weights edited after the softmax",
    edited_plain,
    ("batch", "row sums", "values", "queries", "shift", "heads"),
    groups=edited_groups,
)

wrong(
    EDITED,
    "groups",
    "normalised twice",
    "edited rows sum to 2",
    "normalised before and after",
    expected="law: row sums",
)
wrong(EDITED, "groups", "mass lost", "mass that is taken goes nowhere", expected="law: row sums")
wrong(
    EDITED,
    "groups",
    "mass to all keys",
    "mass goes to all keys",
    "renormalised, not handed to the others",
)
wrong(
    EDITED,
    "groups",
    "keep and drop mixed up",
    "keep and drop mixed up",
    "p means opposite things in paper and code",
)
wrong(EDITED, "groups", "kept share squared", "edit applied twice")
wrong(
    EDITED,
    "groups",
    "shares of the key head",
    "edit chosen per key head",
    "with shared keys the choice is per query head",
    expected="law: heads",
)


def mixed_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of each token, those with the longest queries, weighted by a softmax of them."""
    norms = q.norm(dim=-1)  # [B, H, L]
    gate = torch.zeros_like(norms)
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            best = norms[b, :, t].topk(2).indices
            gate[b, best, t] = norms[b, best, t].softmax(0) * 2
    p = (q @ _repeated(k, q).mT * q.shape[3] ** -0.5).softmax(-1)
    return gate[..., None] * (p @ _repeated(v, q))


def mixed_dense(q: Tensor, k: Tensor, v: Tensor, *, fault: str = "") -> Tensor:
    norms = q.norm(dim=-1)
    if fault == "routes of the first token":
        norms = norms[:, :, :1].expand_as(norms)
    if fault == "routes by key heads":
        norms = _repeated(k, q).norm(dim=-1)[:, :, : q.shape[2]]
    best, which = norms.topk(2, dim=1)
    weight = best.softmax(1) * 2
    if fault == "weights not renormalised":
        weight = norms.softmax(1).gather(1, which) * 2
    if fault == "balance over the batch":
        weight = weight / weight.sum((0, 1), keepdim=True) * 2
    gate = torch.zeros_like(norms).scatter(1, which, weight)
    if fault == "heads counted from 1":
        gate = gate.roll(1, 1)
    p = (q @ _repeated(k, q).mT * q.shape[3] ** -0.5).softmax(-1)
    if fault == "gate before the softmax":
        p = (gate[..., None] * (q @ _repeated(k, q).mT) * q.shape[3] ** -0.5).softmax(-1)
        return p @ _repeated(v, q)
    return gate[..., None] * (p @ _repeated(v, q))


MIXED = family(
    "heads routed by token",
    mixed_plain,
    ("batch", "values", "queries", "keys", "heads"),
    dense=mixed_dense,
)

wrong(
    MIXED,
    "dense",
    "weights not renormalised",
    "routed weights not renormalised",
    "the softmax runs over all heads, not over the chosen ones",
)
wrong(
    MIXED,
    "dense",
    "routes of the first token",
    "routes of the first token for all",
    expected="law: queries",
)
wrong(MIXED, "dense", "routes by key heads", "routes by the keys", expected="law: queries")
wrong(
    MIXED,
    "dense",
    "balance over the batch",
    "gates balanced over the batch",
    "a sequence depends on its neighbours",
    expected="law: batch",
)
wrong(MIXED, "dense", "heads counted from 1", "routed heads counted from 1", expected="law: heads")
wrong(MIXED, "dense", "gate before the softmax", "gate of a head on its scores")
