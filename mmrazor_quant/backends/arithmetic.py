"""What a backend computes, to the last bit, where a network is in integers.

The sums of a layer in integers are exact, and a backend rounds but once or twice behind them. Fake quantization in
training adds the same numbers as floats, in any order: next to a tie an integer comes out one higher or lower, and in a
deep network what follows from it differs as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .grid import QuantGrid


@dataclass(frozen=True)
class LayerScales:
    """What quantizes one call of a layer in integers.

    Args:
        input: scale of the input, float32, shape ().
        weight: scale of the weight, float32, one for all outputs, or one per channel in a shape that fits them.
        result: grid of the result, maybe behind a ReLU; None: nothing quantizes it, or several grids do.
        is_depthwise: whether it is a convolution with one group for each channel of input and result.
    """

    input: Tensor
    weight: Tensor
    result: QuantGrid | None
    is_depthwise: bool = False


@dataclass(frozen=True)
class Arithmetic:
    """How a backend quantizes, and what it makes of the sums of a layer.

    Args:
        quantize: ``(x, grid)``: float32 values in steps of the grid, rounded, before they are clipped; without the
            zero point.
        factor: ``(scales)``: what the sums of a layer are multiplied by, in the shape of the weight's scale.
        layer: ``(sums, factor, bias, scales)``: the real results, float32, of exact sums, float32, of products of
            integers; the bias may be None.
        add: ``(x, residual, residual_grid, result)``: the quantized sum of a layer's result, which is not quantized,
            and of one that is; None: added as floats.
        integer_bias: whether the sums contain the bias, as an integer.
        needs_result: whether a layer whose result is not quantized is computed in float.
    """

    quantize: Callable[[Tensor, QuantGrid], Tensor]
    factor: Callable[[LayerScales], Tensor]
    layer: Callable[[Tensor, Tensor, Tensor | None, LayerScales], Tensor]
    add: Callable[[Tensor, Tensor, QuantGrid, QuantGrid], Tensor] | None = None
    integer_bias: bool = False
    needs_result: bool = False


def fused_multiply_add(x: Tensor, factor: Tensor | np.float32, summand: Tensor | np.float32) -> Tensor:
    """Computes ``x * factor + summand`` with one rounding, as processors do.

    Args:
        x: float32.
        factor: float32.
        summand: float32.

    Returns:
        float32.
    """
    # The product of two floats is exact in twice the digits.
    factor, summand = (v.double() if isinstance(v, Tensor) else float(v) for v in (factor, summand))
    return (x.double() * factor + summand).to(torch.float32)
