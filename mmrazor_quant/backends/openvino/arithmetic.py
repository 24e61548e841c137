"""The arithmetic of OpenVINO on CPU: a layer multiplies and adds, what quantizes is a FakeQuantize of a range."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mmrazor_quant.backends.arithmetic import (
    Arithmetic,
    LayerScales,
    chain,
    fused_multiply_add,
    polynomial,
    summands,
    with_bias,
)
from mmrazor_quant.backends.grid import QuantGrid
from mmrazor_quant.backends.qdq import stored_grid

STEPS = np.float32(255)


def quantize(x: Tensor, grid: QuantGrid) -> Tensor:
    """Multiplies by what maps the range to 0 ... 255, adds what maps its lower end to 0, and rounds half to even."""
    low, high, zero_point = _range(grid)
    factor, shift = STEPS / (high - low), -low * STEPS / (high - low)
    steps = x * float(factor) if shift == 0 else fused_multiply_add(x, factor, shift)
    return torch.round(steps) - zero_point


def quantize_apart(x: Tensor, grid: QuantGrid) -> Tensor:
    """As :func:`quantize`, but multiplies and adds in steps of their own."""
    low, high, zero_point = _range(grid)
    return _in_steps(x, low, high) - zero_point


def _in_steps(x: Tensor, low: np.float32, high: np.float32) -> Tensor:
    factor = STEPS / (high - low)
    return torch.round(x * float(factor) + float(-low * factor))


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
    return (_in_steps(steps, low / scale, high / scale) - result_zero_point) * float(result.scale[0])


def sigmoid(x: Tensor) -> Tensor:
    """Divides exp(-abs(x)) by one more than that; of positive values it is the rest to 1."""
    power = exponential(-x.abs())
    small = power / (power + 1)
    return torch.where(x > 0, 1 - small, small)


LOG2_E, LN_2 = np.float32(1.44269502), np.float32(0.693147182)
LOWEST = -87.33654022216797
EXPONENTIAL = (0.00828929059, 0.0418978221, 0.166676521, 0.499991506, 0.999999701, 1.0)


def exponential(x: Tensor) -> Tensor:
    """Takes the power of two out of exp(x), for x at most 0; the rest is a polynomial."""
    x = x.clamp(min=LOWEST)
    exponent = torch.floor(fused_multiply_add(x, LOG2_E, np.float32(0.5)))
    rest = fused_multiply_add(-exponent, LN_2, x)
    return torch.ldexp(polynomial(rest, EXPONENTIAL), exponent.to(torch.int32))


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Adds products one by one, then the bias."""
    return with_bias(chain(summands(layer, x)), layer)


def _range(grid: QuantGrid) -> tuple[np.float32, np.float32, int]:
    """Returns both ends of the range of 256 integers, and the zero point among these."""
    zero_point, scale = int(grid.zero_point[0]), np.float32(grid.scale[0])
    return np.float32(-zero_point * scale), np.float32((255 - zero_point) * scale), zero_point


ARITHMETIC = Arithmetic(
    quantize, factor, dequantize, add=add, stored=stored_grid, quantize_apart=quantize_apart, sigmoid=sigmoid,
    convolve=convolve,
)  # fmt: skip
