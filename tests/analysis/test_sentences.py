"""How often each sentence is printed where what it says is false: at most 5 % of panels, at each rule's worst case.

Each case is a panel of which the truth is known. The quick tests draw a few panels and allow for that; the slow ones
draw so many that 5 % itself is the bound. `pytest -m slow -rP` on this file prints the rates
of docs/reading.md. Every panel is read as a table of its own (q = p): with more panels, q only asks for more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import write
from random_walks import dora_panel
from random_walks import panels as walks

import wdanalysis as wd
from wdanalysis.analysis.badges import FALLS, ONE_LAYER, RISES, badge
from wdanalysis.analysis.nulls import null_r
from wdanalysis.analysis.panel import Panel, panels
from wdanalysis.analysis.readings import FEW_VECTORS, ONE_FACTOR, RULES, readings
from wdanalysis.analysis.regression import PANEL_SCOPES, choose_steps, correlations, parts
from wdanalysis.decomposition import delta_d
from wdanalysis.measure.rows import uniform_shrink

MOST = 0.05
"""The share of panels with a false sentence that is allowed."""

Values = tuple[np.ndarray, np.ndarray]  # ΔD and ΔM, steps × layers
Draw = Callable[[np.random.Generator], Values]


def generators(draws: int) -> Iterator[np.random.Generator]:
    return map(np.random.default_rng, range(draws))


def spare(draws: int) -> float:
    """What chance adds to a rate of `MOST` in so many draws, in 1 of 20."""
    return 1.65 * math.sqrt(MOST * (1 - MOST) / draws)


def in_quick_and_slow(quick: int, slow: int) -> pytest.MarkDecorator:
    """Run with few draws, and in the slow stage with many."""
    return pytest.mark.parametrize(
        ("draws", "bound"),
        [
            pytest.param(quick, MOST + spare(quick), id="quick"),
            pytest.param(slow, MOST, id="slow", marks=pytest.mark.slow),
        ],
    )


def assert_rare(sentence: str, rate: float, bound: float) -> None:
    print(f"{sentence}: {100 * rate:.1f} %")
    assert rate <= bound, (sentence, rate)


# ΔD and ΔM of layers ----------------------------------------------------------------------------------------------


def random_walks(generator: np.random.Generator, layers: int = 10, steps: int = 4) -> Values:
    """|sums| of independent moves: both grow in every layer, and have nothing to do with each other."""
    moves = generator.normal(size=(2, steps, layers, 40))
    return tuple(np.abs(np.cumsum(moves, axis=1)).mean(axis=3))  # type: ignore[return-value]


def independent(generator: np.random.Generator, layers: int = 10, steps: int = 4) -> Values:
    return tuple(generator.normal(size=(2, steps, layers)))  # type: ignore[return-value]


def trended(
    generator: np.random.Generator,
    layers: int = 10,
    steps: int = 4,
    *,
    rho: float = 0.0,
    common: float = 3.0,
    heavy: bool = False,
) -> Values:
    """Layers with speeds of their own, which correlate by rho in ΔD and ΔM, and a common one; heavy tails are t3's."""
    speed = (
        generator.standard_t(3, size=(2, layers)) / math.sqrt(3)
        if heavy
        else generator.normal(size=(2, layers))
    )
    speed[1] = rho * speed[0] + math.sqrt(1 - rho**2) * speed[1]
    noise = 0.3 * generator.normal(size=(2, steps, layers))
    grown = np.arange(1, steps + 1)[:, None]
    return tuple(grown * (common + one) + of_one for one, of_one in zip(speed, noise, strict=True))  # type: ignore[return-value]


def outlier(generator: np.random.Generator, layers: int = 10, steps: int = 4) -> Values:
    """As `trended`, but one layer is far out in both."""
    x, y = trended(generator, layers, steps)
    x[:, 0], y[:, 0] = x[:, 0] * 5, y[:, 0] * 5
    return x, y


def one_relation(generator: np.random.Generator, layers: int = 10, steps: int = 8) -> Values:
    """ΔM follows ΔD in the same way at every step and among the layers: nothing mixes, and no choice decides."""
    x = sum(generator.normal(size=shape) for shape in ((steps, layers), (1, layers), (steps, 1)))
    return x, x + 0.6 * generator.normal(size=(steps, layers))


def turning(generator: np.random.Generator, layers: int = 10, steps: int = 8) -> Values:
    """ΔD grows; ΔM grows for half of the run and then goes back: early steps rise, late ones fall."""
    grown = np.arange(steps)[:, None]
    x, y = 0.3 * generator.normal(size=(2, steps, layers))
    return x + grown, y + np.minimum(grown, steps - 1 - grown)


