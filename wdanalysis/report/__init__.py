"""The one-file HTML page: a picture and what it says, charts to explore, tables to sort, and where it all came from."""

from wdanalysis.report.page import render, write

__all__ = ["render", "write"]
