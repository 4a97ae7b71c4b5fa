"""What a pass is, how a request names one, and how requests are applied to a spec.

A request is one line of text: a pass, its options, and the sites it is for.

    fuse
    sparse.window(window=4, sinks=1) @ 3-5
    heads.scale(heads=[0, 3], by=0.5) @ path=decoder
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

import sympy
from sympy import Expr, Integer
from sympy.logic.boolalg import Boolean

from rewriter import symbols as sym
from rewriter.errors import Declined, PassError, SelectorError
from rewriter.options import check_options, list_text, option, options_of, value_text
from rewriter.selectors import Selector
from rewriter.spec import SoftmaxSpec, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.sites import Site

__all__ = [
    "PATTERNS",
    "Contract",
    "Pass",
    "Pattern",
    "Registry",
    "Request",
    "Selector",
    "apply",
    "blend",
    "option",
    "parse_request",
    "unmatched",
]

Contract = Literal["exact", "limit", "approximate"]
"""`"exact"`: the same function up to rounding. `"limit"`: the same at the identity setting, else
another function on purpose. `"approximate"`: the error is measured and reported."""

Pattern = Literal["noncausal self", "causal self", "noncausal cross", "causal cross"]
"""The four patterns of the Comprehensive Attention Benchmark (arXiv 2210.07661)."""
PATTERNS: tuple[Pattern, ...] = (
    "noncausal self",
    "causal self",
    "noncausal cross",
    "causal cross",
)


@dataclass(frozen=True)
class Pass:
    """An edit of specs. A subclass is a frozen dataclass: fields are `option`s, `rewrite` is pure.

    The first line of its docstring says what holds afterwards; the lines `Contract:`, `Patterns:`
    and `Declines when:` follow, and the data sheet of `rewriter passes NAME` prints them.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    stage: ClassVar[str]
    """The stage of the spec that it edits: "mask", "score", "heads", ...; "none"."""
    families: ClassVar[tuple[str, ...]] = ("softmax",)
    """The families of specs that it can edit; it is not asked about others."""
    identity: ClassVar[str]
    """A request that leaves every function as it was."""
    patterns: ClassVar[tuple[Pattern, ...]] = ()
    """The attentions that it is for; it declines the others. Empty: it does not say."""
    laws: ClassVar[tuple[str, ...]] = ()
    """The laws of `rewriter.testing.laws` that still hold after it, where they held before. Empty:
    it does not say."""
    empty_rows: ClassVar[bool] = True
    """A query that sees no key gives afterwards what it gave before. False: it gives 0, as under a
    boolean mask; the report says so where it gave something else."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Requests that are not the identity, for a site of four heads. Empty: it does not say."""

    def __post_init__(self) -> None:
        check_options(self, self.name)

    def rewrite(self, site: Site, spec: Any) -> Any:
        """The edited spec. New tensors that it reads carry a `Source`, which says how they are
        computed beside the attention, and from which new parameters.

        Raises:
            Declined: the pass does not apply to this site; the text is the reason.
        """
        raise NotImplementedError

    def meaning(self, weights: Tensor) -> Tensor:
        """What the pass makes of the dense weights `[B, H, L, M]` of an attention.

        Its definition said a second time, slowly and without specs, for `rewriter.testing.check`.
        The last query stands at the last key; keys that the model hides have weight 0. A pass that
        does more than change weights leaves this out, and is then not checked in this way.
        """
        raise NotImplementedError

    @property
    def text(self) -> str:
        """The request that makes an equal pass; options at their default are left out."""
        values = [
            f"{key}={value_text(getattr(self, key))}"
            for key, (declared, _) in options_of(type(self)).items()
            if getattr(self, key) != declared.default
        ]
        return f"{self.name}({', '.join(values)})" if values else self.name


EVERYWHERE = Selector()


@dataclass(frozen=True)
class Request:
    """A pass and the sites it is for."""

    action: Pass
    selector: Selector = EVERYWHERE

    @property
    def text(self) -> str:
        """Canonical text: `parse_request` reads it back as an equal request."""
        where = self.selector.text
        return f"{self.action.text} @ {where}" if where else self.action.text


class Registry(Protocol):
    """Whatever finds passes by name: the module `rewriter.registry` does."""

    def find(self, name: str) -> type[Pass]: ...


