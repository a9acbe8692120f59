"""What a notebook shows of a comparison: the summary in a cell of its own, and the page's linked charts in a frame.

Nothing sets a colour of text or paper, so that it reads on a light notebook and on a dark one.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from wdanalysis.errors import ComparisonError

if TYPE_CHECKING:
    import pandas as pd

    from wdanalysis.analysis.findings import Findings
    from wdanalysis.results.provenance import Run

MOST_NAMES = 4
"""So many methods or modules are named in a line; of more, their number is told."""

MOST_OPEN = 8
"""The readings of more panels are folded up at first."""

MOST_ROWS = 40
"""A summary of more rows is cut in its middle."""

DPI = 150
"""Of the picture, which is shown at 100 to an inch: sharp on most screens, and small in the notebook's file."""

ONLY_CHARTS = """
body :not(#explore, #explore *, :has(#explore), .bk-Tooltip, .bk-Tooltip *) { display: none !important; }
body, body :has(#explore) { display: block !important; margin: 0; padding: 0; max-width: none; }
html { font-size: 87.5%; } body { padding: 0 .75rem .75rem; } #explore > h2 { display: none; }
"""
"""Style that leaves of the page its charts and their filters."""


@dataclass(frozen=True, repr=False)
class Explorer:
    """The linked charts of the HTML page, for a cell of a notebook to show: Jupyter's, VS Code's or Colab's.

    Attributes
    ----------
    page
        The whole page (`wdanalysis.report.render`). It fetches nothing, and its frame lets it reach nothing of the
        notebook.
    title
        What it shows, in a line.
    height
        Of the frame, in pixels.
    """

    page: str
    title: str
    height: int = 800

    def __repr__(self) -> str:
        return f"<Linked charts of {self.title}; a notebook shows them, and report(path) writes them for a browser>"

    def _repr_html_(self) -> str:
        page = self.page.replace("</head>", f"<style>{ONLY_CHARTS}</style></head>", 1)
        # A viewer that shows no frames, of notebooks that it does not trust for one, shows the text in it.
        return (
            f'<iframe title="{escape(f"Linked charts of {self.title}")}" sandbox="allow-scripts allow-downloads"'
            f' style="width: 100%; height: {self.height}px; border: 0" srcdoc="{escape(page)}">'
            "Run this cell to see the linked charts.</iframe>"
        )


def in_words(findings: Findings) -> str:
    """Say in a line what was compared: "FT, DoRA: q, v; 10 layers; steps 60–240; axis out; 160 rows".

    >>> in_words(run._findings)
    'ft, dora: q, v; 10 layers; steps 60–240; axis out; 160 rows'
    """
    metrics = findings.metrics
    if metrics.empty:
        return "nothing: 0 rows"
    steps = sorted(metrics["step"].dropna().unique())
    parts = [
        f"{_names(findings.methods, 'methods')}: {_names(findings.modules, 'modules')}",
        _counted(metrics["layer"].nunique(), "layer"),
        *([f"steps {steps[0]}–{steps[-1]}"] if len(steps) > 1 else [f"step {step}" for step in steps]),
        f"axis {findings.axis}",
        _counted(len(metrics), "row"),
    ]
    return "; ".join(parts)


def cell(findings: Findings, run: Run) -> str:
    """Return the HTML of a comparison: what was compared, its summary, a scatter, its readings, and the warnings."""
    return "\n".join(
        [
            f"<p>{escape(in_words(findings))}{_vectors(findings.axis)}</p>",
            _summary(findings.summary),
            *_scatter(findings),
            *_readings(findings.readings),
            *(f"<p>⚠ {escape(warning)}</p>" for warning in run.warnings),
            *([f"<p>{len(run.skipped)} left out: <code>.skipped</code></p>"] if run.skipped else []),
            "<p>Linked charts: <code>.explore()</code>; tables: <code>.metrics</code>,"
            " <code>.correlations()</code>, <code>.readings()</code></p>",
        ]
    )


def _names(names: list[str], noun: str) -> str:
    """Return the names on one line, or their number where there are many."""
    if len(names) > MOST_NAMES:
        return f"{len(names)} {noun}"
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _vectors(axis: str) -> str:
    """Say what a vector is along an axis."""
    from wdanalysis.figures.selection import VECTORS

    return f"; {VECTORS[axis]}" if axis in VECTORS else ""


def _summary(summary: pd.DataFrame) -> str:
    """Return the table of methods and modules, each r with its interval."""
    from wdanalysis.figures.style import decimals, number

    def written(column: str, form: Callable[[float], str] = number) -> list[str]:
        return ["" if math.isnan(value) else form(value) for value in summary[column].astype(float)]

    ends = zip(*(written(column, decimals) for column in ("pearson_r", "r_low", "r_high")), strict=True)
    shown = summary[["method", "module", "step"]].assign(
        **{
            "ΔM": written("delta_m"),
            "ΔD": written("delta_d"),
            "r [95 %]": [f"{r} [{low}, {high}]" if low else r for r, low, high in ends],
            "slope": written("slope"),
            "badge": summary["badge"].tolist(),
        }
    )
    return shown.to_html(index=False, na_rep="", max_rows=MOST_ROWS, border=0)


def _scatter(findings: Findings) -> Iterator[str]:
    """Give the scatter of the first module as a picture; none where the table has nothing that one could show."""
    from wdanalysis import figures
    from wdanalysis.figures.style import write

    with suppress(ComparisonError):  # the table mixes axes
        for module in findings.modules[:1]:
            figure = figures.scatter(
                findings.metrics,
                module,
                correlations=findings.correlations,
                readings=findings.readings,
            )
            picture = io.BytesIO()
            write(figure, picture, "png", DPI)
            data = base64.b64encode(picture.getvalue()).decode()
            alt = escape(f"Scatter of ΔM against ΔD, {module}")
            width = f"width: {100 * figure.get_figwidth():.0f}px; max-width: 100%"
            yield f'<p><img src="data:image/png;base64,{data}" alt="{alt}" style="{width}"></p>'


def _readings(readings: pd.DataFrame) -> Iterator[str]:
    """Give what is read from each panel, by method."""
    panels = readings.groupby(["method", "module"], sort=False)["sentence"].agg(" ".join).reset_index()
    if panels.empty:
        return
    opened = " open" if len(panels) <= MOST_OPEN else ""
    items = (
        f"<li><strong>{escape(method)}, {escape(module)}</strong>: {escape(text)}</li>"
        for method, module, text in panels.itertuples(index=False)
    )
    yield f"<details{opened}><summary>Readings</summary><ul>{''.join(items)}</ul></details>"
