"""What was found in a model, what was done about it and why: as text, as JSON, as a page."""

from rewriter.report.groups import SiteGroup
from rewriter.report.report import Decision, Report, SiteReport

__all__ = ["Decision", "Report", "SiteGroup", "SiteReport"]
