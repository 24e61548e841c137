"""Histograms of bounded size that grow their range: a one-pass statistic of everything seen.

Bins are equally wide in sign(x) sqrt|x|, so that they are narrow near zero, where most values are, even when a few
outliers make the range wide. Counts are per channel, shape [C, bins], over the range [low, high] of that channel.

Counting every value of a large batch would cost as much as the layer that made it, so the bulk is counted from a
sample. Its tails are not: a clipped outlier weighs as its distance to the power p, and a sample would miss it or count
it many times over. They are taken from the extremes of many small blocks, which cost two passes over memory and find
each value that is alone in its block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 61
"""Values per block. Prime, so that the members of a block do not lie at the same place of all images of a batch."""

MIN_BLOCKS = 64
"""Rows with fewer blocks are counted in full."""

TAIL = 1 / 256
"""Share of the values that counts as tail: about a quarter of the blocks have one of them."""


def exact_dtype(device: torch.device) -> torch.dtype:
    """Choose the type for sums over many counts: float64 where the device has it."""
    return torch.float32 if device.type == 'mps' else torch.float64


def sample_stride(rows: Tensor, max_samples: int | None) -> int:
    """Choose the distance of the sampled values within a row.

    Args:
        rows: Shape [C, K].
        max_samples: How many values to take of all rows together, roughly; None: all.

    Returns:
        1 if all values are taken.
    """
    count = rows.shape[1]
    if max_samples is None or rows.numel() <= max_samples or count < BLOCK * MIN_BLOCKS:
        return 1
    stride = math.ceil(rows.numel() / max_samples)
    # A stride that shares a factor with the sizes of the tensor would look at some columns or channels only.
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def block_extremes(rows: Tensor) -> Tensor:
    """Give the extremes of blocks of :data:`BLOCK` values, spread over each row.

    Args:
        rows: Shape [C, K], K at least BLOCK.

    Returns:
        Least and greatest values of the blocks, shape [2, C, blocks]; NaN where a block has NaN.
    """
    blocks = rows.shape[1] // BLOCK
    members = rows[:, : blocks * BLOCK].unflatten(1, (BLOCK, blocks))
    rest = rows[:, -BLOCK:].unsqueeze(2)
    low = torch.cat([members.amin(1), rest.amin(1)], 1)
    high = torch.cat([members.amax(1), rest.amax(1)], 1)
    return torch.stack([low, high])


def count_values(values: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Count values into bins.

    Args:
        values: Shape [..., C, K]. Values outside the range go to the outermost bins.
        low: Lower ends of the ranges, shape [C].
        high: Upper ends, shape [C].
        bins: Number of bins.

    Returns:
        float32 counts, shape [..., C, bins].
    """
    return _count_into(values, _bins(low, high, bins), bins)


def _count_into(values: Tensor, start_width: tuple[Tensor, Tensor], bins: int) -> Tensor:
    start, width = start_width
    # Clamped as integers: also what NaN becomes is then inside.
    index = (_compress(values) - start).mul_(1.0 / width).to(torch.int32).clamp_(0, bins - 1)
    rows = math.prod(values.shape[:-1])
    if rows > 1:
        offsets = torch.arange(0, rows * bins, bins, device=values.device, dtype=torch.int32)
        index += offsets.view(*values.shape[:-1], 1)
    counts = torch.bincount(index.flatten(), minlength=rows * bins)
    return counts.view(*values.shape[:-1], bins).to(torch.float32)


def estimate_counts(rows: Tensor, extremes: Tensor, low: Tensor, high: Tensor, bins: int, stride: int) -> Tensor:
    """Count values into bins from a sample and from the extremes of blocks.

    Args:
        rows: Shape [C, K].
        extremes: Of :func:`block_extremes`.
        low: Lower ends of the ranges, shape [C].
        high: Upper ends, shape [C].
        bins: Number of bins.
        stride: Distance of the sampled values in a row.

    Returns:
        float32 estimates of the counts of all K values, shape [C, bins].
    """
    # Contiguous: it is read several times.
    sample = rows[:, ::stride].contiguous()
    ratio = rows.shape[1] / sample.shape[1]
    start_width = _bins(low, high, bins)
    sampled = _count_into(sample, start_width, bins)
    blocks = _count_into(extremes, start_width, bins)
    # Both tails at once, the lower one first. Sums from the ends inwards, in the order of the bins.
    tail, known = _tails(torch.stack([sampled, sampled]), blocks, ratio, extremes.shape[2])
    counts = torch.where(known[1], tail[1], sampled * ratio)
    return torch.where(known[0], tail[0], counts)


