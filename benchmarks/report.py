"""How large the report is, how long it takes to write, and how soon it is drawn in a browser.

python -m benchmarks.report

A made-up table of 32 layers, 7 modules, 3 methods and 4 steps. Opened three times in headless Chromium, where that is
installed. Prints the table and writes it to `RESULTS.md`.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import page
from wdanalysis.analysis.findings import Findings
from wdanalysis.analysis.table import COLUMNS
from wdanalysis.comparison import Comparison
from wdanalysis.report import render
from wdanalysis.results.provenance import Options, Run

HEADING = "report"
METHODS, STEPS, LAYERS = ("FT", "LoRA", "DoRA"), (500, 1000, 1500, 2000), 32
MODULES = ("q", "k", "v", "o", "gate", "up", "down")
PACKAGES = ("bokeh", "pandas", "jinja2")
MOST_BYTES = 2_000_000
RUNS = 3
DRAWN = (
    "return typeof charts !== 'undefined' && charts?.profiles.every(({ target }) => target.children.length)"
)


def made_up() -> Comparison:
    """Random values with all their digits for every method, step, layer and module."""
    index = pd.MultiIndex.from_product([METHODS, STEPS, range(LAYERS), MODULES])
    random = np.random.default_rng(0)
    table = pd.DataFrame({column: random.uniform(1e-6, 1e-5, len(index)) for column in COLUMNS})
    table[["method", "step", "layer", "module"]] = index.to_frame().to_numpy()
    names = [f"model.layers.{layer}.mlp.{module}_proj.weight" for _, _, layer, module in index]
    table = table.assign(
        name=names, axis="out", base_dtype="BF16", tuned_dtype="BF16", vectors=4096, length=4096
    )
    types = dict.fromkeys(("step", "layer", "vectors", "length", "zero_vectors"), "Int64")
    return Comparison(table.assign(zero_vectors=0).astype(types), Run(options=Options(axis="out")))


def seconds_to_draw(path: Path) -> float | None:
    """From opening the file to the last chart on the screen, the median; None without a browser."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        return None
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={path.parent / 'profile'}")
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    taken = []
    try:
        for _ in range(RUNS):
            chrome.get("about:blank")
            started = time.perf_counter()
            chrome.get(path.as_uri())
            WebDriverWait(chrome, 60, poll_frequency=0.01).until(lambda chrome: chrome.execute_script(DRAWN))
            taken.append(time.perf_counter() - started)
    finally:
        chrome.quit()
    return statistics.median(taken)


def main() -> None:
    """Measure, print and write."""
    comparison = made_up()
    started = time.perf_counter()
    for measure in (comparison.correlations, comparison.readings, comparison.diagnostics, comparison.summary):
        measure()
    counted = time.perf_counter()
    text = render(Findings(comparison.metrics), comparison.run)
    written = time.perf_counter()
    found = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    assert json.loads(found[1])
    total, data = len(text.encode()), len(found[1].encode())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        path.write_text(text, "utf-8")
        drawn = seconds_to_draw(path)
    rows = [
        ["whole file", f"{total / 1e6:.2f} MB"],
        ["of it data", f"{data / 1e6:.2f} MB"],
        ["of it page and charting library (at most 2 MB)", f"{(total - data) / 1e6:.2f} MB"],
        ["to write it", f"{written - counted:.1f} s"],
        ["the statistics before it, which `compare` takes anyway", f"{counted - started:.1f} s"],
        ["to open it until the last chart is drawn", "no browser" if drawn is None else f"{drawn:.1f} s"],
    ]
    shape = (
        f"{len(METHODS)} methods, {len(STEPS)} steps, {LAYERS} layers, {len(MODULES)} modules: "
        f"{len(comparison.metrics):,} rows of {len(COLUMNS)} columns."
    )
    body = f"`python -m benchmarks.report`, {page.machine(PACKAGES)}\n\n{shape}\n\n{page.table(['', 'measured'], rows)}"
    print(body)
    page.replace_section(HEADING, body)
    assert total - data <= MOST_BYTES


if __name__ == "__main__":
    main()
