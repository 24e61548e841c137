"""The start value of learned step sizes and offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.arguments import check_number
from mmrazor_quant.registry import MODELS

from .base import RangeObserver
from .extremes import extremes
from .histogram import exact_dtype


@MODELS.register_module()
class LSQPlusObserver(RangeObserver):
    """The range that LSQ+ starts from: mean and standard deviation over all data seen.

    Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization", CVPRW
    2020, section 3.2. With mean mu, standard deviation sigma (of the population) and b bits,

    * symmetric: s = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1), over 2^b where no integer is negative;
    * asymmetric: the range [max(min, mu - 3 sigma), min(max, mu + 3 sigma)]. The paper leaves activations open.

    Args:
        *args: See :class:`RangeObserver`.
        sigmas: Number of standard deviations, the 3 above.
        **kwargs: See :class:`RangeObserver`.

    Raises:
        ValueError: ``sigmas`` not positive.
    """

    mean: Tensor
    deviation: Tensor
    count: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, *args, sigmas: float = 3.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sigmas = check_number('sigmas', sigmas, lambda v: v > 0, 'positive numbers')
        for name in ('mean', 'deviation', 'count'):
            self.register_statistic(name, 0.0)
        if not self.is_symmetric:
            self.register_statistic('min_val', float('inf'))
            self.register_statistic('max_val', float('-inf'))

    def update(self, x: Tensor) -> None:
        """Take the values of ``x`` into mean and standard deviation."""
        if not self.is_symmetric:
            low, high = self.joint_extremes(*extremes(x, self.ch_axis))
            torch.minimum(self.min_val, low, out=self.min_val)
            torch.maximum(self.max_val, high, out=self.max_val)
        mean, deviation, count = self._moments(self.rows(x).to(torch.float32))
        self.count.add_(count)
        # Of two sets with the shares 1 - w and w the variance is that within them and that between their means. Not
        # squared here, which could overflow.
        weight = (count / self.count.clamp(min=1)).to(torch.float32)
        rest = 1 - weight
        within = torch.hypot(self.deviation * rest.sqrt(), deviation * weight.sqrt())
        self.deviation.copy_(torch.hypot(within, (mean - self.mean) * (weight * rest).sqrt()))
        self.mean.lerp_(mean, weight)

    def _moments(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give mean, standard deviation and number of the values of each channel, of all processes together."""
        size = rows.shape[1]
        if size:
            deviation, mean = torch.std_mean(rows, dim=1, correction=0)
        else:
            deviation = mean = rows.new_zeros(rows.shape[0])
        if not self.is_reducing:
            return mean, deviation, torch.full_like(mean, size)
        first, second = (v.to(exact_dtype(rows.device)) for v in (mean, deviation))
        sums = self.joint_sum(torch.stack([first, first.square() + second.square(), torch.ones_like(first)]) * size)
        first, second = sums[:2] / sums[2].clamp(min=1)
        return first.to(mean.dtype), (second - first.square()).clamp(min=0).sqrt().to(mean.dtype), sums[2]

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the range, each end of shape [C]; empty where there were no data."""
        low, high = self._symmetric_range() if self.is_symmetric else self._asymmetric_range()
        unseen = self.count == 0
        return low.masked_fill(unseen, float('inf')), high.masked_fill(unseen, float('-inf'))

    def _symmetric_range(self) -> tuple[Tensor, Tensor]:
        bit = (self.quant_max - self.quant_min).bit_length()
        end = self.mean.abs() + self.sigmas * self.deviation
        return self.range_of_scale(end / 2 ** (bit - 1 if self.quant_min < 0 else bit))

    def _asymmetric_range(self) -> tuple[Tensor, Tensor]:
        # Rounding may have put the mean outside.
        mean = self.mean.clamp(self.min_val, self.max_val)
        width = self.sigmas * self.deviation
        return torch.maximum(self.min_val, mean - width), torch.minimum(self.max_val, mean + width)
