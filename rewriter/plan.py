"""The plan of a rewritten checkpoint: what was done to which model, as one JSON file.

    {"format": 1,
     "versions": {"rewriter": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
     "passes": ["sparse.window(window=64) @ 3-5"], "target": "auto",
     "model": {"class": "...", "config": {...}, "parameters": {"embed.weight": [97, 32], ...},
               "sha256": "..."},
     "sites": {"layers.3.attn": [{"before": "...", "after": "...", "formula": "...", ...}]}}

A plan is applied again by its passes; the specs of the sites are a record, so that a reader sees
what was computed and a later rewriter can be held to it. They are never decoded on loading.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from rewriter import registry
from rewriter.errors import InputError, PlanError
from rewriter.passbase import Request

__all__ = ["FILE", "FORMAT", "Plan", "config_of", "parameters_of"]

FILE = "rewriter.json"
FORMAT = 1

_IGNORED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
"""Settings that may change without a change of the model."""


@dataclass(frozen=True)
class Plan:
    """What `rewriter.json` holds."""

    passes: tuple[Request, ...]
    target: str = "auto"
    sites: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """For each site by name, one entry a formula it was found with; empty before the first run."""
    kind: str = ""
    """Name of the class of the model."""
    config: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, list[int]] = field(default_factory=dict)
    """Shape of everything in the state dict."""
    added: dict[str, list[int]] = field(default_factory=dict)
    """Shape of every parameter that passes added, by its full name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `read` is the inverse."""
        return {
            "format": FORMAT,
            "versions": {name: _version(name) for name in ("rewriter", "torch", "transformers")},
            "passes": [request.text for request in self.passes],
            "target": self.target,
            "model": {
                "class": self.kind,
                "config": self.config,
                "parameters": self.parameters,
                "sha256": _digest(self.config, self.parameters),
            },
            "added": self.added,
            "sites": self.sites,
        }

    @staticmethod
    def read(path: Path) -> Plan:
        """The plan in a file.

        Raises:
            PlanError: the file cannot be read, is of another format, or was changed by hand.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise PlanError(
                    f"{path} has format {data['format']}, and this rewriter reads {FORMAT}; it was "
                    f"written by rewriter {data['versions']['rewriter']}: install that version"
                )
            model = data["model"]
            plan = Plan(
                passes=registry.read_requests([str(text) for text in data["passes"]]),
                target=str(data["target"]),
                sites={str(name): list(found) for name, found in data["sites"].items()},
                kind=str(model["class"]),
                config=dict(model["config"]),
                parameters={str(k): [int(n) for n in v] for k, v in model["parameters"].items()},
                added={str(k): [int(n) for n in v] for k, v in data.get("added", {}).items()},
            )
            changed = model["sha256"] != _digest(plan.config, plan.parameters)
        except OSError as error:
            raise PlanError(f"{path} cannot be read: {error.strerror}") from None
        except KeyError as error:
            raise PlanError(f"{path} is not a plan: it has no {error}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"{path} is not a plan: {error}") from None
        except PlanError:
            raise
        except InputError as error:
            raise PlanError(f"{path} asks for what this rewriter does not have: {error}") from error
        if changed:
            raise PlanError(f"{path} was changed: its sha256 is not that of its model description")
        return plan

    def check_config(self, where: Path, config: dict[str, Any]) -> None:
        """Refuses the configuration of another model.

        Raises:
            PlanError: names the first setting that differs.
        """
        found = config_of(config)
        for key in sorted({*self.config, *found}):
            if self.config.get(key) != found.get(key):
                raise PlanError(
                    f"{where}: the plan was made for another model: {key} is {found.get(key)!r} in "
                    f"config.json and {self.config.get(key)!r} in {FILE}"
                )

    def check_added(self, where: Path, found: dict[str, list[int]]) -> None:
        """Refuses the added parameters of another plan.

        Raises:
            PlanError: names the first parameter that differs.
        """
        name = _difference(self.added, found)
        if name:
            raise PlanError(
                f"{where} belongs to another plan: {name} has shape {found.get(name)} there and "
                f"{self.added.get(name)} in {FILE}"
            )

    def check_model(self, where: Path, model: nn.Module) -> None:
        """Refuses another model.

        Raises:
            PlanError: names the first parameter or site that differs.
        """
        found = parameters_of(model)
        for name, shape in self.parameters.items():
            if name not in found:
                raise PlanError(f"{where}: the plan has a parameter {name}, and the model has not")
            if found[name] != shape:
                raise PlanError(
                    f"{where}: parameter {name} has shape {found[name]}, and {shape} in the plan"
                )
        for name in found:
            if name not in self.parameters:
                raise PlanError(f"{where}: the model has a parameter {name}, and the plan has not")
        modules = {name for name, _ in model.named_modules()}
        for name in self.sites:
            if name.partition("#")[0] not in modules and not name.startswith("("):
                raise PlanError(
                    f"{where}: the plan has a site {name}, and the model no such module"
                )


def _difference(a: dict[str, list[int]], b: dict[str, list[int]]) -> str:
    """The first name that the two do not have in common with the same shape; empty if none."""
    return next((n for n in sorted({*a, *b}) if a.get(n) != b.get(n)), "")


def config_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a `config.json` that have to stay as they are."""
    return {key: value for key, value in config.items() if key not in _IGNORED}


def parameters_of(model: nn.Module) -> dict[str, list[int]]:
    """The shape of everything in the state dict, by name."""
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def _digest(config: dict[str, Any], parameters: dict[str, list[int]]) -> str:
    text = json.dumps([config, parameters], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
