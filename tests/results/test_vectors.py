"""The file of vectors: what the means are of, kept by matrix, read back in parts, whole after Ctrl-C."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_files import llama, moved, write, write_lora, write_steps

import wdanalysis as wd
from wdanalysis import comparison
from wdanalysis.errors import OutputError
from wdanalysis.measure import stream
from wdanalysis.results.vectors import VECTOR_COLUMNS, VECTORS_PARQUET


@pytest.fixture
def compared(tmp_path: Path) -> wd.Comparison:
    base = write(tmp_path / "base.safetensors", llama())
    tuned = [write_steps(tmp_path / "ft", llama()), write_lora(tmp_path / "lora", llama())]
    return wd.compare(base, tuned, vectors=True)


def test_the_table_has_the_means_of_the_vectors(compared: wd.Comparison) -> None:
    assert compared.vectors is not None
    vectors = compared.vectors.read()
    assert tuple(vectors) == VECTOR_COLUMNS
    by_matrix = vectors.groupby(["method", "step", "name"], dropna=False, observed=True)
    metrics = compared.metrics.set_index(["method", "step", "name"])
    assert (by_matrix.size().reindex(metrics.index) == metrics["vectors"]).all()
    means = by_matrix["delta_d"].mean().reindex(metrics.index)
    assert means.to_numpy() == pytest.approx(metrics["delta_d"].to_numpy(float), rel=1e-6)
    assert len(vectors) == metrics["vectors"].sum()


def test_the_vectors_are_those_of_float64(compared: wd.Comparison) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    W0, W = llama()[name].double(), moved(llama(), size=20 / 1000, seed=20)[name].double()
    m0, m = W0.norm(dim=1), W.norm(dim=1)
    assert compared.vectors is not None
    found = compared.vectors.read("ft", step=20, module="k", layer=1)
    assert found["vector"].tolist() == list(range(8))
    assert found["rel_delta_m"].to_numpy() == pytest.approx(((m - m0) / m0).numpy(), rel=1e-5)
    turn = 1 - torch.nn.functional.cosine_similarity(W0, W, dim=1)
    assert found["delta_d"].to_numpy() == pytest.approx(turn.numpy(), rel=1e-5)


def test_save_and_load_keep_them(compared: wd.Comparison, tmp_path: Path) -> None:
    written = compared.save(tmp_path / "results", figures=[], report=False)
    assert tmp_path / "results" / VECTORS_PARQUET in written
    assert pq.ParquetFile(tmp_path / "results" / VECTORS_PARQUET).num_row_groups == len(compared.metrics)
    loaded = wd.Comparison.load(tmp_path / "results")
    assert compared.vectors is not None
    assert loaded.vectors is not None
    pd.testing.assert_frame_equal(loaded.vectors.read(module="q"), compared.vectors.read(module="q"))
    again = loaded.save(tmp_path / "results", figures=[], report=False, force=True)  # over its own source
    assert tmp_path / "results" / VECTORS_PARQUET in again
    pd.testing.assert_frame_equal(loaded.vectors.read(), compared.vectors.read())


def test_only_rows_of_the_table_are_saved(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    tuned = write(tmp_path / "ft.safetensors", moved(llama(), only="q_proj"))
    compared = wd.compare(base, tuned, vectors=True)
    compared.save(tmp_path / "results", figures=[], report=False)
    vectors = wd.Comparison.load(tmp_path / "results").vectors
    assert vectors is not None
    assert set(vectors.read()["module"]) == {"q"} == set(compared.modules)


def test_without_the_option_there_is_no_file(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    compared = wd.compare(base, write_lora(tmp_path / "lora", llama()), vectors=True)
    compared.save(tmp_path / "results", figures=[], report=False)
    plain = wd.compare(base, tmp_path / "lora")
    assert plain.vectors is None
    plain.save(tmp_path / "results", figures=[], report=False, force=True)
    assert not (tmp_path / "results" / VECTORS_PARQUET).exists()  # the earlier run's file is none of this one
    assert wd.Comparison.load(tmp_path / "results").vectors is None
    pd.testing.assert_frame_equal(plain.metrics, compared.metrics)


def test_a_zero_vector_has_no_relative_change_and_a_matrix_of_nan_no_vectors(tmp_path: Path) -> None:
    model = llama()
    model["model.layers.0.self_attn.q_proj.weight"][2] = 0
    base, tuned = write(tmp_path / "base.safetensors", model), moved(model)
    tuned["model.layers.1.self_attn.q_proj.weight"][0, 0] = np.nan
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", tuned), vectors=True)
    assert compared.vectors is not None
    of_first = compared.vectors.read(module="q", layer=0)
    assert of_first.index[of_first["rel_delta_m"].isna()].tolist() == [2]
    assert of_first.loc[2, "delta_d"] == 1
    assert compared.vectors.read(module="q", layer=1).empty


def test_ctrl_c_keeps_the_vectors_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object):  # type: ignore[no-untyped-def]
        for count, measured in enumerate(stream.stream(*arguments, **options)):  # type: ignore[arg-type]
            if count == 2:
                raise KeyboardInterrupt
            yield measured

    monkeypatch.setattr(comparison, "stream", interrupted)
    base = write(tmp_path / "base.safetensors", llama())
    with pytest.raises(comparison.Interrupted) as caught:
        wd.compare(base, write_steps(tmp_path / "ft", llama()), vectors=True)
    caught.value.comparison.save(tmp_path / "results", figures=[], report=False)
    loaded = wd.Comparison.load(tmp_path / "results")
    assert loaded.vectors is not None
    assert len(loaded.metrics) == 6
    assert len(loaded.vectors.read()) == loaded.metrics["vectors"].sum()
    assert json.loads((tmp_path / "results" / "run.json").read_text())["options"]["vectors"] is True


def test_the_temporary_file_goes_with_the_comparison(compared: wd.Comparison) -> None:
    assert compared.vectors is not None
    base = write(compared.vectors.path.parent / "b.safetensors", llama())
    short = wd.compare(base, moved_file(base), vectors=True)
    assert short.vectors is not None
    path = short.vectors.path
    assert path.is_file()
    del short
    gc.collect()
    assert not path.parent.exists()


def moved_file(base: Path) -> Path:
    return write(base.with_name("ft.safetensors"), moved(llama()))


def test_a_lost_file_is_said_in_a_sentence(compared: wd.Comparison, tmp_path: Path) -> None:
    compared.save(tmp_path / "results", figures=[], report=False)
    loaded = wd.Comparison.load(tmp_path / "results")
    (tmp_path / "results" / VECTORS_PARQUET).unlink()
    assert loaded.vectors is not None
    with pytest.raises(OutputError, match="cannot be read"):
        loaded.vectors.read()


def test_a_failure_while_saving_leaves_no_half_file(
    compared: wd.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = iter(range(3))

    def full(*_: object, **__: object) -> None:
        if next(writes) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    assert compared.vectors is not None
    with pytest.raises(OutputError, match="disk is full"):
        compared.vectors.save(tmp_path / "results", compared.metrics)
    assert list((tmp_path / "results").iterdir()) == []
