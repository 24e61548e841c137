"""The range of all data seen."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.registry import MODELS

from .extremes import ExtremesObserver


@MODELS.register_module()
class MinMaxObserver(ExtremesObserver):
    """Minimum and maximum over all data seen, per tensor or per channel."""

    min_val: Tensor
    max_val: Tensor

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_statistic('min_val', float('inf'))
        self.register_statistic('max_val', float('-inf'))

    def update_extremes(self, low: Tensor, high: Tensor) -> None:
        """Widen the range to these."""
        torch.minimum(self.min_val, low, out=self.min_val)
        torch.maximum(self.max_val, high, out=self.max_val)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the range seen, each end of shape [C]."""
        return self.min_val, self.max_val
