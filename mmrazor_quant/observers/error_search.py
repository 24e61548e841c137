"""The range of least quantization error sum |x - fq(x)|^p, on values and on histograms."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.ops.error import histogram_error, value_error

from .base import RangeObserver
from .histogram import bin_edges, count_values
from .range_search import ErrorFn, best_range, symmetric_limits

COARSE_BINS = 256
"""Bins of the histograms that a search starts on, before it goes on to values or to a histogram of more bins."""

MAX_VALUES = 4 * COARSE_BINS
"""Up to so many values per channel are searched without a histogram: a bin, in float64, costs as much as four."""


def best_for_values(
    observer: RangeObserver, rows: Tensor, low: Tensor, high: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """Search on values.

    Args:
        observer: Whose grid it is.
        rows: float32, shape [C, K].
        low: Least values, shape [C].
        high: Greatest values, shape [C].
        p: Exponent of the error.

    Returns:
        Lower and upper ends of the best ranges, shape [C].
    """

    def fine(scale: Tensor, zero_point: Tensor) -> Tensor:
        return value_error(rows, scale, zero_point, observer.quant_min, observer.quant_max, p)

    if rows.shape[1] <= MAX_VALUES:
        return _best_range(observer, fine, fine, low, high)
    counts = count_values(rows, low, high, COARSE_BINS)
    return _best_range(observer, _histogram_error(observer, counts, low, high, p), fine, low, high)


def best_for_histogram(
    observer: RangeObserver, counts: Tensor, low: Tensor, high: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """Search on a histogram.

    Args:
        observer: Whose grid it is.
        counts: Shape [C, bins].
        low: Lower ends of the histogram, shape [C].
        high: Upper ends, shape [C].
        p: Exponent of the error.

    Returns:
        Lower and upper ends of the best ranges, shape [C].
    """
    fine = _histogram_error(observer, counts, low, high, p)
    per_bin, rest = divmod(counts.shape[1], COARSE_BINS)
    if per_bin < 2 or rest:
        return _best_range(observer, fine, fine, low, high)
    coarse = _histogram_error(observer, counts.unflatten(1, (-1, per_bin)).sum(2), low, high, p)
    return _best_range(observer, coarse, fine, low, high)


def _best_range(
    observer: RangeObserver, coarse: ErrorFn, fine: ErrorFn, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    if observer.is_symmetric:
        low, high = symmetric_limits(low, high, observer.quant_min, observer.quant_max)
    return best_range(observer, coarse, fine, low, high)


def _histogram_error(observer: RangeObserver, counts: Tensor, low: Tensor, high: Tensor, p: float) -> ErrorFn:
    edges = bin_edges(low, high, counts.shape[1])
    density = torch.nn.functional.pad(counts.to(edges.dtype) / edges.diff(dim=1), (1, 1))
    weights = density[:, :-1] - density[:, 1:]

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        return histogram_error(edges, weights, scale, zero_point, observer.quant_min, observer.quant_max, p)

    return error
