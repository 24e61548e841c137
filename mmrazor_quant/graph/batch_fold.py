"""Batch norms folded into the layer before them with the statistics of the batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .bias import quantized_bias
from .layers import call_layer, is_idle, per_channel, quantized_layer_norm


def quantized_layer_batch_norm(
    layer: nn.Module, norm: nn.Module, x: Tensor, *args: object, bias_input: nn.Module | None = None, **kwargs: object
) -> Tensor:
    """Runs a layer with the batch norm behind it folded in (Jacob et al. 2018, section 3.2 and figure C.7).

    While the batch norm learns, the layer runs twice: with its float weight, for the mean and variance of the batch,
    and with the weight folded with these and quantized. Frozen or in evaluation it is
    :func:`.layers.quantized_layer_norm`, with the running statistics.

    Args:
        layer: layer with a child ``weight_fake_quant``.
        norm: batch norm that is the only consumer of the layer.
        x: activations.
        *args: further arguments of the layer's forward.
        bias_input: quantizer of the input, to quantize the folded bias with; None leaves it float.
        **kwargs: the same by name.
    """
    quantizer = layer.weight_fake_quant
    if is_idle(quantizer) or not norm.training:
        return quantized_layer_norm(layer, norm, x, *args, bias_input=bias_input, **kwargs)
    mean, variance = _batch_statistics(norm, call_layer(layer, x, layer.weight, layer.bias, *args, **kwargs))
    factor = torch.rsqrt(variance + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -mean if layer.bias is None else layer.bias - mean
    bias = shift * factor if norm.bias is None else torch.addcmul(norm.bias, shift, factor)
    weight = quantizer(layer.weight * per_channel(factor, layer))
    return call_layer(layer, x, weight, quantized_bias(bias, bias_input, quantizer), *args, **kwargs)


def _batch_statistics(norm: nn.Module, out: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance per channel, shape (channels,), and lets the running statistics follow."""
    dims = [d for d in range(out.dim()) if d != 1]
    # In float32 under autocast, as batch norms have them: half types would round the variance by half a percent.
    variance, mean = torch.var_mean(out.to(torch.promote_types(out.dtype, torch.float32)), dims, correction=0)
    count = out.numel() // out.shape[1]
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        mean, variance, count = _joint(mean, variance, count)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        weight = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
        unbiased = variance * (count / max(count - 1, 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), weight)
    return mean, variance


def _joint(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Returns the statistics of all processes together; differentiable. The batches are of equal size."""
    from torch.distributed.nn.functional import all_reduce

    world = dist.get_world_size()
    joint = all_reduce(mean) / world
    # Around the joint mean: a difference of squares loses the variance where the mean is large.
    return joint, all_reduce(variance + (mean - joint).square()) / world, count * world
