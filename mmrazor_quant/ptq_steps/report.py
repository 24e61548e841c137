"""What steps log besides their progress."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.logging import MMLogger

from mmrazor_quant.engine.table import aligned

MAX_ROWS = 12
"""Rows of a table that are shown."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out rows of text in columns, the first one to the left, the others to the right.

    Args:
        header: names of the columns.
        rows: the cells, most important row first; of many rows only the first :data:`MAX_ROWS` are shown.
    """
    more = f'\n... and {len(rows) - MAX_ROWS} more' if len(rows) > MAX_ROWS else ''
    return aligned([header, *rows[:MAX_ROWS]]) + more


def log(text: str) -> None:
    """Logs text to the run's logger."""
    MMLogger.get_current_instance().info(text)
