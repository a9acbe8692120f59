"""What a comparison chooses, says and leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import llama, moved, write, write_lora, write_model, write_steps

import wdanalysis as wd
from wdanalysis.analysis.table import COLUMNS
from wdanalysis.comparison import Interrupted, redraw
from wdanalysis.errors import ComparisonError, OutputError, WdAnalysisError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.safetensors", llama())


def rows(compared: wd.Comparison, **where: object) -> pd.DataFrame:
    metrics = compared.metrics
    for column, value in where.items():
        metrics = metrics[metrics[column] == value]
    return metrics


def test_the_columns_are_those_that_others_rely_on(base: Path, tmp_path: Path) -> None:
    compared = wd.compare(base, write_steps(tmp_path / "ft", llama()))
    promised = [
        "method",
        "step",
        "layer",
        "module",
        "name",
        "axis",
        "vectors",
        "length",
        "delta_m",
        "delta_d",
        "delta_m_signed",
        "rel_delta_m",
        "update_norm",
        "rel_update_norm",
        "unchanged_fraction",
        "delta_d_floor",
        "base_dtype",
        "tuned_dtype",
    ]
    assert list(compared.metrics)[: len(promised)] == promised
    assert list(compared.metrics) == list(COLUMNS)


def test_the_derived_columns_are_what_they_are_called(base: Path, tmp_path: Path) -> None:
    weights = llama()
    tuned = {
        name: weight.bfloat16() for name, weight in moved(weights, only="layers.1.self_attn.q_proj").items()
    }
    compared = wd.compare(base, {"FT": write(tmp_path / "ft.safetensors", tuned)})
    name = "model.layers.1.self_attn.q_proj.weight"
    row = rows(compared, name=name).iloc[0]
    w0, w = weights[name].double(), tuned[name].double()
    m0, m = w0.norm(dim=1), w.norm(dim=1)
    ulp = torch.nextafter(tuned[name].abs(), torch.tensor(torch.inf, dtype=torch.bfloat16)).double() - w.abs()
    assert row.delta_m_signed == pytest.approx(float((m - m0).mean()))
    assert row.rel_delta_m == pytest.approx(float((m - m0).abs().mean() / m0.mean()))
    assert row.update_norm == pytest.approx(float((w - w0).norm()))
    assert row.rel_update_norm == pytest.approx(float((w - w0).norm() / w0.norm()))
    assert row.unchanged_fraction == float((w == w0).double().mean())
    assert row.delta_d_floor == pytest.approx(float(0.5 * ((ulp**2 / 12).sum(1) / m**2).mean()), rel=1e-12)
    assert (row.layer, row.module, row.base_dtype, row.tuned_dtype) == (1, "q", "F32", "BF16")
    assert (row.vectors, row.length) == (8, 8)


def test_rounding_alone_is_one_floor(tmp_path: Path) -> None:
    weights = {"model.layers.0.self_attn.q_proj.weight": 0.02 * torch.randn(256, 1024)}
    base = write(tmp_path / "base.safetensors", weights)
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    row = wd.compare(base, write(tmp_path / "rounded.safetensors", rounded)).metrics.iloc[0]
    assert row.delta_d == pytest.approx(row.delta_d_floor, rel=0.1)


def test_without_modules_the_changed_attention_projections_are_taken(base: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", llama())
    compared = wd.compare(base, lora)
    assert compared.modules == ["q", "v"]
    ft = write(tmp_path / "ft.safetensors", moved(llama(), only="proj"))
    compared = wd.compare(base, [ft, lora])
    assert compared.modules == ["q", "k", "v"]  # up is not of the attention
    assert set(rows(compared, method="lora")["module"]) == {
        "q",
        "v",
    }  # an adapter has rows for what it adapts


def test_a_projection_that_no_method_changed_is_left_out_and_said_so(base: Path, tmp_path: Path) -> None:
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", moved(llama(), only="q_proj")))
    assert compared.modules == ["q"]
    assert any("left out: k, v" in warning for warning in compared.warnings)
    everything = wd.compare(base, tmp_path / "ft.safetensors", modules="all")
    assert rows(everything, module="k")["unchanged_fraction"].eq(1).all()


def test_without_a_known_projection_every_changed_matrix_is_taken_and_said_so(tmp_path: Path) -> None:
    weights = {"net.0.mix": torch.randn(4, 4), "net.1.mix": torch.randn(4, 4), "net.1.bias": torch.randn(4)}
    base = write(tmp_path / "base.safetensors", weights)
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", moved(weights, only="1.mix")))
    assert compared.metrics["name"].tolist() == ["net.1.mix"]
    assert any("no attention projection is recognised" in warning for warning in compared.warnings)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("q,v", {"q", "v"}),
        (["k"], {"k"}),
        ("all", {"q", "k", "v", "up", "embed"}),
        (r"self_attn\.[qk]_", {"q", "k"}),
    ],
)
def test_modules_picks_roles_everything_or_names(
    base: Path, tmp_path: Path, modules: str | list[str], expected: set[str]
) -> None:
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", moved(llama())), modules=modules)
    assert set(compared.modules) == expected


def test_layers_and_steps_are_kept_as_asked(base: Path, tmp_path: Path) -> None:
    compared = wd.compare(base, write_steps(tmp_path / "ft", llama()), layers=[0, 2], steps=[10, 30])
    assert set(compared.metrics["layer"]) == {0, 2}
    assert set(compared.metrics["step"]) == {10, 30}


def test_steps_given_one_by_one_make_one_series(base: Path, tmp_path: Path) -> None:
    ft = write_steps(tmp_path / "ft", llama())
    compared = wd.compare(base, [ft / "checkpoint-20", ft / "checkpoint-10"])
    assert compared.metrics["step"].unique().tolist() == [10, 20]
    assert compared.methods == ["ft"]


def test_two_checkpoints_of_one_name_and_step_need_a_label(base: Path, tmp_path: Path) -> None:
    for run in ("a", "b"):
        write_model(tmp_path / run / "ft", moved(llama()))
    with pytest.raises(ComparisonError, match="a name of its own"):
        wd.compare(base, [tmp_path / "a" / "ft", tmp_path / "b" / "ft"])
    named = wd.compare(base, {"A": tmp_path / "a" / "ft", "B": tmp_path / "b" / "ft"})
    assert named.methods == ["A", "B"]


def test_gpt2s_fused_columns_are_three_roles(tmp_path: Path) -> None:
    weights = {"h.0.attn.c_attn.weight": torch.randn(6, 18), "h.0.attn.c_proj.weight": torch.randn(6, 6)}
    tuned = moved(weights)
    base = write(tmp_path / "base.safetensors", weights)
    for axis in ("out", "in"):
        compared = wd.compare(base, write(tmp_path / "ft.safetensors", tuned), axis=axis, modules="q,k,v")
        for place, role in enumerate("qkv"):
            columns = slice(6 * place, 6 * place + 6)
            w0, w = (w["h.0.attn.c_attn.weight"][:, columns].T for w in (weights, tuned))
            row = rows(compared, module=role).iloc[0]
            assert row.delta_m == pytest.approx(wd.delta_m(w0, w, axis), rel=1e-6)
            assert row.delta_d == pytest.approx(wd.delta_d(w0, w, axis), rel=1e-6)


def test_gpt_neox_heads_are_taken_apart_for_tensors_and_for_adapters(tmp_path: Path) -> None:
    heads, head, hidden, r = 4, 4, 16, 2
    name = "gpt_neox.layers.0.attention.query_key_value"
    W = torch.randn(3 * hidden, hidden)
    A, B = torch.randn(r, hidden), 0.05 * torch.randn(3 * hidden, r)
    tuned = W.double() + 2 * B.double() @ A.double()
    base = write(tmp_path / "base" / "model.safetensors", {f"{name}.weight": W}).parent
    (base / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "num_attention_heads": heads}))
    ft = write(tmp_path / "ft.safetensors", {f"{name}.weight": tuned})
    prefix = f"base_model.model.{name}"
    lora = tmp_path / "lora"
    write(lora / "adapter_model.safetensors", {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B})
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": 2 * r}))
    for axis in ("out", "in"):
        compared = wd.compare(base, [ft, lora], axis=axis)
        assert len(compared.metrics) == 6
        for place, role in enumerate("qkv"):
            w0, w = (x.view(heads, 3, head, hidden)[:, place].reshape(hidden, hidden) for x in (W, tuned))
            for row in rows(compared, module=role).itertuples():
                assert row.delta_m == pytest.approx(wd.delta_m(w0, w, axis), rel=1e-6)
                assert row.delta_d == pytest.approx(wd.delta_d(w0, w, axis), rel=1e-6)


def test_a_resized_vocabulary_is_compared_over_the_common_rows(base: Path, tmp_path: Path) -> None:
    weights = llama()
    name = "model.embed_tokens.weight"
    tuned = moved(weights)
    tuned[name] = torch.cat([tuned[name], torch.zeros(4, 8)])
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", tuned), modules="embed")
    row = compared.metrics.iloc[0]
    assert row.delta_d == pytest.approx(wd.delta_d(weights[name].T, tuned[name][:20].T), rel=1e-6)
    assert any("first 20 are compared" in warning for warning in compared.warnings)


def test_a_tied_tensor_is_found_under_the_name_that_was_kept(tmp_path: Path) -> None:
    weights = llama()
    both = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    base = write(tmp_path / "base.safetensors", both)
    tuned = moved(weights)
    row = wd.compare(base, write(tmp_path / "ft.safetensors", tuned), modules="lm_head").metrics.iloc[0]
    W0, W = both["lm_head.weight"], tuned["model.embed_tokens.weight"]
    assert row.delta_d == pytest.approx(wd.delta_d(W0, W), rel=1e-6)


def test_an_adapter_of_a_tied_lm_head_is_measured_as_a_linear_layer(base: Path, tmp_path: Path) -> None:
    A, B = torch.randn(2, 8), 0.1 * torch.randn(20, 2)
    prefix = "base_model.model.lm_head"
    lora = tmp_path / "lora"
    write(lora / "adapter_model.safetensors", {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B})
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    row = wd.compare(base, lora, modules="all").metrics.iloc[0]
    W0 = llama()["model.embed_tokens.weight"]
    assert (row.module, row.vectors) == ("lm_head", 20)
    assert row.delta_d == pytest.approx(wd.delta_d(W0, W0.double() + B.double() @ A.double()), rel=1e-6)


def test_a_vector_of_nan_leaves_its_row_with_empty_metrics_and_is_named(base: Path, tmp_path: Path) -> None:
    tuned = moved(llama())
    tuned["model.layers.1.self_attn.q_proj.weight"][3, 3] = torch.nan
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", tuned))
    bad = rows(compared, name="model.layers.1.self_attn.q_proj.weight").iloc[0]
    assert pd.isna(bad.delta_m)
    assert pd.isna(bad.delta_d)
    assert rows(compared, name="model.layers.0.self_attn.q_proj.weight")["delta_m"].notna().all()
    assert any("layers.1.self_attn.q_proj" in w and "NaN or Inf" in w for w in compared.warnings)


def test_zero_vectors_are_counted_and_defined(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    w0, w = torch.eye(4), torch.eye(4)
    w0[0], w[0], w[1] = 0, 0, 0  # stays zero; becomes zero
    base = write(tmp_path / "base.safetensors", {name: w0})
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", {name: w}))
    row = compared.metrics.iloc[0]
    assert (row.zero_vectors, row.delta_d, row.delta_m) == (2, 0.25, 0.25)
    assert any("all-zero" in warning for warning in compared.warnings)


def test_what_is_not_stored_as_floats_is_skipped_with_its_reason(base: Path, tmp_path: Path) -> None:
    tuned = moved(llama())
    tuned["model.layers.0.self_attn.q_proj.weight"] = tuned["model.layers.0.self_attn.q_proj.weight"].to(
        torch.int8
    )
    tuned["model.layers.1.self_attn.q_proj.weight"] = tuned["model.layers.1.self_attn.q_proj.weight"].to(
        torch.float8_e4m3fn
    )
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", tuned))
    reasons = dict(zip(compared.skipped["name"], compared.skipped["reason"], strict=True))
    assert "I8" in reasons["model.layers.0.self_attn.q_proj.weight"]
    assert "F8_E4M3" in reasons["model.layers.1.self_attn.q_proj.weight"]
    assert rows(compared, module="q")["layer"].tolist() == [2]


def test_what_only_one_side_has_is_listed(base: Path, tmp_path: Path) -> None:
    tuned = moved(llama())
    tuned["model.layers.7.self_attn.q_proj.weight"] = tuned.pop("model.layers.2.self_attn.q_proj.weight")
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", tuned))
    reasons = dict(zip(compared.skipped["name"], compared.skipped["reason"], strict=True))
    assert "not in this checkpoint" in reasons["model.layers.2.self_attn.q_proj.weight"]
    assert "not in BASE" in reasons["model.layers.7.self_attn.q_proj.weight"]


def test_a_matrix_of_another_shape_is_an_error_that_names_both_files(base: Path, tmp_path: Path) -> None:
    tuned = write(tmp_path / "ft.safetensors", llama(size=10))
    with pytest.raises(ComparisonError, match=r"8 × 8 in .*base.*10 × 10 in .*ft"):
        wd.compare(base, tuned)


def test_no_name_in_common_is_an_error(base: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", {"encoder.conv": torch.randn(3, 3)})
    with pytest.raises(ComparisonError, match="same model"):
        wd.compare(base, other)


def test_an_adapter_whose_targets_are_not_in_base_is_an_error(base: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", {"model.blocks.0.attn.q_proj.weight": torch.randn(8, 8)})
    with pytest.raises(ComparisonError, match="none of the 1 modules"):
        wd.compare(base, lora)


def test_an_adapter_of_another_width_is_an_error(base: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", llama(size=12))
    with pytest.raises(ComparisonError, match=r"12 × 12 .*stored as 8 × 8"):
        wd.compare(base, lora)


def test_an_adapter_is_no_base(base: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", llama())
    with pytest.raises(ComparisonError, match="is an adapter"):
        wd.compare(lora, base)


def test_a_selection_that_finds_nothing_says_how_to_look(base: Path, tmp_path: Path) -> None:
    tuned = write(tmp_path / "ft.safetensors", moved(llama()))
    with pytest.raises(ComparisonError, match=r"the chosen modules select no matrix.*inspect"):
        wd.compare(base, tuned, modules="gate")
    with pytest.raises(ComparisonError, match=r"the chosen layers select no matrix"):
        wd.compare(base, tuned, layers=[99])


def test_an_adapter_of_another_base_earns_a_warning(tmp_path: Path) -> None:
    base = write_model(tmp_path / "llama-7b", llama())
    lora = write_lora(tmp_path / "lora", llama())
    config = json.loads((lora / "adapter_config.json").read_text())
    for trained_on, warned in (("meta/llama-7b", False), ("mistralai/Mistral-7B", True)):
        (lora / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": trained_on})
        )
        warnings = wd.compare(base, lora).warnings
        assert any("Mistral-7B" in warning for warning in warnings) is warned


def test_ctrl_c_keeps_the_rows_measured_so_far(base: Path, tmp_path: Path) -> None:
    ft = write_steps(tmp_path / "ft", llama(layers=40))
    base = write(tmp_path / "base.safetensors", llama(layers=40))
    calls = iter(range(1000))

    def interrupt(phase: str, done: int, total: int) -> None:
        if next(calls) == 9:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        wd.compare(base, ft, progress=interrupt)
    partial = caught.value.comparison
    assert partial.run.complete is False
    whole = wd.compare(base, ft).metrics.set_index(["name", "step"])["delta_d"]
    found = partial.metrics.set_index(["name", "step"])["delta_d"]
    assert 0 < len(found) < len(whole)
    pd.testing.assert_series_equal(found, whole[found.index])


def test_progress_ends_at_the_bytes_of_the_compared_matrices(base: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    tuned = write(tmp_path / "ft.safetensors", moved(llama()))
    wd.compare(base, tuned, modules="q", progress=lambda phase, done, total: told.append((done, total)))
    assert told[0] == (0, 2 * 3 * 8 * 8 * 4)
    assert told[-1] == (told[0][1],) * 2
    assert np.all(np.diff([done for done, _ in told]) >= 0)


def test_large_matrices_read_in_many_blocks_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wdanalysis.measure import stream

    monkeypatch.setattr(stream, "DENSE_BLOCK_BYTES", 100)
    monkeypatch.setattr(stream, "ADAPTER_BLOCK_BYTES", 100)
    base = write(tmp_path / "base.safetensors", llama())
    tuned = write(tmp_path / "ft.safetensors", moved(llama()))
    lora = write_lora(tmp_path / "lora", llama())
    in_blocks = wd.compare(base, [tuned, lora], axis="in", modules="all").metrics
    monkeypatch.undo()
    whole = wd.compare(base, [tuned, lora], axis="in", modules="all").metrics
    pd.testing.assert_frame_equal(in_blocks, whole, rtol=1e-9)


def test_a_comparison_comes_back_from_its_folder(base: Path, tmp_path: Path) -> None:
    compared = wd.compare(base, write_steps(tmp_path / "ft", llama()))
    compared.save(tmp_path / "out", figures=[])
    loaded = wd.Comparison.load(tmp_path / "out")
    pd.testing.assert_frame_equal(loaded.metrics, compared.metrics)
    assert loaded.run.options == compared.run.options
    pd.testing.assert_frame_equal(loaded.correlations(), compared.correlations())


def test_saving_refuses_to_replace_results_unless_told(base: Path, tmp_path: Path) -> None:
    compared = wd.compare(base, write_steps(tmp_path / "ft", llama()))
    compared.save(tmp_path / "out", figures=["scatter"])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(WdAnalysisError, match="already holds results") as refused:
        compared.save(tmp_path / "out")
    assert refused.value.parameter == "force"
    compared.save(tmp_path / "out", figures=["heatmap"], force=True)
    assert [path.name for path in (tmp_path / "out" / "figures").glob("*.png")] == ["heatmap.png"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_folder_without_results_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(WdAnalysisError, match="holds no results"):
        wd.Comparison.load(tmp_path)


def test_names_are_data_in_the_html_that_jupyter_shows(base: Path, tmp_path: Path) -> None:
    tuned = write(tmp_path / "ft.safetensors", moved(llama()))
    shown = wd.compare(base, {"<script>alert(1)</script>": tuned})._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


def test_a_resized_vocabulary_of_one_method_leaves_the_rows_of_another_alone(
    base: Path, tmp_path: Path
) -> None:
    name = "model.embed_tokens.weight"
    cut = moved(llama())
    cut[name] = cut[name][:12]
    A, B = torch.randn(2, 20), 0.1 * torch.randn(8, 2)
    prefix, lora = "base_model.model.model.embed_tokens", tmp_path / "lora"
    write(
        lora / "adapter_model.safetensors", {f"{prefix}.lora_embedding_A": A, f"{prefix}.lora_embedding_B": B}
    )
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    W0 = llama()[name].T
    for axis in ("out", "in"):
        compared = wd.compare(
            base, {"FT": write(tmp_path / "ft.safetensors", cut), "LoRA": lora}, modules="embed", axis=axis
        )
        ft, adapter = rows(compared, method="FT").iloc[0], rows(compared, method="LoRA").iloc[0]
        assert ft.delta_d == pytest.approx(wd.delta_d(W0[:, :12], cut[name].T, axis), rel=1e-6)
        assert adapter.delta_d == pytest.approx(
            wd.delta_d(W0, W0.double() + B.double() @ A.double(), axis), rel=1e-6
        )


@pytest.mark.parametrize("size", [1e-90, 1e90])
def test_weights_far_from_one_neither_overflow_nor_underflow(tmp_path: Path, size: float) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    W0 = torch.randn(4, 4, dtype=torch.float64)
    W = W0 + 0.01 * torch.randn(4, 4, dtype=torch.float64)
    base = write(tmp_path / "base.safetensors", {name: size * W0})
    row = wd.compare(base, write(tmp_path / "ft.safetensors", {name: size * W})).metrics.iloc[0]
    assert row.delta_d == pytest.approx(wd.delta_d(W0, W), rel=1e-6)


def test_one_name_from_two_places_needs_a_label(base: Path, tmp_path: Path) -> None:
    for run, step in (("a", 10), ("b", 20)):
        write_steps(tmp_path / run / "lora", llama(), steps=(step,))
    paths = [tmp_path / "a" / "lora", tmp_path / "b" / "lora"]
    with pytest.raises(ComparisonError, match=r"both be called 'lora'.*a name of its own"):
        wd.compare(base, paths)
    assert wd.compare(base, {"LoRA": paths}).metrics["step"].unique().tolist() == [10, 20]


def test_the_same_path_twice_is_said_so(base: Path, tmp_path: Path) -> None:
    ft = write_model(tmp_path / "ft", moved(llama()))
    with pytest.raises(ComparisonError, match="given twice"):
        wd.compare(base, {"FT": [ft, ft]})


def test_a_chat_model_is_not_its_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "llama-2-7b-chat", llama())
    lora = write_lora(tmp_path / "lora", llama())
    config = json.loads((lora / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "meta-llama/llama-2-7b"
    (lora / "adapter_config.json").write_text(json.dumps(config))
    assert any("llama-2-7b-chat" in warning for warning in wd.compare(base, lora).warnings)


def test_a_module_that_the_last_step_lacks_stays_in_the_summary(base: Path, tmp_path: Path) -> None:
    ft = write_steps(tmp_path / "ft", llama(), steps=(10,))
    write_model(ft / "checkpoint-20", {k: v for k, v in moved(llama()).items() if "k_proj" not in k})
    summary = wd.compare(base, ft).summary().set_index("module")
    assert summary["step"].to_dict() == {"q": 20, "k": 10, "v": 20}


def test_ctrl_c_before_the_first_matrix_is_done(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wdanalysis.comparison.stream", at_once)
    with pytest.raises(Interrupted) as caught:
        wd.compare(base, write(tmp_path / "ft.safetensors", moved(llama())))
    assert caught.value.comparison.metrics.empty


def test_a_checkpoint_that_vanishes_in_mid_run_loses_nothing(base: Path, tmp_path: Path) -> None:
    ft = write(tmp_path / "ft.safetensors", moved(llama()))
    compared = wd.compare(base, ft, progress=lambda _, done, __: ft.unlink(missing_ok=True) if done else None)
    assert compared.run.inputs["ft"][0].files[0].bytes > 0


def test_results_survive_a_replacement_that_fails(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wdanalysis import writing

    compared = wd.compare(base, write_steps(tmp_path / "ft", llama()))
    compared.save(tmp_path / "out", figures=["layers"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(
        writing.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(WdAnalysisError, match="disk is full"):
        compared.save(tmp_path / "out", force=True)
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before


def test_tables_are_whole_where_drawing_fails(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("results cannot be written: the disk is full.")

    monkeypatch.setattr("wdanalysis.figures.batch.write_whole", full)
    compared = wd.compare(base, write_steps(tmp_path / "ft", llama()))
    with pytest.raises(WdAnalysisError, match=r"disk is full.*tables there are whole"):
        compared.save(tmp_path / "out")
    monkeypatch.undo()
    assert redraw(tmp_path / "out", figures=["heatmap"])
    outputs = json.loads((tmp_path / "out" / "run.json").read_text())["outputs"]
    assert "figures/heatmap.png" in outputs
    compared.save(tmp_path / "out", figures=[], force=True)
    assert not list((tmp_path / "out" / "figures").iterdir())


def test_what_selects_nothing_beside_what_selects_something_is_said(base: Path, tmp_path: Path) -> None:
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", moved(llama())), modules="q,zzz,fc1")
    assert set(compared.metrics["module"]) == {"q"}
    said = [warning for warning in compared.warnings if "selects no matrix of BASE" in warning]
    assert len(said) == 2


@pytest.mark.parametrize(("folder", "warns"), [("base", True), ("Llama-2-7b-hf", False)])
def test_a_folder_called_base_does_not_hide_that_it_is_another(
    tmp_path: Path, folder: str, warns: bool
) -> None:
    base = write_model(tmp_path / folder, llama())
    lora = write_lora(tmp_path / "lora", llama())
    config = json.loads((lora / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "meta-llama/Llama-2-7b-hf"
    (lora / "adapter_config.json").write_text(json.dumps(config))
    warnings = wd.compare(base, lora).warnings
    assert any("meta-llama/Llama-2-7b-hf" in warning for warning in warnings) is warns


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_table_alone_makes_a_comparison(base: Path, tmp_path: Path, axis: str) -> None:
    metrics = wd.compare(base, write_steps(tmp_path / "ft", llama()), axis=axis).metrics
    alone = wd.Comparison(metrics)
    assert alone.axis == axis
    assert f"axis {axis};" in alone._repr_html_()
    assert alone.skipped.empty
    alone.save(tmp_path / "out", figures=[])
    pd.testing.assert_frame_equal(wd.Comparison.load(tmp_path / "out").metrics, metrics)


def test_a_comparison_is_equal_to_itself_alone_and_can_be_kept_in_a_set(base: Path, tmp_path: Path) -> None:
    metrics = wd.compare(base, write_steps(tmp_path / "ft", llama())).metrics
    one, other = wd.Comparison(metrics), wd.Comparison(metrics)
    assert one == one  # noqa: PLR0124
    assert one != other
    assert len({one, other, one}) == 2


def test_the_library_does_not_read_the_command_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["wd-analyze", "of", "somebody", "else"])
    assert wd.compare(base, write_steps(tmp_path / "ft", llama())).run.command is None


def test_paths_may_come_with_names(base: Path, tmp_path: Path) -> None:
    ft, lora = write_steps(tmp_path / "ft", llama()), write_lora(tmp_path / "lora", llama())
    assert wd.compare(base, [("Full", ft), (None, lora)]).methods == ["Full", "lora"]
    assert wd.compare(base, [("Full", ft), lora]).methods == ["Full", "lora"]
