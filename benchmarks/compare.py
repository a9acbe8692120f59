"""What `wd-analyze compare` takes beside the usual float32 script, and beside reading the bytes.

python -m benchmarks.compare [--layers 22] [--keep] [--quick]

Builds a random bf16 pair of TinyLlama's shape (1.1B parameters at 22 layers) with four LoRA checkpoints in a temporary
folder, and a pair of twice the layers. Every run is a fresh process; the cases take turns, the files are in the page
cache, and the numbers are medians. Prints the tables and writes them to `RESULTS.md` (not with --quick).
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks import page
from benchmarks.checkpoints import Pair, build_adapters, build_pairs
from benchmarks.processes import ROOT, Cost, measure, seconds_of_others
from wdanalysis.decomposition import Axis, delta_d, delta_m

HEADING = "compare"
STEPS = (100, 200, 300, 400)
PACKAGES = ("torch", "safetensors", "numpy", "numba", "pandas", "matplotlib")
SAMPLES = ROOT / "sample_checkpoints"
WD_ANALYZE = (sys.executable, "cli.py")

READ = "read the bytes (`cat`)"
SCRIPT, SCRIPT_IN = "float32 script, axis out", "float32 script, axis in"
SCRIPT_DEEP, SCRIPT_LORA = "float32 script, twice the layers", "float32 script, 4 LoRA steps merged"
COMPARE, COMPARE_IN = "`compare`, axis out", "`compare`, axis in"
COMPARE_PLAIN, COMPARE_PLAIN_IN = (
    "`compare`, axis out, `--no-diagnostics`",
    "`compare`, axis in, `--no-diagnostics`",
)
COMPARE_FIGURES, COMPARE_COLD = (
    "`compare`, axis out, all figures",
    "`compare`, axis out, kernels compiled anew",
)
COMPARE_DEEP, COMPARE_LORA = "`compare`, twice the layers", "`compare`, 4 LoRA steps"
COMPARE_LORA_IN = "`compare`, 4 LoRA steps, axis in"
HELP = "`wd-analyze --help`"
SAMPLE, SAMPLE_COLD = "README's `compare`: 15 figures, report", "README's `compare`, kernels compiled anew"
SAMPLE_ALL = "README's `compare` with `--modules all`: 27 figures, report"


@dataclass(frozen=True)
class Case:
    """One command to measure.

    Attributes
    ----------
    name
        Its row in the table.
    command
        What is run.
    runs
        How often.
    against
        The case to compare it with.
    cold
        Whether numba finds no compiled kernels.
    """

    name: str
    command: Sequence[str]
    runs: int
    against: str | None = None
    cold: bool = False


class Work:
    """The temporary folder: checkpoints, result tables, numba's caches."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.folder = folder
        self.pair, self.deep = build_pairs(folder, layers)
        self.adapters = build_adapters(folder / "lora", layers, STEPS)

    def results(self, name: str) -> Path:
        return self.folder / f"results-{name}"

    def numba_cache(self, *, cold: bool) -> Mapping[str, str]:
        warm = self.folder / "numba-warm"
        return {
            "NUMBA_CACHE_DIR": tempfile.mkdtemp(dir=self.folder, prefix="numba-cold-") if cold else str(warm)
        }

    def compare(
        self,
        name: str,
        base: Path,
        *tuned: Path,
        axis: str = "out",
        figures: str = "none",
        diagnostics: bool = True,
    ) -> list[str]:
        chosen = ["--modules", "all", "--axis", axis, "--figures", figures, "--no-report"]
        chosen += [] if diagnostics else ["--no-diagnostics"]
        return [
            *WD_ANALYZE,
            "compare",
            *map(str, (base, *tuned)),
            *chosen,
            "--out",
            str(self.results(name)),
            "--force",
        ]

    def script(
        self, name: str, base: Path, tuned: Path, *, axis: str = "out", module: str = "float32_script"
    ) -> list[str]:
        out = self.results(name)
        out.mkdir(exist_ok=True)
        return [
            *(sys.executable, "-m", f"benchmarks.{module}"),
            *(str(base), str(tuned), str(out / "metrics.csv"), axis),
        ]


