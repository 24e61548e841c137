"""Text in columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Lay out cells in columns.

    Args:
        rows: The cells, as many in each row.
        left: Columns that are aligned to the left; the others are to the right.

    Returns:
        Lines of text.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        for row in rows
    ]
    return '\n'.join('  '.join(cells).rstrip() for cells in lines)
