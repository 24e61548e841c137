"""Scale and zero point from the tensor to be quantized itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .qparams import qparams_from_range

SHARES = ('tensor', 'sample', 'token')
"""Which values share a range: all, those of one index of the first dimension, those along the last dimension."""


def shared_rows(x: Tensor, share: str) -> Tensor:
    """Arrange a tensor as rows that have a range each.

    Args:
        x: At least one dimension.
        share: One of :data:`SHARES`.

    Returns:
        ``x`` itself for ``'tensor'``, else shape [rows, values]; a copy where the memory does not allow a view.
    """
    if share == 'tensor':
        return x
    return x.reshape(len(x), -1) if share == 'sample' else x.reshape(-1, x.shape[-1])


def dynamic_qparams(
    x: Tensor, share: str, quant_min: int, quant_max: int, symmetric: bool, is_pot_scale: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute scale and zero point from minima and maxima.

    Args:
        x: Floating-point values, at least one dimension; a tensor without values has the scale 1.
        share: One of :data:`SHARES`.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        symmetric: Whether the zero point is fixed to 0.
        is_pot_scale: Round scales to powers of two.

    Returns:
        scale (float32) and zero_point (integer), with the dimensions of ``x``, those that share a range of size 1.
    """
    dims = {'tensor': range(x.dim()), 'sample': range(1, x.dim()), 'token': [x.dim() - 1]}[share]
    if share == 'tensor':
        extremes = torch.aminmax(x) if x.numel() else x.new_zeros(2)
        low, high = (v.reshape([1] * x.dim()) for v in extremes)
    else:
        low, high = torch.amin(x, list(dims), keepdim=True), torch.amax(x, list(dims), keepdim=True)
    return qparams_from_range(low, high, quant_min, quant_max, symmetric, is_pot_scale)
