"""Histograms of bounded size that grow their range: a one-pass statistic of everything seen.

Counts are per channel, shape [C, bins], over equal bins of the range [low, high] of that channel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exact_dtype(device: torch.device) -> torch.dtype:
    """Choose the type for sums over many counts: float64 where the device has it."""
    return torch.float32 if device.type == 'mps' else torch.float64


def subsample(rows: Tensor, max_samples: int | None) -> Tensor:
    """Take every n-th value of each row.

    Args:
        rows: Shape [C, K].
        max_samples: How many values to take of all rows together, roughly; None: all.

    Returns:
        Shape [C, k], a view.
    """
    count = rows.shape[1]
    if max_samples is None or rows.numel() <= max_samples:
        return rows
    stride = math.ceil(rows.numel() / max_samples)
    # A stride that shares a factor with the width of the rows would look at some columns only.
    while math.gcd(stride, count) > 1:
        stride += 1
    return rows[:, ::stride]


def count_values(rows: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Count values into bins.

    Args:
        rows: Shape [C, K]. Values outside the range go to the outermost bins.
        low: Lower ends of the ranges, shape [C].
        high: Upper ends, shape [C].
        bins: Number of bins.

    Returns:
        float32 counts, shape [C, bins].
    """
    channels = rows.shape[0]
    width = _bin_width(low, high, bins).unsqueeze(1)
    index = ((rows - low.unsqueeze(1)) / width).nan_to_num_(0.0, bins, 0.0).clamp_(0, bins - 1).to(torch.int64)
    if channels > 1:
        index += torch.arange(channels, device=rows.device).unsqueeze(1) * bins
    counts = torch.bincount(index.flatten(), minlength=channels * bins)
    return counts.view(channels, bins).to(torch.float32)


def rebin(counts: Tensor, low: Tensor, high: Tensor, new_low: Tensor, new_high: Tensor) -> Tensor:
    """Move counts to bins of another range that contains the old one, spreading each evenly over its old bin.

    Args:
        counts: Shape [C, bins].
        low: Lower ends of the old ranges, shape [C].
        high: Upper ends of the old ranges, shape [C].
        new_low: Lower ends of the new ranges, shape [C].
        new_high: Upper ends of the new ranges, shape [C].

    Returns:
        float32 counts, shape [C, bins], of the same sum per channel.
    """
    bins = counts.shape[1]
    dtype = exact_dtype(counts.device)
    below = torch.nn.functional.pad(counts.to(dtype).cumsum(1), (1, 0))
    edges = bin_edges(new_low.to(dtype), new_high.to(dtype), bins)
    # Clamped after the division: an old range without width has all its counts between two new edges.
    place = ((edges - low.to(dtype).unsqueeze(1)) / _bin_width(low, high, bins).to(dtype).unsqueeze(1)).clamp_(0, bins)
    left = place.floor().clamp_(max=bins - 1)
    index = left.to(torch.int64)
    start = below.gather(1, index)
    inside = counts.to(dtype).gather(1, index) * (place - left)
    return (start + inside).diff(dim=1).to(torch.float32)


def bin_edges(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Give the edges of the bins, shape [C, bins + 1], in the type of ``low``."""
    steps = torch.arange(bins + 1, device=low.device, dtype=low.dtype) / bins
    return torch.lerp(low.unsqueeze(1), high.unsqueeze(1), steps.unsqueeze(0))


def _bin_width(low: Tensor, high: Tensor, bins: int) -> Tensor:
    return ((high - low) / bins).clamp(min=torch.finfo(torch.float32).tiny)
