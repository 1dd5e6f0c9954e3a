"""The report: records, profiles and galleries as one HTML page that needs nothing besides itself."""

from ovbench.tables.report.page import page

__all__ = ["page"]
