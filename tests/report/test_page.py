"""The page as a text: what it holds, what it leaves out, what it does without its extra."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_page import HOSTILE, METHODS, make_comparison

from wdanalysis import report
from wdanalysis.analysis.findings import Findings
from wdanalysis.comparison import Comparison
from wdanalysis.errors import OutputError
from wdanalysis.report import content
from wdanalysis.report.page import embedded_json

MEGABYTE = 1_000_000


def embedded(page: str) -> dict[str, dict[str, dict[str, list[dict[str, list[object]]]]]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_without_its_data_the_page_stays_under_two_megabytes(page: Path) -> None:
    text = page.read_text("utf-8")
    data = json.dumps(embedded(text), ensure_ascii=False, separators=(",", ":"))
    assert len(text.encode()) - len(data.encode()) < 2 * MEGABYTE


def test_no_name_ends_a_script_or_begins_an_element(page: Path) -> None:
    text = page.read_text("utf-8")
    assert HOSTILE not in text
    assert "<img" not in text.replace("\\u003cimg", "")
    assert text.count("<script") == text.count("</script>") == 4


def test_json_in_a_script_element_says_the_same() -> None:
    value = {"</script><!--": ["<b>", "ΔM", None, 1e-300]}
    assert "<" not in embedded_json(value)
    assert json.loads(embedded_json(value)) == value


def test_the_policy_allows_these_scripts_and_no_source(page: Path) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.read_text("utf-8"))
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy[1]
    assert "'unsafe-inline'" not in policy[1].split("style-src")[0]


def test_the_tables_are_the_comparison_s(page: Path, comparison: Comparison) -> None:
    columns = embedded(page.read_text("utf-8"))["tables"]["metrics"]["columns"]
    table = pd.DataFrame(
        {
            column["name"]: column["values"]
            if "values" in column
            else [
                column["levels"][int(str(code))] if int(str(code)) >= 0 else None for code in column["codes"]
            ]
            for column in columns
        }
    )
    pd.testing.assert_frame_equal(table, comparison.metrics, check_dtype=False)


def test_empty_cells_are_null() -> None:
    frame = pd.DataFrame(
        {"x": [1.5, float("nan")], "step": pd.array([None, 3], "Int64"), "text": ["a", None]}
    )
    x, step, text = content.table(frame)["columns"]
    assert (x["values"], step["values"], text["codes"]) == ([1.5, None], [None, 3], [0, -1])


@pytest.mark.parametrize(
    "words",
    [
        "wd-analyze compare base.safetensors &#39;my tuned&#39;",
        "wdanalysis 0.1.0",
        "one vector per output feature",
        "the name &lt;i&gt;x&lt;/i&gt; &amp; &#39;y&#39; differs",
        "1 left out: is &lt;not&gt; in BASE",
    ],
    ids=["command", "versions", "axis", "warnings", "skipped"],
)
def test_the_page_says(page: Path, words: str) -> None:
    assert words in page.read_text("utf-8")


def test_every_reading_is_on_the_page(page: Path, comparison: Comparison) -> None:
    readings = comparison.readings()
    assert set(readings["method"]) == set(METHODS)
    for sentence in readings["sentence"]:
        assert sentence in page.read_text("utf-8")


def test_many_rows_are_thinned_evenly_and_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MOST_ROWS", 20)
    many = make_comparison()
    page = report.render(Findings(many.metrics), many.run)
    assert f"20 of\n    {len(many.metrics)} rows" in page
    kept = content.thinned(many.metrics)
    assert len(kept) == 20
    assert kept["method"].value_counts().between(6, 7).all()
    few = make_comparison(methods=("FT",), layers=1)
    assert "Thinned" not in report.render(Findings(few.metrics), few.run)


def test_rows_that_rounding_made_or_erased_are_marked_for_the_charts() -> None:
    made = make_comparison(methods=("FT",), layers=3)
    metrics = made.metrics.assign(floor_ratio=9.0, grid="on", delta_d_bias=np.nan)
    metrics.loc[2, "floor_ratio"] = 2.0
    only_made = content.data(Findings(metrics), made.run)["marked"]
    metrics.loc[5, "delta_d_bias"] = 0.5
    marked = content.data(Findings(metrics), made.run)["marked"]
    assert [row for row, is_marked in enumerate(marked["rows"]) if is_marked] == [2, 5]
    assert only_made["why"] == "ΔD under 3 × what rounding makes by itself"
    assert marked["why"] == f"{only_made['why']}, or rounding erased over a third of ΔD"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [9.0, 1.0, 5.0], [4.0, 10.0, 1.0, 2.0]], ids=len)
def test_the_median_of_the_charts_is_that_of_pandas(values: list[float]) -> None:
    script = (files("wdanalysis.report") / "assets" / "charts.js").read_text("utf-8")
    found = re.search(r"^const median = .*?^};$", script, re.DOTALL | re.MULTILINE)
    assert found
    code = f"{found[0]} console.log(median({json.dumps(values)}))"
    node = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    assert float(node.stdout) == pd.Series(values).median()


def test_an_interrupted_run_says_so(comparison: Comparison) -> None:
    partial = replace(comparison.run, complete=False)
    assert "The run was interrupted." in report.render(Findings(comparison.metrics), partial)


def test_the_report_replaces_the_file_that_is_there(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    assert comparison.report(path) == path == comparison.report(path)
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_without_the_extra_it_says_how_to_get_it(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wdanalysis.report.page.find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"pip install 'wdanalysis\[report\]'"):
        comparison.report(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_geometry_is_a_table_where_it_was_taken(comparison: Comparison) -> None:
    angles = pd.DataFrame({"method": ["FT"], "nss": [0.25]})
    page = report.render(Findings(comparison.metrics), comparison.run, geometry=angles)
    assert embedded(page)["tables"]["geometry"]["rows"] == 1
    assert 'data-table="geometry"' in page
    assert 'data-table="geometry"' not in report.render(Findings(comparison.metrics), comparison.run)
