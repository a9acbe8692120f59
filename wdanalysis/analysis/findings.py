"""Every table that follows from the metrics table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from wdanalysis.analysis import prediction
from wdanalysis.analysis.readings import readings
from wdanalysis.analysis.regression import correlations, step_choices, summary
from wdanalysis.analysis.runs import across_runs, averaged, run_readings
from wdanalysis.analysis.shrink import common_shrink


@dataclass(frozen=True, eq=False)
class Findings:
    """The metrics table and what follows from it; each table is made when it is first asked for, and kept.

    `schedules` is what `wdanalysis.analysis.prediction.schedule_table` makes of the runs' schedules; None where none is
    known.
    """

    metrics: pd.DataFrame
    schedules: pd.DataFrame | None = None

    @property
    def axis(self) -> str:
        """What a vector is: ``"out"`` or ``"in"``; "out and in" where a table mixes them, "" where it has no rows."""
        return " and ".join(map(str, self.metrics["axis"].unique()))

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of the table."""
        return list(self.metrics["method"].unique())

    @property
    def modules(self) -> list[str]:
        """The module roles, in the order of the table."""
        return list(self.metrics["module"].unique())

    @cached_property
    def averaged(self) -> pd.DataFrame:
        """The metrics with the mean over runs, where a method has several; see `wdanalysis.analysis.runs.averaged`."""
        return averaged(self.metrics)

    @cached_property
    def across_runs(self) -> pd.DataFrame:
        """See `wdanalysis.analysis.runs.across_runs`; without rows where no method has several runs."""
        return across_runs(self.metrics)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """See `wdanalysis.analysis.regression.summary`."""
        return summary(self.averaged, self.correlations)

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """See `wdanalysis.analysis.regression.correlations`."""
        return correlations(self.averaged)

    @cached_property
    def step_choices(self) -> pd.DataFrame:
        """See `wdanalysis.analysis.regression.step_choices`."""
        return step_choices(self.averaged)

    @cached_property
    def diagnostics(self) -> pd.DataFrame:
        """See `wdanalysis.analysis.shrink.common_shrink`."""
        return common_shrink(self.averaged)

    @cached_property
    def readings(self) -> pd.DataFrame:
        """See `wdanalysis.analysis.readings.readings`; then what predictions and runs show, where there are any."""
        read = [
            readings(self.averaged, self.correlations),
            prediction.readings(self.predictions),
            run_readings(self.across_runs),
        ]
        return pd.concat([table for table in read if len(table)] or read[:1], ignore_index=True)

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """See `wdanalysis.analysis.prediction.predictions`."""
        return prediction.predictions(self.metrics, self.schedules)
