"""A compiler for attention: finds it in any PyTorch model, reads it as a formula, rewrites it.

model = rewriter.optimize(model)                    # exact; the same module object
print(rewriter.inspect(model, inputs))              # each attention, its formula, and why
rewriter.verify(original, model, inputs)            # raises if they differ
rewriter.bisect(original, model, inputs)            # names the site and the stage that differ
rewriter.export_onnx(model, inputs, "model.onnx")   # run in ONNX Runtime before it returns
rewriter.restore(model)
"""

from rewriter import errors
from rewriter.checkpoint import load, save
from rewriter.export import export_onnx
from rewriter.giving import give, head_outputs, label_spans
from rewriter.linear import LinearSpec
from rewriter.optimize import auxiliary_loss, inspect, optimize, report_of, restore
from rewriter.passbase import Pass, option
from rewriter.passes.sinks import massive_dimensions
from rewriter.report import Report, SiteReport
from rewriter.sites import Site
from rewriter.spec import SoftmaxSpec, TensorArg
from rewriter.verify import Behaviour, Culprit, VerifyReport, behaviour, bisect, verify

__version__ = "0.1.0"

__all__ = [
    "Behaviour",
    "Culprit",
    "LinearSpec",
    "Pass",
    "Report",
    "Site",
    "SiteReport",
    "SoftmaxSpec",
    "TensorArg",
    "VerifyReport",
    "auxiliary_loss",
    "behaviour",
    "bisect",
    "errors",
    "export_onnx",
    "give",
    "head_outputs",
    "inspect",
    "label_spans",
    "load",
    "massive_dimensions",
    "optimize",
    "option",
    "report_of",
    "restore",
    "save",
    "verify",
]
