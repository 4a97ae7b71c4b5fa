"""Random attention modules are found and rewritten exactly; what only looks like one is never taken
for it.

`EXAMPLES=300 SEED=1 pytest tests/testing/test_modules.py` draws more of them, and others.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor, nn

import rewriter
from rewriter.capture import export, from_exported
from rewriter.optimize import rewrite_graph
from rewriter.registry import read_requests
from rewriter.report import SiteReport
from rewriter.testing.choices import Choices
from rewriter.testing.modules import Drawn, modules
from rewriter.testing.near_misses import NEAR_MISSES

FUSE = "fuse(from_scores=0)"
SEED = os.environ.get("SEED")


def examples(count: int) -> settings:
    return settings(
        max_examples=int(os.environ.get("EXAMPLES", count)),
        derandomize=SEED is None,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # what fails prints its choices; shrinking takes many captures
        suppress_health_check=list(HealthCheck),
    )


class Exported(nn.Module):
    """The graph of an exported program, with the parameters of the model that it came from."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.graph = [program.module(check_guards=False)]  # out of reach of `eval`
        for name, parameter in self.graph[0].named_parameters():
            owner, _, last = name.rpartition(".")
            place: nn.Module = self
            for part in owner.split(".") if owner else ():
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, parameter)

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.graph[0](*args)


def ahead_of_time(drawn: Drawn) -> tuple[nn.Module, Sequence[SiteReport]]:
    """The module rewritten through `torch.export`."""
    shapes = tuple(
        {n: torch.export.Dim.AUTO for n in (0, 1) if x.shape[n] > 1} for x in drawn.inputs
    )
    program = export(drawn.module, drawn.inputs, dynamic_shapes=shapes)
    reports = rewrite_graph(from_exported(program), drawn.module, read_requests((FUSE,)))
    return Exported(program), reports


def lazily(drawn: Drawn) -> tuple[nn.Module, Sequence[SiteReport]]:
    """The module rewritten by `optimize`."""
    model = rewriter.optimize(copy.deepcopy(drawn.module), FUSE)
    model(*drawn.inputs)
    report = rewriter.report_of(model)
    assert report.notes == ()
    return model, report.sites


def longer(drawn: Drawn) -> tuple[Tensor, ...]:
    """Inputs of other sizes: what was read of a graph holds for all that it may be called with."""
    c = drawn.choices
    more = replace(c, batch=c.batch + 1, q_len=c.q_len + 2, kv_len=c.kv_len + 2)
    return Drawn.of(more).inputs


Door = Callable[[Drawn], tuple[nn.Module, Sequence[SiteReport]]]


def checked(drawn: Drawn, door: Door) -> Sequence[SiteReport]:
    """The sites of the module, once it is shown that what was made of it computes the same."""
    model, sites = door(drawn)
    for inputs in (drawn.inputs, longer(drawn)) if door is lazily else (drawn.inputs,):
        with torch.no_grad():
            found = copy.deepcopy(drawn.module)(*inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        is_finite = all(bool(x.isfinite().all()) for x in outputs)  # else gradients are NaN alone
        rewriter.verify(drawn.module, model, inputs, gradients=is_finite, sites=False)
    for site in sites:
        assert site.decision == "rewritten" or site.reason, drawn
    return sites


def run(door: Door, count: int, *, near_misses: bool) -> None:
    @examples(count)
    @given(modules(near_misses=near_misses))
    def example(drawn: Drawn) -> None:
        sites = checked(drawn, door)
        if not near_misses:
            assert [s.decision for s in sites] == ["rewritten"], [s.reason for s in sites]

    (seed(int(SEED))(example) if SEED else example)()


LONG = pytest.mark.timeout(max(300, 10 * int(os.environ.get("EXAMPLES", 0))))
DOORS = pytest.mark.parametrize(("door", "count"), [(ahead_of_time, 5), (lazily, 2)])


@DOORS
@LONG
def test_an_honest_attention_is_found_and_rewritten(door: Door, count: int) -> None:
    run(door, count, near_misses=False)


@DOORS
@LONG
def test_a_near_miss_is_read_as_what_it_is_or_left_alone(door: Door, count: int) -> None:
    run(door, count, near_misses=True)


LEFT_ALONE = {
    "softmax twice": "its weights are changed by aten.softmax before they meet the values",
    "mask after the softmax": "its weights are changed before they meet the values",
    "heads mixed before": "no product of queries with keys was found in its scores",
    "weights returned": "its weights are also used by the output",
    "weights used twice": "its weights are multiplied with 2 tensors",
    "softmax over queries": "the softmax runs over another axis",
    "positive scores only": "which keys are seen depends on the scores",
    "maximum over queries": "the scores are changed by what is computed from them",
}
READ = {
    "scale of each row": "softmax( mean[b, h, q, 0]·min(max(s, -50), 50) ) · v",
    "two products multiplied": "softmax(",
    "values written": "softmax( s ) · v",
    "scores returned": "softmax( s ) · v",
}


@pytest.mark.parametrize("name", [*LEFT_ALONE, *READ])
def test_a_near_miss_by_name(name: str) -> None:
    drawn = Drawn.of(replace(Choices(), near_miss=name))
    site, *_ = [s for s in checked(drawn, ahead_of_time) if s.decision != "not attention"]
    if name in READ:
        assert str(site.site.spec).startswith(READ[name])
    else:
        assert site.decision == "kept"
        assert (site.site.spec is None) != (name == "weights returned")
        assert site.reason.startswith(LEFT_ALONE[name])


def test_each_near_miss_changes_what_the_plain_attention_gives_or_how() -> None:
    """A near-miss that is attention after all would test nothing; these keep every number."""
    same = {
        *("two softmaxes added", "weights returned", "last row returned", "scores returned"),
        *("scores detached", "weights detached", "NaN replaced", "dropped twice", "less the mean"),
    }
    c = Choices()
    plain = Drawn.of(c)
    with torch.no_grad():
        expected = plain.module(*plain.inputs)
        for name in NEAR_MISSES:
            drawn = Drawn.of(replace(c, near_miss=name))
            found = drawn.module(*drawn.inputs)
            out = found[0] if isinstance(found, tuple) else found
            if name not in same:
                assert not torch.allclose(out, expected, atol=1e-4), name
