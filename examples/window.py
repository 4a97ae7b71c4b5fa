"""Give the upper layers of a causal model a sliding window, and see how far information travels.

A change of the first token reaches every later position of a causal model. With a window of 4 in
both layers it reaches 2 * (4 - 1) = 6 positions further, and no more. With one sink token, which
stays visible to all, it reaches everything again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import rewriter

LENGTH = 24


def reached(model: nn.Module, tokens: Tensor) -> list[int]:
    """The positions whose logits change when the first token changes."""
    other, mask = tokens.clone(), torch.ones_like(tokens)
    other[0, 0] += 1
    with torch.no_grad():
        logits = [model(input_ids=x, attention_mask=mask).logits for x in (tokens, other)]
    difference = logits[0] - logits[1]
    return [i for i, row in enumerate(difference[0]) if float(row.abs().max()) > 1e-6]


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 96, (1, LENGTH))

    full = reached(model, tokens)
    print(f"full attention       token 0 reaches positions 0 to {full[-1]}")
    assert full == list(range(LENGTH))

    rewriter.optimize(model, "sparse.window(window=4)")
    near = reached(model, tokens)
    print(f"window 4             token 0 reaches positions 0 to {near[-1]}")
    print(rewriter.inspect(model))
    assert near == list(range(7))

    rewriter.restore(model)
    rewriter.optimize(model, "sparse.window(window=4, sinks=1)")
    kept = reached(model, tokens)
    print(f"window 4 and 1 sink  token 0 reaches positions 0 to {kept[-1]}")
    assert kept == full


if __name__ == "__main__":
    main()
