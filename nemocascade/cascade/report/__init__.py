"""The report of a cascade: one HTML file, and its figures as PNG files."""

from nemocascade.cascade.errors import ReportError
from nemocascade.cascade.report.write import write_report

__all__ = ["ReportError", "write_report"]
