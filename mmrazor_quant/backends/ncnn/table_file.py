"""The calibration table of ncnn's own tools: the scales of all layers in integers, as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .convert import Scales


def write_table(scales: list[Scales], path: Path) -> None:
    """Writes a table: a line per weight, then a line per input.

    Args:
        scales: factors of the layers.
        path: where to.
    """
    weights = [_line(f'{each.layer}_param_0', each.weight) for each in scales]
    inputs = [_line(each.layer, each.input) for each in scales]
    Path(path).write_text(''.join(f'{line}\n' for line in weights + inputs))


def _line(name: str, values: np.ndarray) -> str:
    return ' '.join([name, *(f'{value:.9g}' for value in values)])
