"""The range of least quantization error over all data seen."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.registry import MODELS

from .base import RangeObserver
from .distributed import reduce_max, reduce_min, reduce_sum, world_size
from .histogram import count_values, rebin, subsample
from .min_max import extremes
from .range_search import (
    Grid,
    histogram_error,
    line_stages,
    pair_stages,
    search_asymmetric,
    search_symmetric,
    value_error,
)


class ErrorSearchObserver(RangeObserver):
    """Base of the observers that search the range of least error sum |x - fq(x)|^p.

    Args:
        *args: See :class:`RangeObserver`.
        p: Exponent of the error.
        bins: Number of bins of the histograms.
        max_samples: How many values of a batch go into its histogram, in equal distances; None: all. The least and
            the greatest value are always those of the whole batch.
        **kwargs: See :class:`RangeObserver`.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, *args, p: float = 2.0, bins: int = 2048, max_samples: int | None = 2**17, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for name, value, least in (('p', p, 1e-3), ('bins', bins, 2), ('max_samples', max_samples, 1)):
            if value is not None and not value >= least:
                raise ValueError(f'{name}: got {value!r}, allowed: numbers from {least} up')
        self.p = p
        self.bins = bins
        self.max_samples = max_samples
        self.grid = Grid(self.quant_min, self.quant_max)

    def search_values(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Search on values of shape [C, K] with extremes of shape [C]; returns the ends of the best ranges."""
        return self._search(value_error(rows, self.grid, self.p), low, high, line_stages())

    def search_histogram(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Search on counts of shape [C, bins] over ranges of shape [C]; returns the ends of the best ranges."""
        return self._search(histogram_error(counts, low, high, self.grid, self.p), low, high, pair_stages())

    def _search(self, error, low, high, stages) -> tuple[Tensor, Tensor]:
        if self.is_symmetric:
            return search_symmetric(error, self.to_qparams, low, high, self.grid)
        return search_asymmetric(error, self.to_qparams, low, high, stages)


@MODELS.register_module()
class MSEObserver(ErrorSearchObserver):
    """The range that minimises sum |x - fq(x)|^p over all data seen.

    Two ways, told apart by ``exact``:

    * values (``exact=True``, the default per channel, meant for weights): the search runs on all values of the
      tensor as soon as it is observed, and the last tensor observed counts;
    * histogram (``exact=False``, the default per tensor, meant for activations): all batches are gathered in a
      histogram and the search runs on that when parameters are computed. As long as no more than ``max_samples``
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
        low, high = (v.reshape(-1).to(torch.float32) for v in extremes(x, self.ch_axis))
        rows = self.rows(x).to(torch.float32)
        if self.exact:
            self.min_val.copy_(low)
            self.max_val.copy_(high)
            best = self.search_values(rows, low, high)
            self.best_min.copy_(best[0])
            self.best_max.copy_(best[1])
        else:
            self._count(rows, low, high)
            self._keep(rows)

    def _count(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        low, high = torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)
        counts = rebin(self.counts, self.min_val, self.max_val, low, high)
        sample = subsample(rows, self.max_samples)
        counts += count_values(sample, low, high, self.bins) * (rows.shape[1] / sample.shape[1])
        self.counts.copy_(counts)
        self.min_val.copy_(low)
        self.max_val.copy_(high)

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
        return _unless_bad(low, self.min_val, self.max_val), _unless_bad(high, self.max_val, self.min_val)

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
        return _unless_bad(best[0], low, high), _unless_bad(best[1], high, low)


def _unless_bad(best: Tensor, extreme: Tensor, other: Tensor) -> Tensor:
    """Give ``extreme``, which tells of no data or of NaN and infinite ones, in place of ``best`` where it does."""
    return best.where(torch.isfinite(extreme) & torch.isfinite(other), extreme)
