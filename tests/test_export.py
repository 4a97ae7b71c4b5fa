"""ONNX files run in ONNX Runtime at shapes that the export did not see, or are not written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn

import zoo
from rewriter import export as module
from rewriter.errors import ExportError, InputError
from rewriter.export import export_onnx
from rewriter.optimize import optimize
from rewriter.program import Call
from rewriter.trees import flatten

TOLERANCE = 1e-4
WINDOW = "sparse.window(window=4) @ 1-"


def run(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    found = session.run(None, {x.name: inputs[x.name].numpy() for x in session.get_inputs()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def cache_of(model: nn.Module, batch: int, length: int, seed: int = 0) -> Any:
    """A key-value cache with random contents."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    cache = transformers.DynamicCache()
    shape = (batch, config.n_head, length, config.n_embd // config.n_head)
    for layer in range(config.n_layer):
        cache.update(*(torch.randn(shape, generator=generator) for _ in range(2)), layer)
    return cache


def decoder_inputs(model: nn.Module, batch: int, past: int, new: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch + past + new)
    mask = torch.ones(batch, past + new, dtype=torch.long)
    mask[-1, :2] = 0
    return {
        "input_ids": torch.randint(3, zoo.VOCABULARY, (batch, new), generator=generator),
        "attention_mask": mask,
        "past_key_values": cache_of(model, batch, past),
        "use_cache": True,
    }


def assert_agrees(model: nn.Module, path: Path, inputs: dict[str, Any]) -> None:
    """The file gives what the model gives, for every output."""
    call = Call(model, inputs)
    with torch.no_grad():
        expected = call(call.tree.tensors)
    found = run(path, dict(zip(call.tree.names, call.tree.tensors, strict=True)))
    for name, want in zip(call.outputs(expected), expected.tensors, strict=True):
        assert found[name].shape == want.shape
        assert (found[name] - want).abs().max() <= TOLERANCE * want.abs().max(), name


@pytest.mark.parametrize(
    ("name", "passes"),
    [("bert", ("fuse",)), ("gpt2", ()), ("gpt2", (WINDOW,)), ("vit", (WINDOW,))],
    ids=["bert, fuse", "gpt2, plain", "gpt2, window", "vit, window"],
)
def test_the_file_agrees_at_two_shapes_that_were_not_used_for_the_export(
    name: str, passes: tuple[str, ...], tmp_path: Path
) -> None:
    case = zoo.architecture(name)
    model = case.build("eager")
    if name == "gpt2":
        inputs = decoder_inputs(model, 2, 3, 5)
        few = 2 if passes else 1  # torch compiles the rewritten model anew for sizes of 1
        others = [decoder_inputs(model, 3, 7, few), decoder_inputs(model, few, 2, 12)]
    else:
        inputs = case.inputs(length=9)
        others = [case.inputs(batch=3, length=13), case.inputs(batch=5, length=7)]
    if passes:
        optimize(model, *passes)
    path = tmp_path / "model.onnx"
    report = export_onnx(model, inputs, path, check_inputs=[])
    assert report.sites == 2
    assert report.rewritten == (1 if WINDOW in passes else 0)
    assert len(report.checks) == 1
    assert report.notes == ()
    for other in others:
        assert_agrees(model, path, other)


def test_inputs_and_outputs_have_names_that_a_person_understands(tmp_path: Path) -> None:
    model = zoo.architecture("gpt2").build("sdpa")
    path = tmp_path / "model.onnx"
    report = export_onnx(model, decoder_inputs(model, 2, 3, 5), path)
    cache = {
        f"past_key_values.{i}.{x}": ("batch", 4, "past_length", 8)
        for i in (0, 1)
        for x in ("key", "value")
    }
    ids = ("batch", "length")
    assert report.inputs == {
        "input_ids": ids,
        "attention_mask": ("batch", "past_length + length"),
        **cache,
    }
    assert report.outputs["logits"] == ("batch", "length", zoo.VOCABULARY)
    assert report.outputs["present.1.value"] == ("batch", 4, "past_length + length", 8)
    assert [c.shapes["input_ids"] for c in report.checks] == [(2, 5), (4, 10), (3, 6)]
    assert all(c.error < 1e-5 for c in report.checks)
    assert "past_key_values.0.key [batch, 4, past_length, 8]" in str(report)
    assert report.to_dict()["opset"] == 20

    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Softmax") == 2
    assert kinds.count("LessOrEqual") == 1, "layers share the computation of their mask"


def test_a_file_made_from_one_token_decodes_with_its_own_cache(tmp_path: Path) -> None:
    model = zoo.architecture("gpt2").build("eager", n_layer=1)
    path = tmp_path / "model.onnx"
    export_onnx(model, decoder_inputs(model, 1, 3, 1), path, check_inputs=[])
    tokens = torch.randint(3, zoo.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=tokens)
        prompt = model(input_ids=tokens[:, :4], use_cache=True)
    cache = Call(model, {"past_key_values": prompt.past_key_values}).tree
    state = dict(zip(cache.names, cache.tensors, strict=True))
    for step in range(4, 9):
        mask = torch.ones(2, step + 1, dtype=torch.long)
        found = run(
            path, {"input_ids": tokens[:, step : step + 1], "attention_mask": mask, **state}
        )
        torch.testing.assert_close(
            found["logits"][:, 0], whole.logits[:, step], rtol=1e-4, atol=1e-4
        )
        state = {
            n.replace("present", "past_key_values"): x for n, x in found.items() if n != "logits"
        }


def test_rows_that_see_no_key_are_as_in_torch(tmp_path: Path) -> None:
    """torch's own export of a boolean mask gives the mean of v there."""
    case = zoo.architecture("gpt2")
    inputs = case.inputs(length=9)
    assert inputs["attention_mask"][1, 0] == 0
    model = case.build("sdpa", n_layer=1)
    report = export_onnx(model, inputs, tmp_path / "model.onnx", check_inputs=[])
    assert all(c.error < 1e-5 for c in report.checks)


# --- what is left as it was ---


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        weights = (x @ x.mT * scale).softmax(-1)
        return self.inner(weights @ x)


def test_the_model_and_its_inputs_are_as_before(tmp_path: Path) -> None:
    model = zoo.architecture("gpt2").build("eager")
    optimize(model, WINDOW).train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    call = model._compiled_call_impl
    inputs = decoder_inputs(model, 2, 3, 5)
    export_onnx(model, inputs, tmp_path / "model.onnx", dynamic=False)
    assert inputs["past_key_values"].get_seq_length() == 3
    assert model._compiled_call_impl is call
    assert "forward" not in vars(model)
    assert [m.training for m in model.modules()] == modes
    assert not any(p.grad_fn for p in model.parameters())


def test_a_tensor_and_a_tuple_are_inputs_too(tmp_path: Path) -> None:
    model = Tiny()
    x = torch.randn(2, 5, 8)
    report = export_onnx(model, (x, 0.5), tmp_path / "tuple.onnx")
    assert report.inputs == {"x": ("batch", "length", 8)}
    assert report.outputs == {"output": ("batch", "length", 8)}
    assert report.sites == 1
    given = torch.randn(4, 3, 8)
    found = run(tmp_path / "tuple.onnx", {"x": given})["output"]
    torch.testing.assert_close(found, model(given, 0.5), rtol=1e-5, atol=1e-5)
    export_onnx(model, x, tmp_path / "tensor.onnx", check_inputs=[])
    found = run(tmp_path / "tensor.onnx", {"x": given})["output"]
    torch.testing.assert_close(found, model(given), rtol=1e-5, atol=1e-5)


def test_without_dynamic_the_shapes_are_fixed(tmp_path: Path) -> None:
    report = export_onnx(Tiny(), torch.randn(1, 5, 8), tmp_path / "model.onnx", dynamic=False)
    assert report.inputs == {"x": (1, 5, 8)}
    assert len(report.checks) == 1


def test_float16_runs(tmp_path: Path) -> None:
    x, path = torch.randn(2, 5, 8).half(), tmp_path / "model.onnx"
    report = export_onnx(Tiny().half(), x, path, dynamic=False)
    assert all(c.error < 2e-3 for c in report.checks)


def test_large_weights_go_into_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INLINE_BYTES", 0)
    path, x, model = tmp_path / "model.onnx", torch.randn(2, 5, 8), Tiny()
    report = export_onnx(model, x, path, dynamic=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    torch.testing.assert_close(run(path, {"x": x})["output"], model(x), rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    export_onnx(model, x, path, dynamic=False, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


# --- refusals ---


def test_a_file_that_exists_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(
        InputError, match=r"model\.onnx exists; give another path, or overwrite=True"
    ):
        export_onnx(Tiny(), torch.randn(2, 5, 8), path)
    assert path.read_text() == "mine"


def test_a_path_without_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is not a directory; make it first"):
        export_onnx(Tiny(), torch.randn(2, 5, 8), tmp_path / "nowhere" / "model.onnx")


def test_a_file_that_does_not_agree_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("older")
    message = r"differ by \d\.\de-\d\d of the largest value of output, at x \[2, 5, 8\]; 0"
    with pytest.raises(ExportError, match=message):
        export_onnx(
            Tiny(), torch.randn(2, 5, 8), path, dynamic=False, tolerance=0.0, overwrite=True
        )
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "older"


@pytest.mark.parametrize(
    ("stop", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), ExportError, r"cannot be written: No space left"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_a_stop_while_writing_leaves_nothing(
    stop: BaseException,
    raised: type[BaseException],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def save(onnx: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise stop

    monkeypatch.setattr(module, "_save", save)
    with pytest.raises(raised, match=message):
        export_onnx(Tiny(), torch.randn(2, 5, 8), tmp_path / "model.onnx", dynamic=False)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_torch_cannot_trace_is_refused_with_its_reason(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ExportError, match=r"torch\.export cannot trace Branch: .*data-dependent"):
        export_onnx(Branch(), torch.randn(2, 5), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"inner\.weight is torch\.bfloat16.*call model\.float\(\)"
    ):
        export_onnx(Tiny().bfloat16(), torch.randn(2, 5, 8).bfloat16(), tmp_path / "model.onnx")


def test_sizes_that_tracing_fixed_are_noted(tmp_path: Path) -> None:
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[1] % 2 == 0 else x * 3

    report = export_onnx(Even(), torch.randn(2, 6), tmp_path / "model.onnx")
    assert report.notes == ("the file holds only at sizes where x.size()[1] % 2 == 0",)
    assert [c.shapes["x"] for c in report.checks] == [(2, 6), (4, 12), (4, 6)]


def test_check_inputs_have_to_hold_the_same_tensors(tmp_path: Path) -> None:
    case = zoo.architecture("bert")
    with pytest.raises(
        InputError, match=r"check_inputs hold input_ids; the inputs hold input_ids, attention_mask"
    ):
        export_onnx(
            case.build(),
            case.inputs(),
            tmp_path / "model.onnx",
            check_inputs=[{"input_ids": torch.ones(1, 4, dtype=torch.long)}],
        )


# --- nested values ---


def test_nested_values_come_apart_and_together_again() -> None:
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.full((2,), 2.0))
    value = {"cache": cache, "flag": True, "pair": (torch.full((1,), 3.0), None), "output": output}
    tree = flatten(value)
    assert tree.names == ("cache.0.key", "cache.0.value", "pair.0", "output.last_hidden_state")
    again = tree.build([x + 1 for x in tree.tensors])
    assert again["flag"] is True
    assert again["pair"][0].item() == 4
    assert again["pair"][1] is None
    assert again["cache"].layers[0].values.unique().tolist() == [2]
    assert isinstance(again["output"], transformers.modeling_outputs.BaseModelOutput)
    assert again["output"].last_hidden_state.tolist() == [3, 3]
    again["cache"].update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    assert cache.get_seq_length() == 3
