"""The report of a cascade: HTML files, and its figures as PNG files."""

from nemocascade.cascade.errors import ReportError
from nemocascade.cascade.report.write import write_comparison, write_report

__all__ = ["ReportError", "write_comparison", "write_report"]
