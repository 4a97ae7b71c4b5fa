"""Which attention head matters? Ablate one at a time and measure how the prediction moves.

Nothing is recomputed as a matrix of weights: the head is switched off inside the rewritten
attention. Ablating the heads in one request does the same as ablating them in two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import rewriter

HEADS = 4


def log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        return model(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)


def ablated(model: nn.Module, tokens: Tensor, *passes: str) -> Tensor:
    """What the model says with the passes in place; it is left as it was."""
    rewriter.optimize(model, *passes)
    said = log_probabilities(model, tokens)
    rewriter.restore(model)
    return said


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97,
        n_embd=64,
        n_layer=1,
        n_head=HEADS,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 97, (2, 32))
    before = log_probabilities(model, tokens)

    for head in range(HEADS):
        after = ablated(model, tokens, f"heads.scale(heads=[{head}], by=0) @ 0")
        moved = float((before.exp() * (before - after)).sum(-1).mean())
        print(f"layer 0 without head {head}: KL {moved:.4f}")
        assert moved > 1e-3

    together = ablated(model, tokens, "heads.scale(heads=[0, 2], by=0)")
    apart = ablated(model, tokens, "heads.scale(heads=[0], by=0)", "heads.scale(heads=[2], by=0)")
    assert torch.allclose(together, apart, atol=1e-6)
    assert torch.equal(log_probabilities(model, tokens), before)


if __name__ == "__main__":
    main()
