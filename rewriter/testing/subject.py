"""What `check` checks: a pass with its requests, and the sites that it is tried on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, replace

from rewriter import registry
from rewriter.errors import InputError
from rewriter.options import options_of
from rewriter.passbase import PATTERNS, Pass, Pattern, Request, apply, parse_request
from rewriter.sites import Site
from rewriter.spec import MASKED, SoftmaxSpec, Spec
from rewriter.testing.cases import Case, Dims
from rewriter.testing.outcome import Outcome
from rewriter.testing.sources import HIDDEN

__all__ = ["Subject", "Trial", "function_cases", "pattern_cases", "rewritten", "site_of"]


@dataclass(frozen=True)
class Subject:
    """A pass, and the requests that it is checked with."""

    kind: type[Pass]
    identity: Request | None
    examples: tuple[Request, ...]
    problems: tuple[Outcome, ...] = ()
    """What is wrong with the declaration, and what it does not say."""

    @staticmethod
    def of(what: type[Pass] | Pass) -> Subject:
        """The subject for a class or for one setting of it.

        Raises:
            InputError: if it is neither.
        """
        kind = what if isinstance(what, type) else type(what)
        if not issubclass(kind, Pass) or kind is Pass:
            raise InputError(f"check takes a Pass, a class or a value of it, got {what!r}")
        problems = list(_undeclared(kind))
        identity = _identity(kind, problems)
        found = [_read(kind, text, "examples", problems) for text in kind.examples]
        if isinstance(what, Pass):
            found.insert(0, Request(what))
        elif not kind.examples and _has_defaults(kind):
            found.insert(0, Request(kind()))
        examples = tuple(request for request in found if request is not None)
        return Subject(kind, identity, examples, tuple(problems))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Those that the pass claims; all, if it does not say."""
        return self.kind.patterns or PATTERNS

    @property
    def requests(self) -> tuple[Request, ...]:
        """The identity and the examples."""
        return (*([self.identity] if self.identity else []), *self.examples)

    def find(self, name: str) -> type[Pass]:
        """A registry that also knows this pass."""
        return self.kind if name == self.kind.name else registry.find(name)


def _has_defaults(kind: type[Pass]) -> bool:
    return all(field.default is not MISSING for field, _ in options_of(kind).values())


def _identity(kind: type[Pass], problems: list[Outcome]) -> Request | None:
    """The setting that changes nothing; an approximation may have none."""
    text = getattr(kind, "identity", "")
    if text or kind.contract != "approximate":
        return _read(kind, text, "identity", problems)
    reason = f"{kind.name} approximates and has no setting that changes nothing"
    problems.append(Outcome("identity", "all cases", "skipped", reason))
    return None


def _read(kind: type[Pass], text: str, what: str, problems: list[Outcome]) -> Request | None:
    """The request of a declaration; a problem, if it cannot be read or is for another pass."""
    try:
        request = parse_request(text, Subject(kind, None, ()))
    except InputError as error:
        problems.append(Outcome("declaration", what, "failed", str(error)))
        return None
    if type(request.action) is not kind:
        reason = f"{text!r} is not a request for {kind.name}"
        problems.append(Outcome("declaration", what, "failed", reason))
        return None
    return request


def _undeclared(kind: type[Pass]) -> Iterator[Outcome]:
    from rewriter.testing.laws import LAWS

    for what, effect in (
        ("patterns", "it is tried on all four"),
        ("laws", "only causality is checked"),
        ("examples", "the identity and what is given are all that is checked"),
    ):
        if not getattr(kind, what):
            reason = f"NOT DECLARED: {kind.name} says no {what}; {effect}"
            yield Outcome("declaration", what, "skipped", reason)
    for what, known in (("patterns", PATTERNS), ("laws", tuple(LAWS))):
        unknown = [x for x in getattr(kind, what) if x not in known]
        if unknown:
            reason = f"there is no {unknown[0]!r}; one of {', '.join(known)}"
            yield Outcome("declaration", what, "failed", reason)


# --- sites ----------------------------------------------------------------------------------------

