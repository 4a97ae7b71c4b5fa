"""What `behaviour` measured: values, as a table and as JSON."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = ["Behaviour", "Predictions", "Probed", "Vectors"]


@dataclass(frozen=True)
class Predictions:
    """The distributions that one output of logits gives."""

    name: str
    """Path of the output."""
    places: int
    """Tokens that are not padding."""
    compared: int
    """Those of them at which both models give numbers."""
    kl_mean: float
    """KL(original || model) of one token, in nats."""
    kl_max: float
    top1: float
    """Share of the tokens at which both models predict the same."""


@dataclass(frozen=True)
class Vectors:
    """The vectors of one output of states: of each token, or of each row."""

    name: str
    places: int
    compared: int
    cosine_mean: float
    cosine_min: float
    moved: float
    """Mean length of the difference, as a part of the mean length in the original."""


@dataclass(frozen=True)
class Probed:
    """One probe of the outputs."""

    name: str
    numbers: int
    """How many the probe gives; the fields below are their means."""
    original: float
    model: float
    difference: float
    """Model minus original."""
    largest: float
    """The largest |difference| of one number."""


@dataclass(frozen=True)
class Behaviour:
    """How a model behaves beside its original. Nothing in it is a verdict."""

    predictions: tuple[Predictions, ...]
    vectors: tuple[Vectors, ...]
    probes: tuple[Probed, ...]
    notes: tuple[str, ...] = ()
    """What was left out, or says little."""

    @property
    def kl(self) -> float:
        """Mean KL(original || model) of a token in nats, over the first output of logits; NaN
        without one."""
        return self.predictions[0].kl_mean if self.predictions else float("nan")

    @property
    def top1(self) -> float:
        """Share of equal predictions, over the first output of logits; NaN without one."""
        return self.predictions[0].top1 if self.predictions else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; what is not finite is None."""
        groups = ("predictions", "vectors", "probes")
        found = {group: [_plain(row) for row in getattr(self, group)] for group in groups}
        return {**found, "notes": list(self.notes)}

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=120, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self._lines())

    def _lines(self) -> Iterator[Table | Text]:
        if self.predictions:
            heads = ("places", "KL mean, nats", "KL max", "top-1")
            yield _table("logits", heads, (_prediction(row) for row in self.predictions))
        if self.vectors:
            heads = ("places", "cosine mean", "cosine min", "moved")
            yield _table("state", heads, (_vector(row) for row in self.vectors))
        if self.probes:
            heads = ("original", "model", "difference", "largest")
            yield _table("probe", heads, (_probe(row) for row in self.probes))
        for note in self.notes:
            yield Text(f"note: {note}")


def _table(first: str, heads: tuple[str, ...], rows: Iterator[list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _prediction(row: Predictions) -> list[str]:
    return [row.name, _count(row), f"{row.kl_mean:.2e}", f"{row.kl_max:.2e}", f"{row.top1:.1%}"]


def _vector(row: Vectors) -> list[str]:
    cosines = (f"{row.cosine_mean:.6f}", f"{row.cosine_min:.6f}")
    return [row.name, _count(row), *cosines, f"{row.moved:.2%}"]


def _probe(row: Probed) -> list[str]:
    values = (row.original, row.model, row.difference, row.largest)
    return [row.name, *(f"{x:.6g}" for x in values)]


def _count(row: Predictions | Vectors) -> str:
    return str(row.places) if row.compared == row.places else f"{row.compared} of {row.places}"


def _plain(value: Any) -> dict[str, Any]:
    return {
        n: None if isinstance(x, float) and not abs(x) < float("inf") else x
        for n, x in asdict(value).items()
    }
