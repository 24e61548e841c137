"""Scaling the output channels of a layer, or its input channels, through its parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import PLAIN_FORWARDS, batch_norm_factor, call_layer, small_input


def grouped(weight: Tensor, layer: nn.Module) -> Tensor:
    """Returns a view of a weight as (groups, outputs of a group, inputs of a group, elements of a kernel).

    Args:
        weight: tensor of the shape of ``layer.weight``.
        layer: convolution (grouped, depthwise, transposed or not) or linear layer.
    """
    groups = getattr(layer, 'groups', 1)
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.transpose(1, 2) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else parts


def magnitudes(layer: nn.Module, norm: nn.Module | None) -> Tensor:
    """Returns the largest absolute element of every kernel, float64 on the CPU.

    Args:
        layer: convolution or linear layer.
        norm: batch norm folded into it, or None.

    Returns:
        Shape (groups, outputs of a group, inputs of a group).
    """
    largest = grouped(layer.weight.detach().abs(), layer).amax(3).cpu().double()
    if norm is None:
        return largest
    return largest * batch_norm_factor(norm).detach().abs().cpu().double().reshape(len(largest), -1, 1)


def output_channels(layer: nn.Module) -> int:
    """Returns the number of output channels of a layer."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def input_channels(layer: nn.Module) -> int:
    """Returns the number of input channels of a layer."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


@torch.no_grad()
def scale_outputs(layer: nn.Module, norm: nn.Module | None, factor: Tensor) -> None:
    """Multiplies the output of a layer, behind its batch norm if it has one, by a factor per channel, in place.

    Args:
        layer: layer that is linear in weight and bias.
        norm: affine batch norm behind it, whose scale and shift are then what is changed; or None.
        factor: float64, shape (output channels,).
    """
    if norm is not None:
        _multiply(norm.weight, factor)
        _multiply(norm.bias, factor)
        return
    _multiply_grouped(layer, factor.reshape(getattr(layer, 'groups', 1), -1, 1, 1))
    if layer.bias is not None:
        _multiply(layer.bias, factor)


@torch.no_grad()
def scale_inputs(layer: nn.Module, factor: Tensor) -> None:
    """Multiplies what a layer does with each input channel by a factor, in place.

    Args:
        layer: layer that is linear in its input.
        factor: float64, shape (input channels,).
    """
    _multiply_grouped(layer, factor.reshape(getattr(layer, 'groups', 1), 1, -1, 1))


def _multiply_grouped(layer: nn.Module, factor: Tensor) -> None:
    layer.weight.copy_(_product(layer.weight.detach().cpu().double(), layer, factor))


def _product(weight: Tensor, layer: nn.Module, factor: Tensor) -> Tensor:
    """Returns weight times factor, which broadcasts with what :func:`grouped` returns, in the shape of the weight."""
    product = grouped(weight, layer) * factor
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        product = product.transpose(1, 2)
    return product.reshape(weight.shape)


def _multiply(parameter: Tensor, factor: Tensor) -> None:
    # Products in float64 are rounded once; not every device has that type.
    parameter.copy_(parameter.detach().cpu().double() * factor)


def is_linear_in_input(layer: nn.Module) -> bool:
    """Tells whether factors of the input channels can be moved into a layer's weight.

    True of torch's own layers; a subclass with a forward of its own is tried on a small input.

    Args:
        layer: convolution (transposed or not) or linear layer.
    """
    if type(layer).forward in PLAIN_FORWARDS:
        return True
    try:
        with torch.no_grad():
            x = small_input(layer)
            like = dict(dtype=x.dtype, device=x.device)
            factor = torch.linspace(0.5, 2.0, input_channels(layer), **like)
            moved = _product(layer.weight, layer, factor.reshape(getattr(layer, 'groups', 1), 1, -1, 1))
            scaled = x * (factor if isinstance(layer, nn.Linear) else factor.reshape(-1, *[1] * (x.dim() - 2)))
            return torch.allclose(call_layer(layer, x, moved, layer.bias), layer(scaled), rtol=1e-3, atol=1e-4)
    except Exception:  # whatever the subclass asks of its input: it is left as it is
        return False
