"""What observers share that see of a tensor only its least and greatest values."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

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


class ExtremesObserver(RangeObserver):
    """Base of the observers that only need minimum and maximum of each tensor, per tensor or per channel."""

    def update(self, x: Tensor) -> None:
        """Take in the extremes of ``x``."""
        self.update_extremes(*self.joint_extremes(*extremes(x, self.ch_axis)))

    @abstractmethod
    def update_extremes(self, low: Tensor, high: Tensor) -> None:
        """Update the statistics.

        Args:
            low: Least values, of all processes, shape [C] or [].
            high: Greatest values, likewise.
        """

    def observe_extremes(self, low: Tensor, high: Tensor) -> None:
        """Update the statistics with what a tensor's extremes are known to be.

        Args:
            low: Least value in this process, shape [].
            high: Greatest value, likewise.
        """
        self.update_extremes(*self.joint_extremes(low, high))
