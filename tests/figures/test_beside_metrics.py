"""Figures of tables beside the metrics: predictions, choices of steps, vectors."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import Look, density, prediction, save_figures, steps


def texts(axes) -> str:
    return "\n".join([axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)])


@pytest.fixture
def predictions(table) -> pd.DataFrame:
    rows = table(methods=["FT", "LoRA"])
    factor = np.random.default_rng(1).normal(1, 0.1, len(rows))
    rows = rows.assign(law=rows["method"].map({"FT": "diffusing_weights", "LoRA": "turning"}))
    rows = rows.assign(quantity=rows["method"].map({"FT": "delta_d", "LoRA": "delta_m"}))
    observed = rows["delta_m"].where(rows["quantity"] == "delta_m", rows["delta_d"])
    fitted = rows["method"].map({"FT": 0.43, "LoRA": np.nan})
    return rows.assign(observed=observed, predicted=observed * factor, fitted=fitted)


@pytest.fixture
def choices() -> pd.DataFrame:
    rows = [
        ("FT", "q", "out", "1 2 3 4", -0.3),
        ("FT", "q", "out", "1 2 3 5", 0.1),
        ("FT", "q", "out", "2 3 4 5", 0.8),
        ("LoRA", "q", "out", "1 2 3 4", 0.9),
    ]
    return pd.DataFrame(rows, columns=["method", "module", "axis", "steps", "r"])


@pytest.fixture
def vectors() -> pd.DataFrame:
    random = np.random.default_rng(0)
    rows = pd.MultiIndex.from_product([["FT", "LoRA"], [1, 2], [0, 1], range(100)])
    table = rows.to_frame(index=False, name=["method", "step", "layer", "vector"]).assign(module="q")
    change = random.normal(0, 0.1, len(table))
    return table.assign(rel_delta_m=change, delta_d=random.uniform(1e-4, 1e-2, len(table)))


def test_a_panel_of_predictions_has_its_points_the_law_and_r2(predictions) -> None:
    figure = prediction(predictions, "q")
    for panel, method in zip(figure.axes[:2], ("FT", "LoRA"), strict=True):
        rows = predictions[(predictions["method"] == method) & (predictions["module"] == "q")]
        np.testing.assert_array_equal(panel.collections[0].get_offsets(), rows[["predicted", "observed"]])
        assert panel.get_xlim() == panel.get_ylim()
        np.testing.assert_array_equal(*panel.lines[0].get_data())
        spread = ((rows["observed"] - rows["observed"].mean()) ** 2).sum()
        r2 = 1 - ((rows["observed"] - rows["predicted"]) ** 2).sum() / spread
        assert f"R² = {r2:.2f}".replace("-", "−") in texts(panel)
        assert f"n = {len(rows)}" in figure.caption
    assert "q, FT: diffusing weights × 0.43 (fitted) predicts ΔD" in figure.caption
    assert "q, LoRA: turning predicts ΔM" in figure.caption
    assert figure.axes[0].get_xlabel().startswith("predicted ΔD")
    assert figure.axes[1].get_ylabel().startswith("observed ΔM")


def test_the_r2_of_the_table_goes_before_and_an_empty_one_is_a_dash(predictions) -> None:
    assert "R² = 0.50" in texts(prediction(predictions.assign(r2=0.5), "q").axes[0])
    assert "R² = –" in texts(prediction(predictions.assign(r2=np.nan), "q").axes[0])


def test_a_prediction_without_a_value_is_counted_and_none_at_all_is_said(predictions) -> None:
    predictions.loc[predictions.index[0], "predicted"] = np.nan
    module = predictions["module"].iloc[0]
    assert "Not shown: 1 rows without a value" in prediction(predictions, module).caption
    empty = prediction(predictions.assign(predicted=np.nan), "q")
    assert "no values" in texts(empty.axes[0])


def test_a_row_of_steps_counts_its_choices_and_names_the_ends(choices) -> None:
    correlations = pd.DataFrame({"method": ["FT"], "module": ["q"], "scope": ["pooled"], "pearson_r": [0.25]})
    figure = steps(choices, "q", correlations=correlations)
    first, second = figure.axes
    assert "FT: −0.30 (steps 1 2 3 4) … 0.80 (steps 2 3 4 5), 3 choices" in figure.caption
    assert sum(bar.get_height() for bar in first.patches) == 3
    assert texts(first) == "FT\nr = −0.30 … 0.80"
    assert [list(line.get_xdata()) for line in first.lines] == [[0, 0], [0.25, 0.25]]
    assert len(second.lines) == 1  # its own r is not known


def test_density_counts_every_vector_of_the_last_step_once(vectors) -> None:
    figure = density(vectors, "q")
    for panel, method in zip(figure.axes[:2], ("FT", "LoRA"), strict=True):
        rows = vectors[(vectors["method"] == method) & (vectors["step"] == 2)]
        assert panel.collections[0].get_array().sum() == len(rows)
        cross = np.ravel(panel.lines[0].get_data())
        np.testing.assert_allclose(cross, [rows["delta_d"].mean(), rows["rel_delta_m"].abs().mean()])
        assert panel.get_xscale() == panel.get_yscale() == "log"
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert "FT: step 2, 200 vectors" in figure.caption


@pytest.mark.parametrize("axis", ["out", "in"])
def test_density_names_the_axis_of_the_metrics(vectors, axis) -> None:
    metrics = pd.DataFrame({"axis": [axis, axis]})
    assert f"(axis={axis})" in density(vectors, "q", metrics=metrics).get_suptitle().replace("\n", " ")


def test_vectors_that_did_not_move_are_counted(vectors) -> None:
    vectors.loc[vectors["step"] == 2, "delta_d"] = np.where(
        vectors.loc[vectors["step"] == 2, "vector"] < 2, 0, 1e-3
    )
    assert "Not shown: 8 vectors" in density(vectors, "q").caption
    still = density(vectors.assign(rel_delta_m=0.0), "q")
    assert "0 vectors" in still.caption


@pytest.mark.parametrize("figure", [prediction, steps, density])
def test_an_empty_table_is_answered_in_a_sentence(figure) -> None:
    with pytest.raises(ComparisonError, match=r"there are no|no method"):
        figure(pd.DataFrame(), "q")


def test_a_kind_is_drawn_where_its_table_is_there(table, predictions, choices, vectors, tmp_path) -> None:
    tables = {"metrics": table(methods=["FT", "LoRA"], modules=["q"]), "step_choices": choices}
    kinds = ["prediction", "steps", "density"]
    drawn = save_figures(tables, tmp_path, kinds=kinds, look=Look(dpi=20))
    assert [path.name for path in drawn] == ["steps_q.png", "captions.md"]
    tables |= {"predictions": predictions[predictions["module"] == "q"], "vectors": vectors}
    drawn = save_figures(tables, tmp_path, kinds=kinds, look=Look(dpi=20))
    assert [path.name for path in drawn] == [
        "prediction_q.png",
        "steps_q.png",
        "density_q.png",
        "captions.md",
    ]
    assert save_figures(tables["metrics"], tmp_path, kinds=kinds, look=Look(dpi=20)) == []
