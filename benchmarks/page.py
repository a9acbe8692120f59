"""`RESULTS.md`: one section for each benchmark, replaced when it runs again."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = "# Results\n\nEach section is written by the benchmark that it names.\n"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    rules = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rules, *rows])


def machine(packages: Iterable[str]) -> str:
    """The machine, the versions and the day, in one paragraph."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{datetime.date.today()}. {len(os.sched_getaffinity(0))} cores ({cpu[1] if cpu else platform.machine()}), "
        f"{memory / 1e9:.0f} GB of memory, {system}, Linux {platform.release()}; "
        f"Python {platform.python_version()}, {versions}."
    )


def replace_section(heading: str, body: str) -> None:
    """Write a section of the page; the other sections stay as they are."""
    page = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else TITLE
    intro, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    kept = {section.split("\n", 1)[0]: section.strip() for section in sections}
    kept[f"## {heading}"] = f"## {heading}\n\n{body.strip()}"
    RESULTS.write_text("\n\n".join([intro.strip(), *kept.values()]) + "\n", encoding="utf-8")
