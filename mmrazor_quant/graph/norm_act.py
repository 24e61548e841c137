"""A layer, the batch norm folded into it, the activation behind and the quantizer of its result, as one operation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.fx import Node

from mmrazor_quant import ops
from mmrazor_quant.ops import activated, normalized
from mmrazor_quant.tracing.nodes import node_name

from .layers import call_layer, is_idle, quantized_layer_norm, unfolded_weight

_CLAMPS = frozenset({'relu', 'relu_', 'relu6', 'hardtanh', 'hardtanh_', 'clamp', 'clamp_', 'clip', 'clip_'})

_NORM_FORWARD = nn.BatchNorm2d.forward


def ends_of(act: nn.Module | None) -> tuple[float, float] | None:
    """Returns the values that an activation clamps to; None if it does anything else.

    Args:
        act: activation; None: no activation.
    """
    if act is None:
        return -math.inf, math.inf
    if type(act).forward is nn.ReLU.forward:
        return 0.0, math.inf
    if type(act).forward is nn.Hardtanh.forward:
        return float(act.min_val), float(act.max_val)
    return None


def is_clamp(node: Node, root: nn.Module) -> bool:
    """Tells whether a node is an activation that clamps, as ReLU does.

    Args:
        node: node of a graph.
        root: the island's module.
    """
    if node.op == 'call_module':
        module = root.get_submodule(node.target)
        return ends_of(module) is not None
    return node.op in ('call_function', 'call_method') and node_name(node) in _CLAMPS


def layer_norm_act(
    layer: nn.Module, norm: nn.Module, identity: nn.Module | None, act: nn.Module | None, quantizer: nn.Module,
    has_plain: bool, x: Tensor, other: Tensor | None = None, bias_input: nn.Module | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Runs :func:`.layers.quantized_layer_norm`, adds, activates and fake-quantizes; at once where that is possible.

    Args:
        layer: layer with a child ``weight_fake_quant``.
        norm: batch norm behind it.
        identity: module between norm and addition that does nothing, or None.
        act: activation that :func:`ends_of` knows, or None.
        quantizer: fake quantizer of the result.
        has_plain: whether the result is needed unquantized too.
        x: activations.
        other: tensor to add before the activation, or None.
        bias_input: see :func:`.layers.quantized_layer_norm`.

    Returns:
        The quantized result, and the unquantized one if it is needed, else None.
    """
    # The activation may have been replaced since the graph was made.
    is_known = ends_of(act) is not None and not any(map(_has_hooks, (identity, act, quantizer)))
    if is_known and _learns(layer, norm) and not _has_hooks(norm):
        y = call_layer(layer, x, unfolded_weight(layer, norm), layer.bias)
        quantization = quantizer.quantization(y)
        if quantization is not None and normalized.usable(y, other, quantization):
            norm.num_batches_tracked.add_(1)
            numbers = ops.BatchNorm(
                norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps
            )
            return ops.fake_quantize_normalized(y, other, numbers, ends_of(act), quantization, has_plain)
        y = norm(y)
    else:
        y = quantized_layer_norm(layer, norm, x, bias_input=bias_input)
        quantization = None if torch.is_grad_enabled() or not is_known else quantizer.quantization(y)
        if quantization is not None and activated.usable(y, other, quantization):
            return ops.fake_quantize_activated(y, other, ends_of(act), quantization, has_plain)
    y = y if identity is None else identity(y)
    if other is not None:
        is_free = type(norm).forward is _NORM_FORWARD and not any(map(_has_hooks, (layer, norm, identity)))
        y = _add(y, other) if is_free else y + other
    y = y if act is None else act(y)
    return quantizer(y), y if has_plain else None


def _add(y: Tensor, other: Tensor) -> Tensor:
    """Adds to a result that no backward and no hook needs, in its memory where shape and type stay."""
    fits = other.shape == y.shape and other.dtype == y.dtype and type(y) is type(other) is Tensor
    return y.add_(other) if fits else y + other


def _learns(layer: nn.Module, norm: nn.Module) -> bool:
    """Tells whether the batch norm uses the statistics of its batch, in the way of torch's own."""
    if not norm.training:
        return False
    plain = type(norm).forward is _NORM_FORWARD and norm.affine and norm.momentum is not None
    return plain and not is_idle(layer.weight_fake_quant)


def _has_hooks(module: nn.Module | None) -> bool:
    return module is not None and bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
