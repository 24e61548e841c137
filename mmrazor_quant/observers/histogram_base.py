"""What the observers that count values into histograms share."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.arguments import check_integer, check_number

from .base import RangeObserver
from .extremes import extremes
from .histogram import block_extremes, count_values, estimate_counts, rebin, sample_stride


class HistogramBase(RangeObserver):
    """Base of the observers that count values into histograms, of a batch or of all data.

    In a distributed run a histogram is that of the parts of all processes together: they agree on its range first and
    add up their counts then.

    Args:
        *args: See :class:`RangeObserver`.
        bins: Number of bins of the histograms.
        max_samples: How many values of a batch, or of a process's part of it, go into its histogram, in equal
            distances (the tails are taken from the whole batch, see :mod:`.histogram`); None: all.
        **kwargs: See :class:`RangeObserver`.

    Raises:
        ValueError: An argument out of range.
    """

    min_val: Tensor
    max_val: Tensor
    counts: Tensor

    def __init__(self, *args, bins: int = 2048, max_samples: int | None = 2**15, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bins = check_integer('bins', bins, 2)
        self.max_samples = None if max_samples is None else check_integer('max_samples', max_samples, 1)

    def register_histogram(self) -> None:
        """Register the histogram of all data as statistics: ``counts`` [C, bins], ``min_val`` and ``max_val`` [C]."""
        self.register_statistic('min_val', float('inf'))
        self.register_statistic('max_val', float('-inf'))
        self.register_statistic('counts', 0.0, trailing=(self.bins,))

    def gather(self, rows: Tensor) -> None:
        """Add a batch to the histogram of all data.

        Args:
            rows: float32, shape [C, K].
        """
        counts, low, high = self.count(rows, self.min_val, self.max_val)
        self.counts.copy_(counts.add_(rebin(self.counts, self.min_val, self.max_val, low, high)))
        self.min_val.copy_(low)
        self.max_val.copy_(high)

    def count_batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count a batch into a histogram over its own range.

        Args:
            rows: float32, shape [C, K].

        Returns:
            Counts, shape [C, bins], and the ends of their range, shape [C].
        """
        nothing = rows.new_full((rows.shape[0],), float('inf'))
        return self.count(rows, nothing, -nothing)

    def count(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count a batch into a histogram over its own range and that given.

        Args:
            rows: float32, shape [C, K].
            low: Lower ends of a range to include, shape [C].
            high: Upper ends, shape [C].

        Returns:
            Counts, shape [C, bins], and the ends of their range, shape [C].
        """
        stride = sample_stride(rows, self.max_samples)
        blocks = block_extremes(rows) if stride > 1 else None
        own_low, own_high = _row_extremes(rows) if blocks is None else (blocks[0].amin(1), blocks[1].amax(1))
        own_low, own_high = self.joint_extremes(own_low, own_high)
        low, high = torch.minimum(own_low, low), torch.maximum(own_high, high)
        if blocks is None:
            counts = count_values(rows, low, high, self.bins)
        else:
            counts = estimate_counts(rows, blocks, low, high, self.bins, stride)
        return self.joint_sum(counts), low, high


def _row_extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    return extremes(rows, 0) if rows.shape[1] == 0 else torch.aminmax(rows, dim=1)


def check_exponent(p: float) -> float:
    """Give the exponent of an error back, or raise a ValueError that names it."""
    return check_number('p', p, lambda v: v >= 0.1, 'numbers from 0.1 up')


def unless_bad(low: Tensor, high: Tensor, least: Tensor, greatest: Tensor) -> tuple[Tensor, Tensor]:
    """Give a range computed from a histogram or by a search, or the extremes where those tell that it means nothing.

    Args:
        low: Lower ends, shape [C].
        high: Upper ends, shape [C].
        least: Least values of the data, shape [C]: above the greatest ones if there were none, NaN or infinite if
            there were such.
        greatest: Greatest values, shape [C].

    Returns:
        Lower and upper ends, shape [C].
    """
    good = torch.isfinite(least) & torch.isfinite(greatest)
    return low.where(good, least), high.where(good, greatest)
