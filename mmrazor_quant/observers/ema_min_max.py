"""The average range of the batches seen."""

from __future__ import annotations

from torch import Tensor

from mmrazor_quant.registry import MODELS

from .base import RangeObserver
from .distributed import reduce_weighted_mean
from .min_max import extremes


class EMARangeObserver(RangeObserver):
    """Base of the observers that average one range per batch.

    ``average = ema_ratio * average + (1 - ema_ratio) * range_of_batch``, starting from the first batch's range.
    Processes of a distributed run average theirs when the parameters are computed.

    Args:
        *args: See :class:`RangeObserver`.
        ema_ratio: Weight of the past, in [0, 1).
        **kwargs: See :class:`RangeObserver`.

    Raises:
        ValueError: ``ema_ratio`` outside [0, 1).
    """

    min_val: Tensor
    max_val: Tensor
    next_weight: Tensor

    def __init__(self, *args, ema_ratio: float = 0.9, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= ema_ratio < 1:
            raise ValueError(f'ema_ratio: got {ema_ratio!r}, allowed: 0 <= ema_ratio < 1')
        self.ema_ratio = ema_ratio
        self.register_statistic('min_val', 0.0)
        self.register_statistic('max_val', 0.0)
        # The weight of the next batch: 1 for the first one, which needs no question asked of the data this way.
        self.register_statistic('next_weight', 1.0)

    def average(self, low: Tensor, high: Tensor) -> None:
        """Take the range of one batch into the average.

        Args:
            low: Lower ends, shape [C] or [].
            high: Upper ends, shape [C] or [].
        """
        self.min_val.lerp_(low.to(self.min_val.dtype), self.next_weight)
        self.max_val.lerp_(high.to(self.max_val.dtype), self.next_weight)
        self.next_weight.fill_(1 - self.ema_ratio)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the average range, each end of shape [C]; empty where there were no data."""
        return self._empty_where(self.next_weight == 1, self.min_val, self.max_val)

    def global_range(self) -> tuple[Tensor, Tensor]:
        """Give the mean of the processes' average ranges, leaving out processes without data."""
        seen = (self.next_weight != 1).to(self.min_val.dtype)
        low, total = reduce_weighted_mean(self.min_val, seen)
        high, _ = reduce_weighted_mean(self.max_val, seen)
        return self._empty_where(total == 0, low, high)

    @staticmethod
    def _empty_where(unseen: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low.masked_fill(unseen, float('inf')), high.masked_fill(unseen, float('-inf'))


@MODELS.register_module()
class EMAMinMaxObserver(EMARangeObserver):
    """Exponential moving average of the batches' minima and maxima, per tensor or per channel."""

    def update(self, x: Tensor) -> None:
        """Average in the extremes of ``x``."""
        self.average(*extremes(x, self.ch_axis))