UNRELATED: Mapping[str, Draw] = {
    "random walks": random_walks,
    "random walks, 6 layers": partial(random_walks, layers=6),
    "independent": independent,
    "independent, 6 layers": partial(independent, layers=6),
    "trended": trended,
    "trended, 6 layers": partial(trended, layers=6),
    "heavy tails": partial(trended, heavy=True),
    "heavy tails, 6 layers": partial(trended, layers=6, heavy=True),
}
"""No layer stands out but by chance, and ΔM has nothing to do with ΔD."""


def tabled(*drawn: Values) -> pd.DataFrame:
    """Metrics of panels, each a method of its own."""
    delta_d, delta_m = np.array(drawn).swapaxes(0, 1)
    method, step, layer = (index.ravel() for index in np.indices(delta_d.shape))
    numbers = {"delta_d": delta_d.ravel(), "delta_m": delta_m.ravel()}
    labels = {"method": method.astype(str), "step": 100 * (1 + step), "layer": layer}
    rows = pd.DataFrame({"module": "q", "axis": "out"} | labels | numbers)
    return rows.astype({"step": "Int64", "layer": "Int64"})


def many(values: Draw, draws: int) -> pd.DataFrame:
    return tabled(*(values(generator) for generator in generators(draws)))


def judged(values: Draw, draws: int) -> pd.DataFrame:
    """What the table of correlations says of many panels within steps, and the badge of each."""
    table = correlations(many(values, draws), ("within_step",))
    table["q_value"] = table["p_value"]
    return table.assign(badge=[badge(row) for row in table.to_dict("records")])


# trend, one_layer -------------------------------------------------------------------------------------------------


@in_quick_and_slow(100, 500)
@pytest.mark.parametrize("case", UNRELATED)
def test_no_trend_is_told_and_no_layer_is_blamed_where_all_are_alike(
    case: str, draws: int, bound: float
) -> None:
    said = judged(UNRELATED[case], draws)["badge"]
    assert_rare("trend", said.isin([RISES, FALLS]).mean(), bound)
    assert_rare("one_layer", said.eq(ONE_LAYER).mean(), bound)


@in_quick_and_slow(60, 300)
def test_a_layer_far_out_in_both_makes_no_trend_and_is_the_one_that_is_named(
    draws: int, bound: float
) -> None:
    said = judged(outlier, draws)
    assert_rare("trend", said["badge"].isin([RISES, FALLS]).mean(), bound)
    blamed = said[said["badge"] == ONE_LAYER]
    assert len(blamed) > draws / 4  # where the others go down; else no sign turns
    assert blamed["leave_out_layer"].eq(0).all()


def test_a_trend_is_told_where_there_is_one() -> None:
    def falling(generator: np.random.Generator) -> Values:
        x, other = trended(generator)
        return x, 40 - 1.5 * x + other

    said = judged(falling, 100)["badge"]
    assert said.eq(FALLS).mean() > 0.55
    assert not said.eq(RISES).any()


def test_the_sentences_are_those_of_the_badges() -> None:
    metrics = pd.concat(
        [many(values, 20).assign(module=name) for name, values in {**UNRELATED, "o": outlier}.items()]
    )
    table = correlations(metrics, PANEL_SCOPES)
    said = readings(metrics, table)
    badges = [badge(row) for row in table[table["scope"] == "within_step"].to_dict("records")]
    assert said["sentence"].str.contains("magnitude more").sum() == badges.count(RISES)
    assert said["sentence"].str.contains("magnitude less").sum() == badges.count(FALLS)
    assert said["rule"].eq("one_layer").sum() == badges.count(ONE_LAYER) > 0


# pooled_parts, step_choice ----------------------------------------------------------------------------------------


def panel_of(values: Values) -> Panel:
    """A panel without p-values and intervals, which cost most of the time."""
    rows = tabled(values)
    bare = Panel(rows, rows, {}, {}, 1)
    found = parts(rows["delta_d"], rows["delta_m"], rows["step"])
    _, r = choose_steps(bare.points)
    pooled = vars(found) | {"pearson_r": bare.points.r()}
    if len(r):
        pooled |= {"r_four_low": np.nanmin(r), "r_four_high": np.nanmax(r)}
    else:
        pooled |= {"r_four_low": np.nan, "r_four_high": np.nan}
    within = {"pearson_r": found.r_within, "r_low": np.nan, "r_high": np.nan}
    return Panel(rows, rows, pooled, within, 1)


