"""The arithmetic of ONNX Runtime on CPU: QLinearConv, QGemm, QLinearAdd, QuantizeLinear.

The bias is in the sums. They become floats and are multiplied by one factor, which is that of the result's integers.
What is float between quantizers has an order of its own, too, found by experiment on x86 with AVX-512.
"""

from __future__ import annotations

import functools
import itertools
import operator

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


def quantize(x: Tensor, grid: QuantGrid) -> Tensor:
    """Divides by the scale and rounds half to even."""
    # By a tensor: numbers are divided by with their reciprocal on some devices.
    return torch.round(x / x.new_tensor(grid.scale[0]))


def factor(scales: LayerScales) -> Tensor:
    """Returns scale_input * scale_weight / scale_result."""
    return scales.input * scales.weight / float(scales.result.scale[0])


def requantize(sums: Tensor, factor: Tensor, bias: Tensor | None, scales: LayerScales) -> Tensor:
    """Multiplies sums by the factor and rounds half to even; returns real values on the grid of the result."""
    return torch.round(sums * factor) * float(scales.result.scale[0])


def add_quantized(x: Tensor, x_grid: QuantGrid, y: Tensor, y_grid: QuantGrid, result: QuantGrid) -> Tensor:
    """Adds integers times scale / scale_result, with what the zero points make of it as one number."""
    step = np.float32(result.scale[0])
    (first, x_zero, a), (second, y_zero, b) = (
        (np.float32(grid.scale[0]) / step, int(grid.zero_point[0]), torch.round(v / v.new_tensor(grid.scale[0])))
        for v, grid in ((x, x_grid), (y, y_grid))
    )
    zero = int(result.zero_point[0])
    # In float64, in which products of floats are exact, and rounded once.
    shift = zero - np.float32(float(first) * x_zero + float(second * np.float32(y_zero)))
    sums = fused_multiply_add(a + x_zero, first, fused_multiply_add(b + y_zero, second, np.float32(shift)))
    return (torch.round(sums) - zero).clamp_(result.quant_min - zero, result.quant_max - zero) * float(step)


def sigmoid(x: Tensor) -> Tensor:
    """Divides two polynomials, of x clamped to [-18, 18]."""
    x = x.clamp(-18, 18)
    square = x * x
    return (polynomial(square, ODD) * x / polynomial(square, EVEN) + 0.5).clamp_(0, 1)


ODD = (4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 2.48287947061529e-01)
EVEN = (
    6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03, 1.16817656904453e-01,
    9.93151921023180e-01,
)  # fmt: skip

BLOCK, DEPTHWISE_BLOCK = 128, 4
"""So many products are added before they are added to the others."""


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Adds products in blocks, then the blocks, then the bias.

    With one output channel per group it multiplies and adds in steps of their own.
    """
    is_depthwise = layer.out_channels == layer.groups
    pairs, size = summands(layer, x), DEPTHWISE_BLOCK if is_depthwise else BLOCK
    sums = None
    while block := list(itertools.islice(pairs, size)):
        part = functools.reduce(operator.add, (a * b for a, b in block)) if is_depthwise else chain(block)
        sums = part if sums is None else sums + part
    return with_bias(sums, layer)


ARITHMETIC = Arithmetic(
    quantize, factor, requantize, add_quantized=add_quantized, stored=stored_grid, sigmoid=sigmoid, convolve=convolve,
    integer_bias=True, needs_result=True,
)  # fmt: skip
