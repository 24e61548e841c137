"""What steps log: progress, and short tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from mmengine.logging import MMLogger

LOG_INTERVAL = 10
"""Batches between two lines of progress."""

MAX_ROWS = 12
"""Rows of a table that are shown."""


def with_progress(batches: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    """Yields batches, logging how many are done and how long the rest will take.

    Args:
        batches: the batches.
        total: how many there are.
        title: what is done.
    """
    logger, start = MMLogger.get_current_instance(), time.perf_counter()
    for done, batch in enumerate(batches, 1):
        yield batch
        if done % LOG_INTERVAL == 0 or done == total:
            per_batch = (time.perf_counter() - start) / done
            eta = timedelta(seconds=round(per_batch * (total - done)))
            logger.info(f'{title} [{done}/{total}]  eta: {eta}  time: {per_batch:.4f}')


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