def said_of(rule: str, values: Draw, draws: int) -> list[str]:
    """Its sentences over many panels."""
    panels_of = (panel_of(values(generator)) for generator in generators(draws))
    return [text for panel in panels_of if (text := RULES[rule](panel))]


NOTHING_MIXES: Mapping[str, Draw] = {
    f"{layers} layers, {steps} steps, {kind}": partial(
        trended, layers=layers, steps=steps, rho=rho, common=0.5, heavy=heavy
    )
    for layers, steps in ((6, 8), (10, 4))
    for kind, rho, heavy in (("normal", 0.3, False), ("heavy tails", 0.0, True))
} | {"one relation": one_relation, "one relation, 6 layers": partial(one_relation, layers=6)}
"""The pooled r is that of layers at the same step, to 0.05."""


@pytest.mark.parametrize("case", NOTHING_MIXES)
def test_the_cases_in_which_nothing_mixes_are_what_they_claim_to_be(case: str) -> None:
    of = NOTHING_MIXES[case].func if isinstance(NOTHING_MIXES[case], partial) else NOTHING_MIXES[case]
    keywords = {**getattr(NOTHING_MIXES[case], "keywords", {}), "layers": 40_000}
    x, y = of(np.random.default_rng(0), **keywords)
    found = panel_of((x, y)).pooled
    assert abs(found["pearson_r"] - found["r_within"]) < 0.06


@in_quick_and_slow(60, 300)
@pytest.mark.parametrize("case", NOTHING_MIXES)
def test_a_pooled_r_is_not_taken_apart_where_nothing_mixes(case: str, draws: int, bound: float) -> None:
    assert_rare("pooled_parts", len(said_of("pooled_parts", NOTHING_MIXES[case], draws)) / draws, bound)


def test_a_pooled_r_is_taken_apart_where_the_steps_make_it() -> None:
    mostly = said_of("pooled_parts", trended, 100)
    assert len(mostly) > 60
    assert all(
        "from the steps" in text and " and +" in text for text in mostly
    )  # the steps' part has its sign


ONE_SIGN: Mapping[str, Draw] = {
    f"{layers} layers, {kind}": partial(trended, layers=layers, steps=8, rho=rho, common=common, heavy=heavy)
    for layers in (6, 10)
    for kind, rho, common, heavy in (
        ("r of +0.03 to +0.29", 0.0, 1.0, False),
        ("r of +0.2 to +0.8", 0.0, 3.0, False),
        ("r of +0.03 to +0.29, heavy tails", 0.0, 1.0, True),
    )
} | {"one relation": one_relation}
"""All choices of four of the steps have an r above 0."""


@in_quick_and_slow(60, 250)
@pytest.mark.parametrize("case", ONE_SIGN)
def test_no_choice_of_steps_is_said_to_decide_a_sign_that_all_have(
    case: str, draws: int, bound: float
) -> None:
    said = said_of("step_choice", ONE_SIGN[case], draws)
    assert_rare("step_choice", sum("decides" in text for text in said) / draws, bound)


def test_the_steps_are_said_to_decide_the_sign_where_they_do() -> None:
    said = said_of("step_choice", turning, 50)
    assert sum("which steps one looks at decides its sign" in text for text in said) > 45


# shrink, without_shrink -------------------------------------------------------------------------------------------


def matrices(m0: np.ndarray, change: np.ndarray, radial: np.ndarray) -> Panel:
    """One step's rows: m₀, m − m₀ and ρ are layers × vectors."""
    c = np.array([uniform_shrink(*of_layer) for of_layer in zip(m0, radial, strict=True)])
    sizes = {"delta_m": np.abs(change).mean(1), "delta_m_unshrunk": np.abs(change + c[:, None] * m0).mean(1)}
    rows = pd.DataFrame({"layer": range(len(m0)), "shrink": c, **sizes})
    return Panel(rows, rows, {}, {}, 1)


def only_noise(generator: np.random.Generator) -> Panel:
    m0 = generator.uniform(0.5, 2, size=(6, 1)) * np.exp(0.3 * generator.normal(size=(6, 96)))
    radial = 0.01 * generator.normal(size=m0.shape)
    return matrices(m0, radial, radial)


