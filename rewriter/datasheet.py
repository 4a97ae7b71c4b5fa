"""What a pass says of itself, from its declaration alone: options, contract, docstring."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rewriter.options import options_of, type_text, value_text
from rewriter.passbase import Pass

__all__ = ["data_sheet", "list_view", "sheet_view"]


def data_sheet(kind: type[Pass]) -> dict[str, Any]:
    """The data sheet of a pass as plain JSON values."""
    text = inspect.getdoc(kind) or ""
    return {
        "name": kind.name,
        "contract": kind.contract,
        "stage": kind.stage,
        "identity": kind.identity,
        "patterns": list(kind.patterns),
        "laws": list(kind.laws),
        "examples": list(kind.examples),
        "summary": _first_sentence(text),
        "text": text,
        "source": inspect.getdoc(sys.modules[kind.__module__]) or "",
        "options": [
            {
                "name": name,
                "type": type_text(hint),
                "required": declared.default is MISSING,
                "default": None if declared.default is MISSING else declared.default,
                "at_least": declared.metadata["at_least"],
                "at_most": declared.metadata["at_most"],
                "choices": declared.metadata["choices"],
                "help": declared.metadata["help"],
            }
            for name, (declared, hint) in options_of(kind).items()
        ],
    }


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.]) ", paragraph)[0]


def sheet_view(kind: type[Pass]) -> RenderableType:
    """The data sheet of one pass, for a terminal."""
    sheet = data_sheet(kind)
    table = Table("option", "value", "default", "meaning", box=None, pad_edge=False)
    for option in sheet["options"]:
        bounds = (("at_least", "at least"), ("at_most", "at most"))
        limits = [f"{words} {option[key]:g}" for key, words in bounds if option[key] is not None]
        if option["choices"]:
            limits.append("one of " + ", ".join(option["choices"]))
        value = ", ".join([option["type"], *limits])
        default = "required" if option["required"] else value_text(option["default"])
        table.add_row(*(Text(x) for x in (option["name"], value, default, option["help"])))
    return Group(
        Text(f"{sheet['name']}   contract: {sheet['contract']}   edits: {sheet['stage']}\n"),
        Text(sheet["text"] + "\n"),
        table if sheet["options"] else Text("no options"),
        Text("\n" + "\n".join(f"{name}: {value}" for name, value in _facts(sheet))),
    )


def _facts(sheet: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines below the options."""
    return [
        ("Identity", sheet["identity"] or "none"),
        ("For", ", ".join(sheet["patterns"]) or "it does not say"),
        ("Laws it keeps", ", ".join(sheet["laws"]) or "it does not say"),
        ("Examples", "; ".join(sheet["examples"]) or "none"),
        ("Source", sheet["source"]),
    ]


def list_view(kinds: tuple[type[Pass], ...]) -> RenderableType:
    """All passes, one a row."""
    table = Table("pass", "contract", "edits", "what holds afterwards", box=None, pad_edge=False)
    for kind in kinds:
        summary = data_sheet(kind)["summary"]
        table.add_row(*(Text(x) for x in (kind.name, kind.contract, kind.stage, summary)))
    return table
