"""A comparison as a notebook shows it: IPython's own formatter for what a cell gives, a real browser for the charts."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from report_page import HOSTILE, LAYERS, METHODS, STEPS, Reader, make_comparison, messages

import wdanalysis as wd

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from wdanalysis.comparison import Comparison


def in_a_cell(value: object) -> dict[str, Any]:
    """What IPython sends to a notebook for a cell's last value, by kind."""
    formatters = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed")
    shown, _ = formatters.DisplayFormatter().format(value)
    return dict(shown)


class Elements(HTMLParser):
    """The elements of a piece of HTML, and the text of its table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.found[-1][0] in ("td", "th") and data.strip():
            self.rows[-1][-1] += data


def named(names: list[str], rows: int, comparison: Comparison) -> wd.Comparison:
    """The first rows of each method, under other names."""
    metrics = comparison.metrics.groupby("method", sort=False).head(rows)
    return wd.Comparison(
        metrics.assign(method=metrics["method"].map(dict(zip(METHODS, names, strict=False))))
    )


def test_a_terminal_shows_one_line(comparison: Comparison) -> None:
    plain = named(["FT", "LoRA", "DoRA"], 999, comparison)
    size = len(METHODS) * len(STEPS) * LAYERS * 2
    expected = f"FT, LoRA, DoRA: q, v; 6 layers; steps 100–400; axis out; {size} rows"
    assert repr(plain) == in_a_cell(plain)["text/plain"] == f"<Comparison of {expected}>"
    shown = in_a_cell(plain.explore())["text/plain"]
    assert shown.startswith(f"<Linked charts of {expected}; a notebook shows them")
    assert "\n" not in shown


def test_the_line_names_few_and_counts_many() -> None:
    assert "50 methods: q, v" in repr(make_comparison(tuple(map(str, range(50)))))
    one = make_comparison(("a\nb",), layers=1)
    one = wd.Comparison(one.metrics.query("step == 100 and module == 'q'").assign(step=pd.NA))
    assert repr(one) == "<Comparison of 'a\\nb': q; 1 layer; axis out; 1 row>"
    assert repr(wd.Comparison(one.metrics.iloc[:0])) == "<Comparison of nothing: 0 rows>"


def test_a_cell_shows_the_summary_with_the_numbers_of_the_table(comparison: Comparison) -> None:
    heading, *rows = Elements(in_a_cell(comparison)["text/html"]).rows
    summary = comparison.summary()
    assert heading[:5] == ["method", "module", "step", "ΔM", "ΔD"]
    assert len(rows) == len(summary)
    for cells, row in zip(rows, summary.itertuples(), strict=True):
        assert cells[:3] == [row.method, row.module, str(row.step)]
        numbers = re.findall(r"[\d.-]+(?:×10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?", " ".join(cells[3:7]).replace("−", "-"))
        superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
        read = [float(number.replace("×10", "e").translate(superscripts)) for number in numbers]
        known = [row.delta_m, row.delta_d, row.pearson_r, row.r_low, row.r_high, row.slope]
        assert read == pytest.approx([value for value in known if np.isfinite(value)], rel=0.006, abs=0.006)
        assert cells[-1] == row.badge


def test_a_cell_shows_a_scatter_that_is_small(comparison: Comparison) -> None:
    (picture,) = [has for tag, has in Elements(comparison._repr_html_()).found if tag == "img"]
    source, data = str(picture["src"]).split(",")
    assert source == "data:image/png;base64"
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
    assert 800 < pixels.shape[1] < 1600
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50  # and not empty
    assert picture["alt"] == "Scatter of ΔM against ΔD, q"
    assert len(data) < 300_000


def test_a_cell_shows_every_reading_and_warning_as_text(comparison: Comparison) -> None:
    html = comparison._repr_html_()
    tags = {tag for tag, _ in Elements(html).found}
    assert not tags & {"script", "i", "b", "style", "iframe"}
    assert [has for tag, has in Elements(html).found if tag == "img" and "onerror" in has] == []

    class Text(HTMLParser):
        said = ""

        def handle_data(self, data: str) -> None:
            self.said += data

    text = Text()
    text.feed(html)
    for sentence in comparison.readings()["sentence"]:
        assert sentence in text.said
    assert HOSTILE in text.said
    assert "the name <i>x</i> & 'y' differs" in text.said
    assert "1 left out" in text.said


def test_a_cell_reads_on_light_and_on_dark(comparison: Comparison) -> None:
    styles = [str(has.get("style", "")) for _, has in Elements(comparison._repr_html_()).found]
    assert not [style for style in styles if re.search("color|background", style)]


def test_many_panels_are_folded_and_cut() -> None:
    many = make_comparison(tuple(map(str, range(30))), layers=4)
    elements = Elements(many._repr_html_())
    assert ("details", {}) in elements.found
    assert len(elements.rows) < 45
    few = Elements(make_comparison(METHODS[:2], layers=4)._repr_html_())
    assert ("details", {"open": None}) in few.found


def test_what_no_picture_can_show_is_shown_without(comparison: Comparison) -> None:
    other = comparison.metrics.assign(axis="in")
    mixed = wd.Comparison(pd.concat([comparison.metrics, other]))
    empty = wd.Comparison(comparison.metrics.iloc[:0])
    for shown in (mixed, empty):
        assert "img" not in {tag for tag, _ in Elements(shown._repr_html_()).found}
    assert "axis out and in" in mixed._repr_html_()
    unmeasured = wd.Comparison(comparison.metrics.assign(delta_m=np.nan, delta_d=np.nan))
    cells = [cell for row in Elements(unmeasured._repr_html_()).rows for cell in row]
    assert not [cell for cell in cells if "nan" in cell]


@pytest.fixture
def frame(chromium: Chrome, comparison: Comparison, tmp_path: Path) -> Iterator[Reader]:
    """A reader of the charts in a page that has them in a cell, as a notebook does."""
    pytest.importorskip("bokeh", reason="the report needs the extra 'report'")
    notebook = tmp_path / "notebook.html"
    cell = comparison.explore()._repr_html_()
    notebook.write_text(
        f"<!doctype html><meta charset='utf-8'><link rel='icon' href='data:,'><title>notebook</title>{cell}",
        encoding="utf-8",
    )
    download = {"behavior": "allow", "downloadPath": str(tmp_path)}
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", download)
    size = {"width": 1000, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for log in ("browser", "performance"):
        chromium.get_log(log)
    chromium.get(notebook.as_uri())
    chromium.switch_to.frame(0)
    reader = Reader(chromium, notebook)
    reader.wait(
        "return [...document.querySelectorAll('#scatters figure > div')].length > 0"
        " && [...document.querySelectorAll('#scatters figure > div')].every((div) => div.children.length)"
    )
    reader.run(
        "document.documentElement.style.scrollBehavior = 'auto'"
    )  # emulated media do not reach a frame
    yield reader
    chromium.switch_to.default_content()


def test_the_charts_work_in_a_notebooks_frame(frame: Reader, comparison: Comparison) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    points = len(METHODS) * len(STEPS) * LAYERS
    assert frame.status().startswith(f"{points} of {2 * points} points shown")
    frame.choose("#module", "v")
    frame.choose("#step-from", "400")
    assert frame.status().startswith(f"{len(METHODS) * LAYERS} of")
    frame.drag_over(frame.find("#scatters figure"))
    frame.wait("return document.getElementById('status').textContent.includes('selected')")
    frame.find("#selected .tools button:last-child").click()
    file = frame.page.parent / "selected.csv"
    WebDriverWait(frame.chrome, 20).until(lambda _: file.exists())
    chosen = pd.read_csv(file)
    assert f"{len(chosen)} selected" in frame.status()
    of_panel = comparison.metrics.query("method == 'FT' and module == 'v' and step == 400")
    assert LAYERS // 2 < len(chosen) == chosen["name"].isin(of_panel["name"]).sum()
    assert set(chosen["delta_m"]) <= set(of_panel["delta_m"])
    logged = frame.chrome.get_log("browser")
    assert [entry for entry in logged if entry["level"] in ("SEVERE", "WARNING")] == []


def test_the_frame_shows_the_charts_and_nothing_else_of_the_page(frame: Reader) -> None:
    seen = frame.run("""
        const shown = (element) => element.checkVisibility();
        return [[...document.querySelectorAll("section")].filter(shown).map(({ id }) => id),
                [...document.querySelectorAll("header, nav, footer, h1")].filter(shown).length,
                document.documentElement.scrollWidth > innerWidth];""")
    assert seen == [["explore"], 0, False]
    frame.hover_over_first_point(0)
    frame.wait("return document.querySelector('.bk-Tooltip')?.checkVisibility()")


def test_the_frame_reaches_neither_the_notebook_nor_the_network(frame: Reader) -> None:
    reached = frame.run("try { return parent.document.title } catch (error) { return error.name }")
    assert reached == "SecurityError"
    requests = [sent["request"]["url"] for sent in messages(frame.chrome, "Network.requestWillBeSent")]
    fetched = [url for url in requests if url.startswith(("file:", "http:", "https:", "ws:", "wss:"))]
    assert fetched == [frame.page.as_uri()]