def only_turns(generator: np.random.Generator) -> Panel:
    """Low rank: every vector gets longer by turning, by the same share of its length."""
    m0 = generator.uniform(0.5, 2, size=(6, 1)) * np.exp(0.3 * generator.normal(size=(6, 96)))
    radial = 0.002 * m0 * generator.normal(size=m0.shape)
    return matrices(m0, radial + 0.02 * m0, radial)


def one_long_vector(generator: np.random.Generator) -> Panel:
    """It carries ΔM and the factor of its matrix, whichever way it went."""
    m0 = np.ones((6, 96))
    m0[:, 0] = 1000
    radial = 0.01 * m0 * generator.normal(size=m0.shape)
    return matrices(m0, radial, radial)


def lengths_of_all_sizes(generator: np.random.Generator) -> Panel:
    m0 = np.exp(1.5 * generator.normal(size=(6, 8)))
    radial = 0.01 * m0 * generator.normal(size=m0.shape)
    return matrices(m0, radial, radial)


NO_SHRINK = {of.__name__: of for of in (only_noise, only_turns, one_long_vector, lengths_of_all_sizes)}


@in_quick_and_slow(100, 1000)
@pytest.mark.parametrize("case", NO_SHRINK)
def test_no_shrink_is_told_where_there_is_none(case: str, draws: int, bound: float) -> None:
    said = [RULES["shrink"](NO_SHRINK[case](generator)) for generator in generators(draws)]
    assert_rare("shrink", np.mean([text is not None for text in said]), bound)


def with_shrink(
    generator: np.random.Generator, spread: float = 0.0, shape: tuple[int, int] = (6, 96)
) -> tuple[Panel, float]:
    """A shrink by about 1 %, of spread · 1 % over the layers, beside noise; and its true share of ΔM."""
    factor = generator.normal(size=(shape[0], 1))
    factor = 0.01 * (1 + spread * (factor - factor.mean()) / factor.std())
    m0 = np.exp(0.3 * generator.normal(size=shape))
    noise = generator.uniform(0.001, 0.02) * generator.normal(size=shape)
    change = noise - factor * m0
    return matrices(m0, change, change), 1 - np.abs(noise).mean() / np.abs(change).mean()


def shrinks_said(draws: int, spread: float = 0.0) -> list[tuple[str, float]]:
    drawn = (with_shrink(generator, spread) for generator in generators(draws))
    return [(text, true) for panel, true in drawn if (text := RULES["shrink"](panel))]


@in_quick_and_slow(100, 1000)
def test_the_share_of_a_shrink_is_the_true_one(draws: int, bound: float) -> None:
    said = shrinks_said(draws)
    assert draws / 5 < len(said) < draws
    off = [abs(int(text.split()[0]) / 100 - true) > 0.05 for text, true in said]
    assert_rare("shrink's share", np.mean(off), bound)


@in_quick_and_slow(100, 1000)
def test_factors_that_differ_are_not_called_one(draws: int, bound: float) -> None:
    said = shrinks_said(draws, spread=1.25 * ONE_FACTOR)
    assert_rare("one common shrink", np.mean(["one common" in text for text, _ in said]), bound)


def unrelated_below_a_shrink(values: Draw, draws: int) -> pd.DataFrame:
    """ΔM is nine parts shrink, which goes by the layers' lengths, and one part that has nothing to do with ΔD."""

    def shrunk(generator: np.random.Generator) -> Values:
        x, y = values(generator)
        lengths = np.exp(generator.normal(size=x.shape[1]))
        return x, np.abs(y) + 9 * np.abs(y).mean() * lengths * np.arange(1, 1 + len(x))[:, None]

    metrics = many(shrunk, draws)
    apart = np.concatenate([np.abs(values(generator)[1]).ravel() for generator in generators(draws)])
    return metrics.assign(shrink=0.01, delta_m_unshrunk=apart)


@in_quick_and_slow(40, 150)
@pytest.mark.parametrize("case", ["independent, 6 layers", "trended", "heavy tails", "heavy tails, 6 layers"])
def test_no_trend_is_told_without_the_shrink_where_there_is_none(case: str, draws: int, bound: float) -> None:
    metrics = unrelated_below_a_shrink(UNRELATED[case], draws)
    table = correlations(metrics, PANEL_SCOPES)
    table["q_value"] = table["p_value"]
    alone = [replace(panel, panels=1) for _, panel in panels(metrics, table)]
    assert all(RULES["shrink"](panel) for panel in alone)
    said = [RULES["without_shrink"](panel) for panel in alone]
    rate = np.mean([text is not None and "layers that turned" in text for text in said])
    assert_rare("without_shrink", rate, bound)