# --- reading requests ----------------------------------------------------------------------------


def parse_request(text: str, registry: Registry) -> Request:
    """Reads `name`, `name(option=value, ...)`, each also with ` @ selector`. Runs no code.

    Raises:
        PassError: an unknown pass or option, a value that cannot be read or is out of range.
        SelectorError: a selector that cannot be read.
    """
    match = re.match(r"\s*([A-Za-z_][\w.-]*)\s*", text)
    if match is None:
        raise PassError(f"request {text!r} does not start with the name of a pass")
    kind = registry.find(match[1])
    rest, arguments = text[match.end() :], ""
    if rest.startswith("("):
        end = _closing(rest)
        if end is None:
            raise PassError(f"request {text!r} has a bracket that is never closed")
        arguments, rest = rest[1:end], rest[end + 1 :].strip()
    if rest and not rest.startswith("@"):
        raise PassError(f"request {text!r}: expected '@' or the end after the pass, got {rest!r}")
    if rest and not rest.strip("@ \t"):
        raise SelectorError(f"request {text!r} has nothing after '@'; leave it out for every site")
    return Request(_build(kind, arguments), Selector.parse(rest))


def _closing(text: str) -> int | None:
    """The place of the bracket that closes the first one; quoted brackets do not count."""
    depth, quote = 0, ""
    for place, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "([":
            depth += 1
        elif c in ")]":
            depth -= 1
            if depth == 0:
                return place
    return None


def _build(kind: type[Pass], arguments: str) -> Pass:
    options = options_of(kind)
    values: dict[str, Any] = {}
    for key, node in _arguments(kind, arguments):
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = f"it takes {list_text(kind)}" if options else "it takes no options"
            raise PassError(f"{kind.name} has no option {key!r}{hint} ({known})")
        if key in values:
            raise PassError(f"{kind.name}: option {key} is given twice")
        values[key] = _value(kind, key, node)
    missing = [k for k, (f, _) in options.items() if f.default is MISSING and k not in values]
    if missing:
        raise PassError(
            f"{kind.name} needs {' and '.join(missing)}; its options are {list_text(kind)}"
        )
    return kind(**values)


def _arguments(kind: type[Pass], text: str) -> list[tuple[str, ast.expr]]:
    """The `option=value` pairs of a call, each value as a syntax tree that is not evaluated."""
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise PassError(
            f"{kind.name}: the options ({text}) cannot be read; write option=value, ..."
        )
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise PassError(f"{kind.name}: options are given by name; they are {list_text(kind)}")
    return [(str(keyword.arg), keyword.value) for keyword in call.keywords]


