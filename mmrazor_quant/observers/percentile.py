"""The range that holds a given share of all values seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrazor_quant.arguments import check_number
from mmrazor_quant.registry import MODELS

from .base import RangeObserver
from .histogram_base import HistogramBase, unless_bad
from .quantiles import histogram_quantile, magnitude_quantile

Quantile = Callable[[float], Tensor]
"""From a share in [0, 1] to the quantile of each channel, shape [C]."""


@MODELS.register_module()
class PercentileObserver(HistogramBase):
    """The range that holds ``percentile`` percent of all values seen, known by a histogram of them.

    The rest is clipped: by an asymmetric scheme half of it at each end, by a symmetric one the values of greatest
    magnitude. A symmetric scheme without negative (or positive) integers clips all of it at the end that it has.

    Args:
        *args: See :class:`RangeObserver`.
        percentile: Share of the values inside the range in percent, in (0, 100].
        **kwargs: See :class:`HistogramBase`.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, *args, percentile: float = 99.99, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.percentile = checked_percentile(percentile)
        self.register_histogram()

    def update(self, x: Tensor) -> None:
        """Add ``x`` to the histogram."""
        self.gather(self.rows(x).to(torch.float32))

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the range, each end of shape [C]."""
        found = histogram_percentile_range(self, self.counts, self.min_val, self.max_val, self.percentile)
        return unless_bad(*found, self.min_val, self.max_val)


def checked_percentile(percentile: float) -> float:
    """Give the argument back, or raise a ValueError that names it."""
    return check_number('percentile', percentile, lambda v: 0 < v <= 100, '0 < percentile <= 100')


def histogram_percentile_range(
    observer: RangeObserver, counts: Tensor, low: Tensor, high: Tensor, percentile: float
) -> tuple[Tensor, Tensor]:
    """Give the range that holds a share of the values in a histogram.

    Args:
        observer: Whose scheme tells what is clipped.
        counts: Shape [C, bins].
        low: Lower ends of the histogram, shape [C].
        high: Upper ends, shape [C].
        percentile: Share in percent.

    Returns:
        Lower and upper ends, shape [C].
    """
    return percentile_range(
        observer,
        lambda share: histogram_quantile(counts, low, high, share),
        lambda share: magnitude_quantile(counts, low, high, share),
        percentile,
    )


def percentile_range(
    observer: RangeObserver, quantile: Quantile, magnitude: Quantile, percentile: float
) -> tuple[Tensor, Tensor]:
    """Give the range that holds a share of the values.

    Args:
        observer: Whose scheme tells what is clipped.
        quantile: Quantiles of the values.
        magnitude: Quantiles of their absolute values.
        percentile: Share in percent.

    Returns:
        Lower and upper ends, shape [C].
    """
    clipped = (100 - percentile) / 100
    if not observer.is_symmetric:
        return quantile(clipped / 2), quantile(1 - clipped / 2)
    if observer.quant_min >= 0:
        return quantile(0.0), quantile(1 - clipped)
    if observer.quant_max <= 0:
        return quantile(clipped), quantile(1.0)
    end = magnitude(1 - clipped)
    return -end, end
