"""The average of the batches' ranges of least quantization error."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.registry import MODELS

from .ema_min_max import EMARangeObserver
from .min_max import extremes
from .mse import ErrorSearchObserver, unless_bad


@MODELS.register_module()
class EMAMSEObserver(ErrorSearchObserver, EMARangeObserver):
    """Exponential moving average of the range that minimises sum |x - fq(x)|^p in each batch.

    Args:
        *args: See :class:`RangeObserver`.
        exact: Whether to search on all values of a batch instead of on a histogram; None: if per channel.
        **kwargs: See :class:`ErrorSearchObserver` and :class:`EMARangeObserver`.
    """

    def __init__(self, *args, exact: bool | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.exact = self.is_per_channel if exact is None else exact

    def update(self, x: Tensor) -> None:
        """Average in the best range of ``x``."""
        rows = self.rows(x).to(torch.float32)
        if self.exact:
            low, high = (v.reshape(-1).to(torch.float32) for v in extremes(x, self.ch_axis))
            best = self.search_values(rows, low, high)
        else:
            nothing = torch.full_like(self.min_val, float('inf'))
            counts, low, high = self.count(rows, nothing, -nothing)
            best = self.search_histogram(counts, low, high)
        self.average(*unless_bad(*best, low, high))
