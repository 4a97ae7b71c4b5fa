"""The Triton kernels of a site, as text to read."""

from __future__ import annotations

from typing import Any, cast

import torch

from rewriter.errors import InputError, LoweringError
from rewriter.lowering import kernel_sources
from rewriter.op import core_of
from rewriter.report.report import Report, SiteReport
from rewriter.selectors import Selector

__all__ = ["kernel_text"]


def kernel_text(
    report: Report, selector: str, *, dtype: torch.dtype = torch.bfloat16, capability: int = 90
) -> str:
    """The generated files for the first site that the selector takes, forward and gradients, as a
    GPU would run them.

    Args:
        report: what `rewriter.inspect` gave.
        selector: as behind the `@` of a pass: `"3"`, `"path=decoder.0"`.
        dtype: of queries, keys and values.
        capability: compute capability of the GPU times ten, 80 for an A100, 90 for an H100.

    Raises:
        InputError: if no site with a formula is selected.
        LoweringError: if a formula has no kernel.
    """
    layers = 1 + max((s.site.layer for s in report.sites if s.site.layer is not None), default=-1)
    parsed = Selector.parse(selector)
    chosen = [s for s in report.attention if parsed.matches(s.site, layers)]
    if not chosen:
        names = ", ".join(dict.fromkeys(s.site.name for s in report.attention)) or "none"
        raise InputError(f"no attention is selected by {selector!r}; there are {names}")
    found = next((s for s in chosen if s.after is not None), None)
    if found is None:
        raise InputError(f"{chosen[0].site.name} has no formula: {chosen[0].reason}")
    return _text(found, dtype, capability)


def _text(found: SiteReport, dtype: torch.dtype, capability: int) -> str:
    site, after = found.site, cast(Any, found.after)
    core, _ = core_of(after.to_json())
    wanted = [t.name for t in core.tensors if "float" in t.dtype]
    try:
        sources = kernel_sources(
            core, site.head_dim, site.value_dim or site.head_dim, dtype, wanted, capability
        )
    except LoweringError as reason:
        raise LoweringError(f"{site.name} has no Triton kernel: {reason}") from None
    return "\n\n".join(f"# {name}: {site.name}\n\n{text}" for name, text in sources)
