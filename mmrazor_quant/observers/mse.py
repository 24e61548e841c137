"""The range of least quantization error over all data seen."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.arguments import check_flag
from mmrazor_quant.registry import MODELS

from .error_search import best_for_histogram, best_for_values
from .extremes import extremes
from .histogram_base import HistogramBase, check_exponent, unless_bad


@MODELS.register_module()
class MSEObserver(HistogramBase):
    """The range that minimises sum |x - fq(x)|^p over all data seen.

    There are two ways, told apart by ``exact``:

    * values (``exact=True``, the default per channel, meant for weights): the search runs on all values of a tensor as
      soon as it is observed, and the last tensor observed counts;
    * histogram (``exact=False``, the default per tensor, meant for activations): all batches are gathered in a
      histogram, and the search runs on that when parameters are computed. As long as no more than ``max_samples``
      values were seen, they are kept and searched instead (kept only in memory: a checkpoint has the histogram).

    Where the processes of a distributed run observe jointly, no process has all values, and none are kept: the search
    runs on the joint histogram, of the last batch if ``exact``.

    Args:
        *args: See :class:`RangeObserver`.
        p: Exponent of the error.
        exact: Whether to search on the values of the last tensor instead of on a histogram of all; None: if per
            channel.
        **kwargs: See :class:`HistogramBase`.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, *args, p: float = 2.0, exact: bool | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.p = check_exponent(p)
        self.exact = self.is_per_channel if exact is None else check_flag('exact', exact)
        if self.exact:
            for name, initial in (('min_val', 'inf'), ('max_val', '-inf'), ('best_min', 0), ('best_max', 0)):
                self.register_statistic(name, float(initial))
        else:
            self.register_histogram()
        self._kept: list[Tensor] | None = []

    def reset(self) -> None:
        """Forget all data."""
        super().reset()
        self._kept = []

    def update(self, x: Tensor) -> None:
        """Search on ``x``, or add it to the histogram."""
        rows = self.rows(x).to(torch.float32)
        if not self.exact:
            self.gather(rows)
            self._keep(rows)
        elif self.is_reducing:
            self._search_joint_batch(rows)
        else:
            low, high = (v.reshape(-1) for v in extremes(x, self.ch_axis))
            self.min_val.copy_(low)
            self.max_val.copy_(high)
            best = best_for_values(self, rows, self.min_val, self.max_val, self.p)
            self.best_min.copy_(best[0])
            self.best_max.copy_(best[1])

    def _search_joint_batch(self, rows: Tensor) -> None:
        counts, low, high = self.count_batch(rows)
        best = best_for_histogram(self, counts, low, high, self.p)
        # If no process has data, the last batch that had some still counts.
        seen = ~(low > high)
        for name, value in zip(('min_val', 'max_val', 'best_min', 'best_max'), (low, high, *best)):
            statistic = getattr(self, name)
            statistic.copy_(value.where(seen, statistic))

    def _keep(self, rows: Tensor) -> None:
        if self._kept is None:
            return
        kept = sum(r.numel() for r in self._kept) + rows.numel()
        if self.is_reducing or (self.max_samples is not None and kept > self.max_samples):
            self._kept = None
        else:
            self._kept.append(rows.clone())

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the best range, each end of shape [C]."""
        if self.exact:
            low, high = self.best_min, self.best_max
        elif self._kept:
            low, high = best_for_values(self, torch.cat(self._kept, 1), self.min_val, self.max_val, self.p)
        else:
            low, high = best_for_histogram(self, self.counts, self.min_val, self.max_val, self.p)
        return unless_bad(low, high, self.min_val, self.max_val)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        # Values kept from before are not what the loaded statistics are about.
        self._kept = None
