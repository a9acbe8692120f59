"""The recipes have the values of Tables 8 to 11, typed here column by column as the paper prints them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from wdanalysis.errors import TrainingError
from wdanalysis.training.run.plan import TrainingPlan, plan_fields
from wdanalysis.training.run.recipes import RECIPES, Recipe, recipe

TABLE_8 = {
    # model: (rank, α, learning rate) of DoRA† and DoRA
    "llama-7b": [(16, 32, 2e-4), (32, 64, 1e-4)],
    "llama-13b": [(16, 32, 3e-4), (32, 64, 2e-4)],
    "llama2-7b": [(16, 32, 2e-4), (32, 64, 2e-4)],
    "llama3-8b": [(16, 32, 1e-4), (32, 64, 1e-4)],
}


@pytest.mark.parametrize(
    ("model", "rank", "alpha", "rate"), [(model, *row) for model, rows in TABLE_8.items() for row in rows]
)
def test_table_8(model: str, rank: int, alpha: float, rate: float) -> None:
    r = recipe(f"{model}-commonsense-r{rank}")
    assert (r.table, r.model, r.method) == (8, model, "dora")
    assert (r.rank, r.alpha, r.dropout, r.optimizer) == (rank, alpha, 0.05, "adamw")
    assert (r.learning_rate, r.scheduler, r.batch_size) == (rate, "linear", 16)
    assert (r.warmup_steps, r.warmup_ratio, r.epochs) == (100, None, 3)
    assert r.targets == ("q", "k", "v", "up", "down")


@pytest.mark.parametrize(
    ("data", "rate", "batch", "epochs"), [("image-text", 1e-3, 300, 20), ("video-text", 3e-4, 40, 7)]
)
def test_table_9(data: str, rate: float, batch: int, epochs: int) -> None:
    r = recipe(f"vl-bart-{data}")
    assert (r.table, r.method, r.rank, r.alpha, r.dropout, r.optimizer) == (9, "dora", 128, 128, 0.0, "adamw")
    assert (r.learning_rate, r.scheduler, r.batch_size) == (rate, "linear", batch)
    assert (r.warmup_steps, r.warmup_ratio, r.epochs) == (None, 0.1, epochs)
    assert r.targets == ("q", "k")


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_table_10(method: str) -> None:
    r = recipe(f"llava-1.5-7b-{method}")
    assert (r.table, r.method, r.rank, r.alpha, r.dropout, r.optimizer) == (
        10,
        method,
        128,
        256,
        0.05,
        "adamw",
    )
    assert (r.learning_rate, r.scheduler, r.batch_size) == (2e-4, "cosine", 16)
    assert (r.warmup_steps, r.warmup_ratio, r.epochs) == (None, 0.03, 1)
    assert set(r.targets) == {"q", "k", "v", "o", "up", "down", "gate"}


@pytest.mark.parametrize("model", ["llama-7b", "llama2-7b"])
@pytest.mark.parametrize(("method", "rank", "rate"), [("dora", 64, 4e-4), ("dvora", 1024, 4e-3)])
def test_table_11(model: str, method: str, rank: int, rate: float) -> None:
    r = recipe(f"{model}-alpaca-{method}")
    assert (r.table, r.model, r.method, r.rank, r.dropout, r.optimizer) == (
        11,
        model,
        method,
        rank,
        0.0,
        "adamw",
    )
    assert (r.learning_rate, r.scheduler, r.batch_size, r.accumulation) == (rate, "cosine", 4, 4)
    assert (r.warmup_steps, r.warmup_ratio, r.epochs) == (None, 0.1, 1)
    assert set(r.targets) == {"q", "k", "v", "o", "up", "down", "gate"}


def test_the_paper_has_sixteen_recipes_each_under_its_own_name() -> None:
    assert len(RECIPES) == 16
    assert all(name == found.name for name, found in RECIPES.items())


def test_what_the_paper_does_not_print_is_none_and_said_to_be_so() -> None:
    assert recipe("llama-7b-commonsense-r32").unprinted == ("accumulation",)
    alpaca = recipe("llama-7b-alpaca-dora")
    assert alpaca.alpha is None
    assert alpaca.unprinted == ("alpha",)
    assert "alpha          not printed" in alpaca.describe()


def test_a_description_has_every_value_and_the_table() -> None:
    description = recipe("llama-7b-commonsense-r32").describe()
    assert description.startswith("llama-7b-commonsense-r32 (Table 8)")
    for line in (
        "rank           32",
        "learning_rate  0.0001",
        "targets        q,k,v,up,down",
        "warmup_steps   100",
    ):
        assert f"  {line}" in description


def test_any_value_can_be_overridden() -> None:
    changed = replace(recipe("llama-7b-commonsense-r32"), rank=8, learning_rate=5e-4)
    assert (changed.settings()["rank"], changed.learning_rate) == (8, 5e-4)
    assert recipe("llama-7b-commonsense-r32").rank == 32


@pytest.mark.parametrize("found", RECIPES.values(), ids=RECIPES)
def test_every_recipe_makes_a_plan_and_its_adapters(found: Recipe) -> None:
    plan = TrainingPlan(**found.settings())
    adapter = plan.adapter(found.method)
    assert adapter is not None
    assert (adapter.method, adapter.rank, adapter.alpha, adapter.dropout, adapter.axis) == (
        found.method, found.rank, found.alpha, found.dropout, "out",
    )  # fmt: skip
    assert tuple(adapter.targets) == found.targets
    assert (plan.model, plan.data, plan.learning_rate) == (None, (), found.learning_rate)
    assert plan.warmup == (found.warmup_steps or found.warmup_ratio)


def test_what_a_recipe_prints_is_a_setting_or_says_what_the_paper_did() -> None:
    of_the_paper = {"name", "table", "method", "warmup_steps", "warmup_ratio", "optimizer"}
    assert {field.name for field in fields(Recipe)} - of_the_paper <= set(plan_fields())


def test_an_unknown_recipe_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        TrainingError, match=r"no recipe 'llama-70b'; choose one of llama-7b-commonsense-r16, "
    ):
        recipe("llama-70b")
