"""`python -m wdanalysis.cli` is `wd-analyze`."""

from wdanalysis.cli import main

main()
