"""Every “# Params (%)” of LoRA, DoRA, DoRA†, VeRA and DVoRA in Tables 1, 5, 6 and 15, from configurations alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from wdanalysis.errors import TrainingError
from wdanalysis.training.counting import count, empty_model
from wdanalysis.training.injection import AdapterConfig
from wdanalysis.training.model_configs import MODEL_CONFIGS

QKVUD = "q,k,v,up,down"
QKVOGUD = "q,k,v,o,gate,up,down"


class Row(NamedTuple):
    """One row of one table."""

    table: int
    model: str
    method: str
    rank: int
    printed: str
    targets: str = QKVUD
    magnitude_targets: str | None = None

    def __str__(self) -> str:
        return f"Table {self.table}, {self.model}, {self.method}, r {self.rank}, {self.targets}"

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig(
            self.method, rank=self.rank, targets=self.targets, magnitude_targets=self.magnitude_targets
        )


MET = [
    Row(1, "llama-7b", "lora", 32, "0.83"),
    Row(1, "llama-7b", "dora", 16, "0.43"),
    Row(1, "llama-7b", "dora", 32, "0.84"),
    Row(1, "llama-13b", "lora", 32, "0.67"),
    Row(1, "llama-13b", "dora", 16, "0.35"),
    Row(1, "llama-13b", "dora", 32, "0.68"),
    Row(1, "llama2-7b", "lora", 32, "0.83"),
    Row(1, "llama2-7b", "dora", 16, "0.43"),
    Row(1, "llama2-7b", "dora", 32, "0.84"),
    Row(1, "llama3-8b", "lora", 32, "0.70"),
    Row(1, "llama3-8b", "dora", 32, "0.71"),
    Row(5, "llama-7b", "vera", 1024, "0.02", QKVOGUD),
    Row(5, "llama-7b", "dvora", 1024, "0.04", QKVOGUD),
    Row(5, "llama2-7b", "vera", 1024, "0.02", QKVOGUD),
    Row(5, "llama2-7b", "dvora", 1024, "0.04", QKVOGUD),
    Row(6, "llama-7b", "lora", 32, "0.83"),
    Row(6, "llama-7b", "dora", 32, "0.84"),
    Row(6, "llama-7b", "dora", 32, "0.39", "q,k,v", QKVOGUD),
    Row(6, "llama-13b", "lora", 32, "0.67"),
    Row(6, "llama-13b", "dora", 32, "0.68"),
    Row(15, "llama-7b", "lora", 4, "0.10"),
    Row(15, "llama-7b", "lora", 8, "0.21"),
    Row(15, "llama-7b", "lora", 32, "0.83"),
    Row(15, "llama-7b", "lora", 64, "1.64"),
    Row(15, "llama-7b", "dora", 8, "0.22"),
    Row(15, "llama-7b", "dora", 16, "0.43"),
    Row(15, "llama-7b", "dora", 32, "0.84"),
    Row(15, "llama-7b", "dora", 64, "1.65"),
]


@pytest.mark.parametrize("row", MET, ids=str)
def test_the_percentage_is_the_papers_to_the_two_decimals_printed(row: Row) -> None:
    assert f"{count(row.model, row.adapter).percent:.2f}" == row.printed


A_HUNDREDTH_ABOVE = [
    (Row(5, "llama-7b", "lora", 64, "2.31", QKVOGUD), 159_907_840, 6_898_323_456, "2.32"),
    (Row(5, "llama-7b", "dora", 64, "2.33", QKVOGUD), 161_267_712, 6_899_683_328, "2.34"),
    (Row(5, "llama2-7b", "lora", 64, "2.31", QKVOGUD), 159_907_840, 6_898_323_456, "2.32"),
    (Row(5, "llama2-7b", "dora", 64, "2.33", QKVOGUD), 161_267_712, 6_899_683_328, "2.34"),
    (Row(6, "llama-13b", "dora", 32, "0.31", "q,k,v", QKVOGUD), 41_451_520, 13_057_315_840, "0.32"),
    (Row(15, "llama-7b", "dora", 4, "0.11"), 7_888_896, 6_746_304_512, "0.12"),
]


@pytest.mark.parametrize(("row", "trainable", "total", "ours"), A_HUNDREDTH_ABOVE, ids=str)
def test_six_rows_are_the_printed_ones_only_when_cut_after_two_decimals_instead_of_rounded(
    row: Row, trainable: int, total: int, ours: str
) -> None:
    found = count(row.model, row.adapter)
    assert (found.trainable, found.total) == (trainable, total)
    assert f"{found.percent:.2f}" == ours
    assert f"{math.floor(100 * found.percent) / 100:.2f}" == row.printed


def test_table_15_lora_of_rank_16_is_the_printed_share_only_of_the_base_alone() -> None:
    found = count("llama-7b", AdapterConfig("lora", rank=16, targets=QKVUD))
    assert (found.trainable, found.total) == (28_049_408, 6_766_465_024)
    assert f"{found.percent:.2f}" == "0.41"
    assert f"{100 * found.trainable / (found.total - found.trainable):.2f}" == "0.42"  # as printed


def test_table_1_llama3_dora_of_rank_16_is_the_printed_share_only_without_its_magnitudes() -> None:
    found = count("llama3-8b", AdapterConfig("dora", rank=16, targets=QKVUD))
    assert (found.trainable, found.total) == (29_097_984, 8_059_359_232)
    assert f"{found.percent:.2f}" == "0.36"
    directions = count("llama3-8b", AdapterConfig("lora", rank=16, targets=QKVUD))
    assert found.trainable - directions.trainable == 32 * (4096 + 1024 + 1024 + 14336 + 4096)
    assert f"{directions.percent:.2f}" == "0.35"  # as printed


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_the_bases_have_their_published_sizes_and_no_storage(model: str, parameters: int) -> None:
    built = empty_model(model)
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters
    assert all(parameter.is_meta for parameter in built.parameters())


@pytest.mark.parametrize(("method", "printed", "ours"), [("lora", "4.61", "4.62"), ("dora", "4.63", "4.63")])
def test_llava_of_table_4_trains_its_projector_as_well(method: str, printed: str, ours: str) -> None:
    targets = r"language_model\..*\.(q|k|v|o|gate|up|down)_proj$"
    found = count("llava-1.5-7b", AdapterConfig(method, rank=128, targets=targets))
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    percent = 100 * (found.trainable + projector) / found.total
    assert f"{percent:.2f}" == ours
    assert f"{math.floor(100 * percent) / 100:.2f}" == printed


# --- what a configuration may be ----------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32, "tie_word_embeddings": False,
}  # fmt: skip
LORA = AdapterConfig("lora", rank=2, targets=("q", "v"))
LORA_TRAINS = 2 * 2 * 2 * (16 + 16)  # layers × modules × rank × (in + out)


def test_a_folder_its_file_its_content_and_a_configuration_count_alike(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    sources = (tmp_path, tmp_path / "config.json", str(tmp_path), SMALL, MODEL_CONFIGS["llama-7b"] | SMALL)
    counted = {count(source, LORA) for source in (*sources, LlamaConfig(**SMALL))}
    assert {found.trainable for found in counted} == {LORA_TRAINS}
    assert len(counted) == 1


def test_it_counts_what_a_model_with_weights_has() -> None:
    real = LlamaForCausalLM(LlamaConfig(**SMALL)).num_parameters()
    full, adapted = count(SMALL, None), count(SMALL, LORA)
    assert (full.trainable, full.total) == (real, real)
    assert (adapted.trainable, adapted.total) == (LORA_TRAINS, real + LORA_TRAINS)


def test_tied_embeddings_count_once() -> None:
    assert count(SMALL, None).total - count(SMALL | {"tie_word_embeddings": True}, None).total == 32 * 16


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "t5"])
def test_other_kinds_of_models_are_counted_too(model_type: str) -> None:
    found = count({"model_type": model_type}, AdapterConfig("dora", rank=4, targets="q,v,qkv"))
    assert 0 < found.percent < 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("llama-70b", r"no configuration at llama-70b; pass a config\.json, .*llama-7b"),
        ({"hidden_size": 4}, "has no model_type"),
        ({"model_type": "no-such-model"}, "transformers cannot read the configuration"),
        ({"model_type": "llama", "hidden_size": "x"}, "transformers cannot read the configuration"),
    ],
)
def test_what_cannot_be_counted_is_named(model: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        count(model, LORA)
