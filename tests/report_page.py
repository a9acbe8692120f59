"""A made-up comparison to report on, and a person who reads its page in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wdanalysis.analysis.findings import Findings
from wdanalysis.analysis.table import COLUMNS
from wdanalysis.comparison import Comparison
from wdanalysis.measure.plan import Skipped
from wdanalysis.results.provenance import Input, InputFile, Options, Run

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
METHODS = ("FT", "LoRA", HOSTILE)
MODULES = ("q", "v")
STEPS = (100, 200, 400)
LAYERS = 6


def make_comparison(methods: tuple[str, ...] = METHODS, layers: int = LAYERS) -> Comparison:
    """A row for every method, step, module and layer; the third method's name is an attack."""
    random = np.random.default_rng(0)
    rows = [
        {column: random.uniform(0.1, 1) for column in COLUMNS}
        | {
            "method": method,
            "step": step,
            "layer": layer,
            "module": module,
            "name": f"model.layers.{layer}.self_attn.{module}_proj.weight",
            "axis": "out",
            "base_dtype": "BF16",
            "tuned_dtype": "BF16",
            "run": "",
            "vectors": 8,
            "length": 8,
            "zero_vectors": 0,
            "stack": "",
            "update": "stored",
            "rank": None,
            "grid": "",
            "delta_m": random.uniform(1, 2) * 1e-3,
            "delta_d": random.uniform(1, 2) * 1e-6 * (1 if method == "FT" else 1000),
            "floor_ratio": random.uniform(1, 9) if method == "FT" else np.nan,
            "delta_d_bias": np.nan,
        }
        for method in methods
        for step in STEPS
        for layer in range(layers)
        for module in MODULES
    ]
    metrics = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"step": "Int64", "layer": "Int64"})
    file = InputFile(
        "base.safetensors", bytes=1_180_128, header_sha256="ab" * 32, modified="2026-01-31T12:00:00Z"
    )
    run = Run(
        versions={"wdanalysis": "0.1.0", "python": "3.11.7"},
        command=("wd-analyze", "compare", "base.safetensors", "my tuned"),
        options=Options(axis="out", modules=["q", "v"]),
        inputs={"BASE": (Input("base", "safetensors", None, (file,)),)},
        skipped=(Skipped("FT", 100, "<b>head</b>", "is <not> in BASE"),),
        warnings=("the name <i>x</i> & 'y' differs",),
        date="2026-02-01T08:00:00Z",
    )
    return Comparison(metrics, run)


class FullFindings(Findings):
    """What a comparison with null models, a known schedule and many steps has to show."""

    @property
    def correlations(self) -> pd.DataFrame:
        table = super().correlations
        pooled = table["scope"] == "pooled"
        known = {
            "leave_out_low": -0.25,
            "leave_out_high": 0.5,
            "r_null": 0.6,
            "r_null_low": 0.4,
            "r_null_high": 0.8,
        }
        return table.assign(**{name: np.where(pooled, value, np.nan) for name, value in known.items()})

    @property
    def predictions(self) -> pd.DataFrame:
        rows = self.metrics.query("method == 'LoRA'")
        columns = ["method", "module", "axis", "step", "layer", "name"]
        values = {
            "law": "turning",
            "quantity": "delta_m",
            "predicted": rows["delta_m"],
            "observed": rows["delta_m"],
        }
        known = {"r2": 1.0, "bias": 0.0, "p_value": 0.001, "q_value": 0.002}
        return rows[columns].assign(**values, **known, fitted=np.nan)

    @property
    def step_choices(self) -> pd.DataFrame:
        choice = {"module": "q", "axis": "out", "steps": "1 2 3 4", "r": 0.5}
        return pd.DataFrame([{"method": method, **choice} for method in METHODS])


def full_findings() -> FullFindings:
    """The made-up comparison with every column and table of which the page knows."""
    metrics = make_comparison().metrics
    null = {
        "update": "stored",
        "null_delta_m": 1.2 * metrics["delta_m"],
        "null_delta_m_sd": 0.1 * metrics["delta_m"],
        "null_delta_d": metrics["delta_d"],
        "null_delta_d_sd": 0.1 * metrics["delta_d"],
    }
    return FullFindings(metrics.assign(**null))


class Reader:
    """What a person does with the page."""

    def __init__(self, chrome: Chrome, page: Path) -> None:
        self.chrome = chrome
        self.page = page

    def open(self, width: int = 1280, height: int = 900, scheme: str = "light", address: str = "") -> Reader:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for log in ("browser", "performance"):
            self.chrome.get_log(log)
        if address:  # another one of the same page alone would not load it anew
            self.chrome.get("about:blank")
        self.chrome.get(self.page.as_uri() + address)
        self.wait("return charts && views().every(({ target }) => target.children.length)")
        return self

    def wait(self, script: str) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.chrome, 20).until(lambda chrome: chrome.execute_script(script))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.chrome.find_element("css selector", selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements("css selector", selector)

    def status(self) -> str:
        return self.find("#status").text

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.chrome).send_keys(*keys).perform()

    def choose(self, selector: str, text: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_visible_text(text)

    def drag_over(self, figure: WebElement, *, until: float = 1.0) -> None:
        """Drag from the upper left of the figure's frame over a share of its width."""
        from selenium.webdriver.common.action_chains import ActionChains

        chart = figure.find_element("css selector", "div")
        self.run("arguments[0].scrollIntoView({block: 'center'})", chart)
        width, height = chart.size["width"], chart.size["height"]
        left, right, top, bottom = self.run(  # of the frame, which stands where the labels' font lets it
            """
            const { plot } = views().find(({ target }) => target === arguments[0]);
            const { left, right, top, bottom } = Bokeh.index.find_one(plot).frame.bbox;
            return [left + 3, right - 3, top + 3, bottom - 3];""",
            chart,
        )
        actions = ActionChains(self.chrome, duration=50)
        actions.move_to_element_with_offset(
            chart, int(left - width / 2), int(top - height / 2)
        ).click_and_hold()
        for part in (0.3, 0.7, 1):
            x, y = left + part * until * (right - left), top + part * (bottom - top)
            actions.move_to_element_with_offset(chart, int(x - width / 2), int(y - height / 2))
        actions.release().perform()

    def hover_over_first_point(self, panel: int) -> None:
        """Rest the pointer on the first point of a method's panel."""
        from selenium.webdriver.common.action_chains import ActionChains

        chart = self.all("#scatters figure > div")[panel]
        self.run("arguments[0].scrollIntoView({block: 'center'})", chart)
        x, y = self.run(
            """
            const { plot, filter } = charts.scatters[arguments[0]];
            const { x_scale, y_scale } = Bokeh.index.find_one(plot).frame;
            const first = filter.booleans.indexOf(true);
            return [x_scale.compute(source.data.x[first]), y_scale.compute(source.data.y[first])];""",
            panel,
        )
        left, top = int(x - chart.size["width"] / 2), int(y - chart.size["height"] / 2)
        actions = ActionChains(self.chrome, duration=50).move_to_element_with_offset(chart, left - 3, top)
        actions.move_to_element_with_offset(chart, left, top).perform()

    def pixels(self, figure: WebElement) -> bytes:
        chart = figure.find_element("css selector", "div")
        self.run("arguments[0].scrollIntoView({block: 'center'})", chart)
        return chart.screenshot_as_png


def messages(chrome: Chrome, method: str) -> list[dict[str, Any]]:
    """The performance log's messages of one kind since it was last read."""
    logged = (json.loads(entry["message"])["message"] for entry in chrome.get_log("performance"))
    return [message["params"] for message in logged if message["method"] == method]
