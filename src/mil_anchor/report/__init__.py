"""The report of runs as one HTML page that needs no network."""

from mil_anchor.report.page import write_report

__all__ = ["write_report"]
