"""A pass of your own: cap the scores of a model that has no cap, as Gemma 2 does (2408.00118).

A pass edits the formula of a site; kernels, gradients and ONNX follow from the formula.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from transformers import BertConfig, BertModel

import rewriter
from rewriter import symbols
from rewriter.passbase import Pass, option
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec


@dataclass(frozen=True)
class SoftCap(Pass):
    """Scores are kept between -cap and cap: `cap * tanh(score / cap)`.

    Contract: limit; a large cap is the identity.
    """

    name = "example.softcap"
    contract = "limit"
    stage = "score"
    identity = "example.softcap(cap=1e6)"
    cap: float = option("largest absolute score", at_least=0.0)

    def rewrite(self, site: Site, spec: SoftmaxSpec) -> SoftmaxSpec:
        capped = self.cap * sympy.tanh(symbols.s / self.cap)
        return replace(spec, score=spec.score.subs(symbols.s, capped))


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    model = BertModel(config).eval()
    tokens = torch.randint(3, 97, (2, 32))
    with torch.no_grad():
        before = model(input_ids=tokens).last_hidden_state
        for cap in (1.0, 10.0, 1e4):
            rewriter.optimize(model, SoftCap(cap=cap))
            moved = float((model(input_ids=tokens).last_hidden_state - before).abs().max())
            formula = rewriter.inspect(model).attention[0].after
            print(f"cap {cap:g}: outputs move by {moved:.2g}; {formula}")
            rewriter.restore(model)
    assert moved < 1e-3


if __name__ == "__main__":
    main()