_BASES: dict[Pattern, tuple[str, ...]] = {
    "noncausal self": ("plain", "padding", "relative bias", "key bias", "head scale"),
    "causal self": (
        "causal",
        "causal from the start",
        "causal padding",
        "soft cap",
        "alibi",
        "sink",
        "gate",
    ),
    "noncausal cross": ("plain", "padding"),
    "causal cross": ("causal", "causal padding"),
}
_MORE_BASES: dict[Pattern, tuple[str, ...]] = {
    "noncausal self": ("two-sided window", "buckets"),
    "causal self": (
        "window",
        "window of each head",
        "alibi, sink",
        "documents",
        "cap, then bias",
        "whole bias",
        "sink, padding",
        "size",
    ),
    "noncausal cross": ("key bias", "head scale"),
    "causal cross": ("sink", "gate"),
}


def pattern_cases(pattern: Pattern, *, full: bool = False) -> Iterator[Case]:
    """Attentions of a pattern, with four query heads."""
    self_, n = "self" in pattern, 12
    names = _BASES[pattern] + (_MORE_BASES[pattern] if full else ())
    for name in names:
        yield Case.of(name, Dims(q_len=n, kv_len=n if self_ else 17))
    first = names[0]
    padded = next(name for name in names if "padding" in name)
    yield Case.of(padded, Dims(q_len=n, kv_len=n), masked="mean", hidden="left")
    yield Case.of(first, Dims(q_len=1, kv_len=n))
    yield Case.of(first, Dims(q_len=5, kv_len=n, kv_heads=4))
    if pattern == "noncausal self":
        plain = Case.of(first, Dims(q_len=n, kv_len=n))
        yield replace(plain, name="dropout", spec=replace(plain.softmax, dropout=0.1))
    for size in (1, 2, 63, 64, 65, 129) if full else ():
        yield Case.of(first, Dims(q_len=size, kv_len=size))
    for kv_heads, dim in ((1, 60), (2, 64), (4, 128)) if full else ():
        yield Case.of(first, Dims(q_len=n, kv_len=n, kv_heads=kv_heads, head_dim=dim))


def function_cases(pattern: Pattern) -> Iterator[Case]:
    """More attentions for what costs little, whether a function is as it was: every base, long
    enough for its windows and buckets, with a cache, and rows that see no key of every kind."""
    self_ = "self" in pattern
    for name in dict.fromkeys((*_BASES[pattern], *_MORE_BASES[pattern])):
        for q_len in (33, 20) if self_ else (20,):
            yield Case.of(name, Dims(q_len=q_len, kv_len=33))
    for name in ("padding", "causal padding"):
        if name in _BASES[pattern]:
            for masked in MASKED:
                dims = Dims(q_len=9, kv_len=9 if self_ else 11)
                yield Case.of(name, dims, masked=masked, hidden="all")


def site_of(case: Case, pattern: Pattern) -> Site:
    """The site that a graph with this attention would have."""
    d = case.dims
    return Site(
        "layers.0.attn",
        0,
        spec=case.spec if isinstance(case.spec, SoftmaxSpec) else None,
        heads=d.heads,
        kv_heads=d.kv_heads,
        head_dim=d.head_dim,
        value_dim=d.value_dim,
        is_cross="cross" in pattern,
        q_len=d.q_len,
        kv_len=d.kv_len,
        input_dim=HIDDEN,
        residual_dim=HIDDEN,
        layers=1,
    )


@dataclass(frozen=True)
class Trial:
    """One request on one attention."""

    request: Request
    pattern: Pattern
    case: Case
    new: Spec | None
    """None, if the pass declined."""
    reason: str = ""

    @property
    def text(self) -> str:
        return f"{self.request.text}, {self.pattern}, {self.case.text}"

    @property
    def after(self) -> Case:
        """The case of the new spec."""
        assert self.new is not None
        return replace(self.case, name=f"{self.request.text}, {self.case.name}", spec=self.new)


def rewritten(request: Request, pattern: Pattern, case: Case) -> Trial:
    """What a request makes of an attention. Other exceptions than `Declined` go through."""
    spec, applied, refusals = apply([request], site_of(case, pattern), case.spec, 1)
    if applied:
        return Trial(request, pattern, case, spec)
    reason = refusals[0].removeprefix(f"{request.text}: ") if refusals else "no site is selected"
    return Trial(request, pattern, case, None, reason)
