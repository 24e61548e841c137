"""The start value of learned step sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.registry import MODELS

from .base import RangeObserver
from .histogram import exact_dtype


@MODELS.register_module()
class LSQObserver(RangeObserver):
    """The range of the scale that LSQ starts from: s = 2 mean|v| / sqrt(Qp), over all data seen.

    Esser et al., "Learned Step Size Quantization", ICLR 2020, section 2.1. Qp is the number of positive levels:

    * symmetric: the highest integer; that of the negative ones where it is 0 (1 bit);
    * asymmetric, data of one sign: all levels but zero, with the zero point at that end;
    * asymmetric, data of both signs: half of the levels, with the zero point in the middle. Of an odd number the end
      with the greater mean magnitude has one more.

    Args:
        *args: See :class:`RangeObserver`.
        **kwargs: See :class:`RangeObserver`.
    """

    positive: Tensor
    negative: Tensor
    count: Tensor

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Means over all values of max(v, 0) and max(-v, 0), and how many values there were.
        self.register_statistic('positive', 0.0)
        self.register_statistic('negative', 0.0)
        self.register_statistic('count', 0.0)

    def update(self, x: Tensor) -> None:
        """Take the values of ``x`` into the means."""
        rows = self.rows(x)
        dtype = exact_dtype(rows.device)
        positive, negative = (v.sum(1, dtype=dtype) for v in (rows.clamp(min=0), rows.clamp(max=0)))
        count = torch.full_like(positive, rows.shape[1])
        positive, negative, count = self.joint_sum(torch.stack([positive, -negative, count]))
        new = torch.stack([positive, negative]) / count.clamp(min=1)
        self.count.add_(count)
        weight = (count / self.count.clamp(min=1)).to(torch.float32)
        self.positive.lerp_(new[0].to(torch.float32), weight)
        self.negative.lerp_(new[1].to(torch.float32), weight)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the range whose scale is s, each end of shape [C]; empty where there were no data."""
        low, high = self._symmetric_range() if self.is_symmetric else self._asymmetric_range()
        unseen = self.count == 0
        return low.masked_fill(unseen, float('inf')), high.masked_fill(unseen, float('-inf'))

    def _mean_magnitude(self) -> Tensor:
        return (self.positive + self.negative).to(exact_dtype(self.positive.device))

    def _symmetric_range(self) -> tuple[Tensor, Tensor]:
        levels = self.quant_max if self.quant_max > 0 else -self.quant_min
        return self.range_of_scale(2 * self._mean_magnitude() / levels**0.5)

    def _asymmetric_range(self) -> tuple[Tensor, Tensor]:
        steps = self.quant_max - self.quant_min
        less, more = steps // 2, steps - steps // 2
        mean = self._mean_magnitude()
        has_both_signs = (self.positive > 0) & (self.negative > 0)
        levels = torch.where(has_both_signs, max(less, 1), steps).to(mean.dtype)
        scale = 2 * mean / levels.sqrt()
        down, up = torch.where(has_both_signs, less, 0), torch.where(has_both_signs, more, steps)
        is_positive = self.positive >= self.negative
        down, up = down.where(is_positive, up), up.where(is_positive, down)
        return (-down * scale).to(torch.float32), (up * scale).to(torch.float32)
