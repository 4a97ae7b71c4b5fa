"""Options of passes: dataclass fields that know their help text, their type and their bounds.

One declaration serves Python, the text of a request, the command line and the data sheet:

    window: int = option("keys visible to one query, its own included", at_least=1)

Types: `bool`, `int`, `float`, `str`, `tuple[int, ...]`, each also with `| None`.
"""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, Field, field, fields
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from rewriter.errors import PassError

__all__ = ["check_options", "list_text", "option", "options_of", "type_text", "value_text"]


def option(
    help: str,
    *,
    default: Any = MISSING,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field of a pass that a request can set by name.

    Args:
        help: one clause, without a full stop.
        default: the value when the request does not name the option; without one it is required.
        at_least: the smallest value allowed; holds for every element of a list.
        at_most: the largest value allowed; likewise.
        choices: the only values allowed.
    """
    metadata = {"help": help, "at_least": at_least, "at_most": at_most, "choices": choices}
    return field(default=default, kw_only=True, metadata=metadata)


def options_of(kind: type) -> dict[str, tuple[Field[Any], Any]]:
    """The options of a pass by name, in order: the dataclass field and its type."""
    hints = _hints(kind)
    return {f.name: (f, hints[f.name]) for f in fields(kind) if "help" in f.metadata}


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def check_options(owner: Any, name: str) -> None:
    """Brings every option of `owner` to its declared type, in place.

    Raises:
        PassError: a value of another type or outside of its bounds; the text names both.
    """
    for key, (declared, hint) in options_of(type(owner)).items():
        where = f"{name}: option {key}"
        value = _typed(getattr(owner, key), hint, where)
        for element in value if isinstance(value, tuple) else (value,):
            _check_bounds(element, declared.metadata, where)
        object.__setattr__(owner, key, value)


def _typed(value: Any, hint: Any, where: str) -> Any:
    optional = isinstance(hint, types.UnionType) and type(None) in get_args(hint)
    if optional:
        if value is None:
            return None
        hint = next(t for t in get_args(hint) if t is not type(None))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
        raise PassError(f"{where} is {value}; it has to be finite")
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if get_origin(hint) is tuple:
        values = _integers(value)
        if values:
            return values
    raise PassError(f"{where} takes {type_text(hint)}, got {value!r}")


def _integers(value: Any) -> tuple[int, ...] | None:
    """`3`, `[0, 3]`, `(0, 3)` and `"0,3"` as a tuple; None for anything else."""
    if isinstance(value, str):
        parts = value.strip("[] ").split(",")
        value = [int(x) if x.strip().lstrip("-").isdecimal() else x for x in parts]
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if all(isinstance(x, int) and not isinstance(x, bool) for x in values):
        return values
    return None


def _check_bounds(value: Any, metadata: Any, where: str) -> None:
    if value is None:
        return
    low, high, choices = metadata["at_least"], metadata["at_most"], metadata["choices"]
    if choices is not None and value not in choices:
        raise PassError(f"{where} is {value!r}; it is one of {', '.join(choices)}")
    if low is not None and value < low:
        raise PassError(f"{where} is {value_text(value)}; it has to be at least {low:g}")
    if high is not None and value > high:
        raise PassError(f"{where} is {value_text(value)}; it has to be at most {high:g}")


# --- text ----------------------------------------------------------------------------------------


def value_text(value: Any) -> str:
    """The value as a request writes it; reading it back gives the same value."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(value_text(x) for x in value)}]"
    return repr(value)


def type_text(hint: Any) -> str:
    """The type of an option in words."""
    if isinstance(hint, types.UnionType):
        kinds = [t for t in get_args(hint) if t is not type(None)]
        return " or ".join([type_text(t) for t in kinds] + ["None"])
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}
    return names.get(hint, "a list of integers such as [0, 3]")


def list_text(kind: type) -> str:
    """Every option of a pass with its default: `window, sinks=0`; "none" if it takes none."""
    texts = []
    for key, (declared, _) in options_of(kind).items():
        required = declared.default is MISSING
        texts.append(key if required else f"{key}={value_text(declared.default)}")
    return ", ".join(texts) or "none"
