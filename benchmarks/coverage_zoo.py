"""Every architecture of transformers and of diffusers that can be built offline, tiny and with
random weights, and inputs for it.

An architecture is a configuration class and the model that it configures. Configurations are shrunk
by `coverage_shrink`, inputs are made by `coverage_inputs` from the names of forward's arguments;
`coverage_table` holds what neither can guess. `coverage_diffusers` does the same for diffusers.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import coverage_diffusers
import coverage_inputs
import torch
from coverage_shrink import options_of
from coverage_table import INPUTS, LEFT_OUT, MODELS, OPTIONS, VARIANTS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

__all__ = ["Architecture", "architectures", "build", "guesses", "inputs_of", "named"]


@dataclass(frozen=True)
class Architecture:
    """One architecture."""

    name: str
    """The model type, or that of a variant; of diffusers, `diffusers/` and the class."""
    library: str = "transformers"

    @property
    def left_out(self) -> str:
        """Why it cannot be built here; empty if it can."""
        return {**LEFT_OUT, **coverage_diffusers.LEFT_OUT}.get(self.name, "")


def named(name: str) -> Architecture:
    """The architecture of that name."""
    return Architecture(name, "diffusers" if name.startswith("diffusers/") else "transformers")


def architectures() -> list[Architecture]:
    """All of them, by name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return [
        named(n) for n in sorted([*CONFIG_MAPPING_NAMES, *VARIANTS, *coverage_diffusers.names()])
    ]


_checked: dict[str, tuple[int, bool]] = {}
"""Of every architecture that was built: which guess of inputs it takes (-1 for none), and whether
its output is finite with the wide weights."""


def build(architecture: Architecture, implementation: str, *, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, in float32; equal arguments give equal weights.

    Raises:
        NotImplementedError: if a model of diffusers has no such attention.
        ValueError: if a model of transformers has no such attention.
    """
    model = _built(architecture, implementation, seed, wide=True)
    if architecture.name not in _checked:
        try:
            _check(architecture, model)
        except ValueError:
            _checked[architecture.name] = (-1, True)
    if not _checked[architecture.name][1]:
        model = _built(architecture, implementation, seed, wide=False)
    return model


def _built(architecture: Architecture, implementation: str, seed: int, *, wide: bool) -> nn.Module:
    torch.manual_seed(seed)
    if architecture.library == "diffusers":
        model = coverage_diffusers.build(architecture.name, implementation)
    else:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind = CONFIG_MAPPING[VARIANTS.get(architecture.name, architecture.name)]
        part = MODELS.get(architecture.name, "").partition(":")[2]
        cls = model_class(architecture.name, kind)
        options = options_of(kind, OPTIONS.get(architecture.name))

        def made(parts: bool) -> nn.Module:
            config = kind(**copy.deepcopy(options))
            _set(config, implementation, parts=parts)
            torch.manual_seed(seed)
            return cls(getattr(config, part) if part else config)

        try:
            model = made(parts=True)
        except ValueError as error:
            if "attn_implementation" not in str(error):
                raise
            model = made(parts=False)  # a part refuses, such as a backbone of convolutions
    if wide:
        _widen(model, seed)
    return model.float().eval()


def _set(config: Any, implementation: str, *, parts: bool) -> None:
    """Asks for an implementation, of the whole only or of its parts too."""
    config._attn_implementation = implementation if parts else {"": implementation}
    for part in vars(config).values() if parts else ():
        if hasattr(part, "_attn_implementation"):
            _set(part, implementation, parts=True)


def model_class(name: str, config: type) -> type[nn.Module]:
    """The class without a head where there is one."""
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    path = config.__module__.replace("configuration_", "modeling_")
    name = VARIANTS.get(name, name)
    wanted = MODELS.get(name, "").partition(":")[0] or MODEL_MAPPING_NAMES.get(name)
    if isinstance(wanted, str) and "." in wanted:
        path, wanted = wanted.rsplit(".", 1)
        path = f"transformers.models.{path}"
    module = importlib.import_module(path)
    if isinstance(wanted, str) and hasattr(module, wanted):
        found: type[nn.Module] = getattr(module, wanted)
        return found
    for value in vars(module).values():
        is_model = isinstance(value, type) and issubclass(value, PreTrainedModel)
        if not is_model or value.__module__ != module.__name__ or value.config_class is not config:
            continue
        if not value.__name__.endswith("PreTrainedModel"):
            return value
    raise LookupError(f"no model class of {config.__name__} in {module.__name__}")


@torch.no_grad()
def _widen(model: nn.Module, seed: int) -> None:
    """Matrices that keep the size of what they multiply: with the usual initialisation attention is
    nearly uniform, and a wrong score would not show; what stacked convolutions compute vanishes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and weight.numel():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1.5 * noise / math.sqrt(weight.shape[1]))
        elif isinstance(module, _BatchNorm) and weight is not None:
            weight.fill_(1.0)
        elif isinstance(module, _ConvNd) and "weight" in module._parameters:
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * math.sqrt(2 / weight[0].numel()))
        elif isinstance(module, nn.Embedding):
            weight.copy_(torch.randn(weight.shape, generator=generator))


def inputs_of(architecture: Architecture, model: nn.Module) -> dict[str, Any]:
    """Arguments of one forward that the model takes: the first of several guesses.

    Raises:
        ValueError: if it takes none of them; the message holds the last reasons.
    """
    found = _checked.get(architecture.name, (-1, True))[0]
    if found >= 0:
        for index, guess in enumerate(guesses(architecture, model)):
            if index == found:
                return guess
    return _check(architecture, model)


def guesses(architecture: Architecture, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Sets of arguments to try, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    if architecture.library == "diffusers":
        yield from coverage_diffusers.guesses(architecture.name, model, generator)
    elif architecture.name in INPUTS:
        yield INPUTS[architecture.name](model.config, generator)
    else:
        yield from coverage_inputs.guesses(model, generator)


def _check(architecture: Architecture, model: nn.Module) -> dict[str, Any]:
    reasons = []
    for index, guess in enumerate(guesses(architecture, model)):
        try:
            with torch.no_grad():
                output = model(**_copied(guess))
        except Exception as error:
            reasons.append(f"{list(guess)}: {type(error).__name__}: {error}"[:200])
        else:
            _checked[architecture.name] = (index, _finite(output))
            return guess
    raise ValueError(" | ".join(reasons[-2:]) or "no guess")


def _copied(given: dict[str, Any]) -> dict[str, Any]:
    return {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}


def _finite(output: Any) -> bool:
    """Whether no number in it is NaN; infinities may be masks."""
    if isinstance(output, Tensor):
        return not (output.is_floating_point() and bool(output.isnan().any()))
    if isinstance(output, Mapping):
        return all(map(_finite, output.values()))
    if isinstance(output, Sequence) and not isinstance(output, str):
        return all(map(_finite, output))
    return True
