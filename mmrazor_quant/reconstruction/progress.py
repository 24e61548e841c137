"""What a reconstruction says about itself: the plan, a line a unit, and a log in JSON and CSV."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger

from mmrazor_quant.engine.table import aligned


@dataclass
class UnitReport:
    """What became of a unit.

    Args:
        unit: Its name.
        layers: Its layers.
        weights: Number of weights whose rounding was learned.
        before: Loss before: mean squared error relative to the mean square of the float output.
        after: Loss after learning, with hard rounding.
        kept: Whether what was learned is kept; False: the loss got worse, and the unit is as before.
        undecided: Share of weights that were not near 0 or 1 yet when they were rounded.
        seconds: Time it took.
    """

    unit: str
    layers: int
    weights: int
    before: float
    after: float
    kept: bool
    undecided: float
    seconds: float


def plan_table(rows: list[tuple[str, int, int, str]]) -> str:
    """Lay out what will be done.

    Args:
        rows: Name, number of layers, number of weights, and shapes of the outputs in the captured example of each unit.

    Returns:
        Lines of text.
    """
    header = ('', 'unit', 'layers', 'weights', 'outputs, in the captured example')
    cells = [header, *[(str(i), row[0], str(row[1]), f'{row[2]:,}', row[3]) for i, row in enumerate(rows, 1)]]
    return aligned(cells, left=(1, 4))


class Progress:
    """Logs units as they are done.

    Args:
        costs: What each unit costs, in any measure, to tell how much is left.
        folder: Where ``reconstruction.json`` and ``reconstruction.csv`` go.
    """

    def __init__(self, costs: list[float], folder: str | Path) -> None:
        self.costs, self.folder = costs, Path(folder)
        self.reports: list[UnitReport] = []
        self._learned_cost = self._learned_seconds = 0.0
        self._logger = MMLogger.get_current_instance()

    def add(self, report: UnitReport, resumed: bool = False) -> None:
        """Log a unit.

        Args:
            report: The unit.
            resumed: Whether an earlier run did it.
        """
        done = len(self.reports)
        self.reports.append(report)
        if not resumed:
            self._learned_cost += self.costs[done]
            self._learned_seconds += report.seconds
        verdict = '' if report.kept else ': worse, taken back'
        origin = 'from an earlier run' if resumed else f'{report.seconds:.1f} s'
        self._logger.info(
            f'Reconstruction [{done + 1}/{len(self.costs)}] {report.unit}  loss: {report.before:.5f} -> '
            f'{report.after:.5f}{verdict}  ({origin})  eta: {self._eta(done + 1)}'
        )
        self.write()

    def _eta(self, done: int) -> timedelta | str:
        if not self._learned_cost:
            return '?'
        return timedelta(seconds=round(self._learned_seconds / self._learned_cost * sum(self.costs[done:])))

    def write(self) -> None:
        """Write the log of all units so far."""
        if not is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [asdict(report) for report in self.reports]
        (self.folder / 'reconstruction.json').write_text(json.dumps(rows, indent=1) + '\n')
        with open(self.folder / 'reconstruction.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


class Timer:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._start
