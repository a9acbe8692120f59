"""How often each sentence is printed where what it says is false: at most 5 %, the error of so many panels aside.

Every panel is read as a table of its own (q = p): with more panels, q only asks for more.
`python tests/analysis/test_sentences.py` prints the shares of docs/reading.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from wdanalysis.analysis.badges import badge
from wdanalysis.analysis.readings import readings
from wdanalysis.analysis.regression import PANEL_SCOPES, correlations

PANELS = 200
SPARE = 2 * math.sqrt(0.05 * 0.95 / PANELS)  # 3 %; the table of docs/reading.md is of 1,000 panels

Values = tuple[np.ndarray, np.ndarray]  # ΔD and ΔM, steps × layers


def random_walks(generator: np.random.Generator, layers: int = 10, steps: int = 4) -> Values:
    """|sums| of independent moves: both grow in every layer, and have nothing to do with each other."""
    moves = generator.normal(size=(2, steps, layers, 40))
    return tuple(np.abs(np.cumsum(moves, axis=1)).mean(axis=3))  # type: ignore[return-value]


def independent(generator: np.random.Generator, layers: int = 10, steps: int = 4) -> Values:
    return tuple(generator.normal(size=(2, steps, layers)))  # type: ignore[return-value]


def trended(generator: np.random.Generator, layers: int = 10, steps: int = 4) -> Values:
    """Layers with speeds of their own, independent in ΔD and ΔM, and steps with a common trend."""
    speed = 3 + generator.normal(size=(2, 1, layers))
    noise = 0.3 * generator.normal(size=(2, steps, layers))
    return tuple(np.arange(1, steps + 1)[:, None] * speed + noise)  # type: ignore[return-value]


def outlier(generator: np.random.Generator, layers: int = 10, steps: int = 4) -> Values:
    """As `trended`, but one layer is far out in both."""
    x, y = trended(generator, layers, steps)
    x[:, 0], y[:, 0] = x[:, 0] * 5, y[:, 0] * 5
    return x, y


def outlying_in_one(generator: np.random.Generator, layers: int = 10, steps: int = 4) -> Values:
    """Speeds with Student's t3: now and then one layer is far out in ΔD or in ΔM, as chance has it."""
    speed = 3 + generator.standard_t(3, size=(2, 1, layers))
    noise = 0.3 * generator.normal(size=(2, steps, layers))
    return tuple(np.arange(1, steps + 1)[:, None] * speed + noise)  # type: ignore[return-value]


def few_independent(generator: np.random.Generator) -> Values:
    return independent(generator, layers=6)


def one_relation(generator: np.random.Generator, layers: int = 10, steps: int = 8) -> Values:
    """ΔM follows ΔD in the same way at every step and among the layers: nothing mixes, and no choice decides."""
    x = (
        generator.normal(size=(steps, layers))
        + generator.normal(size=layers)
        + generator.normal(size=(steps, 1))
    )
    return x, x + 0.6 * generator.normal(size=(steps, layers))


def tabled(
    values: Callable[[np.random.Generator], Values], panels: int = PANELS, **columns: object
) -> pd.DataFrame:
    """Metrics of many panels, each a method of its own."""
    generator = np.random.default_rng(11)
    tables = []
    for one in range(panels):
        x, y = values(generator)
        step, layer = np.indices(x.shape)
        tables.append(
            pd.DataFrame(
                {
                    "method": f"{one}",
                    "module": "q",
                    "axis": "out",
                    "step": 100 * (1 + step.ravel()),
                    "layer": layer.ravel(),
                    "delta_d": x.ravel(),
                    "delta_m": y.ravel(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True).astype({"step": "Int64", "layer": "Int64"}).assign(**columns)


def shares(metrics: pd.DataFrame) -> Counter[str]:
    """The share of panels with a sentence of each rule; a trend by its direction."""
    table = correlations(metrics, PANEL_SCOPES)
    table["q_value"] = table["p_value"]
    said = readings(metrics, table)
    says = said["sentence"].str
    trend = np.select(
        [says.contains("magnitude more"), says.contains("magnitude less")], ["rises", "falls"], ""
    )
    count = Counter((said["rule"] + " " + trend).str.strip())
    badges = Counter(badge(row) for row in table[table["scope"] == "within_step"].to_dict("records"))
    of_badges = {f"badge {name}": number for name, number in badges.items()}
    panels = metrics["method"].nunique()
    return Counter({name: number / panels for name, number in (count | Counter(of_badges)).items()})


NULLS = (random_walks, independent, trended, outlying_in_one, few_independent)


@pytest.mark.parametrize("values", [*NULLS, outlier])
def test_no_trend_is_told_where_there_is_none(values: Callable[[np.random.Generator], Values]) -> None:
    found = shares(tabled(values))
    assert found["trend rises"] + found["trend falls"] <= 0.05 + SPARE
    assert found["badge rises"] + found["badge falls"] == found["trend rises"] + found["trend falls"]


def test_one_layer_that_makes_the_trend_is_named_and_no_other() -> None:
    metrics = tabled(outlier)
    named = readings(metrics).query("rule == 'one_layer'")["sentence"]
    assert len(named) > PANELS / 4  # where the others go down; else no sign turns
    assert named.str.contains("rests on layer 0:").all()


@pytest.mark.parametrize("values", [random_walks, independent, trended, one_relation])
def test_no_layer_is_blamed_where_all_are_alike(values: Callable[[np.random.Generator], Values]) -> None:
    assert shares(tabled(values))["one_layer"] <= 0.05 + SPARE


def test_one_relation_is_not_taken_apart_and_no_choice_of_steps_decides() -> None:
    found = shares(tabled(one_relation))
    assert found["trend rises"] > 0.95
    assert found["pooled_parts"] <= 0.05
    assert found["step_choice"] <= 0.05


def test_a_trend_is_told_where_there_is_one() -> None:
    def falling(generator: np.random.Generator) -> Values:
        x, other = trended(generator)
        return x, 40 - 1.5 * x + other

    found = shares(tabled(falling))
    assert found["trend falls"] > 0.55
    assert found["trend rises"] == 0


@pytest.mark.parametrize("values", [independent, trended])
def test_no_trend_is_told_without_the_shrink_where_there_is_none(
    values: Callable[[np.random.Generator], Values],
) -> None:
    metrics = tabled(values)
    unshrunk = np.random.default_rng(1).uniform(0.01, 0.1, size=len(metrics))
    metrics = metrics.assign(delta_m=metrics["delta_m"] + 20, shrink=0.01, delta_m_unshrunk=unshrunk)
    found = shares(metrics)
    assert found["shrink"] == 1
    assert found["without_shrink rises"] + found["without_shrink falls"] <= 0.05


def _print_shares() -> None:
    for values in (*NULLS, outlier, one_relation):
        found = shares(tabled(values, panels=1000))
        print(values.__name__, {name: round(100 * share, 1) for name, share in sorted(found.items())})


if __name__ == "__main__":
    _print_shares()
