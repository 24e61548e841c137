"""What a backend computes, to the last bit, where a network is in integers.

The sums of a layer in integers are exact, and a backend rounds but once or twice behind them. Fake quantization in
training adds the same numbers as floats, in any order: next to a tie an integer comes out one higher or lower, and in a
deep network what follows from it differs as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        quantize_apart: the same for values that something else reads, too; None: as the others.
        factor: ``(scales)``: what the sums of a layer are multiplied by, in the shape of the weight's scale.
        layer: ``(sums, factor, bias, scales)``: the real results, float32, of exact sums, float32, of products of
            integers; the bias may be None.
        add: ``(x, residual, residual_grid, result)``: the quantized sum of a layer's result, which is not quantized,
            and of one that is; None: added as floats.
        add_quantized: ``(x, x_grid, y, y_grid, result)``: the quantized sum of two that are; None: added as floats.
        stored: ``(grid, is_not_negative)``: a grid as it is in the file, which all others here are given; whether the
            values come from an operation without negative results. None: as it is.
        sigmoid: the logistic function of float32 values; None: PyTorch's.
        silu: SiLU of float32 values; None: the argument times its sigmoid.
        convolve: ``(layer, x)``: a convolution in float, for which :func:`can_convolve` holds; None: PyTorch's.
        integer_bias: whether the sums contain the bias, as an integer.
        needs_result: whether a layer whose result is not quantized is computed in float.
    """

    quantize: Callable[[Tensor, QuantGrid], Tensor]
    factor: Callable[[LayerScales], Tensor]
    layer: Callable[[Tensor, Tensor, Tensor | None, LayerScales], Tensor]
    add: Callable[[Tensor, Tensor, QuantGrid, QuantGrid], Tensor] | None = None
    add_quantized: Callable[[Tensor, QuantGrid, Tensor, QuantGrid, QuantGrid], Tensor] | None = None
    stored: Callable[[QuantGrid, bool], QuantGrid] | None = None
    quantize_apart: Callable[[Tensor, QuantGrid], Tensor] | None = None
    sigmoid: Callable[[Tensor], Tensor] | None = None
    silu: Callable[[Tensor], Tensor] | None = None
    convolve: Callable[[nn.Conv2d, Tensor], Tensor] | None = None
    integer_bias: bool = False
    needs_result: bool = False


MAX_SUMMANDS = 512
"""Of convolutions with more products per result only PyTorch's own sums are computed: one by one they take long."""


def can_convolve(layer: nn.Module) -> bool:
    """Tells whether :func:`summands` can be listed of a layer.

    Args:
        layer: any module.
    """
    return (
        isinstance(layer, nn.Conv2d)
        and layer.padding_mode == 'zeros'
        and not isinstance(layer.padding, str)
        and layer.weight[0].numel() <= MAX_SUMMANDS
    )


def summands(layer: nn.Conv2d, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Lists what a convolution multiplies, by input channel (of the group), row and column of the kernel.

    Args:
        layer: the convolution.
        x: its input, shape (batch, channels, height, width).

    Yields:
        Activations, shape (batch, out_channels or 1, height, width) of the result, and weights that go with them.
    """
    (top, left), (rows, columns), (down, right) = layer.padding, layer.dilation, layer.stride
    channels, height, width = layer.weight.shape[1:]
    x = F.pad(x, (left, left, top, top))
    sizes = x.shape[2] - rows * (height - 1), x.shape[3] - columns * (width - 1)
    group = torch.arange(layer.out_channels, device=x.device) // (layer.out_channels // layer.groups)
    for channel in range(channels):
        source = x[:, channel : channel + 1] if layer.groups == 1 else x[:, group * channels + channel]
        for row in range(height):
            for column in range(width):
                start = row * rows, column * columns
                part = source[:, :, start[0] : start[0] + sizes[0] : down, start[1] : start[1] + sizes[1] : right]
                yield part, layer.weight[:, channel, row, column].reshape(-1, 1, 1)


def chain(pairs: Iterable[tuple[Tensor, Tensor]], start: Tensor | None = None) -> Tensor:
    """Adds products one by one, each with one rounding.

    Args:
        pairs: activations and weights, float32.
        start: what the first product is added to; None: nothing.

    Returns:
        float32, shape of the result.
    """
    for x, weight in pairs:
        start = x * weight if start is None else fused_multiply_add(x, weight, start)
    return start


def with_bias(sums: Tensor, layer: nn.Conv2d) -> Tensor:
    """Adds the bias of a convolution, if it has one, to sums."""
    return sums if layer.bias is None else sums + layer.bias.reshape(-1, 1, 1)


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


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Evaluates a polynomial by Horner's rule with fused steps.

    Args:
        x: float32.
        coefficients: from that of the highest power down; rounded to float32.

    Returns:
        float32.
    """
    first, second, *rest = (np.float32(c) for c in coefficients)
    value = fused_multiply_add(x, first, second)
    for coefficient in rest:
        value = fused_multiply_add(value, x, coefficient)
    return value
