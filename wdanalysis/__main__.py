"""`python -m wdanalysis` is `wd-analyze`."""

from wdanalysis.cli import main

if __name__ == "__main__":
    main()