def _tails(sampled: Tensor, blocks: Tensor, ratio: float, block_count: int) -> tuple[Tensor, Tensor]:
    """Estimate the counts of both tails from the minima and maxima of blocks.

    Args:
        sampled: Counts of the sample, twice, shape [2, C, bins].
        blocks: Counts of the block minima and maxima, the same shape.
        ratio: Values per sampled value.
        block_count: Number of blocks.

    Returns:
        Estimated counts, and where they are to be used: from the bin outwards beyond which there are few samples.
    """
    samples_beyond = _sums_beyond(sampled)
    # Of values spread at random, N fall on B blocks so that B (1 - exp(-N / B)) blocks have at least one.
    beyond = -block_count * torch.log1p(-(_sums_beyond(blocks) / block_count).clamp(max=0.9))
    few = samples_beyond < TAIL * sampled.sum(-1, keepdim=True)
    # Values that are not spread at random but share blocks: the sample has significantly more of them.
    crowded = samples_beyond - 3 * (samples_beyond + 1).sqrt() > beyond / ratio
    padded = torch.nn.functional.pad(beyond, (1, 1))
    counts = beyond - torch.stack([padded[0, :, :-2], padded[1, :, 2:]])
    return counts, few & ~crowded


def _sums_beyond(counts: Tensor) -> Tensor:
    """Sum, for each bin, from it outwards: of the first of two to the first bin, of the second to the last one."""
    return torch.stack([counts[0].cumsum(-1), counts[1].flip(-1).cumsum(-1).flip(-1)])


def rebin(counts: Tensor, low: Tensor, high: Tensor, new_low: Tensor, new_high: Tensor) -> Tensor:
    """Move counts to bins of another range that contains the old one, spread evenly over the old ones.

    Args:
        counts: Shape [C, bins].
        low: Lower ends of the old ranges, shape [C]; not finite if there are no counts yet.
        high: Upper ends of the old ranges, shape [C].
        new_low: Lower ends of the new ranges, shape [C].
        new_high: Upper ends of the new ranges, shape [C].

    Returns:
        float32 counts, shape [C, bins], of the same sum per channel.
    """
    bins = counts.shape[1]
    dtype = exact_dtype(counts.device)
    # Both ranges at once: on few channels a call costs more than what it computes.
    ends = torch.stack([low, new_low, high, new_high]).to(dtype).unflatten(0, (2, 2))
    (start, new_start), (width, new_width) = _bins(*ends, bins)
    place = (new_start + new_width * _steps(new_start, bins) - start) / width
    # Ranges that are not finite have no counts to lose.
    place = place.nan_to_num_(0.0).clamp_(0, bins)
    # The outermost edges of an unchanged range must not lose anything to rounding.
    place[:, 0], place[:, -1] = 0.0, bins
    left = place.floor().clamp_(max=bins - 1)
    index = left.to(torch.int64)
    counts = counts.to(dtype)
    below = counts.cumsum(1) - counts
    return (below.gather(1, index) + counts.gather(1, index) * (place - left)).diff(dim=1).to(torch.float32)


def bin_edges(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Give the edges of the bins.

    Args:
        low: Lower ends of the ranges, shape [C].
        high: Upper ends, shape [C].
        bins: Number of bins.

    Returns:
        Ascending edges, shape [C, bins + 1], in the type of :func:`exact_dtype`.
    """
    dtype = exact_dtype(low.device)
    start, width = _bins(low.to(dtype), high.to(dtype), bins)
    edges = start + width * _steps(start, bins)
    return edges * edges.abs()


def bin_positions(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Tell where among the bins values lie.

    Args:
        x: Values, shape [C, N], in the type of :func:`exact_dtype`.
        low: Lower ends of the ranges, shape [C].
        high: Upper ends, shape [C].
        bins: Number of bins.

    Returns:
        Shape [C, N]: i + f for a value at the portion f of bin i, from 0 to ``bins``. 0 where a range is not finite.
    """
    start, width = _bins(low.to(x.dtype), high.to(x.dtype), bins)
    return ((_compress(x) - start) / width).nan_to_num_(0.0).clamp_(0, bins)


def bins_at_zero(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Tell which bins values of zero are in, where rounding or :func:`rebin` may have spread them over neighbours.

    Args:
        low: Lower ends of the ranges, shape [C].
        high: Upper ends, shape [C].
        bins: Number of bins.

    Returns:
        bool, shape [C, bins].
    """
    dtype = exact_dtype(low.device)
    start, width = _bins(low.to(dtype), high.to(dtype), bins)
    centers = start + width * (_steps(start, bins)[:-1] + 0.5)
    return centers.abs() < 1.25 * width


def _compress(x: Tensor) -> Tensor:
    return x.abs().sqrt_().copysign_(x)


def _steps(like: Tensor, bins: int) -> Tensor:
    return torch.arange(bins + 1, device=like.device, dtype=like.dtype)


def _bins(low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Give start and width of the bins of sign(x) sqrt|x|, shape [..., C, 1]; a width also where the range has none."""
    start, end = _compress(torch.stack([low, high]))
    # Not 0, nor so small that float32 and float64 cannot tell the edges of a far-off range from each other.
    width = torch.maximum((end - start) / bins, 1e-7 * end.abs() + 1e-19)
    return start.unsqueeze(-1), width.unsqueeze(-1)
