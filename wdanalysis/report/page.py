"""The page as one text: template, style, scripts, data and the charting library, with nothing left to fetch."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING

from wdanalysis.errors import OutputError
from wdanalysis.writing import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from wdanalysis.analysis.findings import Findings
    from wdanalysis.measure.spectra import Spectra
    from wdanalysis.results.provenance import Run

NEEDS = "the HTML report needs Bokeh: pip install 'wdanalysis[report]'"
"""How to get what the page is made with."""

BOKEH = ("bokeh.min.js", "bokeh-api.min.js")


def is_available() -> bool:
    """Whether the packages of the extra `report` are installed."""
    return all(find_spec(package) for package in ("bokeh", "jinja2"))


def write(
    path: Path,
    findings: Findings,
    run: Run,
    spectra: Spectra | None = None,
    geometry: pd.DataFrame | None = None,
) -> Path:
    """Write the page that `render` gives into a file, which appears whole or not at all."""
    page = render(findings, run, spectra, geometry).encode("utf-8", "backslashreplace")
    return write_whole(path, lambda file: file.write(page))


def render(
    findings: Findings, run: Run, spectra: Spectra | None = None, geometry: pd.DataFrame | None = None
) -> str:
    """Return the page.

    Names of tensors, files and methods are data: the template escapes them, and the scripts set them as text. The
    page's own policy (CSP) lets nothing be fetched and no other script run than those that it was made with.

    Raises
    ------
    OutputError
        The extra `report` is not installed.
    """
    if not is_available():
        raise OutputError(NEEDS)
    from jinja2 import Environment

    from wdanalysis.report import content

    assets = files(__package__) / "assets"
    scripts = {
        "tables": (assets / "tables.js").read_text("utf-8"),
        "bokeh": "\n".join(_bokeh(name) for name in BOKEH),
        "charts": (assets / "charts.js").read_text("utf-8"),
    }
    data = content.data(findings, run, spectra, geometry)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (assets / "page.html").read_text("utf-8")
    )
    metrics = findings.averaged
    return template.render(
        css=(assets / "page.css").read_text("utf-8"),
        scripts=scripts,
        script_hashes=" ".join(f"'{_hash(script)}'" for script in scripts.values()),
        data=embedded_json(data),
        axis=findings.axis,
        methods=findings.methods,
        modules=findings.modules,
        layers=metrics["layer"].nunique(),
        rows=len(metrics),
        rows_shown=min(len(metrics), content.MOST_ROWS),
        complete=run.complete,
        tables=data["tables"],
        readings=content.readings(findings.readings),
        warnings=run.warnings,
        skipped=content.skipped_reasons(run),
        provenance=list(content.provenance(run)),
        version=run.versions.get("wdanalysis", ""),
    )


def embedded_json(value: object) -> str:
    """Return JSON that stays data inside a `<script>` element, whatever names it holds: without any "<"."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )


def _bokeh(name: str) -> str:
    from bokeh.util.paths import static_path

    return (static_path() / "js" / name).read_text("utf-8")


def _hash(script: str) -> str:
    """Return a script's source expression for a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
