"""What each of the four kinds does to a language model: as converted, and after fine-tuning.

A small decoder is trained from nothing, byte by byte, on the sources of Python's standard library.
Copies of it are rewritten, and each is fine-tuned by the loop that trained it. Losses are in nats a
byte, on files that were held out.

    original     the trained model, after the same further steps that a rewritten copy gets
    fine-tuned   a rewritten copy, after these steps: same batches, same learning rates
    converted    the same copy before them

The further steps help any model. So "original" had them too, and "recovered" leaves them out: it is
the share by which fine-tuning narrowed the distance to the model that was not rewritten, measured
before the steps and after them. Steps are counted and not timed: a busy machine prints the same
table, later. `--minutes` is the time on two idle cores.
"""

from __future__ import annotations

import argparse
import copy
import math
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter

CONTEXT, BATCH = 256, 8
MINUTES = 6.0

REWRITES = {
    "linear": ("linear.features(map=elu)", "linear.window_tail(window=16)"),
    "sparse-routed": ("sparse.moba(block=16, topk=2, dense_below=0)",),
    "head-mixed": ("heads.moh(active=0.5)",),
    "sink-redistributed": ("sinks.learned(initial=10)", "sinks.remove(first=4)"),
}


@dataclass(frozen=True)
class Size:
    """How much is done."""

    layers: int = 4
    width: int = 128
    steps: int = 800
    tuning: int = 80
    rate: float = 3e-3
    """Of learning; further steps have a third of it."""
    rows: int = 128
    """Rows of `CONTEXT` bytes that losses are measured on."""
    rewrites: int = 2
    """Rewrites of each kind, at most."""

    def lasting(self, minutes: float) -> Size:
        """The same with other numbers of steps; the default is meant for `MINUTES`."""
        steps, tuning = (max(2, round(n * minutes / MINUTES)) for n in (self.steps, self.tuning))
        return replace(self, steps=steps, tuning=tuning)


QUICK = Size(layers=1, width=64, steps=150, tuning=16, rate=1e-2, rows=24, rewrites=1)


# --- text -----------------------------------------------------------------------------------------


def texts() -> tuple[Tensor, Tensor]:
    """The bytes to train on, and those of every tenth file, held out; uint8."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [f for i, f in enumerate(files) if i % 10 != 9], files[9::10]
    train, held = (bytearray(b"".join(f.read_bytes() for f in part)) for part in parts)
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held, dtype=torch.uint8)


def rows_at(text: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """What the model takes: rows of `CONTEXT` bytes.

    The mask says that a row is one text. Without it, transformers looks for several texts in a row,
    and its attention is no longer plainly causal.
    """
    ids = torch.stack([text[i : i + CONTEXT] for i in starts.tolist()]).long()
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


# --- the model and its ordinary training ----------------------------------------------------------


def new_model(size: Size) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=size.width**-0.5,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module, text: Tensor, steps: int, rate: float, seed: int) -> None:
    """A loop that knows nothing of rewriting: new parameters are parameters of the model, and what
    keeps routers balanced is in its loss."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=random)
        loss = model(**rows_at(text, starts)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def loss_of(model: nn.Module, held: Tensor, rows: int) -> float:
    """The mean loss over rows that are spread over the text."""
    starts = torch.linspace(0, len(held) - CONTEXT, rows).long()
    batches = [rows_at(held, part) for part in starts.split(BATCH)]
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


# --- rewriting ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one rewrite did to the loss."""

    kind: str
    request: str
    trained: float
    """The loss of the trained model, before further steps."""
    original: float
    tuned: float
    converted: float
    numbers: int
    """In the new parameters."""
    seconds: float

    @property
    def recovered(self) -> float:
        return 1 - (self.tuned - self.original) / (self.converted - self.trained)


@dataclass(frozen=True)
class Course:
    """A trained model, and what all of its copies go through."""

    model: LlamaForCausalLM
    text: Tensor
    held: Tensor
    size: Size
    seed: int

    def loss(self, model: nn.Module) -> float:
        return loss_of(model, self.held, self.size.rows)

    def tune(self, model: nn.Module) -> float:
        """The loss after the further steps."""
        train(model, self.text, self.size.tuning, self.size.rate / 3, self.seed + 1)
        return self.loss(model)

    def converted(self, request: str) -> nn.Module:
        """A copy that is rewritten in every layer; given inputs, it has its new parameters."""
        inputs = rows_at(self.held, torch.arange(BATCH))
        model = rewriter.optimize(copy.deepcopy(self.model), request, inputs=inputs)
        report = rewriter.report_of(model)
        assert len(report.rewritten) == len(report.attention) == self.size.layers, str(report)
        return model

    def outcome(self, kind: str, request: str, trained: float, original: float) -> Outcome:
        start, model = time.perf_counter(), self.converted(request)
        new = {n: p for n, p in model.named_parameters() if n.startswith("rewriter.")}
        before, converted = copy.deepcopy(new), self.loss(model)
        tuned = self.tune(model)
        assert not any(torch.equal(new[n], before[n]) for n in new), "a parameter was not trained"
        numbers, seconds = sum(p.numel() for p in new.values()), time.perf_counter() - start
        return Outcome(kind, request, trained, original, tuned, converted, numbers, seconds)


# --- the table ------------------------------------------------------------------------------------


def table_of(outcomes: list[Outcome]) -> Table:
    table = Table(title="Loss in nats a byte (and in bits a byte)", title_justify="left")
    for name in ("kind", "rewrite, in every layer"):
        table.add_column(name, no_wrap=True)
    for name in ("original", "fine-tuned", "converted", "recovered", "new numbers", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for x in outcomes:
        losses = [f"{n:.3f} ({n / math.log(2):.2f})" for n in (x.original, x.tuned, x.converted)]
        last = f"{x.recovered:.0%}", str(x.numbers), f"{x.seconds:.0f} s"
        table.add_row(x.kind, x.request, *losses, *last)
    return table


def check(outcomes: list[Outcome]) -> None:
    """The order that this is about, and that more than the further steps was at work: where the
    rewrite cost enough for the distances to be more than chance."""
    for x in outcomes:
        assert x.original < x.tuned < x.converted, x
        assert x.recovered > 0 or x.converted - x.trained < 0.02, x


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rewrites of four kinds, converted and tuned.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="on two idle cores")
    parser.add_argument("--quick", action="store_true", help="a smaller model, some seconds")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> list[Outcome]:
    options, console = arguments(), Console(width=150)
    size = QUICK if options.quick else Size().lasting(options.minutes)
    torch.manual_seed(options.seed)
    (text, held), model, start = texts(), new_model(size), time.perf_counter()
    with console.status(f"{size.steps} steps of training"):
        train(model, text, size.steps, size.rate, options.seed)
    course = Course(model, text, held, size, options.seed)
    trained, seconds = course.loss(model), time.perf_counter() - start
    original = course.tune(copy.deepcopy(model))
    print(f"{size.steps} steps in {seconds:.0f} s: loss {trained:.3f} nats a byte")
    print(f"{size.tuning} further steps, not rewritten: {original:.3f}")

    outcomes = []
    for kind, requests in REWRITES.items():
        for request in requests[: size.rewrites]:
            with console.status(request):
                outcomes.append(course.outcome(kind, request, trained, original))
    console.print(table_of(outcomes))
    if not options.quick:  # a model that has hardly learned to attend loses little, or nothing
        check(outcomes)
    return outcomes


if __name__ == "__main__":
    main()
