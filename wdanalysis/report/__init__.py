"""The one-file HTML page: a picture and what it says, charts to explore, tables to sort, and where it all came from.

What a notebook shows of a comparison is made here too, of the same page where it is to be explored.
"""

from wdanalysis.report.notebook import Explorer, cell, in_words
from wdanalysis.report.page import render, write

__all__ = ["Explorer", "cell", "in_words", "render", "write"]
