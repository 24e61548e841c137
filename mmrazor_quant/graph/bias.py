"""Biases as the integers that an accumulator starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrazor_quant import ops

BIAS_MIN, BIAS_MAX = -(2**31), 2**31 - 1


def quantized_bias(
    bias: Tensor | None, input_quantizer: nn.Module | None, weight_quantizer: nn.Module
) -> Tensor | None:
    """Fake-quantizes a bias to int32, with the product of the scales of input and weight (Jacob et al. 2018, eq. 11).

    Args:
        bias: shape (out_channels,), or None.
        input_quantizer: fake quantizer of the layer's input, one scale for the tensor; None leaves the bias float.
        weight_quantizer: fake quantizer of the layer's weight.

    Returns:
        The bias, with a straight-through gradient; as it is where input or weight are not quantized now.
    """
    if bias is None or input_quantizer is None or not (_quantizes(input_quantizer) and _quantizes(weight_quantizer)):
        return bias
    scale = bias_scale(input_quantizer, weight_quantizer, bias.numel())
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return ops.fake_quantize(bias, scale, zero_point, BIAS_MIN, BIAS_MAX, 0)


def rounded_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Quantizes and dequantizes a bias; what :func:`quantized_bias` does, with scales instead of quantizers.

    Args:
        bias: shape (out_channels,).
        input_scale: shape (1,).
        weight_scale: shape (1,), or one per channel (of each group).
    """
    scale = (input_scale * weight_scale).repeat(bias.numel() // weight_scale.numel())
    qparams = scale, torch.zeros_like(scale, dtype=torch.int32)
    return ops.dequantize(ops.quantize(bias, *qparams, BIAS_MIN, BIAS_MAX, 0), *qparams, 0)


def bias_scale(input_quantizer: nn.Module, weight_quantizer: nn.Module, channels: int) -> Tensor:
    """Returns scale_input * scale_weight, shape (channels,).

    Args:
        input_quantizer: fake quantizer with one scale.
        weight_quantizer: fake quantizer with one scale, or one per channel (of each group).
        channels: length of the bias.
    """
    weight_scale = _scale(weight_quantizer)
    return (_scale(input_quantizer) * weight_scale).repeat(channels // weight_scale.numel())


def _scale(quantizer: nn.Module) -> Tensor:
    in_use = getattr(quantizer, 'scale_in_use', None)
    return quantizer.scale.detach() if in_use is None else in_use()


def _quantizes(quantizer: nn.Module) -> bool:
    """Tells whether a fake quantizer is switched on, without reading a tensor where it can."""
    switch = getattr(quantizer, 'is_quantizing', None)
    return bool(quantizer.fake_quant_enabled[0]) if switch is None else switch
