"""Progress of long pieces of work in the log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from mmengine.logging import MMLogger

LOG_SECONDS = 10.0
"""Seconds between two lines of progress."""


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
        MMLogger.get_current_instance().info(
            f'{self._title} [{self._done}/{self._total}]  eta: {eta}  time: {per_part:.4f}'
        )


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
