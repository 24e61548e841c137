"""The arithmetic of OpenVINO on CPU: a layer multiplies and adds, what quantizes is a FakeQuantize of a range."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmrazor_quant.backends.arithmetic import Arithmetic, LayerScales, fused_multiply_add
from mmrazor_quant.backends.grid import QuantGrid
from mmrazor_quant.backends.qdq import as_uint8

STEPS = np.float32(255)


def quantize(x: Tensor, grid: QuantGrid) -> Tensor:
    """Multiplies by what maps the range to 0 ... 255, adds what maps its lower end to 0, and rounds half to even."""
    low, high, zero_point = _range(grid)
    factor, shift = STEPS / (high - low), -low * STEPS / (high - low)
    steps = x * float(factor) if shift == 0 else fused_multiply_add(x, factor, shift)
    return torch.round(steps) - zero_point


def factor(scales: LayerScales) -> Tensor:
    """Returns scale_input * scale_weight."""
    return scales.input * scales.weight


def dequantize(sums: Tensor, factor: Tensor, bias: Tensor | None, scales: LayerScales) -> Tensor:
    """Multiplies sums by the factor and adds the bias."""
    real = sums * factor
    return real if bias is None else real + bias


def add(x: Tensor, residual: Tensor, residual_grid: QuantGrid, result: QuantGrid) -> Tensor:
    """Adds in steps of the residual, which is not dequantized, and quantizes from those."""
    scale = np.float32(residual_grid.scale[0])
    zero_point = _range(residual_grid)[2]
    steps = (x - float(np.float32(zero_point) * scale)) * float(np.float32(1) / scale)
    steps += torch.round(residual / float(scale)) + zero_point
    low, high, result_zero_point = _range(result)
    low, high = low / scale, high / scale
    factor = STEPS / (high - low)
    integers = torch.round(steps * float(factor) + float(-low * factor)) - result_zero_point
    return integers * float(result.scale[0])


def _range(grid: QuantGrid) -> tuple[np.float32, np.float32, int]:
    """Returns both ends of the range of 256 integers, and the zero point among these."""
    zero_point, scale = as_uint8(grid, is_not_negative=False)[2], np.float32(grid.scale[0])
    return np.float32(-zero_point * scale), np.float32((255 - zero_point) * scale), zero_point


ARITHMETIC = Arithmetic(quantize, factor, dequantize, add)