def large_cases(work: Work, rounds: int) -> list[Case]:
    pair, deep = work.pair, work.deep
    base, tuned, lora = pair.base, pair.tuned, work.adapters
    lora_script = work.script("script-lora", base, lora, module="float32_merge_script")
    return [
        Case(READ, ["cat", *map(str, pair.files)], rounds, SCRIPT),
        Case(SCRIPT, work.script("script", base, tuned), rounds),
        Case(COMPARE, work.compare("out", base, tuned), rounds, SCRIPT),
        Case(COMPARE_PLAIN, work.compare("plain", base, tuned, diagnostics=False), rounds, SCRIPT),
        Case(COMPARE_FIGURES, work.compare("figures", base, tuned, figures="all"), rounds, SCRIPT),
        Case(COMPARE_COLD, work.compare("cold", base, tuned), 1, SCRIPT, cold=True),
        Case(SCRIPT_IN, work.script("script-in", base, tuned, axis="in"), 1),
        Case(COMPARE_IN, work.compare("in", base, tuned, axis="in"), rounds, SCRIPT_IN),
        Case(
            COMPARE_PLAIN_IN,
            work.compare("plain-in", base, tuned, axis="in", diagnostics=False),
            rounds,
            SCRIPT_IN,
        ),
        Case(SCRIPT_DEEP, work.script("script-deep", deep.base, deep.tuned), 1),
        Case(COMPARE_DEEP, work.compare("deep", deep.base, deep.tuned), rounds, SCRIPT_DEEP),
        Case(SCRIPT_LORA, lora_script, 1),
        Case(COMPARE_LORA, work.compare("lora", base, lora), rounds, SCRIPT_LORA),
        Case(COMPARE_LORA_IN, work.compare("lora-in", base, lora, axis="in"), rounds, SCRIPT_LORA),
    ]


def small_cases(work: Work, rounds: int) -> list[Case]:
    methods = [SAMPLES / method for method in ("ft", "lora", "dora")]
    paths = map(str, (SAMPLES / "base", *methods))
    sample = [*WD_ANALYZE, "compare", *paths, "--out", str(work.results("sample")), "--force"]
    return [
        Case(HELP, [*WD_ANALYZE, "--help"], rounds),
        Case(SAMPLE, sample, rounds),
        Case(SAMPLE_ALL, [*sample, "--modules", "all"], min(rounds, 3)),
        Case(SAMPLE_COLD, sample, min(rounds, 3), cold=True),
    ]


def warming_up(work: Work, cases: Sequence[Case]) -> Iterator[Sequence[str]]:
    """What brings files into the page cache and kernels into numba's."""
    yield ["cat", *map(str, work.deep.files)]
    yield from (case.command for case in cases if tuple(case.command[:2]) == WD_ANALYZE and not case.cold)


def measure_in_turn(cases: Sequence[Case], work: Work) -> dict[str, Cost]:
    """Run every case once, then every case once more …, so that a slow minute of the machine hits all alike."""
    costs: dict[str, list[Cost]] = {case.name: [] for case in cases}
    for turn in range(max(case.runs for case in cases)):
        for case in cases:
            if turn < case.runs:
                cost = measure(case.command, work.numba_cache(cold=case.cold))
                costs[case.name].append(cost)
                print(f"{case.name}: {cost.seconds:.2f} s, {cost.resident / 1e6:.0f} MB", file=sys.stderr)
    return {name: Cost.median_of(measured) for name, measured in costs.items()}


def check_tables(work: Work) -> None:
    """Every case that is compared with another did the same work."""
    expected = {row["name"] for row in rows_of(work.results("out"))}
    tables = [rows_of(work.results(name)) for name in ("out", "in", "script", "script-in")]
    if any(len(rows) != work.pair.matrices or {row["name"] for row in rows} != expected for rows in tables):
        raise RuntimeError(f"not all {work.pair.matrices} matrices were measured in every case")
    ours, script = rows_of(work.results("lora")), rows_of(work.results("script-lora"))
    if len(ours) != len(script):
        raise RuntimeError(f"compare has {len(ours)} rows of adapters, the script {len(script)}")


