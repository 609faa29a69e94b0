"""The page of a bundle: what was asked for, what was done, and how it was proven."""

from edgeattn.verify.report.page import report_html

__all__ = ["report_html"]
