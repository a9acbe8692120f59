"""The scatter of ΔM against ΔD: its artists hold the table's points and scipy's line."""

from __future__ import annotations

import io
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from wdanalysis.analysis.nulls import null_curve
from wdanalysis.analysis.readings import readings
from wdanalysis.analysis.regression import correlations
from wdanalysis.errors import ComparisonError
from wdanalysis.figures import scatter
from wdanalysis.figures.style import decimals


def panels(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def texts(axes) -> str:
    return "\n".join([axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)])


def drawn_points(axes) -> np.ndarray:
    marked = [c.get_offsets() for c in axes.collections if len(c.get_offsets()) and c.get_array() is not None]
    return np.sort(np.concatenate(marked), axis=0)


def test_every_method_has_a_panel_with_its_points(table) -> None:
    metrics = table()
    for panel, method in zip(panels(scatter(metrics, "v")), ("FT", "LoRA", "DoRA"), strict=True):
        rows = metrics[(metrics["method"] == method) & (metrics["module"] == "v")]
        assert panel.get_title(loc="left").split("\n")[0] == method
        np.testing.assert_array_equal(drawn_points(panel), np.sort(rows[["delta_d", "delta_m"]], axis=0))


def test_the_line_is_that_of_scipy_over_the_range_of_the_points(table) -> None:
    metrics = table(methods=["FT"])
    rows = metrics[metrics["module"] == "q"]
    expected = stats.linregress(rows["delta_d"], rows["delta_m"])
    x, y = panels(scatter(metrics, "q"))[0].lines[0].get_data()
    assert (x[0], x[-1]) == (rows["delta_d"].min(), rows["delta_d"].max())
    np.testing.assert_allclose(y, expected.intercept + expected.slope * np.asarray(x), rtol=1e-10)


def test_a_panel_names_the_numbers_of_the_table_of_correlations(table) -> None:
    metrics = table(methods=["FT"])
    fits = correlations(metrics)
    pooled = fits.query("scope == 'pooled' and module == 'q'").iloc[0]
    shown = texts(panels(scatter(metrics, "q"))[0])
    r, low, high = (decimals(pooled[name]) for name in ("pearson_r", "r_low", "r_high"))
    assert f"r = {r} [{low}, {high}]" in shown
    assert f"n = {pooled['n']}" in scatter(metrics, "q").caption
    known = {"r_low": -0.5, "r_high": 0.75, "leave_out_low": -0.2, "leave_out_high": 0.1}
    null = {"r_null": 0.9, "r_null_low": 0.85, "r_null_high": 0.95}
    figure = scatter(metrics, "q", correlations=fits.assign(**known, **null))
    assert f"r = {r} [−0.50, 0.75]" in texts(panels(figure)[0])
    said = f"r = {r} [−0.50, 0.75] (95 %, by layer), −0.20 … 0.10 with one layer out"
    assert f"{said}, updates without structure 0.90 [0.85, 0.95], slope" in figure.caption
    none = fits.assign(r_low=np.nan, r_high=np.nan, slope_low=np.nan, slope_high=np.nan)
    figure = scatter(metrics, "q", correlations=none)
    assert texts(panels(figure)[0]) == f"FT\nr = {r}"
    assert f"r = {r} (no interval)" in figure.caption
    assert "slope, 95 % by layer" not in legend(figure)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def with_null(metrics: pd.DataFrame, shift: float = 0.9) -> pd.DataFrame:
    null = {"null_delta_m": shift * metrics["delta_m"], "null_delta_m_sd": 0.01 * metrics["delta_m"]}
    both = {"null_delta_d": metrics["delta_d"], "null_delta_d_sd": 0.01 * metrics["delta_d"]}
    return metrics.assign(update="stored", **null, **both)


def test_updates_without_structure_are_dots_that_the_legend_names_once(table) -> None:
    metrics = with_null(table(methods=["FT", "LoRA"]))
    figure = scatter(metrics, "q")
    for panel, method in zip(panels(figure), ("FT", "LoRA"), strict=True):
        rows = null_curve(metrics[(metrics["method"] == method) & (metrics["module"] == "q")])
        (dots,) = [line for line in panel.lines if line.get_marker() == "."]
        np.testing.assert_array_equal(dots.get_xydata(), rows[["delta_d", "delta_m"]])
    assert legend(figure).count("null: without structure") == 1
    assert "null: without structure" not in legend(scatter(table(), "q"))


def test_the_axes_reach_for_the_null_only_so_far(table) -> None:
    metrics = table(methods=["FT"], modules=["q"])
    top = metrics["delta_m"].max()
    spread = top - metrics["delta_m"].min()
    (near,) = panels(scatter(with_null(metrics, 1.2), "q"))
    (far,) = panels(scatter(with_null(metrics, 100), "q"))
    assert near.get_ylim()[1] > 1.2 * top
    assert top + spread < far.get_ylim()[1] < top + 1.5 * spread


