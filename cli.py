"""Launcher: `python cli.py compare …` is `wd-analyze compare …`."""

from wdanalysis.cli import main

if __name__ == "__main__":
    main()
