"""Bad input: one clear line that names the thing and the next step, a code, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rewriter.cli import main
from zoo import architecture

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "model"
    architecture("bert").build().save_pretrained(str(path))
    return path


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that has to fail, and gives back what it says without the prefix."""

    def command(*args: object, code: int = 2) -> str:
        before = _files(tmp_path)
        assert main([str(a) for a in args]) == code
        out, err = capsys.readouterr()
        assert _files(tmp_path) == before, "something was left behind"
        assert out == ""
        assert err.startswith("rewriter: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err.removeprefix("rewriter: ").rstrip("\n")

    return command


def _files(folder: Path) -> dict[str, int]:
    return {str(p): p.lstat().st_size for p in folder.rglob("*")}


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- directories ---------------------------------------------------------------------------------


def test_directory_that_does_not_exist(refused: Refused, tmp_path: Path) -> None:
    assert refused("inspect", tmp_path / "none") == (
        f"{tmp_path}/none does not exist; give a local Hugging Face directory"
    )


def test_directory_without_a_configuration(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json; give a Hugging Face directory" in refused(
        "inspect", tmp_path / "empty"
    )


def test_directory_without_safetensors(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert refused("inspect", model) == (
        f"{model} has no model.safetensors; model.save_pretrained(DIR) writes one"
    )


class _Bomb:
    """Raises as soon as somebody unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_directory_with_a_pickle_only(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    text = refused("optimize", model, "--out", model.parent / "out")
    assert "a pickle only (pytorch_model.bin), which can run code and is never loaded" in text
    assert "model.save_pretrained(DIR) writes safetensors" in text


def test_index_that_names_a_pickle(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "weights.bin").write_bytes(pickle.dumps(_Bomb()))
    index = model / "model.safetensors.index.json"
    for name in ("weights.bin", "../weights.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert f"names '{name}', which is no safetensors file of it" in refused("inspect", model)
    index.write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))
    assert "has no lost.safetensors, which model.safetensors.index.json names" in refused(
        "inspect", model
    )


@pytest.mark.parametrize("nested", [False, True])
def test_configuration_with_remote_code(refused: Refused, model: Path, nested: bool) -> None:
    auto = {"auto_map": {"AutoModel": "own.Own"}}
    (model / "own.py").write_text("raise SystemExit('ran remote code')")
    edited(model / "config.json", **({"text_config": [auto]} if nested else auto))
    text = refused("inspect", model)
    assert "asks for code from the directory (auto_map), which is never run" in text
    assert "use a model whose class is in transformers" in text


def test_configuration_with_a_kernel_from_a_network(refused: Refused, model: Path) -> None:
    edited(model / "config.json", attn_implementation="somebody/kernel")
    assert "asks for a kernel from a network (attn_implementation: somebody/kernel)" in refused(
        "inspect", model
    )


@pytest.mark.parametrize("name", ["OwnModel", "AutoModel", "BertConfig", "__doc__", 3])
def test_architecture_that_transformers_has_not(refused: Refused, model: Path, name: Any) -> None:
    edited(model / "config.json", architectures=[name])
    text = refused("inspect", model)
    assert f"architecture {name!r} is not in transformers {transformers.__version__}" in text
    assert "load the model yourself and call rewriter.optimize(model)" in text


def test_configuration_that_is_not_json(refused: Refused, model: Path) -> None:
    (model / "config.json").write_text("{")
    assert "config.json is not JSON: Expecting property name" in refused("inspect", model)
    (model / "config.json").write_text("[]")
    assert "config.json is not a JSON object" in refused("inspect", model)


def test_damaged_weights(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x00" * 64)
    assert "transformers cannot load it: " in refused("inspect", model)


def test_weights_of_another_model(refused: Refused, model: Path) -> None:
    edited(model / "config.json", num_hidden_layers=3)
    assert "has no weights for encoder.layer.2." in refused("inspect", model)


# --- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ("spare.window(window=4)", "no pass called 'spare.window'; did you mean sparse.window?"),
        ("sparse.window(size=4)", "no option 'size' (it takes window, sinks=0)"),
        ("sparse.window(window=0)", "option window is 0; it has to be at least 1"),
        ("sparse.window(window=4) @ last", "selector 'last' cannot be read; write layers as"),
        ("fuse @ 7", "fuse @ 7: layer 7 does not exist; the model has layers 0 to 1"),
        ("fuse @ path=decoder", "fuse @ path=decoder: matches none of the 2 sites (encoder.layer."),
        ("heads.scale(heads=[9], by=0)", "head 9 does not exist; this site has 4 heads, 0 to 3"),
    ],
)
def test_request_that_cannot_be_done(
    refused: Refused, plain: Path, tmp_path: Path, request_text: str, message: str
) -> None:
    assert message in refused("optimize", plain, "--pass", request_text, "--out", tmp_path / "out")


def test_unknown_command_and_missing_option(refused: Refused, plain: Path) -> None:
    assert "No such command 'inspekt'" in refused("inspekt", plain)
    assert "Missing option '--out'" in refused("optimize", plain)
    assert "No such option" in refused("inspect", plain, "--lenght", "3")
    assert "Invalid value for '--length'" in refused("inspect", plain, "--length", "0")


# --- machines and models -------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_on_a_machine_without(refused: Refused, plain: Path) -> None:
    text = refused("inspect", plain, "--device", "cuda")
    assert "device cuda was asked for, but torch" in text
    assert "sees no CUDA device; use cpu, or install a CUDA build" in text
    assert "device 'tpu' is not known; use cpu or cuda" in refused(
        "inspect", plain, "--device", "tpu"
    )


def test_model_that_cannot_be_captured(
    refused: Refused, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = transformers.BertModel
    monkeypatch.setattr(kind, "forward", torch._dynamo.disable(kind.forward, reason="mine"))
    for command in (("inspect", plain), ("optimize", plain, "--out", tmp_path / "out")):
        text = refused(*command)
        assert "torch captured no graph" in text
        assert "run with TORCH_LOGS=graph_breaks to see where" in text


# --- outputs -------------------------------------------------------------------------------------


def test_output_that_exists(refused: Refused, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.onnx").write_text("mine")
    for command in (("optimize", plain, "--out"), ("export", plain, "--onnx")):
        out = tmp_path / ("out" if command[0] == "optimize" else "out.onnx")
        assert (
            refused(*command, out) == f"{out} exists, and nothing is overwritten; give a new path"
        )
    assert (tmp_path / "out.onnx").read_text() == "mine"


def test_full_disk(
    refused: Refused, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    out = tmp_path / "out"
    assert refused("optimize", plain, "--no-verify", "--out", out) == (
        f"{out} could not be written: No space left on device; nothing was left behind"
    )


def test_disk_that_really_takes_no_more(plain: Path, tmp_path: Path) -> None:
    """The system refuses files above 20 kB, which safetensors reports in its own way."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from rewriter.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    args = ["optimize", str(plain), "--no-verify", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"rewriter: {out} could not be written: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_interrupt_in_the_middle_of_a_save(
    refused: Refused, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = transformers.modeling_utils.safe_save_file

    def interrupted(*args: Any, **kwargs: Any) -> None:
        done(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", interrupted)
    text = refused("optimize", plain, "--no-verify", "--out", tmp_path / "out", code=130)
    assert text == "interrupted; nothing was left behind"


# --- how errors are shown ------------------------------------------------------------------------


def test_error_as_json_is_json_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path / "none"), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "CheckpointError"
    assert found["error"].endswith("none does not exist; give a local Hugging Face directory")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path / "none"), "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.rstrip().splitlines()[-1].startswith("rewriter: ")


def test_mistake_of_ours_is_called_one(
    capsys: pytest.CaptureFixture[str], plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("rewriter.checkpoint.open_directory", broken)
    assert main(["inspect", str(plain)]) == 3
    assert capsys.readouterr().err == (
        "rewriter: internal error, ZeroDivisionError: by zero; run again with "
        "--debug and report it\n"
    )
