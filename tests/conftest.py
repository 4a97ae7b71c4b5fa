"""What every test gets: fixed seeds, a clean compiler, no network; GPU tests only with a GPU."""

from __future__ import annotations

import os

# Read when these libraries are imported, so they are set before.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Iterator

import pytest
import torch

import rewriter.verdicts


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
        if _shares_a_fixture(item) and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def _shares_a_fixture(item: pytest.Item) -> bool:
    """The test uses a fixture of its own module that is made once: one process is to make it."""
    defined = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009, not typed
    return any(
        fixture.scope in ("module", "session") and fixture.baseid == item.parent.nodeid
        for fixtures in defined
        for fixture in fixtures
    )


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Seeds are fixed, and no compiled graph of one test is seen by the next, or by another run."""
    rewriter.verdicts.KEEPS = False
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
