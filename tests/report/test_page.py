"""The page as a text: what it holds, what it leaves out, what it links to."""

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
from wdanalysis.analysis.badges import BADGES
from wdanalysis.analysis.findings import Findings
from wdanalysis.comparison import Comparison
from wdanalysis.report import content, words
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
    assert text.count("<script") == text.count("</script>") == 7


def test_json_in_a_script_element_says_the_same() -> None:
    value = {"</script><!--": ["<b>", "ΔM", None, 1e-300]}
    assert "<" not in embedded_json(value)
    assert json.loads(embedded_json(value)) == value


def test_the_policy_allows_these_scripts_and_no_source(page: Path) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.read_text("utf-8"))
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy[1]
    assert "; base-uri 'none'; form-action 'none'" in policy[1]
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
    table = table.astype({"delta_d_bias": float})  # empty everywhere
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
        "measured on 2026-02-01",
        '"2026-01-31T12:00:00Z"',
    ],
    ids=["command", "versions", "axis", "warnings", "skipped", "date", "modified"],
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


def test_of_many_steps_some_are_left_out_whole_and_the_last_never(monkeypatch: pytest.MonkeyPatch) -> None:
    few = make_comparison(methods=("FT", "LoRA"), layers=4).metrics
    parts = [few[few["step"] == 100].assign(step=step) for step in range(10, 510, 10)]
    metrics = pd.concat(parts, ignore_index=True).astype({"step": "Int64"})
    monkeypatch.setattr(content, "MOST_ROWS", 200)
    kept = content.thinned_by_steps(metrics)
    assert 150 < len(kept) <= 200
    for _, of_method in kept.groupby("method"):
        assert of_method.groupby("step").size().eq(8).all()
        steps = of_method["step"].unique().astype(int)
        assert steps.max() == 500
        assert set(abs(steps[1:] - steps[:-1])) <= {40, 50}
    monkeypatch.setattr(content, "MOST_ROWS", 10**6)
    assert content.thinned_by_steps(metrics) is metrics


def test_many_steps_share_markers_in_ranges_of_one_width(comparison: Comparison) -> None:
    few = make_comparison(methods=("FT",), layers=1).metrics.head(1)
    metrics = pd.concat([few.assign(step=step) for step in range(100, 5001, 100)]).astype({"step": "Int64"})
    ranges = content.data(Findings(metrics), comparison.run)["step_ranges"]
    assert [(at["name"], len(at["steps"])) for at in ranges] == [
        *(("0–1000", 10), ("1001–2000", 10), ("2001–3000", 10), ("3001–4000", 10), ("4001–5000", 10))
    ]


def test_the_overview_has_the_badge_and_r_of_every_panel(comparison: Comparison) -> None:
    found = content.overview(Findings(comparison.metrics))
    assert list(found) == list(METHODS)
    summary = comparison.summary()
    layers = comparison.correlations().query("scope == 'within_step'")
    for row, within in zip(summary.itertuples(), layers.itertuples(), strict=True):
        panel = found[row.method][row.module]
        assert (panel.badge, panel.sign) == (row.badge, content.SIGNS[row.badge])
        numbers = (within.pearson_r, within.r_low, within.r_high)
        r, low, high = (f"{value:.2f}".replace("-", "−") for value in numbers)
        assert panel.r == f"{r} [{low}, {high}]"


def test_every_badge_has_a_sign_of_its_own() -> None:
    assert set(content.SIGNS) == set(BADGES)
    assert len(set(content.SIGNS.values())) == len(BADGES)


def test_figures_are_linked_where_they_are_there_and_nowhere_else(
    comparison: Comparison, tmp_path: Path
) -> None:
    with_figures = make_comparison(methods=("FT",))
    written = with_figures.save(tmp_path / "run", figures=["layers"])
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    linked = re.findall(r'href="(figures/[^"]*)"', page)
    assert sorted(linked) == ["figures/layers_q.png", "figures/layers_v.png"]
    assert all(tmp_path / "run" / link in written for link in linked)
    again = Comparison.load(tmp_path / "run")
    (tmp_path / "run" / "figures" / "layers_v.png").unlink()
    assert 'href="figures/layers_q.png"' in again.report(tmp_path / "run" / "report.html").read_text("utf-8")
    assert "layers_v.png" not in (tmp_path / "run" / "report.html").read_text("utf-8").split("<script")[0]
    assert 'href="figures/' not in again.report(tmp_path / "elsewhere.html").read_text("utf-8")


def test_odd_names_of_figures_are_links_to_them() -> None:
    assert content.figure_links(["figures/scatter_a b#c.png", "figures/heatmap.png"]) == {
        "scatter": [("a b#c", "figures/scatter_a%20b%23c.png")],
        "heatmap": [("heatmap", "figures/heatmap.png")],
    }


def test_meanings_are_of_columns_that_there_are(comparison: Comparison) -> None:
    defined = set(re.findall(r"`(\w+)`", Path("docs/columns.md").read_text("utf-8")))
    elsewhere = {"badge", "bytes", "modified", "header_sha256", "r2"}
    assert set(words.MEANINGS) <= defined | elsewhere
    assert set(comparison.summary().columns) <= set(words.MEANINGS)
    assert set(words.GLOSSARY) <= set(words.MEANINGS)


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
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_quantiles_of_the_charts_are_those_of_pandas(values: list[float], share: float) -> None:
    script = (files("wdanalysis.report") / "assets" / "points.js").read_text("utf-8")
    found = re.search(r"^function quantile.*?^}$", script, re.DOTALL | re.MULTILINE)
    assert found
    code = f"{found[0]} console.log(quantile({json.dumps(values)}, {share}))"
    node = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    assert float(node.stdout) == pytest.approx(pd.Series(values).quantile(share), rel=1e-14)


def test_an_interrupted_run_says_so(comparison: Comparison) -> None:
    partial = replace(comparison.run, complete=False)
    assert "The run was interrupted." in report.render(Findings(comparison.metrics), partial)


def test_the_report_replaces_the_file_that_is_there(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    assert comparison.report(path) == path == comparison.report(path)
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_geometry_is_a_table_where_it_was_taken(comparison: Comparison) -> None:
    angles = pd.DataFrame({"method": ["FT"], "nss": [0.25]})
    page = report.render(Findings(comparison.metrics), comparison.run, geometry=angles)
    assert embedded(page)["tables"]["geometry"]["rows"] == 1
    assert 'data-table="geometry"' in page
    assert 'data-table="geometry"' not in report.render(Findings(comparison.metrics), comparison.run)
