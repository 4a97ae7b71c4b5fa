"""The command line: what each command prints, in words and as JSON, and its exit code."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
import transformers

import rewriter
from rewriter import registry
from rewriter.cli import main
from zoo import architecture


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of stdout, which has to be one JSON document."""
        return json.loads(self.out)


Command = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process."""

    def command(*args: object) -> Outcome:
        code = main([str(a) for a in args])
        return Outcome(code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "encoder"
    architecture("bert").build().save_pretrained(str(path))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "decoder"
    architecture("llama").build().save_pretrained(str(path))
    return path


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_prints_layers_that_are_alike_as_one_row(run: Command, decoder: Path) -> None:
    code, out, err = run("inspect", decoder)
    assert (code, err) == (0, "")
    assert "2 attention sites" in out
    assert "model.layers.*.self_attn" in out
    assert "k ≤ q" in out
    assert "mask: causal" in out
    assert "GQA 4/2" in out


def test_inspect_prints_a_row_for_every_site_on_request(run: Command, decoder: Path) -> None:
    out = run("inspect", decoder, "--every").out
    assert "model.layers.0.self_attn" in out
    assert "model.layers.1.self_attn" in out


def test_inspect_writes_a_page(run: Command, decoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    done = run("inspect", decoder, "--html", path, "--json")
    assert done.code == 0, done.err
    assert len(done.json["sites"]) == 2
    text = path.read_text(encoding="utf-8")
    assert text.count("<section") == 1
    assert "136 of 256 cells are seen" in text


@pytest.mark.parametrize("name", ["page.pdf", "none/page.html", "folder.html"])
def test_a_page_that_cannot_be_written_is_one_line(
    run: Command, decoder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    code, out, err = run("inspect", decoder, "--html", tmp_path / name)
    assert (code, out) == (2, "")
    assert err == (
        f"rewriter: --html {tmp_path / name}: give an .html file in a directory that exists\n"
    )


def test_inspect_prints_the_kernels_of_a_site(run: Command, decoder: Path) -> None:
    code, out, _ = run("inspect", decoder, "--kernel", "1")
    assert code == 0
    ast.parse(out)
    names = [x.name for x in ast.parse(out).body if isinstance(x, ast.FunctionDef)]
    assert "softmax_fwd_kernel" in names
    assert "softmax_bwd_keys_kernel" in names
    assert "k ≤ q" in out


def test_inspect_says_which_sites_have_a_kernel(run: Command, decoder: Path) -> None:
    code, _, err = run("inspect", decoder, "--kernel", "path=nowhere")
    assert code == 2
    assert "no attention is selected by 'path=nowhere'; there are " in err
    assert "layers.0" in err


def test_inspect_as_json_is_the_report(run: Command, encoder: Path) -> None:
    found = run("inspect", encoder, "--json").json
    assert found["attention"] == 2
    assert [s["layer"] for s in found["sites"]] == [0, 1]
    assert all(s["formula"].startswith("softmax(") for s in found["sites"])


def test_inspect_shows_what_a_pass_would_do(run: Command, encoder: Path) -> None:
    found = run("inspect", encoder, "--pass", "sparse.window(window=3) @ 1", "--json").json
    first, second = found["sites"]
    assert (first["decision"], first["why"]) == ("kept", "no pass selects it")
    assert second["decision"] == "rewritten"
    assert second["passes"] == ["sparse.window(window=3) @ 1"]
    assert "< 3" in second["after_formula"]
    assert "< 3" not in second["formula"]


# --- optimize, verify ----------------------------------------------------------------------------


def test_optimizing_without_a_pass_is_equivalent(
    run: Command, decoder: Path, tmp_path: Path
) -> None:
    done = run("optimize", decoder, "--out", tmp_path / "out", "--json")
    assert done.code == 0
    assert done.json["verify"]["ok"]
    assert done.json["changes_function"] == []
    assert len(done.json["sites"]) == 2
    checked = run("verify", decoder, tmp_path / "out", "--gradients", "--json")
    assert checked.code == 0
    assert checked.json["ok"]
    assert checked.json["changed_sites"] == []
    assert any(row["kind"] == "gradient" for row in checked.json["rows"])


def test_a_pass_that_changes_the_function_is_saved_and_told(
    run: Command, encoder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    request = "heads.scale(heads=[0], by=0) @ 1"
    done = run("optimize", encoder, "--pass", request, "--out", out)
    assert done.code == 0
    assert f"not equivalent to the original, as asked for by {request}" in done.out
    assert done.out.rstrip().endswith(f"saved {out}")
    assert (out / "tokenizer.json").exists()
    checked = run("verify", encoder, out)
    assert checked.code == 1
    assert checked.err.startswith("rewriter: ")
    assert checked.err.count("\n") == 1


def test_not_equivalent_as_json_is_an_error_with_its_report(
    run: Command, encoder: Path, tmp_path: Path
) -> None:
    run("optimize", encoder, "--pass", "sparse.window(window=1)", "--out", tmp_path / "out")
    checked = run("verify", encoder, tmp_path / "out", "--json")
    assert checked.code == 1
    assert checked.json["kind"] == "NotEquivalent"
    assert not checked.json["report"]["ok"]


def test_passes_add_up_when_a_rewritten_directory_is_optimized(
    run: Command, encoder: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run("optimize", encoder, "--pass", "sparse.window(window=3)", "--out", first)
    run("optimize", first, "--pass", "heads.scale(heads=[0], by=0)", "--out", second)
    plan = json.loads((second / "rewriter.json").read_text())
    assert plan["passes"] == ["sparse.window(window=3)", "heads.scale(heads=[0], by=0)"]
    formulas = [s["after_formula"] for s in run("inspect", second, "--json").json["sites"]]
    assert all("< 3" in text and "h = 0" in text for text in formulas)


def test_no_verify_skips_the_comparison(run: Command, encoder: Path, tmp_path: Path) -> None:
    done = run("optimize", encoder, "--no-verify", "--out", tmp_path / "out", "--json")
    assert done.json["verify"] is None
    assert (tmp_path / "out" / "rewriter.json").exists()


def test_a_changed_function_is_verified_against_the_reference_with_a_page(
    run: Command, encoder: Path, tmp_path: Path
) -> None:
    out, page = tmp_path / "out", tmp_path / "report.html"
    run("optimize", encoder, "--pass", "sparse.window(window=3)", "--out", out, "--no-verify")
    checked = run("verify", encoder, out, "--against", "reference", "--html", page, "--json")
    assert checked.code == 0, checked.err
    assert checked.json["structure"]["rewritten"] == 2
    assert [row["kind"] for row in checked.json["rows"]].count("site") == 2
    assert "sparse.window(window=3)" in page.read_text()
    refused = run("verify", encoder, out, "--html", tmp_path / "none" / "x.html")
    assert refused.code == 2
    assert "give an .html file in a directory that exists" in refused.err
    assert run("verify", encoder, encoder, "--against", "reference").code == 2


def test_generated_tokens_are_compared_on_request(run: Command, decoder: Path) -> None:
    checked = run("verify", decoder, decoder, "--generate", "4", "--json")
    assert checked.code == 0
    assert checked.json["generation"]["ok"]


# --- export, passes, the rest --------------------------------------------------------------------


def test_export_writes_a_file_that_onnx_runtime_has_run(
    run: Command, encoder: Path, tmp_path: Path
) -> None:
    done = run("export", encoder, "--onnx", tmp_path / "model.onnx", "--json")
    assert done.code == 0, done.err
    assert done.json["checks"]
    assert (tmp_path / "model.onnx").stat().st_size == done.json["bytes"]


def test_a_state_that_no_site_has_is_refused(run: Command, encoder: Path, tmp_path: Path) -> None:
    done = run("export", encoder, "--onnx", tmp_path / "model.onnx", "--state")
    assert done.code == 2
    assert "no site of this model has a state" in done.err
    assert not (tmp_path / "model.onnx").exists()


def test_a_saved_gate_is_what_every_command_computes(
    run: Command, decoder: Path, tmp_path: Path
) -> None:
    """The gates are shut; a command that reads the plan and no parameters would leave them open."""
    tokens = {"input_ids": torch.arange(3, 15).view(2, 6), "use_cache": False}
    model: Any = rewriter.optimize(
        transformers.AutoModelForCausalLM.from_pretrained(decoder), "heads.gate", inputs=tokens
    )
    gates = [p for n, p in model.named_parameters() if n.startswith("rewriter.")]
    with torch.no_grad():
        [p.fill_(-9.0) for p in gates]
        wanted = model(**tokens).logits
    shut, windowed, file = tmp_path / "shut", tmp_path / "windowed", tmp_path / "model.onnx"
    rewriter.save(model, shut)

    done = run("verify", decoder, shut)
    assert done.code == 1, done.out
    done = run("optimize", shut, "--pass", "sparse.window(window=64)", "--out", windowed)
    assert done.code == 0, done.err
    with torch.no_grad():
        torch.testing.assert_close(rewriter.load(windowed)(**tokens).logits, wanted)
    done = run("export", shut, "--onnx", file)
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    mask = torch.ones_like(tokens["input_ids"])
    feed = {"input_ids": tokens["input_ids"].numpy(), "attention_mask": mask.numpy()}
    (logits,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-4, atol=1e-4)


def test_a_state_is_handed_on_behind_a_cache(run: Command, decoder: Path, tmp_path: Path) -> None:
    rewritten = tmp_path / "linear"
    done = run("optimize", decoder, "--pass", "linear.features(map=elu) @ 0", "--out", rewritten)
    assert done.code == 0, done.err
    done = run("export", rewritten, "--onnx", tmp_path / "model.onnx", "--state", "--json")
    assert done.code == 0, done.err
    assert [n for n in done.json["inputs"] if n.startswith("past")] == [
        "past_key_values.1.key",
        "past_key_values.1.value",
        "past_state.model.layers.0.self_attn",
    ]


def test_passes_lists_every_pass(run: Command) -> None:
    listed = run("passes").out
    assert all(kind.name in listed for kind in registry.PASSES)
    assert [sheet["name"] for sheet in run("passes", "--json").json] == [
        kind.name for kind in registry.PASSES
    ]


def test_data_sheet_shows_options_contract_and_source(run: Command) -> None:
    shown = run("passes", "sparse.window").out
    for text in ("contract: limit", "an integer, at least 1", "required", "arXiv 2310.06825"):
        assert text in shown
    sheet = run("passes", "sparse.window", "--json").json
    assert [o["name"] for o in sheet["options"]] == ["window", "sinks"]
    assert sheet["options"][1]["default"] == 0


def test_version_and_help(run: Command) -> None:
    assert run("--version").out.startswith("rewriter ")
    shown = run("optimize", "--help")
    assert shown.code == 0
    assert "--no-verify" in shown.out


def test_as_a_process_it_exits_with_the_code_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rewriter", "inspect", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"rewriter: {tmp_path}/none does not exist; give a local Hugging Face directory\n"
    )
