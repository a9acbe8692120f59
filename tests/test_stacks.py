"""Encoder, decoder and cross-attention taken together: T5 and BART of transformers, tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import llama, write, write_steps
from scipy import stats

import wdanalysis as wd
from wdanalysis.analysis.table import STACK_COLUMNS, apart, merged_stacks, units
from wdanalysis.comparison import redraw
from wdanalysis.errors import ComparisonError

LAYERS = 3
STEPS = (10, 20)


def model(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if family == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=LAYERS,
                num_decoder_layers=LAYERS,
            )
        )  # fmt: skip
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=32, d_model=16, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_ffn_dim=24,
            decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
            max_position_embeddings=32,
        )
    )  # fmt: skip


@pytest.fixture(scope="module", params=["t5", "bart"])
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a series of changed copies."""
    folder = tmp_path_factory.mktemp(request.param)
    tuned = model(request.param)
    tuned.save_pretrained(folder / "base")
    for step in STEPS:
        with torch.no_grad():
            for weight in tuned.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.01)
        tuned.save_pretrained(folder / "ft" / f"checkpoint-{step}")
    return folder / "base", folder / "ft"


def test_one_module_holds_all_stacks_and_every_number_stays(paths: tuple[Path, Path]) -> None:
    base, ft = paths
    separate, merged = (
        wd.compare(base, {"FT": ft}, modules="q,v", merge_stacks=merge) for merge in (False, True)
    )
    assert set(separate.modules) == {
        f"{stack}.{role}" for stack in ("encoder", "decoder", "cross") for role in "qv"
    }
    assert set(merged.modules) == {"q", "v"}
    assert list(merged.metrics) == [*separate.metrics, *STACK_COLUMNS]
    pd.testing.assert_frame_equal(apart(merged.metrics), separate.metrics, check_exact=True)
    pd.testing.assert_frame_equal(merged_stacks(separate.metrics), merged.metrics)
    assert merged_stacks(merged.metrics) is merged.metrics
    assert apart(separate.metrics) is separate.metrics
    assert merged.run.options.merge_stacks is True
    assert separate.run.options.merge_stacks is None


def test_layers_of_one_number_are_units_of_their_own(paths: tuple[Path, Path]) -> None:
    base, ft = paths
    merged = wd.compare(base, {"FT": ft}, modules="q", merge_stacks=True)
    places = merged.metrics.groupby("unit")[["stack", "layer"]].nunique()
    assert len(places) == 3 * LAYERS
    assert places.eq(1).all(axis=None)
    table = merged.correlations()
    (pooled,) = table.query("scope == 'pooled'").to_dict("records")
    rows = merged.metrics
    assert pooled["n"] == 3 * LAYERS * len(STEPS) == len(rows)
    assert pooled["pearson_r"] == pytest.approx(stats.pearsonr(rows["delta_d"], rows["delta_m"]).statistic)
    by_layer = table.query("scope == 'layer'")
    assert sorted(by_layer["group"]) == list(range(3 * LAYERS))
    assert by_layer["n"].eq(len(STEPS)).all()
    (within,) = table.query("scope == 'within_layer'").to_dict("records")
    x, y = (
        rows[column] - rows.groupby(["stack", "layer"])[column].transform("mean")
        for column in ("delta_d", "delta_m")
    )
    assert within["pearson_r"] == pytest.approx(stats.pearsonr(x, y).statistic)


def test_figures_pool_stacks_on_the_scatter_and_keep_them_apart_by_layer(
    paths: tuple[Path, Path], tmp_path: Path
) -> None:
    base, ft = paths
    merged = wd.compare(base, {"FT": ft}, modules="q", merge_stacks=True)
    written = {path.name for path in merged.save(tmp_path / "out", report=False)}
    by_layer = {f"layers_{stack}.q.png" for stack in ("encoder", "decoder", "cross")}
    drawn = {"scatter_q.png", "trajectory_q.png", "heatmap.png"} | by_layer
    assert drawn == {name for name in written if name.endswith(".png")}
    shown = merged.heatmap(methods="FT").axes[0]
    labels = {label.get_text() for label in shown.get_yticklabels()}
    assert {"encoder.q", "decoder.q", "cross.q"} <= labels
    with pytest.raises(ComparisonError, match=r"no module 'q'.*encoder\.q"):
        merged.layers("q")
    loaded = wd.Comparison.load(tmp_path / "out")
    pd.testing.assert_frame_equal(loaded.metrics, merged.metrics)
    pd.testing.assert_frame_equal(loaded.correlations(), merged.correlations())
    read = pd.read_csv(tmp_path / "out" / "metrics.csv", keep_default_na=False)
    assert set(read["stack"]) == {"encoder", "decoder", "cross"}


def test_vectors_of_merged_stacks_are_saved(paths: tuple[Path, Path], tmp_path: Path) -> None:
    base, ft = paths
    merged = wd.compare(base, {"FT": ft}, modules="q", merge_stacks=True, vectors=True)
    merged.save(tmp_path / "out", figures=[], report=False)
    kept = wd.Comparison.load(tmp_path / "out").vectors
    assert kept is not None
    assert len(kept.read()) == merged.metrics["vectors"].sum()


def test_saved_tables_that_keep_stacks_apart_are_drawn_together(
    paths: tuple[Path, Path], tmp_path: Path
) -> None:
    base, ft = paths
    wd.compare(base, {"FT": ft}, modules="q").save(tmp_path / "out", figures=[], report=False)
    drawn = redraw(tmp_path / "out", figures=["scatter"], merge_stacks=True)
    assert [path.name for path in drawn] == ["scatter_q.png", "captions.md"]
    assert set(wd.Comparison.load(tmp_path / "out").modules) == {"encoder.q", "decoder.q", "cross.q"}


def test_a_model_of_one_stack_is_what_it_was(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    ft = write_steps(tmp_path / "ft", llama())
    plain, merged = (wd.compare(base, {"FT": ft}, merge_stacks=merge) for merge in (False, True))
    assert merged.metrics["stack"].eq("").all()
    assert merged.metrics["unit"].equals(merged.metrics["layer"].rename("unit"))
    pd.testing.assert_frame_equal(merged.correlations(), plain.correlations())
    pd.testing.assert_frame_equal(merged.readings(), plain.readings())


def test_what_is_in_no_layer_has_no_unit() -> None:
    layer = pd.array([0, pd.NA, 0], dtype="Int64")
    rows = pd.DataFrame({"module": ["encoder.q", "embed", "decoder.q"], "layer": layer})
    merged = merged_stacks(rows)
    assert merged["unit"].isna().tolist() == [False, True, False]
    np.testing.assert_array_equal(units(merged)[[0, 2]], [0, 1])
    assert units(rows).equals(rows["layer"])


def test_runs_and_stacks_go_together(paths: tuple[Path, Path]) -> None:
    base, ft = paths
    compared = wd.compare(base, {"FT": ft}, modules="q", merge_stacks=True)
    seeds = [compared.metrics.assign(run=f"seed-{seed}") for seed in range(3)]
    both = wd.Comparison(pd.concat(seeds, ignore_index=True))
    pd.testing.assert_frame_equal(both.correlations(), compared.correlations())
    assert both.across_runs()["n"].eq(len(compared.metrics)).all()
