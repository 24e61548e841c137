"""The range of least quantization error over all data seen."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.ops.error import histogram_error, value_error
from mmrazor_quant.registry import MODELS

from .base import RangeObserver
from .distributed import reduce_max, reduce_min, reduce_sum, world_size
from .histogram import (
    bin_edges,
    block_extremes,
    count_values,
    estimate_counts,
    rebin,
    sample_stride,
)
from .min_max import extremes
from .range_search import ErrorFn, search_range, symmetric_limits

COARSE_BINS = 512
"""Bins of the histograms that a search on values starts on."""


class ErrorSearchObserver(RangeObserver):
    """Base of the observers that search the range of least error sum |x - fq(x)|^p.

    Args:
        *args: See :class:`RangeObserver`.
        p: Exponent of the error.
        bins: Number of bins of the histograms.
        max_samples: How many values of a batch go into its histogram, in equal distances (the tails are taken from the
            whole batch, see :mod:`.histogram`); None: all.
        **kwargs: See :class:`RangeObserver`.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, *args, p: float = 2.0, bins: int = 2048, max_samples: int | None = 2**16, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for name, value, least in (('p', p, 0.1), ('bins', bins, 2), ('max_samples', max_samples, 1)):
            if value is not None and not value >= least:
                raise ValueError(f'{name}: got {value!r}, allowed: numbers from {least} up')
        self.p = p
        self.bins = bins
        self.max_samples = max_samples

    def search_values(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Search on values.

        Args:
            rows: float32, shape [C, K].
            low: Least values, shape [C].
            high: Greatest values, shape [C].

        Returns:
            Lower and upper ends of the best ranges, shape [C].
        """
        fine = self._value_error(rows)
        if rows.shape[1] <= COARSE_BINS:
            return self._search(fine, fine, low, high)
        counts = count_values(rows, low, high, COARSE_BINS)
        return self._search(self._histogram_error(counts, low, high), fine, low, high)

    def search_histogram(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Search on a histogram.

        Args:
            counts: Shape [C, bins].
            low: Lower ends of the histogram, shape [C].
            high: Upper ends, shape [C].

        Returns:
            Lower and upper ends of the best ranges, shape [C].
        """
        error = self._histogram_error(counts, low, high)
        return self._search(error, error, low, high)

    def _search(self, coarse: ErrorFn, fine: ErrorFn, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_symmetric:
            low, high = symmetric_limits(low, high, self.quant_min, self.quant_max)
        low, high = low.clamp(max=0), high.clamp(min=0)
        return search_range(coarse, fine, self.to_qparams, low, high, tied=self.is_symmetric)

    def _value_error(self, rows: Tensor) -> ErrorFn:
        return lambda scale, zero: value_error(rows, scale, zero, self.quant_min, self.quant_max, self.p)

    def _histogram_error(self, counts: Tensor, low: Tensor, high: Tensor) -> ErrorFn:
        edges = bin_edges(low, high, counts.shape[1])
        density = torch.nn.functional.pad(counts.to(edges.dtype) / edges.diff(dim=1), (1, 1))
        weights = density[:, :-1] - density[:, 1:]
        return lambda scale, zero: histogram_error(edges, weights, scale, zero, self.quant_min, self.quant_max, self.p)

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
        if stride == 1:
            own_low, own_high = torch.aminmax(rows, dim=1)
            low, high = torch.minimum(own_low, low), torch.maximum(own_high, high)
            return count_values(rows, low, high, self.bins), low, high
        blocks = block_extremes(rows)
        low, high = torch.minimum(blocks[0].amin(1), low), torch.maximum(blocks[1].amax(1), high)
        return estimate_counts(rows, blocks, low, high, self.bins, stride), low, high


@MODELS.register_module()
class MSEObserver(ErrorSearchObserver):
    """The range that minimises sum |x - fq(x)|^p over all data seen.

    There are two ways, told apart by ``exact``:

    * values (``exact=True``, the default per channel, meant for weights): the search runs on all values of a tensor as
      soon as it is observed, and the last tensor observed counts;
    * histogram (``exact=False``, the default per tensor, meant for activations): all batches are gathered in a
      histogram, and the search runs on that when parameters are computed. As long as no more than ``max_samples``
      values were seen, they are kept and searched instead (kept only in memory: a checkpoint has the histogram).

    Args:
        *args: See :class:`RangeObserver`.
        exact: Whether to search on the values of the last tensor instead of on a histogram of all; None: if per
            channel.
        **kwargs: See :class:`ErrorSearchObserver`.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, *args, exact: bool | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.exact = self.is_per_channel if exact is None else exact
        self.register_statistic('min_val', float('inf'))
        self.register_statistic('max_val', float('-inf'))
        if self.exact:
            self.register_statistic('best_min', 0.0)
            self.register_statistic('best_max', 0.0)
        else:
            self.register_statistic('counts', 0.0, trailing=(self.bins,))
        self._kept: list[Tensor] | None = []

    def reset(self) -> None:
        """Forget all data."""
        super().reset()
        self._kept = []

    def update(self, x: Tensor) -> None:
        """Search on ``x``, or add it to the histogram."""
        rows = self.rows(x).to(torch.float32)
        if self.exact:
            low, high = (v.reshape(-1) for v in extremes(x, self.ch_axis))
            self.min_val.copy_(low)
            self.max_val.copy_(high)
            best = self.search_values(rows, self.min_val, self.max_val)
            self.best_min.copy_(best[0])
            self.best_max.copy_(best[1])
        else:
            counts, low, high = self.count(rows, self.min_val, self.max_val)
            self.counts.copy_(counts.add_(rebin(self.counts, self.min_val, self.max_val, low, high)))
            self.min_val.copy_(low)
            self.max_val.copy_(high)
            self._keep(rows)

    def _keep(self, rows: Tensor) -> None:
        if self._kept is None:
            return
        kept = sum(r.numel() for r in self._kept) + rows.numel()
        if self.max_samples is not None and kept > self.max_samples:
            self._kept = None
        else:
            self._kept.append(rows.clone())

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the best range, each end of shape [C]."""
        if self.exact:
            low, high = self.best_min, self.best_max
        elif self._kept:
            low, high = self.search_values(torch.cat(self._kept, 1), self.min_val, self.max_val)
        else:
            low, high = self.search_histogram(self.counts, self.min_val, self.max_val)
        return unless_bad(low, high, self.min_val, self.max_val)

    def global_range(self) -> tuple[Tensor, Tensor]:
        """Give the best range for the data of all processes; in the mode ``exact`` the mean of their best ranges."""
        if world_size() == 1:
            return self.observed_range()
        low, high = reduce_min(self.min_val), reduce_max(self.max_val)
        if self.exact:
            best = [reduce_sum(v) / world_size() for v in (self.best_min, self.best_max)]
        else:
            counts = reduce_sum(rebin(self.counts, self.min_val, self.max_val, low, high))
            best = self.search_histogram(counts, low, high)
        return unless_bad(*best, low, high)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        # Values kept from before are not what the loaded statistics are about.
        self._kept = None


def unless_bad(low: Tensor, high: Tensor, least: Tensor, greatest: Tensor) -> tuple[Tensor, Tensor]:
    """Give a range found by search, or the extremes where those tell of no data or of NaN or infinite ones."""
    good = torch.isfinite(least) & torch.isfinite(greatest)
    return low.where(good, least), high.where(good, greatest)
