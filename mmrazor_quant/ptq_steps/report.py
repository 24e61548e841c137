"""What steps log: progress, and short tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from mmengine.logging import MMLogger

LOG_SECONDS = 10.0
"""Seconds between two lines of progress."""

MAX_ROWS = 12
"""Rows of a table that are shown."""


class Progress:
    """Logs how much of a long piece of work is done, and how long the rest will take.

    Args:
        total: number of parts.
        title: what is done.
    """

    def __init__(self, total: int, title: str) -> None:
        self._total, self._title, self._done = total, title, 0
        self._start = self._logged = time.perf_counter()

    def advance(self) -> None:
        """Counts one part; logs at times, and when the last one is done."""
        self._done += 1
        now = time.perf_counter()
        if self._done != self._total and (self._done > self._total or now - self._logged < LOG_SECONDS):
            return
        self._logged, per_part = now, (now - self._start) / self._done
        eta = timedelta(seconds=round(per_part * (self._total - self._done)))
        log(f'{self._title} [{self._done}/{self._total}]  eta: {eta}  time: {per_part:.4f}')


def with_progress(batches: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    """Yields batches, logging progress.

    Args:
        batches: the batches.
        total: how many there are.
        title: what is done.
    """
    progress = Progress(total, title)
    for batch in batches:
        yield batch
        progress.advance()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out rows of text in columns, the first one to the left, the others to the right.

    Args:
        header: names of the columns.
        rows: the cells, most important row first; of many rows only the first :data:`MAX_ROWS` are shown.
    """
    shown = [header, *rows[:MAX_ROWS]]
    widths = [max(map(len, column)) for column in zip(*shown)]
    lines = ['  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in shown]
    return '\n'.join(lines + ([f'... and {len(rows) - MAX_ROWS} more'] if len(rows) > MAX_ROWS else []))


def log(text: str) -> None:
    """Logs text to the run's logger."""
    MMLogger.get_current_instance().info(text)
