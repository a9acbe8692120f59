"""The one-file HTML page: summary and reading first, charts to explore, tables to sort, and where it all came from."""

from wdanalysis.report.page import NEEDS, is_available, render, write

__all__ = ["NEEDS", "is_available", "render", "write"]
