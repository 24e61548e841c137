"""How the layers with weights run with a quantized weight, alone or with a batch norm folded in."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bias import quantized_bias
from .frozen import is_frozen, once

LAYER_TYPES = (nn.modules.conv._ConvNd, nn.Linear)
BATCH_NORM_TYPES = (nn.modules.batchnorm._BatchNorm,)
WEIGHT_QUANTIZER = 'weight_fake_quant'
"""Name of the weight quantizer, a child of the layer."""

_CONV_TRANSPOSE = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}

PLAIN_FORWARDS = tuple(kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_CONV_TRANSPOSE))
"""The forwards of torch's own layers."""


def channel_axis(layer: nn.Module) -> int:
    """Returns the axis of a layer's weight that runs over output channels."""
    return 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0


def call_layer(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *args: object, **kwargs: object
) -> Tensor:
    """Runs a layer with another weight and bias.

    Args:
        layer: convolution (transposed or not) or linear layer; a subclass's own forward is respected.
        x: activations.
        weight: tensor of the shape of ``layer.weight``.
        bias: tensor of shape (out_channels,) or None.
        *args: further arguments of the layer's forward (``output_size`` of a transposed convolution).
        **kwargs: the same by name.
    """
    forward = type(layer).forward
    if forward is nn.Linear.forward:
        return F.linear(x, weight, bias)
    if forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return layer._conv_forward(x, weight, bias)
    transposed = _CONV_TRANSPOSE.get(type(layer))
    if transposed is not None and not args and not kwargs:
        return transposed(
            x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        )
    return _call_subclass(layer, weight, bias, (x, *args), kwargs)


def _call_subclass(
    layer: nn.Module, weight: Tensor, bias: Tensor | None, args: tuple, kwargs: dict[str, object]
) -> Tensor:
    """Runs a forward that is not torch's own, which reads ``self.weight`` and ``self.bias`` itself."""
    late_bias = bias is not None and layer.bias is None
    overrides = {'weight': weight} if layer.bias is None else {'weight': weight, 'bias': _no_bias(layer, bias)}
    out = torch.func.functional_call(layer, overrides, args, kwargs)
    if not late_bias:
        return out
    return out + bias if isinstance(layer, nn.Linear) else out + bias.reshape(-1, *[1] * (out.dim() - 2))


def _no_bias(layer: nn.Module, bias: Tensor | None) -> Tensor:
    return torch.zeros_like(layer.bias) if bias is None else bias


def is_linear_in_weight(layer: nn.Module) -> bool:
    """Tells whether scaling weight and bias of a layer scales its output, and a bias is added to the output.

    True of torch's own layers; a subclass with a forward of its own (weight standardization, adaptive padding, ...) is
    tried on a small input.

    Args:
        layer: convolution (transposed or not) or linear layer.
    """
    if type(layer).forward in PLAIN_FORWARDS:
        return True
    layer = copy.deepcopy(layer)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    factor = torch.linspace(0.5, 2.0, channels, dtype=layer.weight.dtype, device=layer.weight.device)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(factor))
    try:
        with torch.no_grad():
            x = small_input(layer)
            expected = layer(x).movedim(1, -1) * factor + factor
            scaled = call_layer(layer, x, layer.weight * per_channel(factor, layer), (layer.bias + 1) * factor)
    except Exception:  # whatever the subclass asks of its input: it is not folded
        return False
    return torch.allclose(scaled.movedim(1, -1), expected, rtol=1e-3, atol=1e-4)


def small_input(layer: nn.Module) -> Tensor:
    """Returns an input of the smallest size that a layer, without padding, has a few outputs for."""
    like = dict(dtype=layer.weight.dtype, device=layer.weight.device)
    if isinstance(layer, nn.Linear):
        return torch.linspace(-1, 1, 2 * layer.in_features, **like).reshape(2, -1)
    sizes = [d * (k - 1) + s + 1 for k, s, d in zip(layer.kernel_size, layer.stride, layer.dilation)]
    shape = (1, layer.in_channels, *sizes)
    return torch.linspace(-1, 1, math.prod(shape), **like).reshape(shape)


def quantized_layer(
    layer: nn.Module, x: Tensor, *args: object, bias_input: nn.Module | None = None, **kwargs: object
) -> Tensor:
    """Runs a layer with its weight fake-quantized.

    Args:
        layer: layer with a child ``weight_fake_quant``.
        x: activations.
        *args: further arguments of the layer's forward.
        bias_input: quantizer of the input, to quantize the bias with; None leaves the bias float.
        **kwargs: the same by name.
    """
    weight, bias = once(layer, bias_input, lambda: _quantized(layer, bias_input))
    return call_layer(layer, x, weight, bias, *args, **kwargs)