# few_vectors ------------------------------------------------------------------------------------------------------


def turns(
    vectors: int, length: int, elements: Callable[..., np.ndarray], generator: np.random.Generator
) -> np.ndarray:
    """1 − cos of vectors of one length that get an update of independent elements, each 2 % of an element's size."""
    w0 = generator.normal(size=(vectors, length))
    w0 *= np.sqrt(length / (w0**2).sum(1, keepdims=True))
    d = 0.02 * elements(generator, (vectors, length))
    a, p, q = ((one * other).sum(1) for one, other in ((w0, w0), (w0, d), (d, d)))
    return (a * q - p * p) / (a * (a + 2 * p + q)) / 2


def low_rank(generator: np.random.Generator, shape: tuple[int, int], rank: int) -> np.ndarray:
    return generator.normal(size=(shape[0], rank)) @ generator.normal(size=(rank, shape[1])) / math.sqrt(rank)


def normal(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return generator.normal(size=shape)


def laplace(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return generator.laplace(size=shape)


def student(generator: np.random.Generator, shape: tuple[int, int], freedom: int) -> np.ndarray:
    return generator.standard_t(freedom, size=shape)


ALIKE: Mapping[str, tuple[tuple[int, int], int | None, Callable[..., np.ndarray]]] = {
    "normal elements": ((96, 96), None, normal),
    "normal elements, vectors of 4": ((512, 4), None, normal),
    "rank 1": ((384, 96), 1, partial(low_rank, rank=1)),
    "rank 2": ((384, 96), 2, partial(low_rank, rank=2)),
    "rank 8": ((384, 96), 8, partial(low_rank, rank=8)),
    "Laplace's elements": ((384, 96), None, laplace),
    "t5's elements": ((384, 96), None, partial(student, freedom=5)),
    "t3's elements": ((384, 96), None, partial(student, freedom=3)),
}
"""Of which shape and rank, and whose elements: all vectors are drawn alike."""


def few_said(case: str, draws: int, layers: int = 6) -> float:
    shape, rank, elements = ALIKE[case]
    said = 0
    for generator in generators(draws):
        drawn = [turns(*shape, elements, generator) for _ in range(layers)]
        numbers = {"delta_d": [of.mean() for of in drawn], "delta_d_max": [of.max() for of in drawn]}
        shaped = {"vectors": shape[0], "length": shape[1], "rank": np.nan if rank is None else rank}
        rows = pd.DataFrame(numbers | {"delta_d_median": [np.median(of) for of in drawn]} | shaped)
        rows = rows.assign(delta_m=1.0)
        said += RULES["few_vectors"](Panel(rows, rows, {}, {}, 1)) is not None
    return said / draws


@in_quick_and_slow(20, 40)
@pytest.mark.parametrize("case", ALIKE)
@pytest.mark.parametrize("layers", [1, 6])
def test_no_vector_is_said_to_turn_far_more_where_all_are_alike(
    case: str, layers: int, draws: int, bound: float
) -> None:
    if layers == 1 and case.startswith("t3"):
        pytest.skip("one matrix does have a vector that turned far more, by one element: docs/reading.md")
    assert_rare("few_vectors", few_said(case, draws, layers), bound)


# rounding, few_elements -------------------------------------------------------------------------------------------

NAME = "model.layers.{}.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Rounded:
    """What is measured of matrices that torch stored in bfloat16, and what was there before.

    Attributes
    ----------
    panel
        Measured.
    kept
        ΔD as stored over ΔD before, by layer.
    equal
        The share of stored elements that are the base's.
    largest
        The largest 1 − cos before over the median one; the median over the layers.
    """

    panel: Panel
    kept: np.ndarray
    equal: float
    largest: float


def rounded(
    generator: np.random.Generator,
    folder: Path,
    size: float,
    *,
    on_grid: bool,
    base: str = "normal",
    layers: int = 6,
) -> Rounded:
    """Normal updates, stored in bfloat16 by torch."""
    tensors: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    kept, equal, elements, largest = [], 0, 0, []
    for layer in range(layers):
        shape = (16 * (1 + layer), 96)
        W0 = BASES[base](generator, shape)
        W0 = torch.from_numpy(0.02 * W0).to(torch.bfloat16 if on_grid else torch.float32)
        W = W0.double() + 0.02 * size * torch.from_numpy(generator.normal(size=shape))
        stored = W.bfloat16()
        kept.append(delta_d(W0, stored) / delta_d(W0, W))
        equal, elements = equal + int((stored.double() == W0.double()).sum()), elements + W0.numel()
        turned = 1 - torch.nn.functional.cosine_similarity(W, W0.double())
        largest.append(float(turned.max() / turned.median()))
        tensors["base"][NAME.format(layer)], tensors["tuned"][NAME.format(layer)] = W0, stored
    compared = wd.compare(
        *(write(folder / f"{name}.safetensors", of) for name, of in tensors.items()), modules="all"
    )
    return Rounded(single(compared.metrics), np.array(kept), equal / elements, float(np.median(largest)))


def single(metrics: pd.DataFrame) -> Panel:
    """The panel of a table of one, without what correlates."""
    return Panel(*(metrics.assign(layer=metrics["layer"].astype(float)),) * 2, {}, {}, 1)


def of_long_rows(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return generator.normal(size=shape) * np.exp(0.7 * generator.normal(size=(shape[0], 1)))


def with_outliers(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """One column is 30 times the others, as in large language models."""
    base = generator.normal(size=shape)
    base[:, 3] *= 30
    return base


BASES = {
    "normal": normal,
    "heavy tails": partial(student, freedom=3),
    "long rows": of_long_rows,
    "outliers": with_outliers,
}


def log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return math.exp(generator.uniform(math.log(low), math.log(high)))


@in_quick_and_slow(6, 30)
@pytest.mark.parametrize("base", BASES)
def test_on_the_grid_what_is_said_of_rounding_is_so(base: str, draws: int, bound: float) -> None:
    """From updates of which next to nothing is left to those that lose less than is told."""
    off, false_count, false_vector, told = 0, 0, 0, 0
    for generator in generators(draws):
        with TemporaryDirectory() as folder:
            size = log_uniform(generator, 3e-5, 3e-3)
            found = rounded(generator, Path(folder), size, on_grid=True, base=base)
        if text := RULES["rounding"](found.panel):
            told += 1
            off += abs(int(text.split("about ")[1].split()[0]) / 100 - (1 - np.median(found.kept))) > 0.1
        text = RULES["few_elements"](found.panel)
        false_count += text is not None and abs(int(text.split()[0]) / 100 - found.equal) > 0.0051
        false_vector += RULES["few_vectors"](found.panel) is not None and found.largest < FEW_VECTORS / 2
    assert told > draws / 3
    assert_rare("rounding, on the grid", off / draws, bound)
    assert false_count == 0
    assert_rare("few_vectors", false_vector / draws, bound)


@in_quick_and_slow(6, 30)
@pytest.mark.parametrize("base", BASES)
def test_off_the_grid_points_that_may_be_rounding_are_those_that_it_made_larger(
    base: str, draws: int, bound: float
) -> None:
    """Where rounding made ΔD larger by less than a quarter, no point is counted."""
    false, told = [], 0
    for generator in generators(draws):
        with TemporaryDirectory() as folder:
            size = log_uniform(generator, 5e-4, 6e-3)
            found = rounded(generator, Path(folder), size, on_grid=False, base=base, layers=1)
        said = RULES["rounding"](found.panel) is not None
        told += said
        if found.kept[0] < 1.25:
            false.append(said)
    assert told > draws / 10
    assert_rare("rounding, off the grid", np.mean(false), bound)


# chance -----------------------------------------------------------------------------------------------------------


def without_structure(kind: str, draws: int) -> Iterator[pd.DataFrame]:
    if kind == "dora":
        generator = np.random.default_rng(0)
        for _ in range(draws):
            yield dora_panel(generator, np.outer(generator.uniform(0.5, 1.5, size=8), [0.1, 0.2, 0.35]))
    else:
        yield from walks({"stored": None, "rank 1": 1, "rank 4": 4}[kind], draws)


@in_quick_and_slow(30, 120)
@pytest.mark.parametrize("kind", ["stored", "rank 1", "rank 4", "dora"])
def test_an_update_without_structure_is_said_to_lie_outside_its_band_in_one_of_twenty(
    kind: str, draws: int, bound: float
) -> None:
    outside = 0
    for rows in without_structure(kind, draws):
        band = null_r(rows).iloc[0]
        panel = Panel(rows, rows, {}, {}, 1)
        pooled = {
            "pearson_r": panel.points.r(),
            "r_null_low": band["r_null_low"],
            "r_null_high": band["r_null_high"],
        }
        outside += "is what chance gives" not in str(RULES["chance"](Panel(rows, rows, pooled, {}, 1)))
    assert_rare("chance", outside / draws, bound)
