"""The average range of the batches seen."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmrazor_quant.arguments import check_number
from mmrazor_quant.registry import MODELS

from .base import RangeObserver
from .compiled_update import Advance
from .extremes import ExtremesObserver


class EMARangeObserver(RangeObserver):
    """Base of the observers that average one range per batch.

    ``average = ema_ratio * average + (1 - ema_ratio) * range_of_batch``, starting from the first batch's range. In a
    distributed run that is the range of the parts of all processes together.

    Args:
        *args: See :class:`RangeObserver`.
        ema_ratio: Weight of the past, in [0, 1).
        **kwargs: See :class:`RangeObserver`.

    Raises:
        ValueError: ``ema_ratio`` is not a number in [0, 1).
    """

    min_val: Tensor
    max_val: Tensor
    next_weight: Tensor

    def __init__(self, *args, ema_ratio: float = 0.9, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.ema_ratio = check_number('ema_ratio', ema_ratio, lambda v: 0 <= v < 1, '0 <= ema_ratio < 1')
        self.register_statistic('min_val', 0.0)
        self.register_statistic('max_val', 0.0)
        # The weight of the next batch, so that no question has to be asked of the data; that of the first one is 1, and
        # kept as 2, since without a past all others have 1 too.
        self.register_statistic('next_weight', 2.0)

    def average(self, low: Tensor, high: Tensor) -> None:
        """Take the range of one batch into the average.

        Args:
            low: Lower ends, shape [C] or []; above the upper ones where no process has data.
            high: Upper ends, shape [C] or [].
        """
        low, high = low.to(self.min_val.dtype), high.to(self.max_val.dtype)
        if self.is_reducing:
            seen = ~(low > high)
            low, high = low.where(seen, self.min_val), high.where(seen, self.max_val)
        weight = self.next_weight.clamp(max=1.0)
        self.min_val.lerp_(low, weight)
        self.max_val.lerp_(high, weight)
        if self.is_reducing:
            self.next_weight.masked_fill_(seen, 1 - self.ema_ratio)
        else:
            self.next_weight.fill_(1 - self.ema_ratio)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the average range, each end of shape [C]; empty where there were no data."""
        unseen = self.next_weight > 1
        return self.min_val.masked_fill(unseen, float('inf')), self.max_val.masked_fill(unseen, float('-inf'))


def averaged(
    low: Tensor, high: Tensor, min_val: Tensor, max_val: Tensor, next_weight: Tensor, weight_of_batch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the average range after a batch, and the weight of the next one; the arguments are those of before."""
    weight = next_weight.clamp(max=1.0)
    later = weight_of_batch.expand(next_weight.shape)
    return torch.lerp(min_val, low, weight), torch.lerp(max_val, high, weight), later


@MODELS.register_module()
class EMAMinMaxObserver(ExtremesObserver, EMARangeObserver):
    """Exponential moving average of the batches' minima and maxima, per tensor or per channel."""

    advance: ClassVar[Advance] = averaged

    @property
    def advance_constants(self) -> tuple[float, ...]:
        """Numbers that ``advance`` takes behind the statistics."""
        return (1 - self.ema_ratio,)

    def update_extremes(self, low: Tensor, high: Tensor) -> None:
        """Average these in."""
        self.average(low, high)
