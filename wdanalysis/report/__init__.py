"""The one-file HTML page: summary and reading first, charts to explore, tables to sort, and where it all came from.

What a notebook shows of a comparison is made here too, of the same page where it is to be explored.
"""

from wdanalysis.report.notebook import Explorer, cell, in_words
from wdanalysis.report.page import NEEDS, is_available, render, write

__all__ = ["NEEDS", "Explorer", "cell", "in_words", "is_available", "render", "write"]