def rows_of(results: Path) -> list[dict[str, str]]:
    with (results / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def errors_by_definition(
    pair: Pair, tables: Mapping[str, tuple[Axis, Path]]
) -> dict[str, tuple[float, float]]:
    """The largest relative error of ΔM and ΔD over the first layer's matrices, against the definition in float64.

    Parameters
    ----------
    pair
        The models.
    tables
        Axis and results folder of every row.
    """
    from safetensors import safe_open

    file = "layers-0-*.safetensors"
    found = {name: [0.0, 0.0] for name in tables}
    with (
        safe_open(next(pair.base.glob(file)), "pt") as base,
        safe_open(next(pair.tuned.glob(file)), "pt") as tuned,
    ):
        for name, (axis, results) in tables.items():
            for row in rows_of(results):
                if row["name"].startswith("model.layers.0."):
                    w0, w = base.get_tensor(row["name"]), tuned.get_tensor(row["name"])
                    for place, (column, definition) in enumerate(
                        (("delta_m", delta_m), ("delta_d", delta_d))
                    ):
                        exact = definition(w0, w, axis)
                        found[name][place] = max(found[name][place], abs(float(row[column]) / exact - 1))
    return {name: (error_m, error_d) for name, (error_m, error_d) in found.items()}


def cost_rows(cases: Iterable[Case], costs: Mapping[str, Cost]) -> Iterator[list[str]]:
    for case in cases:
        cost = costs[case.name]
        reference = costs[case.against] if case.against else None
        memory = [
            f"{cost.resident / 1e6:,.0f} MB",
            f"1/{reference.resident / cost.resident:.1f}" if reference else "",
            f"{cost.anonymous / 1e6:,.0f} MB",
        ]
        yield [
            case.name,
            f"{cost.seconds:.2f} s",
            f"{reference.seconds / cost.seconds:.1f} ×" if reference else "",
            *(
                memory if case.name != READ else ["", "", ""]
            ),  # cat's own is less than what it inherits from here
            str(cost.runs),
        ]


def targets(costs: Mapping[str, Cost]) -> Iterator[list[str]]:
    """What was promised, what was measured, and whether it holds."""

    def row(promise: str, measured: str, *, holds: bool) -> list[str]:
        return [promise, measured, "yes" if holds else "**no**"]

    for name, script in ((COMPARE, SCRIPT), (COMPARE_IN, SCRIPT_IN)):
        faster = costs[script].seconds / costs[name].seconds
        leaner = costs[script].resident / costs[name].resident
        yield row(f"{name}: ≥ 5 × faster than the script", f"{faster:.1f} ×", holds=faster >= 5)
        yield row(f"{name}: ≤ 1/5 of its peak memory", f"1/{leaner:.1f}", holds=leaner >= 5)
    for name, plain in ((COMPARE, COMPARE_PLAIN), (COMPARE_IN, COMPARE_PLAIN_IN)):
        slower = costs[name].seconds / costs[plain].seconds
        yield row(f"{name}: ≤ 1.15 × its time without diagnostics", f"{slower:.2f} ×", holds=slower <= 1.15)
    growth = costs[COMPARE_DEEP].resident / costs[COMPARE].resident - 1
    yield row("memory does not grow with twice the layers", f"{100 * growth:+.1f} %", holds=growth < 0.03)
    for name, limit in ((HELP, 0.3), (SAMPLE, 5.0)):
        yield row(f"{name} < {limit:g} s", f"{costs[name].seconds:.2f} s", holds=costs[name].seconds < limit)


def report(
    work: Work,
    large: Sequence[Case],
    small: Sequence[Case],
    costs: Mapping[str, Cost],
    errors: Mapping[str, tuple[float, float]],
    others: float,
) -> str:
    pair, deep = work.pair, work.deep
    headings = ("", "wall", "script / this", "peak resident", "of script's", "of it allocated", "runs")
    return "\n\n".join(
        [
            f"`python -m benchmarks.compare`, {page.machine(PACKAGES)} Meanwhile other processes "
            f"kept {others:.2f} cores busy.",
            f"Pair: {pair.parameters / 1e9:.2f}B parameters, {pair.matrices} matrices, {pair.nbytes / 1e9:.2f} GB in "
            f"bf16 for both; twice the layers: {deep.parameters / 1e9:.2f}B, {deep.nbytes / 1e9:.2f} GB. LoRA: r = 32 "
            f"on q, k, v, up and down, {len(STEPS)} steps, float32. Whole commands with start-up; of the pairs "
            "`--modules all`, no report, no figures unless named; each run a fresh process, "
            "files in the page cache, cases in turn, medians.",
            page.table(headings, cost_rows([*large, *small], costs)),
            "Peak resident is what the kernel counts (`ru_maxrss`); it includes pages of memory-mapped files, which is "
            "how the script's `load_file` holds the models. Allocated is the largest RssAnon, sampled every 20 ms.",
            page.table(
                ("largest relative error, first layer's matrices, against float64", "ΔM", "ΔD"),
                ([name, f"{error_m:.1e}", f"{error_d:.1e}"] for name, (error_m, error_d) in errors.items()),
            ),
            page.table(("target", "measured", "holds"), targets(costs)),
        ]
    )


@contextmanager
def working_folder(*, keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="wd-benchmark-"))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, help="layers of the pair (default: 22)")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    parser.add_argument(
        "--quick", action="store_true", help="2 layers and one run of each; RESULTS.md stays as it is"
    )
    options = parser.parse_args()
    layers = options.layers or (2 if options.quick else 22)
    with working_folder(keep=options.keep) as folder:
        work = Work(folder, layers)
        large = large_cases(work, 1 if options.quick else 3)
        small = small_cases(work, 1 if options.quick else 5)
        for command in warming_up(work, [*large, *small]):
            measure(command, work.numba_cache(cold=False))
        started, others = time.perf_counter(), seconds_of_others()
        costs = measure_in_turn(large, work) | measure_in_turn(small, work)
        others = (seconds_of_others() - others) / (time.perf_counter() - started)
        check_tables(work)
        tables: dict[str, tuple[Axis, Path]] = {
            SCRIPT: ("out", work.results("script")),
            COMPARE: ("out", work.results("out")),
            SCRIPT_IN: ("in", work.results("script-in")),
            COMPARE_IN: ("in", work.results("in")),
        }
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            errors = pool.submit(errors_by_definition, work.pair, tables).result()
        section = report(work, large, small, costs, errors, others)
    print(section)
    if not options.quick:
        page.replace_section(HEADING, section)


if __name__ == "__main__":
    main()
