"""The range of all data seen."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.registry import MODELS

from .base import RangeObserver


def extremes(x: Tensor, ch_axis: int) -> tuple[Tensor, Tensor]:
    """Give minimum and maximum per channel.

    Args:
        x: Any shape.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        Two tensors of shape [C], or [] when per tensor; NaN where ``x`` has NaN, +inf and -inf if it is empty.
    """
    if x.numel() == 0:
        low = x.new_full(() if ch_axis == -1 else (x.shape[ch_axis],), float('inf'))
        return low, -low
    if ch_axis == -1:
        return torch.aminmax(x)
    dims = [d for d in range(x.dim()) if d != ch_axis]
    return torch.amin(x, dims), torch.amax(x, dims)


@MODELS.register_module()
class MinMaxObserver(RangeObserver):
    """Minimum and maximum over all data seen, per tensor or per channel."""

    min_val: Tensor
    max_val: Tensor

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_statistic('min_val', float('inf'))
        self.register_statistic('max_val', float('-inf'))

    def update(self, x: Tensor) -> None:
        """Widen the range to that of ``x``."""
        low, high = self.joint_extremes(*extremes(x, self.ch_axis))
        torch.minimum(self.min_val, low, out=self.min_val)
        torch.maximum(self.max_val, high, out=self.max_val)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the range seen, each end of shape [C]."""
        return self.min_val, self.max_val
