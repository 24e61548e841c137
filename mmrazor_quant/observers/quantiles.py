"""Quantiles of values and of histograms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .histogram import bin_edges


def value_quantile(ordered: Tensor, share: float) -> Tensor:
    """Give a quantile of values, interpolated linearly between neighbours as NumPy does.

    Args:
        ordered: Ascending values, shape [C, K].
        share: Share of the values below the quantile, in [0, 1].

    Returns:
        Shape [C].
    """
    place = share * (ordered.shape[1] - 1)
    left = math.floor(place)
    right = min(left + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, left], ordered[:, right], place - left)


def histogram_quantile(counts: Tensor, low: Tensor, high: Tensor, share: float) -> Tensor:
    """Give a quantile of values known by a histogram, taken as spread evenly over each bin.

    Args:
        counts: Shape [C, bins].
        low: Lower ends of the histogram, shape [C].
        high: Upper ends, shape [C].
        share: Share of the values below the quantile, in [0, 1].

    Returns:
        float32, shape [C]; without meaning where there are no counts.
    """
    edges = bin_edges(low, high, counts.shape[1])
    found = _invert(edges, _below_edges(counts, edges.dtype), share).to(torch.float32)
    return found.clamp(low, high)  # a range of no width has bins of some


def magnitude_quantile(counts: Tensor, low: Tensor, high: Tensor, share: float) -> Tensor:
    """Give a quantile of the absolute values, otherwise as :func:`histogram_quantile`."""
    edges = bin_edges(low, high, counts.shape[1])
    below = _below_edges(counts, edges.dtype)
    # The share of values within [-t, t] is a straight line in t from each edge, of whatever sign, to the next one.
    knots = edges.abs().sort(1).values
    within = _interpolate(edges, below, knots) - _interpolate(edges, below, -knots)
    return _invert(knots, within, share).to(torch.float32).minimum(torch.maximum(-low, high))


def _below_edges(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Count the values below each edge, shape [C, bins + 1]."""
    return torch.nn.functional.pad(counts.to(dtype).cumsum(1), (1, 0))


def _interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Evaluate functions given by their values ``y`` at ascending ``x``, constant outside; all shapes [C, N]."""
    right = torch.searchsorted(x, at.contiguous()).clamp_(1, x.shape[1] - 1)
    x0, x1, y0, y1 = (v.gather(1, i) for v in (x, y) for i in (right - 1, right))
    return y0 + (y1 - y0) * _portion(x0, x1, at)


def _invert(x: Tensor, y: Tensor, share: float) -> Tensor:
    """Find where functions given by ascending ``y`` at ``x``, shape [C, N], first reach a share of their last value."""
    target = y[:, -1:] * share
    # Of a stretch without values, low shares take the upper end and high ones the lower: a range is not wider than its
    # values need.
    right = torch.searchsorted(y, target, right=share < 0.5).clamp_(1, x.shape[1] - 1)
    x0, x1, y0, y1 = (v.gather(1, i) for v in (x, y) for i in (right - 1, right))
    return (x0 + (x1 - x0) * _portion(y0, y1, target)).squeeze(1)


def _portion(start: Tensor, end: Tensor, at: Tensor) -> Tensor:
    """Tell how much of the way from start to end a place is, in [0, 1]."""
    width = end - start
    return ((at - start) / width.where(width > 0, 1.0)).clamp(0, 1)