def _value(kind: type[Pass], key: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # a bare word is a text, and true is True
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        written = ast.unparse(node)
        raise PassError(f"{kind.name}: option {key} cannot be read from {written!r}") from None


# --- applying requests ---------------------------------------------------------------------------


def apply(
    requests: Iterable[Request], site: Site, spec: Spec, layer_count: int
) -> tuple[Spec, tuple[str, ...], tuple[str, ...]]:
    """Applies the requests that select this site, in order.

    Returns:
        The spec afterwards; the texts of the requests that were applied; for each request that
        was declined, its text and the reason.
    """
    applied, refusals = [], []
    for request in requests:
        if not request.selector.matches(site, layer_count):
            continue
        try:
            if spec.family not in request.action.families:
                raise Declined(f"the site computes {spec.family} attention by now")
            edited: Spec = request.action.rewrite(site, spec)
            if request.selector.heads is not None:
                edited = blend(edited, spec, _heads(request.selector, site), site.heads)
        except Declined as reason:
            refusals.append(f"{request.text}: {reason}")
        else:
            spec = edited
            applied.append(request.text)
    return spec, tuple(applied), tuple(refusals)


def _heads(selector: Selector, site: Site) -> tuple[int, ...]:
    assert selector.heads is not None
    if not site.heads:
        raise Declined("heads are selected, but how many heads this site has is not known")
    outside = selector.heads.outside(site.heads)
    if outside:
        raise Declined(f"head {outside[0]} is selected; {heads_text(site.heads)}")
    return selector.heads.resolve(site.heads)


def heads_text(count: int) -> str:
    """How many heads there are, for a refusal."""
    return f"this site has {count} heads, 0 to {count - 1}" if count > 1 else "this site has 1 head"


def head_condition(heads: Sequence[int]) -> Boolean:
    """`h` is one of `heads`, which ascend."""
    terms, start = [], 0
    for end in range(len(heads)):
        if end + 1 < len(heads) and heads[end + 1] == heads[end] + 1:
            continue
        first, last = heads[start], heads[end]
        between = (sym.h >= first) & (sym.h <= last)
        terms.append(sympy.Eq(sym.h, first) if first == last else between)
        start = end + 1
    return cast(Boolean, sympy.Or(*terms))


def blend(new: Spec, old: Spec, heads: Sequence[int], count: int) -> Spec:
    """`new` for the query heads in `heads`, `old` for the other ones of `count`.

    Raises:
        Declined: the two differ in a stage that cannot differ between heads.
    """
    if new == old or tuple(heads) == tuple(range(count)):
        return new
    named = {t.name: t for t in (*old.tensors, *new.tensors)}
    sizes = tuple(dict.fromkeys((*old.sizes, *new.sizes)))
    known: dict[str, Any] = {"tensors": tuple(named.values()), "sizes": sizes}
    only_outputs = replace(cast(Any, new), heads=old.heads, active=old.active, **known)
    if only_outputs == replace(cast(Any, old), **known):
        blended = replace(
            cast(Any, new),
            heads=_where(head_condition(heads), new.heads, old.heads),
            active=None,
            **known,
        )
        return cast(Spec, blended.without_unused())
    if not isinstance(new, SoftmaxSpec) or not isinstance(old, SoftmaxSpec):
        raise Declined("the pass changes the family, which cannot differ between heads")
    for stage in ("masked", "dropout", "route", "edit", "local", "active", "patch"):
        if getattr(new, stage) != getattr(old, stage):
            raise Declined(f"the pass changes {stage}, which cannot differ between heads")
    here = head_condition(heads)
    if any(named[t.name] != t for t in old.tensors):
        raise Declined("the pass gives a new meaning to a tensor that other heads still read")
    sink = None
    if new.sink is not None or old.sink is not None:
        sink = _where(here, _present(new.sink), _present(old.sink))
    return replace(
        new,
        scale=_where(here, new.scale, old.scale),
        score=_where(here, new.score, old.score),
        mask=_blend_masks(here, new.mask, old.mask),
        sink=sink,
        heads=_where(here, new.heads, old.heads),
        **known,
    ).without_unused()


def _where(condition: Boolean, a: Expr, b: Expr) -> Expr:
    return cast(Expr, sym.Where(condition, a, b))


def _present(sink: Expr | None) -> Expr:
    """No sink is a sink of weight exp(-∞) = 0."""
    return Integer(0) - sympy.oo if sink is None else sink


def _blend_masks(here: Boolean, new: Boolean, old: Boolean) -> Boolean:
    """Where one mask narrows the other, only what it adds is limited to the heads."""
    kept, wanted = set(sympy.And.make_args(old)), set(sympy.And.make_args(new))
    common = sympy.And(*(kept & wanted))
    only_new = sympy.And(*(wanted - kept))
    only_old = sympy.And(*(kept - wanted))
    return cast(Boolean, common & (only_new | ~here) & (only_old | here))


def unmatched(requests: Iterable[Request], sites: Iterable[Site], layer_count: int) -> list[str]:
    """One sentence for each request that matches no site, or names layers that do not exist."""
    sites = list(sites)
    messages = []
    for request in requests:
        layers = request.selector.layers
        outside = layers.outside(layer_count) if layers is not None else ()
        if any(request.selector.matches(site, layer_count) for site in sites) and not outside:
            continue
        has = f"layers 0 to {layer_count - 1}" if layer_count else "no numbered layers"
        if outside:
            what = f"layer {outside[0]} does not exist; the model has {has}"
        elif not sites:
            what = "no attention was found in the model"
        else:
            names = ", ".join(dict.fromkeys(site.path or "(no path)" for site in sites[:3]))
            more = ", ..." if len(sites) > 3 else ""
            what = f"matches none of the {len(sites)} sites ({names}{more}); the model has {has}"
        messages.append(f"{request.text}: {what}")
    return messages
