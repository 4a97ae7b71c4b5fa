"""Optimize a model exactly, look at what was found, and check that nothing changed.

The model is a tiny random Llama with a padded row, so this runs on a CPU in seconds.
"""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    mask = torch.ones(2, 48, dtype=torch.int64)
    mask[1, :9] = 0  # the second row is padded on the left
    inputs = {"input_ids": torch.randint(3, 97, (2, 48)) * mask, "attention_mask": mask}

    original = copy.deepcopy(model)
    rewriter.optimize(model, "fuse(from_scores=0)")  # fuse at any size; the default is choosier

    report = rewriter.inspect(model, inputs)
    print(report)
    assert len(report.rewritten) == 2

    print(rewriter.verify(original, model, inputs))  # raises if the two differ

    rewriter.restore(model)
    assert torch.equal(model(**inputs).logits, original(**inputs).logits)


if __name__ == "__main__":
    main()