def _quantized(layer: nn.Module, bias_input: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    weight = layer.weight_fake_quant(layer.weight)
    return weight, quantized_bias(layer.bias, bias_input, layer.weight_fake_quant)


def batch_norm_factor(norm: nn.Module) -> Tensor:
    """Returns gamma / sqrt(running variance + eps), shape (channels,): what folding multiplies the weight by."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    return factor if norm.weight is None else factor * norm.weight


def folded_weight(layer: nn.Module, norm: nn.Module) -> Tensor:
    """Returns the layer's weight with the batch norm's running statistics folded in (Jacob et al. 2018, eq. 14)."""
    return layer.weight * per_channel(batch_norm_factor(norm), layer)


def folded_bias(layer: nn.Module, norm: nn.Module) -> Tensor:
    """Returns beta + (bias - running mean) * factor, shape (channels,)."""
    factor = batch_norm_factor(norm)
    shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    return shift * factor if norm.bias is None else torch.addcmul(norm.bias, shift, factor)


def per_channel(values: Tensor, layer: nn.Module) -> Tensor:
    """Reshapes one value per output channel to multiply the layer's weight."""
    shape = [1] * layer.weight.dim()
    shape[channel_axis(layer)] = -1
    return values.reshape(shape)


def quantized_layer_norm(
    layer: nn.Module, norm: nn.Module, x: Tensor, *args: object, bias_input: nn.Module | None = None, **kwargs: object
) -> Tensor:
    """Runs a layer and the batch norm behind it, with the folded weight fake-quantized.

    With running statistics (evaluation, frozen) this is the folded layer, but for a quantizer that does nothing: then
    both run as in the float network, to the last bit, unless the weights are computed once
    (:func:`.frozen.frozen_weights`). While the batch norm learns from the
    batch, the weight is folded with the running statistics, quantized, and unfolded again, so that the batch norm
    behind it sees its usual input (up to quantization) and goes on learning.

    Args:
        layer: layer with a child ``weight_fake_quant``.
        norm: batch norm that is the only consumer of the layer.
        x: activations.
        *args: further arguments of the layer's forward.
        bias_input: quantizer of the input, to quantize the folded bias with; None leaves it float.
        **kwargs: the same by name.
    """
    quantizer = layer.weight_fake_quant
    if is_idle(quantizer) and (norm.training or not is_frozen(layer)):
        return norm(call_layer(layer, x, quantizer(layer.weight), layer.bias, *args, **kwargs))
    if not norm.training:
        weight, bias = once(layer, (norm, bias_input), lambda: _folded(layer, norm, bias_input))
        return call_layer(layer, x, weight, bias, *args, **kwargs)
    return norm(call_layer(layer, x, unfolded_weight(layer, norm), layer.bias, *args, **kwargs))


def _folded(layer: nn.Module, norm: nn.Module, bias_input: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    quantizer = layer.weight_fake_quant
    weight = quantizer(folded_weight(layer, norm))
    return weight, quantized_bias(folded_bias(layer, norm), bias_input, quantizer)


def unfolded_weight(layer: nn.Module, norm: nn.Module) -> Tensor:
    """Returns the layer's weight, folded, quantized, and divided by what folding multiplied it with."""
    quantizer = layer.weight_fake_quant
    if getattr(quantizer, 'can_fold', False) and quantizer.ch_axis in (-1, channel_axis(layer)):
        with torch.no_grad():
            factor = batch_norm_factor(norm)
        return quantizer.folded(layer.weight, factor, channel_axis(layer))
    factor = per_channel(batch_norm_factor(norm).detach(), layer)
    # A channel that the batch norm multiplies by zero cannot be unfolded; it stays float, for gamma to learn from.
    unused = factor == 0
    quantized = quantizer(layer.weight * factor) / torch.where(unused, 1.0, factor)
    return torch.where(unused, layer.weight, quantized)


def is_idle(quantizer: nn.Module) -> bool:
    """Tells whether a fake quantizer neither observes nor quantizes, without reading a tensor where it can."""
    idle = getattr(quantizer, 'is_idle', None)
    if idle is not None:
        return idle
    return not (bool(quantizer.fake_quant_enabled[0]) or bool(quantizer.observer_enabled[0]))
