"""Hugging Face directories: read safely, and inputs made from a configuration.

A directory is data. Nothing in it is run or unpickled: weights come from safetensors alone, the
class of the model comes from the installed transformers, and nothing is fetched from a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rewriter.errors import CheckpointError, InputError

__all__ = ["check_device", "check_directory", "load_model", "read_json"]

_CODE = {
    "auto_map": "its configuration asks for code from the directory (auto_map)",
    "custom_pipelines": "its configuration asks for code from the directory (custom_pipelines)",
}
_SAFE = ".safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def load_model(directory: str | Path, *, device: str = "cpu") -> nn.Module:
    """The model of a Hugging Face directory, in evaluation mode, in the dtype of its configuration.

    Args:
        directory: a local directory with `config.json` and safetensors.
        device: where the model is put, "cpu" or "cuda".

    Raises:
        CheckpointError: the directory is not a checkpoint, or not safe, or does not fit its model.
        InputError: the device does not exist, or transformers is not installed.
    """
    check_device(device)
    directory = Path(directory)
    config = check_directory(directory)
    kind = _model_class(directory, config)
    try:
        model, info = kind.from_pretrained(
            str(directory.absolute()),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            dtype="auto",
        )
    except Exception as error:  # transformers raises many kinds for a broken directory
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{directory}: transformers cannot load it: {reason}") from error
    for key, what in (("missing_keys", "has no weights for"), ("mismatched_keys", "misfits")):
        if info.get(key):
            first = sorted(map(str, info[key]))[0]
            raise CheckpointError(
                f"{directory}: the checkpoint {what} {first} of {type(model).__name__}, which "
                "would be random; set `architectures` in config.json to the class that was saved"
            )
    return cast(nn.Module, model.eval().to(device))


def check_device(device: str) -> None:
    """Refuses a device that torch does not see.

    Raises:
        InputError: the device is no device, or there is none of its kind here.
    """
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not known; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {device} was asked for, but torch {torch.__version__} sees no CUDA device; "
            "use cpu, or install a CUDA build of torch on a machine with a GPU"
        )


# --- the directory -------------------------------------------------------------------------------


def check_directory(directory: Path) -> dict[str, Any]:
    """The parsed `config.json` of a directory that is safe to load.

    Raises:
        CheckpointError: what is missing or not safe, and what to do.
    """
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {what}; give a local Hugging Face directory")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; give a Hugging Face directory")
    config = read_json(directory / "config.json")
    _check_config(directory, config)
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} holds an adapter, not a model; merge it into its model and save that"
        )
    _check_weights(directory)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def _check_config(directory: Path, config: Any) -> None:
    """Refuses settings, at any depth, that make transformers fetch or run code."""
    if isinstance(config, list):
        for value in config:
            _check_config(directory, value)
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in _CODE and value:
            raise CheckpointError(
                f"{directory}: {_CODE[key]}, which is never run; use a model whose class is in "
                "transformers, or load it yourself and call rewriter.optimize(model)"
            )
        if "attn_implementation" in key and any(c in str(value) for c in "/:"):
            raise CheckpointError(
                f"{directory}: its configuration asks for a kernel from a network ({key}: {value})"
                f"; remove {key} from config.json"
            )
        _check_config(directory, value)


def _check_weights(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return
    if index.is_file():
        shards = read_json(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {None}
        for name in sorted(names, key=str):
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(_SAFE):
                raise CheckpointError(f"{index} names {name!r}, which is no safetensors file of it")
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory} has no {name}, which {index.name} names")
        return
    pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds its weights as a pickle only ({pickles[0]}), which can run code "
            "and is never loaded; convert it: model.save_pretrained(DIR) writes safetensors"
        )
    raise CheckpointError(
        f"{directory} has no model.safetensors; model.save_pretrained(DIR) writes one"
    )


def _model_class(directory: Path, config: dict[str, Any]) -> Any:
    """The class of transformers that the configuration names, else the one of its model type."""
    try:
        import transformers
    except ImportError:
        raise InputError(
            "transformers is not installed, and Hugging Face directories need it: "
            "pip install 'rewriter[hf]'"
        ) from None
    names, installed = config.get("architectures"), transformers.__version__
    if names:
        name = names[0] if isinstance(names, list) else None
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            raise CheckpointError(
                f"{directory}: architecture {name!r} is not in transformers {installed}; upgrade "
                "it, or load the model yourself and call rewriter.optimize(model)"
            )
        if kind is not transformers.PreTrainedModel:
            return kind
    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{directory}: config.json names no architecture, and its model_type "
            f"{config.get('model_type')!r} is not in transformers {installed}"
        )
    return transformers.AutoModel
