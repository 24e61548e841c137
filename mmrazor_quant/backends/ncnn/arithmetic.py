"""The arithmetic of ncnn on CPU: factors that are reciprocals of scales, and rounding half away from zero."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmrazor_quant.backends.arithmetic import Arithmetic, LayerScales, chain, fused_multiply_add, summands
from mmrazor_quant.backends.grid import QuantGrid

from .bin_file import Array, write_bin
from .layer_types import DEPTHWISE, INT8_SCALE_TERM
from .param_file import Layer, write_param
from .runtime import Session


def quantize(x: Tensor, grid: QuantGrid) -> Tensor:
    """Multiplies by the reciprocal of the scale and rounds half away from zero."""
    steps = x * float(np.float32(1) / np.float32(grid.scale[0]))
    return torch.trunc(steps + torch.copysign(steps.new_tensor(0.5), steps))


def factor(scales: LayerScales) -> Tensor:
    """Returns the reciprocal of the product of what maps input and weight to integers."""
    source, weight = 1 / scales.input, 1 / scales.weight
    return kernel_factors(source, weight) if scales.is_depthwise and weight.numel() > 1 else 1 / (source * weight)


def dequantize(sums: Tensor, factor: Tensor, bias: Tensor | None, scales: LayerScales) -> Tensor:
    """Multiplies sums by the factor and adds the bias, with one rounding but in depthwise convolutions."""
    if bias is None:
        return sums * factor
    return sums * factor + bias if scales.is_depthwise else fused_multiply_add(sums, factor, bias)


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Adds products to the bias one by one."""
    bias = None if layer.bias is None else layer.bias.reshape(-1, 1, 1)
    return chain(summands(layer, x), bias)


def sigmoid(x: Tensor) -> Tensor:
    """Asks ncnn: how it divides depends on the compiler."""
    return _ask('Sigmoid', x)


def silu(x: Tensor) -> Tensor:
    """Asks ncnn, see :func:`sigmoid`."""
    return _ask('Swish', x)


def kernel_factors(source: Tensor, weight: Tensor) -> Tensor:
    """Asks ncnn what a depthwise convolution multiplies by: on x86 its kernels take the processor's estimate.

    Args:
        source: from real values to integers of the input, shape ().
        weight: the same of the weight, of each channel, any shape.

    Returns:
        About 1 / (source * weight), shape of ``weight``.
    """
    count = weight.numel()
    sizes = {0: f'{count}', 1: '1', 6: f'{count}', 7: f'{count}', INT8_SCALE_TERM: '1'}
    scales = [Array(weight.flatten().numpy()), Array(source.reshape(1).numpy())]
    session = _session_of(DEPTHWISE, sizes, [Array(np.ones(count, np.int8), is_tagged=True), *scales])
    ones = np.full((1, count, 1, 1), 1 / source.item(), np.float32)
    return torch.from_numpy(session(ones)[0]).reshape(weight.shape)


def _ask(kind: str, x: Tensor) -> Tensor:
    session = _session_of(kind)
    images = [session(image)[0] for image in np.split(x.cpu().numpy(), len(x))]
    return torch.from_numpy(np.concatenate(images)).to(x.device)


def _session_of(kind: str, params: dict[int, str] | None = None, arrays: Sequence[Array] = ()) -> Session:
    """Opens a network of one layer."""
    layers = [Layer('Input', 'in0', [], ['in0']), Layer(kind, 'layer', ['in0'], ['out0'], params or {})]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'layer.param'
        write_param(layers, file)
        write_bin([[], list(arrays)], file.with_suffix('.bin'))
        return Session(file)


ARITHMETIC = Arithmetic(quantize, factor, dequantize, sigmoid=sigmoid, silu=silu, convolve=convolve)
