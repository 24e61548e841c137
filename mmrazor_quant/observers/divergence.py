"""Kullback-Leibler divergence between values and their quantized version, of many candidate scales at once.

After S. Migacz, "8-bit Inference with TensorRT", GTC 2017. There, the histogram of |x| has 2048 equal bins, candidates
are its first i bins, at least 128 of them, and both distributions are normalised. Here

* every level of a candidate's grid is cut into the same number of parts. So all candidates are judged at the same
  resolution relative to their steps, wide ranges with outliers do not run out of bins, and data of both signs and any
  zero point are nothing special;
* the quantized distribution lacks what is clipped, instead of being normalised again: without a lower limit to the
  candidates, one that clips nearly everything would look good;
* values of zero, half of those behind a ReLU, do not count, since zero is on every grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .histogram import bin_positions, bins_at_zero, exact_dtype
from .range_search import ErrorFn

END = 8
"""Clipped values are put into the outermost portion of the outermost level, of one in this many."""

MIN_PARTS = 2

_GROUP_NUMEL = 2**20
"""Candidates go in groups of about this many parts, which bounds the memory."""

_FLOOR = 1e-9
"""Least probability of the quantized values: the divergence from 0 would be infinite."""

_TIE = 1e-9
"""Bonus of the widest candidate, to decide between equally good ones."""


def parts_per_level(bins: int, quant_min: int, quant_max: int) -> int:
    """Choose the number of parts per level: half as many altogether as bins, so that a bin hardly shows as a bin.

    Args:
        bins: Number of bins of the histogram.
        quant_min: Lowest integer.
        quant_max: Highest integer.

    Returns:
        Number of parts; 0 where there are too many levels for any difference within one to show.
    """
    parts = bins // 2 // (quant_max - quant_min + 1)
    return parts if parts >= MIN_PARTS else 0


def histogram_divergence(counts: Tensor, low: Tensor, high: Tensor, quant_min: int, quant_max: int) -> ErrorFn:
    r"""Give the function from candidates to the divergence of values known by a histogram.

    A level k of a grid takes the values x with (k - z - 1/2) s <= x < (k - z + 1/2) s. Of N values, with n_i of them in
    part i of the parts of all levels and c_i clipped ones put there (none but at both ends),

    .. math:: P_i = \frac{n_i + c_i}{N}, \quad Q_i = \frac{1}{N} \frac{\sum_{j \in k(i)} n_j}{|\{j \in k(i):
        P_j > 0\}|} [P_i > 0], \quad D = \sum_i P_i \log \frac{P_i}{Q_i}.

    Args:
        counts: Shape [C, bins].
        low: Lower ends of the histogram, shape [C].
        high: Upper ends, shape [C].
        quant_min: Lowest integer.
        quant_max: Highest integer.

    Returns:
        Function from scale and zero point of M candidates, shape [M, C], to D, shape [M, C].
    """
    bins = counts.shape[1]
    parts = parts_per_level(bins, quant_min, quant_max)
    dtype = exact_dtype(counts.device)
    counts = counts.to(dtype).masked_fill(bins_at_zero(low, high, bins), 0.0)
    below = counts.cumsum(1) - counts
    cuts = torch.arange((quant_max - quant_min + 1) * parts + 1, dtype=dtype, device=counts.device)
    cuts = cuts / parts + (quant_min - 0.5)

    def below_cuts(scale: Tensor, zero_point: Tensor, channel: Tensor) -> Tensor:
        """Count the values below each cut, for N pairs of candidate and channel; shape [N, parts + 1]."""
        x = (cuts - zero_point.unsqueeze(1)) * scale.unsqueeze(1)
        place = bin_positions(x, low[channel], high[channel], bins)
        left = place.to(torch.int64).clamp_(max=bins - 1)
        index = left + (channel * bins).unsqueeze(1)
        return below.take(index) + counts.take(index) * (place - left)

    def divergence(scale: Tensor, zero_point: Tensor) -> Tensor:
        channel = torch.arange(scale.shape[1], device=scale.device).expand_as(scale)
        pairs = [v.reshape(-1).split(max(1, _GROUP_NUMEL // len(cuts))) for v in (scale, zero_point, channel)]
        found = [_divergence(below_cuts(s, z, c), counts.sum(1)[c], parts) for s, z, c in zip(*pairs)]
        # Of candidates that are equally good the widest one: values half a step beyond the last level are rounded to it
        # and not clipped, which the divergence does not mind.
        return torch.cat(found).view_as(scale) - _TIE * scale / scale.amax(0)

    return divergence


def _divergence(below: Tensor, total: Tensor, parts: int) -> Tensor:
    """Compute D of N grids from the counts below each cut, shape [N, levels * parts + 1], and of all values, [N]."""
    # Rounding can make a count negative.
    inside = below.diff(dim=1).clamp_(min=0)
    reference = inside.clone()
    end = max(1, parts // END)
    total = total.unsqueeze(1)
    reference[:, :end] += below[:, :1] / end
    reference[:, -end:] += (total - below[:, -1:]).clamp_(min=0) / end
    occupied = (reference > _FLOOR * total).unflatten(1, (-1, parts))
    levels = inside.unflatten(1, (-1, parts)).sum(2, keepdim=True) / occupied.sum(2, keepdim=True).clamp(min=1)
    total = total.clamp(min=1e-30)
    p, q = reference / total, (levels * occupied).flatten(1) / total
    return (torch.xlogy(p, p) - p * q.clamp_(min=_FLOOR).log_()).sum(1)
