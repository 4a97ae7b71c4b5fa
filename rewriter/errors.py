"""Every exception that rewriter raises on purpose.

    RewriterError
    ├── InputError            a file, directory, option or argument that the user gave is not usable
    │   ├── PassError         an unknown pass, an unknown option, a value out of range
    │   ├── SelectorError     a selector that cannot be read, or that matches no site
    │   └── CheckpointError   a directory that is not a checkpoint, or is not safe to load
    │       └── PlanError     a plan that does not fit the model
    ├── CaptureError          torch could not turn the model into a graph
    ├── SpecError             a formula or JSON text that is not a valid spec
    ├── ShapeError            tensors that do not fit a spec
    ├── LoweringError         no implementation takes a spec on a device
    ├── ExportError           an ONNX file could not be made, loaded or run
    ├── CheckFailed           a pass or an implementation does not do what it promises
    └── NotEquivalent         verification failed; carries the report

A site that stays as it was is not an exception: it is a line of the report. `Declined` carries its
reason out of a pass and never reaches the user. A pass that changes the function and is declined by
every site is a `NotAppliedWarning`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewriter.verify.report import VerifyReport

__all__ = [
    "CaptureError",
    "CheckFailed",
    "CheckpointError",
    "Declined",
    "ExportError",
    "InputError",
    "LoweringError",
    "NotAppliedWarning",
    "NotEquivalent",
    "PassError",
    "PlanError",
    "RewriterError",
    "SelectorError",
    "ShapeError",
    "SpecError",
]


class RewriterError(Exception):
    """Root of the exceptions that rewriter raises on purpose."""


class InputError(RewriterError):
    """Something that the user gave cannot be used."""


class PassError(InputError):
    """A pass that does not exist, or an option that it does not take."""


class SelectorError(InputError):
    """A selector that cannot be read, or that matches no site."""


class CheckpointError(InputError):
    """A directory that is not a checkpoint, or that is not safe to load or to write."""


class PlanError(CheckpointError):
    """A saved plan that does not fit the model; the message names the first difference."""


class CaptureError(RewriterError):
    """torch could not turn the model into a graph; the message carries torch's reason."""


class SpecError(RewriterError):
    """A formula or JSON text that is not a valid spec."""


class ShapeError(RewriterError):
    """Tensors whose shapes or dtypes do not fit the spec that they are given to."""


class LoweringError(RewriterError):
    """No implementation takes this spec on this device; the message lists every reason."""


class ExportError(RewriterError):
    """An ONNX file could not be made, or ONNX Runtime did not agree with torch on it."""


class CheckFailed(RewriterError):
    """A pass or an implementation breaks a promise; the message names the first check that says
    so."""


class NotEquivalent(RewriterError):
    """Two models that should agree do not. `report` says where and by how much."""

    def __init__(self, message: str, report: VerifyReport) -> None:
        super().__init__(message)
        self.report = report


class Declined(Exception):
    """Raised inside a pass: the pass does not apply to this site. The text is the reason that the
    report shows."""


class NotAppliedWarning(UserWarning):
    """A pass that was asked for by name changes nothing in this model."""