def test_other_quantities_have_their_own_fit_name_and_no_null(table) -> None:
    random = np.random.default_rng(5)
    metrics = with_null(table(methods=["FT"], modules=["q"]))
    metrics = metrics.assign(mean_angle=random.uniform(1, 9, 18), rel_delta_m=random.uniform(0, 1, 18))
    figure = scatter(metrics, "q", x="mean_angle", y="rel_delta_m")
    (panel,) = panels(figure)
    line = stats.linregress(metrics["mean_angle"], metrics["rel_delta_m"])
    assert f"r = {decimals(line.rvalue)}" in texts(panel)
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("mean angle, degrees", "ΔM/m₀")
    assert "ΔM/m₀ against the mean angle" in figure.get_suptitle()
    np.testing.assert_array_equal(
        drawn_points(panel), np.sort(metrics[["mean_angle", "rel_delta_m"]], axis=0)
    )
    assert "null" not in "".join(legend(figure)) + texts(panel)
    with pytest.raises(ComparisonError, match="no values of matrix_delta_m"):
        scatter(metrics, "q", y="matrix_delta_m")
    with pytest.raises(ValueError, match="no quantity 'loss'"):
        scatter(metrics, "q", y="loss")


def test_runs_are_faint_and_their_mean_is_strong(table) -> None:
    one = table(methods=["FT"], modules=["q"])
    other = one.assign(delta_m=1.5 * one["delta_m"])
    metrics = pd.concat([one.assign(run="seed-0"), other.assign(run="seed-1")], ignore_index=True)
    figure = scatter(metrics, "q")
    groups = [c for c in panels(figure)[0].collections if c.get_array() is not None]
    faint, strong = ([c for c in groups if (c.get_alpha() is not None) is seen] for seen in (True, False))
    assert sum(len(c.get_offsets()) for c in faint) == 36
    means = np.sort(np.concatenate([c.get_offsets() for c in strong]), axis=0)
    expected = one.assign(delta_m=1.25 * one["delta_m"])[["delta_d", "delta_m"]]
    np.testing.assert_allclose(means, np.sort(expected, axis=0))
    assert "Strong: mean over 2 runs; faint: each run" in figure.caption
    assert "n = 18" in figure.caption


def test_merged_stacks_differ_by_outline_and_colour_stays_the_layer(table) -> None:
    metrics = pd.concat(
        [table(methods=["FT"], modules=["q"]).assign(stack=stack) for stack in ("encoder", "decoder")],
        ignore_index=True,
    )
    figure = scatter(metrics, "q")
    groups = [c for c in panels(figure)[0].collections if c.get_array() is not None]
    assert len({c.get_edgecolor().tobytes() for c in groups}) == 2
    assert {tuple(c.get_array()) for c in groups} == {(0, 1, 2, 3, 4, 5)}
    assert {"encoder", "decoder"} <= set(legend(figure))


def band_edges(panel) -> np.ndarray:
    """The two edges of the slope's band, as they are drawn."""
    _, low, high = [line.get_ydata() for line in panel.lines if line.get_marker() != "."]
    return np.array([low, high])


def test_a_band_widens_the_axis_only_so_far_and_what_it_leaves_out_is_said(table) -> None:
    metrics = table(methods=["FT"], modules=["q"])
    fits = correlations(metrics)
    spread = metrics["delta_m"].max() - metrics["delta_m"].min()
    slope = fits.loc[fits["scope"] == "pooled", "slope"].iloc[0]
    for wide, cut in ((0.1, False), (20.0, True)):
        figure = scatter(
            metrics, "q", correlations=fits.assign(slope_low=slope - wide, slope_high=slope + wide)
        )
        (panel,) = panels(figure)
        low, high = panel.get_ylim()
        edges = band_edges(panel)
        assert bool(edges.min() < low or edges.max() > high) is cut
        assert high - low < 2 * spread
        assert ("The band goes on beyond the panel (FT)" in figure.caption) is cut


