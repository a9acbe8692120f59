"""The report as a reader meets it, in a real browser."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from report_page import HOSTILE, LAYERS, METHODS, STEPS, Reader, messages
from scipy.stats import linregress

from wdanalysis.analysis.floors import near_floor

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from wdanalysis.comparison import Comparison

PER_MODULE = len(METHODS) * len(STEPS) * LAYERS


@pytest.fixture
def reader(chromium: Chrome, page: Path) -> Iterator[Reader]:
    return Reader(chromium, page).open()


def test_nothing_is_fetched_and_nothing_fails(reader: Reader) -> None:
    # The browser's own pages (chrome://) are none of the report's.
    requests = [sent["request"]["url"] for sent in messages(reader.chrome, "Network.requestWillBeSent")]
    requests += [made["url"] for made in messages(reader.chrome, "Network.webSocketCreated")]
    fetched = [url for url in requests if url.startswith(("file:", "http:", "https:", "ws:", "wss:"))]
    assert fetched == [reader.page.as_uri()]
    assert [
        entry for entry in reader.chrome.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ] == []


def test_names_stay_text(reader: Reader) -> None:
    assert reader.chrome.title == f"Weight decomposition: {', '.join(METHODS)}"
    assert HOSTILE in reader.find("#filters").text
    assert HOSTILE in reader.find("[data-table=summary]").text
    assert reader.all("img, b, i") == []


def test_each_panel_gives_the_numbers_of_its_method(reader: Reader, comparison: Comparison) -> None:
    metrics = comparison.metrics
    for figure, method in zip(reader.all("#scatters figure"), METHODS, strict=True):
        rows = metrics[(metrics["method"] == method) & (metrics["module"] == "q")]
        line = linregress(rows["delta_d"], rows["delta_m"])
        caption = figure.find_element("css selector", "figcaption").text.replace("−", "-")
        assert method in caption
        assert f"r = {line.rvalue:#.3g}" in caption
        assert caption.endswith(f"n = {len(rows)}")


@pytest.mark.parametrize(
    ("brushed", "other"), [("#scatters", "#profiles"), ("#profiles", "#scatters")], ids=["scatter", "profile"]
)
def test_a_brush_in_one_view_selects_in_the_other(reader: Reader, brushed: str, other: str) -> None:
    before = reader.pixels(reader.find(f"{other} figure"))
    reader.drag_over(reader.find(f"{brushed} figure"), until=0.6)
    chosen = reader.wait("return source.selected.indices.length")
    assert 0 < chosen < PER_MODULE
    assert f"{chosen} selected" in reader.status()
    assert reader.pixels(reader.find(f"{other} figure")) != before
    listed = reader.run("return document.querySelectorAll('#selected-table tbody tr').length")
    assert listed == min(chosen, 25)
    reader.find("#clear").click()
    assert "selected" not in reader.status()
    assert not reader.find("#selected").is_displayed()


def test_a_brush_over_all_of_a_panel_selects_the_points_of_its_method(
    reader: Reader, comparison: Comparison
) -> None:
    reader.drag_over(reader.find("#scatters figure"))
    reader.wait("return source.selected.indices.length")
    found = reader.run("return source.selected.indices.map((i) => [point.method[i], point.module[i]])")
    assert {tuple(pair) for pair in found} == {("FT", "q")}


@pytest.mark.parametrize("panel", range(len(METHODS)))
def test_hovering_a_point_names_it(reader: Reader, comparison: Comparison, panel: int) -> None:
    reader.hover_over_first_point(panel)
    reader.wait("return document.querySelector('.bk-Tooltip')?.shadowRoot.textContent.includes('matrix')")
    shown = reader.run("""
        const inside = document.querySelector(".bk-Tooltip").shadowRoot;
        const content = inside.querySelector(".bk-tooltip-content");
        return [content.innerText, content.querySelectorAll("img, script").length];""")
    row = comparison.metrics[comparison.metrics["method"] == METHODS[panel]].iloc[0]
    for value in (METHODS[panel], row["name"], row["layer"], row["step"]):
        assert str(value) in shown[0]
    assert shown[1] == 0


def test_a_selection_survives_new_axes_and_colours(reader: Reader) -> None:
    reader.drag_over(reader.find("#scatters figure"), until=0.6)
    chosen = reader.wait("return source.selected.indices")
    logarithmic = reader.find("#log").is_selected()
    reader.find("#log").click()
    scale = "LinearScale" if logarithmic else "LogScale"
    reader.wait(f"return charts.profiles[0].plot.y_scale.type === '{scale}'")
    assert reader.run("return source.selected.indices") == chosen
    assert [entry for entry in reader.chrome.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_filters_leave_what_they_say(reader: Reader) -> None:
    assert reader.status() == f"{PER_MODULE} of {2 * PER_MODULE} points shown."
    reader.choose("#module", "all")
    assert reader.status().startswith(f"{2 * PER_MODULE} of")
    reader.choose("#module", "v")
    reader.choose("#step-from", "400")
    reader.choose("#layer-to", "2")
    assert reader.status().startswith(f"{3 * len(METHODS)} of")
    reader.all("#filters input[type=checkbox]")[0].click()
    assert reader.status().startswith(f"{3 * (len(METHODS) - 1)} of")
    assert not reader.all("#scatters figure")[0].is_displayed()
    reader.find("#filters [type=reset]").click()
    reader.wait(f"return document.getElementById('status').textContent.startsWith('{PER_MODULE} of')")


def test_a_table_sorts_by_the_keyboard(reader: Reader, comparison: Comparison) -> None:
    from selenium.webdriver.common.keys import Keys

    table = "[data-table=metrics]"
    button = reader.find(f"{table} th button[title=delta_m]")
    reader.run("arguments[0].focus()", button)
    reader.press(Keys.ENTER)
    heading = reader.find(f"{table} th:has(button[title=delta_m])")
    assert heading.get_attribute("aria-sort") == "ascending"
    reader.press(Keys.ENTER)
    assert heading.get_attribute("aria-sort") == "descending"
    place = list(comparison.metrics.columns).index("delta_m") + 1
    cell = reader.find(f"{table} tbody tr:first-child td:nth-child({place})")
    assert float(cell.get_attribute("title") or "") == comparison.metrics["delta_m"].max()


def test_a_table_comes_back_as_csv_with_every_digit(reader: Reader, comparison: Comparison) -> None:
    text = reader.run("return csv(report.tables.metrics, [...Array(report.tables.metrics.rows).keys()])")
    saved = pd.read_csv(io.StringIO(text), keep_default_na=False, na_values=[""])
    shown = comparison.metrics.replace("", np.nan).infer_objects()
    pd.testing.assert_frame_equal(saved, shown.where(shown.notna(), np.nan), check_dtype=False)
    assert next(csv.reader(io.StringIO(text))) == list(comparison.metrics.columns)


def test_every_control_is_reached_and_named_by_the_keyboard(reader: Reader) -> None:
    from selenium.webdriver.common.keys import Keys

    reader.run("document.querySelectorAll('details').forEach((part) => (part.open = false))")
    reader.press(Keys.TAB)
    assert reader.run("return document.activeElement.className") == "skip"
    wanted = reader.run(
        "return document.querySelectorAll('#filters select, #filters input, #filters button:not(:disabled)').length"
    )
    reached = set()
    for _ in range(120):
        reader.press(Keys.TAB)
        place, name, outline = reader.run("""
            const at = document.activeElement;
            const all = [...document.querySelectorAll('#filters select, #filters input, #filters button')];
            return [all.indexOf(at), at.ariaLabel || at.labels?.[0]?.textContent || at.textContent,
                    getComputedStyle(at).outlineStyle];""")
        if place >= 0:
            reached.add(place)
            assert name.strip()
            assert outline == "solid"
    assert len(reached) == wanted


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(chromium: Chrome, page: Path, width: int) -> None:
    reader = Reader(chromium, page).open(width)
    assert reader.run("return document.documentElement.scrollWidth") <= width
    for figure in reader.all("#scatters figure, #profiles figure"):
        assert 0.2 * width < figure.size["width"] <= width


def test_the_charts_follow_the_dark_scheme(chromium: Chrome, page: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        reader = Reader(chromium, page).open(scheme=scheme)
        colours[scheme] = reader.run(
            "return [getComputedStyle(document.body).backgroundColor, charts.scatters[0].plot.background_fill_color]"
        )
    assert all(light != dark for light, dark in zip(*colours.values(), strict=True))


def test_marked_points_are_hollow_and_counted(reader: Reader, comparison: Comparison) -> None:
    marked = near_floor(comparison.metrics)
    filled = reader.run("return Array.from(source.data.filled)")
    assert [value == 0 for value in filled] == marked.tolist()
    why = "hollow: ΔD under 3 × what rounding makes by itself"
    assert f"{why} ({marked.sum()} of {len(marked)})" in reader.find("#scatter-legend").text


@pytest.fixture
def full_reader(chromium: Chrome, full_page: Path) -> Iterator[Reader]:
    return Reader(chromium, full_page).open()


def test_the_null_is_drawn_behind_the_points_of_each_panel(
    full_reader: Reader, comparison: Comparison
) -> None:
    for panel, method in enumerate(METHODS):
        of_method = comparison.metrics["method"] == method
        rows = comparison.metrics[of_method & (comparison.metrics["module"] == "q")]
        data = full_reader.run("return charts.scatters[arguments[0]].grey.data", panel)
        assert len(data["x"]) == len(rows)
        assert (pd.Series(data["low"]) < pd.Series(data["y"])).all()
    assert "null: updates without structure" in full_reader.find("#scatter-legend").text


def test_null_dots_beyond_the_axes_are_told(full_reader: Reader) -> None:
    assert "beyond the axes" not in full_reader.find("#scatters").text
    full_reader.run("nulls.filter(isShown).slice(0, 2).forEach((row) => { row.delta_m *= 1000; }); update();")
    first, *others = full_reader.all("#scatters figure")
    assert "2 null dots lie beyond the axes" in first.text
    assert all("beyond" not in other.text for other in others)


def test_each_panel_says_how_r_depends_on_one_layer_and_what_the_null_gives(full_reader: Reader) -> None:
    for figure in full_reader.all("#scatters figure"):
        caption = figure.find_element("css selector", "figcaption").text
        assert "one layer out: −0.25 … 0.50" in caption
        assert "null: 0.60 [0.40, 0.80]" in caption


def test_predictions_are_drawn_and_listed_with_their_r2(full_reader: Reader, comparison: Comparison) -> None:
    (figure,) = full_reader.all("#predictions figure")
    assert f"turning: R² = 1.00, n = {PER_MODULE // len(METHODS)}" in figure.text
    data = full_reader.run("return charts.predictions[0].data.data")
    assert data["x"] == data["y"]
    rows = comparison.metrics.query("method == 'LoRA'")
    assert f"of {len(rows)}" in full_reader.find("[data-table=predictions]").text
    assert "1 2 3 4" in full_reader.find("[data-table=step_choices]").text


def test_the_null_and_the_predictions_follow_the_filters(full_reader: Reader) -> None:
    full_reader.choose("#layer-from", "3")
    assert full_reader.run("return charts.scatters[0].grey.data.x.length") == len(STEPS) * (LAYERS - 3)
    assert full_reader.run("return charts.predictions[0].data.data.x.length") == len(STEPS) * (LAYERS - 3)


def test_without_null_models_no_panel_names_them(reader: Reader) -> None:
    if not reader.run("return nulls.length"):
        assert "null" not in reader.find("#explore").text
    assert reader.all("#predictions") == []
