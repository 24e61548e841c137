"""The average of the batches' ranges of least quantization error."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.arguments import check_flag
from mmrazor_quant.registry import MODELS

from .ema_min_max import EMARangeObserver
from .error_search import best_for_histogram, best_for_values
from .extremes import extremes
from .histogram_base import HistogramBase, check_exponent, unless_bad


@MODELS.register_module()
class EMAMSEObserver(HistogramBase, EMARangeObserver):
    """Exponential moving average of the range that minimises sum |x - fq(x)|^p in each batch.

    Args:
        *args: See :class:`RangeObserver`.
        p: Exponent of the error.
        exact: Whether to search on all values of a batch instead of on a histogram; None: if per channel. Where the
            processes of a distributed run observe jointly, the search is on the joint histogram always.
        **kwargs: See :class:`HistogramBase` and :class:`EMARangeObserver`.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, *args, p: float = 2.0, exact: bool | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.p = check_exponent(p)
        self.exact = self.is_per_channel if exact is None else check_flag('exact', exact)

    def update(self, x: Tensor) -> None:
        """Average in the best range of ``x``."""
        rows = self.rows(x).to(torch.float32)
        if self.exact and not self.is_reducing:
            low, high = (v.reshape(-1).to(torch.float32) for v in extremes(x, self.ch_axis))
            best = best_for_values(self, rows, low, high, self.p)
        else:
            counts, low, high = self.count_batch(rows)
            best = best_for_histogram(self, counts, low, high, self.p)
        self.average(*unless_bad(*best, low, high))
