"""What the table and the page say of a site, in words."""

from __future__ import annotations

from rewriter.cost import cost_of
from rewriter.report.positions import position_words
from rewriter.report.report import SiteReport
from rewriter.report.words import mask_words
from rewriter.sites import Site
from rewriter.spec import Spec

__all__ = ["cost_text", "decision_text", "heads_text", "kind_text", "mask_text", "position_text"]


def kind_text(site: Site) -> str:
    """`"self, GQA 32/8 heads, D 128"`."""
    if site.spec is None:
        return site.kind
    dims = f"{site.head_dim}"
    if site.head_dim != site.value_dim:
        dims = f"{site.head_dim}/{site.value_dim}"
    return f"{'cross' if site.is_cross else 'self'}, {heads_text(site)}, D {dims}"


def heads_text(site: Site) -> str:
    """`"GQA 32/8 heads"`: query heads over key heads."""
    heads = f"{site.heads or '?'}"
    if site.heads != site.kv_heads:
        name = "MQA" if site.kv_heads == 1 else "GQA"
        heads = f"{name} {heads}/{site.kv_heads or '?'}"
    return f"{heads} head" if heads == "1" else f"{heads} heads"


def cost_text(line: SiteReport) -> list[str]:
    """The cost of what the site computes now, and of what it computed, if that is another."""
    if line.site.spec is None:
        return []
    before, after = cost_of(line.site), cost_of(line.site, line.after)
    texts = [str(cost) for cost in (after, before) if cost is not None]
    return texts[:1] if len(set(texts)) < 2 else [texts[0], f"was: {texts[1]}"]


def mask_text(spec: Spec) -> str:
    """Which keys a query sees."""
    return ", ".join(mask_words(spec)) or "every key"


def position_text(spec: Spec) -> str:
    """What the formula adds for positions."""
    return ", ".join(position_words(spec)) or "none in the formula"


def decision_text(line: SiteReport) -> str:
    """What was decided, by what, and why."""
    text: str = line.decision
    if line.passes:
        text += f" by {', '.join(line.passes)}"
    if line.lowering:
        text += f" ({line.lowering})"
    return f"{text}: {line.reason}" if line.reason else text
