"""The file for ONNX Runtime: Q/DQ pairs with uint8 activations and int8 weights."""

from __future__ import annotations

from pathlib import Path

import onnx

from mmrazor_quant.backends.intermediate import Intermediate
from mmrazor_quant.backends.qdq import to_qdq

FILE = 'model.onnx'


def write(network: Intermediate, folder: Path) -> Path:
    """Writes the file.

    Args:
        network: intermediate form.
        folder: where to; it exists.

    Returns:
        Path of the file.
    """
    onnx.save(to_qdq(network), folder / FILE)
    return folder / FILE
