"""The arithmetic of ONNX Runtime on CPU: QLinearConv, QGemm, QuantizeLinear.

The bias is in the sums. They become floats and are multiplied by one factor, which is that of the result's integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.backends.arithmetic import Arithmetic, LayerScales
from mmrazor_quant.backends.grid import QuantGrid


def quantize(x: Tensor, grid: QuantGrid) -> Tensor:
    """Divides by the scale and rounds half to even."""
    return torch.round(x / float(grid.scale[0]))


def factor(scales: LayerScales) -> Tensor:
    """Returns scale_input * scale_weight / scale_result."""
    return scales.input * scales.weight / float(scales.result.scale[0])


def requantize(sums: Tensor, factor: Tensor, bias: Tensor | None, scales: LayerScales) -> Tensor:
    """Multiplies sums by the factor and rounds half to even; returns real values on the grid of the result."""
    return torch.round(sums * factor) * float(scales.result.scale[0])


ARITHMETIC = Arithmetic(quantize, factor, requantize, integer_bias=True, needs_result=True)