def test_colour_is_the_layer_and_marker_the_step(table) -> None:
    figure = scatter(table(methods=["FT"], layers=(3, 7, 11)), "q")
    groups = [c for c in panels(figure)[0].collections if c.get_array() is not None]
    assert [list(group.get_array()) for group in groups] == [[3, 7, 11]] * 3
    assert len({group.get_paths()[0].vertices.tobytes() for group in groups}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == [
        f"step {step}" for step in (500, 1000, 2000)
    ]


def test_many_steps_share_a_marker_and_the_legend_names_their_range(table) -> None:
    figure = scatter(table(methods=["FT"], steps=range(100, 5001, 100), layers=(0, 1)), "q")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    ranges = [label for label in labels if label.startswith("step ")]
    assert ranges == [
        *("step 0–1000", "step 1001–2000", "step 2001–3000", "step 3001–4000", "step 4001–5000")
    ]


def test_panels_share_axes_unless_a_method_would_shrink_to_a_spot(table) -> None:
    alike = table(methods=["FT", "LoRA"])
    unlike = alike.copy()
    unlike.loc[unlike["method"] == "FT", ["delta_m", "delta_d"]] *= 100
    note = "The axes differ from panel to panel"

    for metrics, share, expected in [(alike, None, True), (unlike, None, False), (unlike, True, True)]:
        figure = scatter(metrics, "q", share_axes=share)
        first, second = panels(figure)
        assert (first.get_xlim() == second.get_xlim()) is expected
        assert (note in figure.caption) is not expected


def test_a_matrix_without_a_value_is_not_drawn_and_is_named(table) -> None:
    metrics = table(methods=["FT"])
    metrics.loc[0, "delta_d"] = math.nan
    figure = scatter(metrics, "q")
    assert len(drawn_points(panels(figure)[0])) == 17
    assert "1 matrix without a value (FT)" in figure.caption


def test_points_near_the_rounding_floor_are_hollow_and_counted(table) -> None:
    metrics = table(methods=["FT"], steps=[None], modules=["q"]).assign(
        floor_ratio=[1, 2.9, 3, 10, 100, np.nan]
    )
    figure = scatter(metrics, "q")
    figure.savefig(io.BytesIO())
    filled, hollow = (c for c in panels(figure)[0].collections if c.get_array() is not None)
    assert list(hollow.get_array()) == [0, 1]
    assert len(hollow.get_facecolor()) == 0
    assert not np.array_equal(*hollow.get_edgecolor())  # the layers' colours
    assert len(filled.get_facecolor()) == 4
    assert "Hollow: ΔD under 3 × what rounding makes by itself (2 of 6)" in figure.caption


def test_points_that_rounding_erased_are_hollow_and_told_apart_from_those_that_it_made(table) -> None:
    metrics = table(methods=["FT"], steps=[None], modules=["q"])
    on = metrics.assign(grid="on", delta_d_bias=[0.4, 0.66, 0.67, 0.9, 1.0, np.nan])
    caption = scatter(on, "q").caption
    assert "Hollow: rounding erased over a third of ΔD (2 of 6)" in caption
    both = on.assign(floor_ratio=[np.nan, np.nan, np.nan, np.nan, np.nan, 2.0])
    assert (
        "Hollow: ΔD under 3 × what rounding makes by itself, or rounding erased over a third of ΔD (3 of 6)"
        in scatter(both, "q").caption
    )


def test_null_dots_beyond_the_axes_are_told(table) -> None:
    metrics = table(methods=["FT", "LoRA"], modules=["q"])
    far = metrics.index[:3]
    null = with_null(metrics)
    null.loc[far, "null_delta_m"] *= 1000
    assert "3 grey dots lie beyond the axes" in scatter(null, "q").caption
    assert "beyond" not in scatter(with_null(metrics), "q").caption


def test_the_caption_ends_with_the_reading_of_every_panel(table) -> None:
    metrics = table(methods=["FT", "LoRA"], steps=[None])
    caption = scatter(metrics, "v").caption
    assert "trend" not in scatter(metrics.assign(step=7), "v", step=7).caption  # read of all steps
    said = readings(metrics).query("module == 'v'").groupby("method")["sentence"].agg(" ".join)
    for method in ("FT", "LoRA"):
        assert f"v, {method}: {said[method]}" in caption


@pytest.mark.parametrize("layers", [(0,), (0, 1), (None,)])
def test_too_few_points_have_no_line(table, layers) -> None:
    for panel in panels(scatter(table(steps=[None], layers=layers), "q")):
        assert not panel.lines
        assert f"n = {len(layers)}, no line" in texts(panel)


def test_a_method_without_values_says_so(table) -> None:
    metrics = table()
    metrics.loc[metrics["method"] == "LoRA", "delta_m"] = math.nan
    assert "no values" in texts(panels(scatter(metrics, "q"))[1])


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_figure_names_its_axis(table, axis) -> None:
    figure = scatter(table().assign(axis=axis), "q")
    assert f"(axis {axis})" in figure.get_suptitle()
    assert f"(one vector per {axis}put feature)" in figure.caption


def test_two_axes_in_one_figure_are_refused(table) -> None:
    with pytest.raises(ComparisonError, match="one axis"):
        scatter(pd.concat([table(), table().assign(axis="in")]), "q")


def test_an_unknown_module_is_answered_with_the_known_ones(table) -> None:
    with pytest.raises(ComparisonError, match="no module 'k' in the table, which has q, v"):
        scatter(table(), "k")


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-5, 1e-1, 1e3])
def test_tick_labels_stay_short_at_any_scale(table, scale) -> None:
    figure = scatter(table(scale=scale), "q")
    figure.savefig(io.BytesIO())
    labels = [label.get_text() for panel in panels(figure) for label in panel.get_xticklabels()]
    assert any(labels)
    assert max(map(len, labels)) <= 6
