"""Every setting of a plan is an option of `train`, with the plan's own bounds, choices and defaults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from wdanalysis.cli import app
from wdanalysis.cli.options import option_name
from wdanalysis.cli.plan_options import given_settings
from wdanalysis.training.run.plan import plan_fields

FIELDS = [field for field in plan_fields().values() if field.setting.panel]
BOUNDED = [field for field in FIELDS if field.setting.bounds]
FEW = [field for field in FIELDS if field.choices]


def options() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.commands["train"].params}


def test_every_setting_has_its_option_in_its_panel_and_is_not_given_by_default() -> None:
    found = options()
    for field in FIELDS:
        option = found[field.name]
        assert option.opts == [option_name(field.name)]
        assert option.rich_help_panel == field.setting.panel
        assert option.default in (None, False)
    assert "max_grad_norm" not in found


@pytest.mark.parametrize("field", BOUNDED, ids=lambda field: field.name)
def test_a_number_out_of_its_bounds_is_wrong_usage(field: Any) -> None:
    result = CliRunner().invoke(app, ["train", option_name(field.name), "-1", "--dry-run"])
    assert result.exit_code == 2
    assert "must be" in result.output


@pytest.mark.parametrize("field", FEW, ids=lambda field: field.name)
def test_a_word_that_is_not_known_is_wrong_usage_and_answered_with_the_known(field: Any) -> None:
    result = CliRunner().invoke(app, ["train", option_name(field.name), "square", "--dry-run"])
    assert result.exit_code == 2
    assert all(choice in result.output for choice in field.choices)


def test_options_become_fields_and_what_is_not_given_is_left_out() -> None:
    options = {
        "methods": "ft, dora",
        "data": [Path("a"), Path("b")],
        "eval_data": [],
        "targets": "q,v",
        "rank": None,
        "full_gradient": False,
        "gradient_checkpointing": True,
        "weight_decay": 0.0,
    }
    assert given_settings(options) == {
        "methods": ("ft", "dora"),
        "data": (Path("a"), Path("b")),
        "targets": "q,v",
        "gradient_checkpointing": True,
        "weight_decay": 0.0,
    }


def test_help_names_options_not_parameters_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from wdanalysis.cli import app\n"
        "shown = CliRunner().invoke(app, ['train', '--help'], env={'COLUMNS': '200'}).stdout\n"
        "assert not {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "print(shown)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "`" not in shown
    for text in ("Share of --data", "as --targets", "lora, dora 2e-4", "[0<=x<1]", "May be repeated"):
        assert text in shown
