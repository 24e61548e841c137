"""The average of the batches' ranges that hold a given share of the values."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.registry import MODELS

from .ema_min_max import EMARangeObserver
from .histogram_base import HistogramBase, unless_bad
from .percentile import checked_percentile, histogram_percentile_range, percentile_range
from .quantiles import value_quantile


@MODELS.register_module()
class EMAPercentileObserver(HistogramBase, EMARangeObserver):
    """Exponential moving average of the range that holds ``percentile`` percent of the values of a batch.

    What is clipped depends on the scheme as in :class:`PercentileObserver`. Batches of up to ``max_samples`` values are
    sorted, larger ones, and those that the processes of a distributed run observe jointly, counted into a histogram.

    Args:
        *args: See :class:`RangeObserver`.
        percentile: Share of the values inside the range in percent, in (0, 100].
        **kwargs: See :class:`HistogramBase` and :class:`EMARangeObserver`.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, *args, percentile: float = 99.99, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.percentile = checked_percentile(percentile)

    def update(self, x: Tensor) -> None:
        """Average in the range of ``x``."""
        rows = self.rows(x).to(torch.float32)
        if self.is_reducing or (self.max_samples is not None and rows.numel() > self.max_samples):
            counts, low, high = self.count_batch(rows)
            found = histogram_percentile_range(self, counts, low, high, self.percentile)
        else:
            ordered = rows.sort(1).values
            low, high = ordered[:, 0], ordered[:, -1]
            found = self._range_of(rows, ordered)
        self.average(*unless_bad(*found, low, high))

    def _range_of(self, rows: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
        return percentile_range(
            self,
            lambda share: value_quantile(ordered, share),
            lambda share: value_quantile(rows.abs().sort(1).values, share),
            self.percentile,
        )
