"""The range whose quantized version is most like the distribution of all data seen."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.arguments import check_choice
from mmrazor_quant.registry import MODELS

from .divergence import histogram_divergence, parts_per_level
from .error_search import best_for_histogram
from .histogram_base import HistogramBase, check_exponent, unless_bad
from .range_search import best_range


@MODELS.register_module()
class HistogramObserver(HistogramBase):
    """The range that is best for a histogram of all data seen.

    * ``objective='kl'``: least Kullback-Leibler divergence between the distribution and its quantized version (Migacz
      2017, TensorRT's entropy calibration; see :mod:`.divergence`). Above ``bins / 4`` levels, from 10 bits on by
      default, the histogram shows no loss within a level, and the range is that of all data.
    * ``objective='mse'``: least error sum |x - fq(x)|^p, as :class:`MSEObserver` finds it on a histogram.

    Args:
        *args: See :class:`RangeObserver`.
        objective: ``'kl'`` or ``'mse'``.
        p: Exponent of the error of ``'mse'``; None: 2.
        **kwargs: See :class:`HistogramBase`.

    Raises:
        ValueError: An argument out of range, or an exponent for an objective that has none.
    """

    def __init__(self, *args, objective: str = 'kl', p: float | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.objective = check_choice('objective', objective, ('kl', 'mse'))
        if p is not None and objective != 'mse':
            raise ValueError(f"p: got {p!r} with objective={objective!r}, allowed: only with objective='mse'")
        self.p = 2.0 if p is None else check_exponent(p)
        self.register_histogram()

    def update(self, x: Tensor) -> None:
        """Add ``x`` to the histogram."""
        self.gather(self.rows(x).to(torch.float32))

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the best range, each end of shape [C]."""
        found = self._least_error() if self.objective == 'mse' else self._least_divergence()
        return unless_bad(*found, self.min_val, self.max_val)

    def _least_error(self) -> tuple[Tensor, Tensor]:
        return best_for_histogram(self, self.counts, self.min_val, self.max_val, self.p)

    def _least_divergence(self) -> tuple[Tensor, Tensor]:
        if not parts_per_level(self.bins, self.quant_min, self.quant_max):
            return self.min_val, self.max_val
        divergence = histogram_divergence(self.counts, self.min_val, self.max_val, self.quant_min, self.quant_max)
        return best_range(self, divergence, divergence, self.min_val, self.max_val)
