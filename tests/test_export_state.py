"""Files that hand states on: a prompt, then a few tokens at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

import rewriter
import zoo
from rewriter.errors import InputError
from rewriter.export import export_onnx
from rewriter.program import length_axis

LLAMA, GPT2 = zoo.architecture("llama"), zoo.architecture("gpt2")


def inputs_of(model: Any, past: int, new: int) -> dict[str, Any]:
    """One call with a cache, whose values do not matter."""
    config, cache = model.config, transformers.DynamicCache()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(2, heads, past, 8), torch.zeros(2, heads, past, 8), layer)
    mask = torch.ones(2, past + new, dtype=torch.long)
    mask[-1, :2] = 0
    tokens = torch.randint(3, zoo.VOCABULARY, (2, new), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "past_key_values": cache,
        "use_cache": True,
    }


def check_pieces(model: Any, path: Path, labels: torch.Tensor | None, wrong: str = "") -> None:
    """A prompt of 8 tokens, two times one and one time two are the whole; from the second piece on
    they are not, if the blocks or keys of the state named `wrong` are turned around."""
    tokens = LLAMA.inputs(batch=3, length=12)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    with torch.no_grad():
        whole = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    own = {"input_ids", "attention_mask", "labels"}
    kept = [x for x in session.get_inputs() if x.name not in own]
    kind = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64}
    state = {}
    for x in kept:  # 0 where sizes are fixed, else of no key and no block
        sizes = [n if isinstance(n, int) else 0 for n in x.shape[1:]]
        state[x.name] = torch.zeros(3, *sizes, dtype=kind[x.type]).numpy()
    feed = {} if labels is None else {"labels": labels.expand(3, -1).numpy()}
    for start, stop in [(0, 8), (8, 9), (9, 10), (10, 12)]:
        feed |= {
            "input_ids": tokens[:, start:stop].numpy(),
            "attention_mask": mask[:, :stop].numpy(),
        }
        logits, *after = session.run(None, feed | state)
        real = mask[:, start:stop] != 0
        found, wanted = torch.from_numpy(logits)[real], whole[:, start:stop][real]
        error = float((found - wanted).abs().max())
        assert (error > 1e-2) if wrong and start else (error < 1e-4), f"{start}: {error:.1e}"
        state = dict(zip(state, after, strict=True))
        if wrong:
            state[wrong] = np.flip(state[wrong], 2 if state[wrong].ndim == 4 else 1).copy()


def test_a_prompt_and_then_token_by_token_is_the_whole(tmp_path: Path) -> None:
    """No layer of this model needs a cache: the file takes tokens, a mask and the states."""
    path, model = tmp_path / "model.onnx", LLAMA.build("eager")
    rewriter.optimize(model, "linear.features(map=elu) @ 0", "linear.lightning(rule=retnet) @ 1")
    report = export_onnx(model, inputs_of(model, 3, 5), path, check_inputs=[], state=True)
    first, second = (f"past_state.model.layers.{i}.self_attn" for i in (0, 1))
    assert report.inputs == {
        "input_ids": ("batch", "length"),
        "attention_mask": ("batch", "past_length + length"),
        first: ("batch", 2, 8, 9),  # a head of keys, and the sum of its weights
        second: ("batch", 4, 8, 8),  # each query head decays in its own way
    }
    assert [n.replace("present", "past") for n in report.outputs] == ["logits", first, second]
    onnx.checker.check_model(onnx.load(path), full_check=True)

    check_pieces(model, path, labels=None)


def test_other_sites_keep_their_caches_beside_the_state(tmp_path: Path) -> None:
    model = rewriter.optimize(GPT2.build("eager"), "linear.lightning(rule=retnet) @ 1")
    inputs = inputs_of(model, 3, 5)
    report = export_onnx(model, inputs, tmp_path / "model.onnx", state=True)
    assert list(report.inputs)[2:] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_state.transformer.h.1.attn",
    ]
    assert len(report.checks) == 3
    assert all(c.error < 1e-5 for c in report.checks)


def test_sums_of_blocks_are_handed_on_beside_the_cache(tmp_path: Path) -> None:
    """Two sizes of blocks, so two counts; the choice is made by the sums and nothing else."""
    path, model = tmp_path / "model.onnx", LLAMA.build("eager")
    passes = [f"sparse.moba(block={b}, topk=2, dense_below=0) @ {i}" for i, b in enumerate((2, 3))]
    rewriter.optimize(model, *passes)
    report = export_onnx(model, inputs_of(model, 9, 5), path, state=True)
    states = {n: shape for n, shape in report.inputs.items() if n.startswith("past_state")}
    assert list(states.values()) == [
        ("batch", 2, "past_blocks", 8),
        ("batch", 2, "past_state_past_blocks", 8),
    ]
    assert len([n for n in report.inputs if n.startswith("past_key_values")]) == 4
    assert len(report.checks) == 3
    assert all(c.error < 1e-5 for c in report.checks)
    check_pieces(model, path, labels=None)
    check_pieces(model, path, labels=None, wrong=next(iter(states)))


def test_what_a_prompt_decides_of_its_keys_is_handed_on(tmp_path: Path) -> None:
    """Visual sinks by the hidden states of the prompt, and a group that the user names."""
    path, model = tmp_path / "model.onnx", LLAMA.build("eager")
    visual = "dims=[0, 3], tau=1, min_mass=0, min_nonsink_ratio=0.1, first_layer=0, last_layer=True"
    rewriter.optimize(model, f"sinks.var({visual}) @ 0", "sinks.remove(label=2) @ 1")
    labels = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]])
    with rewriter.give(model, labels=labels):
        report = export_onnx(model, inputs_of(model, 9, 5), path, state=True)
        names = [n for n in report.inputs if n.startswith("past_state")]
        assert [n.split(".")[-1] for n in names] == ["sink_group", "labels"]
        assert {report.inputs[n] for n in names} == {("batch", "past_length")}
        assert report.inputs["labels"] == ("batch", "labels_length")
        assert all(c.error < 1e-5 for c in report.checks)
        check_pieces(model, path, labels)
        for name in names:
            check_pieces(model, path, labels, wrong=name)


@pytest.mark.parametrize("passes", [(), ("sparse.moba(block=4, topk=2, dense_below=0)",)])
def test_a_model_without_a_state_is_refused(tmp_path: Path, passes: tuple[str, ...]) -> None:
    """Without a cache there are no earlier blocks either."""
    model = GPT2.build("eager", n_layer=1)
    if passes:
        rewriter.optimize(model, *passes)
    with pytest.raises(InputError, match=r"no site of this model has a state to hand on"):
        export_onnx(model, GPT2.inputs(length=9), tmp_path / "model.onnx", state=True)


def test_a_cache_beside_which_nothing_is_handed_on_is_refused(tmp_path: Path) -> None:
    model = rewriter.optimize(LLAMA.build("eager"), "sinks.remove(label=1)")
    with (
        rewriter.give(model, labels=torch.tensor([[0, 1]])),
        pytest.raises(InputError, match=r"export with state=True, or inputs without a cache"),
    ):
        export_onnx(model, inputs_of(model, 9, 5), tmp_path / "model.onnx")


def test_the_axis_of_tokens_is_known_by_shape_and_dtype() -> None:
    """Positions of three axes are cut into pieces like tokens."""
    shapes: list[tuple[str, tuple[int, ...], torch.dtype, int]] = [
        ("input_ids", (2, 5), torch.int64, 1),
        ("inputs_embeds", (2, 5, 8), torch.float32, 1),
        ("position_ids", (3, 2, 5), torch.int64, 2),
        ("past_key_values.0.key", (2, 4, 5, 8), torch.float32, 2),
        ("pixel_values", (2, 3, 8, 8), torch.float32, 0),
        ("scale", (2, 5), torch.float32, 0),
    ]
    for name, shape, dtype, axis in shapes:
        assert length_axis(name, torch.zeros(shape, dtype=dtype)) == axis, name
