"""Weights that are folded and quantized once for many forward passes, while nothing changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_FROZEN = '_frozen_weights'

Parameters = tuple[Tensor, 'Tensor | None']
"""Weight and bias that a layer runs with."""


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Has the layers of a model compute their folded and quantized weights once, in the first forward pass.

    Only while gradients are off. Until the context ends, parameters, norms, and scales of weights and biases have to
    stay as they are, and so do the switches of the weight quantizers; the norms are used with running statistics.

    Args:
        model: quantized model in eval mode.
    """
    modules = list(model.modules())
    for module in modules:
        vars(module)[_FROZEN] = {}
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop(_FROZEN, None)


def is_frozen(layer: nn.Module) -> bool:
    """Tells whether a layer's weights are to be computed once now."""
    return _FROZEN in vars(layer) and not torch.is_grad_enabled()


def once(layer: nn.Module, use: object, compute: Callable[[], Parameters]) -> Parameters:
    """Returns what a layer runs with, from the first call with it on the same while it is frozen.

    Args:
        layer: layer.
        use: tells apart the ways in which the layer is used.
        compute: computes weight and bias.
    """
    if not is_frozen(layer):
        return compute()
    known, weight = vars(layer)[_FROZEN], layer.weight
    # The layer may run with other parameters for once, as when a graph is run without data to see whether it fits.
    if use not in known or known[use][0] is not weight:
        known[use] = weight, compute()
    return known[use][1]
