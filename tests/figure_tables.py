"""Tables of every kind of figure, small or large, and the boxes of the text that a figure draws."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from unittest import mock

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from wdanalysis.analysis.regression import correlations, step_choices

LONG = [f"llama-7b-commonsense-lora-r{2**i}-lr1e-4-final-checkpoint-of-the-run" for i in range(1, 9)]
SHORT = ["FT", "LoRA", "DoRA", "VeRA", "AdaLoRA", "PiSSA", "rsLoRA", "LoHa"]
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def metrics(
    methods: Sequence[str], steps: int, layers: int, modules: Sequence[str] = ("q", "v"), spread: float = 1.0
) -> pd.DataFrame:
    """A table whose values grow with the step; `spread` sets each method so many times above the one before."""
    random = np.random.default_rng(1)
    index = pd.MultiIndex.from_product([methods, range(100, 100 * steps + 1, 100), modules, range(layers)])
    table = index.to_frame(index=False, name=["method", "step", "module", "layer"])
    level = 1e-5 * spread ** table["method"].map({name: place for place, name in enumerate(methods)})
    growth = np.sqrt(table["step"] / 100) * random.uniform(1, 2, len(table))
    values = {
        "axis": "out",
        "delta_m": level * growth,
        "delta_d": 3 * level * growth * random.uniform(0.8, 1.2, len(table)),
        "floor_ratio": np.where(table["layer"] == 0, 2.0, 50.0),
    }
    return table.assign(**values).astype({"step": "Int64", "layer": "Int64"})


def tables(methods: Sequence[str], steps: int, layers: int, **more: float) -> dict[str, pd.DataFrame]:
    """Every table that figures are drawn from."""
    rows = metrics(methods, steps, layers, **more)
    factor = np.random.default_rng(2).normal(1, 0.1, len(rows))
    predicted = rows.assign(
        law="diffusing_weights", quantity="delta_d", observed=rows["delta_d"], fitted=0.43
    )
    vectors = rows.loc[rows.index.repeat(3)].assign(rel_delta_m=lambda table: 10 * table["delta_m"])
    return {
        "metrics": rows,
        "correlations": correlations(rows),
        "predictions": predicted.assign(predicted=predicted["observed"] * factor),
        "step_choices": step_choices(rows),
        "vectors": vectors,
    }


def text_boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that the renderer draws, with its box in pixels."""
    drawn: dict[int, tuple[str, Bbox]] = {}
    draw = Text.draw

    def noted(self: Text, renderer: object) -> None:
        if self.get_visible() and self.get_text().strip():
            drawn[id(self)] = (self.get_text(), self.get_window_extent())
        draw(self, renderer)  # type: ignore[arg-type]

    with mock.patch.object(Text, "draw", noted):
        figure.savefig(io.BytesIO(), dpi=figure.dpi)
    return list(drawn.values())


def faults(figure: Figure) -> list[str]:
    """What a reader could not read: texts that overlap, and those that leave the figure."""
    boxes = text_boxes(figure)
    inside = figure.bbox.padded(1)
    return [
        *(
            f"{text!r} leaves the figure"
            for text, box in boxes
            if not (box.x0 >= inside.x0 and box.x1 <= inside.x1)
        ),
        *(
            f"{text!r} leaves the figure"
            for text, box in boxes
            if not (box.y0 >= inside.y0 and box.y1 <= inside.y1)
        ),
        *(
            f"{text!r} and {other!r} overlap"
            for (text, box), (other, beside) in itertools.combinations(boxes, 2)
            if (common := Bbox.intersection(box, beside)) is not None
            and min(common.width, common.height) > 0.5
        ),
    ]
