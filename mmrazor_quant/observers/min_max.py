"""The range of all data seen."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmrazor_quant.registry import MODELS

from .compiled_update import Advance
from .extremes import ExtremesObserver


def widened(low: Tensor, high: Tensor, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
    """Give the range that holds both of two ranges, given by their ends, shape [C]."""
    return torch.minimum(min_val, low), torch.maximum(max_val, high)


@MODELS.register_module()
class MinMaxObserver(ExtremesObserver):
    """Minimum and maximum over all data seen, per tensor or per channel."""

    min_val: Tensor
    max_val: Tensor

    advance: ClassVar[Advance] = widened

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
