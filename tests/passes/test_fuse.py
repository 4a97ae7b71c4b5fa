"""fuse: the identity on specs."""

from __future__ import annotations

import pytest

from rewriter import symbols as sym
from rewriter.errors import Declined
from rewriter.passes.fuse import Fuse
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec

SITE = Site("layers.0.attn", 0, heads=4, kv_heads=4)


def test_fuse_returns_the_spec_itself() -> None:
    spec = SoftmaxSpec(mask=sym.k <= sym.q)
    assert Fuse().rewrite(SITE, spec) is spec
    assert Fuse(from_scores=0).rewrite(SITE, spec) is spec


def test_fuse_declines_active_dropout_unless_asked() -> None:
    spec = SoftmaxSpec(dropout=0.1)
    with pytest.raises(Declined, match=r"dropout of 0\.1 is active; fused code draws other random"):
        Fuse().rewrite(SITE, spec)
    assert Fuse(dropout=True).rewrite(SITE, spec) is spec
