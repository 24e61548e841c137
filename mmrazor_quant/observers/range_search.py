"""Search for the range of least quantization error, for many channels at once, coarse to fine."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mmrazor_quant.ops import eager_mode

from .base import RangeObserver

ErrorFn = Callable[[Tensor, Tensor], Tensor]
"""From scale and zero point of M candidates, shape [M, C], to their errors, shape [M, C]."""

QParamsFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From lower and upper ends of ranges to scale and zero point, of the same shape."""

Stages = tuple[tuple[Tensor, Tensor], ...]
"""Per stage M factors for the lower and M for the upper end, relative to the best range so far."""


def best_range(
    observer: RangeObserver, coarse: ErrorFn, fine: ErrorFn, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the best range of an observer's grid inside [low, high].

    Args:
        observer: Whose grid it is.
        coarse: As in :func:`search_range`.
        fine: As in :func:`search_range`.
        low: Lowest ends, shape [C].
        high: Highest ends, shape [C].

    Returns:
        Lower and upper ends of the best ranges, shape [C].
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    # Of two candidates that are as good, compiled and eager code may prefer different ones. Each process decides for
    # itself when to compile, but all of them have to find the same range.
    with eager_mode() if observer.is_reducing else contextlib.nullcontext():
        return search_range(coarse, fine, observer.to_qparams, low, high, tied=observer.is_symmetric)


def search_range(
    coarse: ErrorFn, fine: ErrorFn, to_qparams: QParamsFn, low: Tensor, high: Tensor, tied: bool
) -> tuple[Tensor, Tensor]:
    """Find the best range [a, b] inside [low, high].

    Args:
        coarse: Error of candidates, to find the region of the best ones.
        fine: Error of candidates, to decide between its members; may cost more.
        to_qparams: Scale and zero point of candidates.
        low: Lowest ends, shape [C], not above 0.
        high: Highest ends, shape [C], not below 0.
        tied: Whether both ends shrink by the same factor. Otherwise all pairs of ends are tried, since the error has
            several minima at few bits.

    Returns:
        Lower and upper ends of the best ranges, shape [C].
    """
    coarse_stages, fine_stages = _tied_stages() if tied else _pair_stages()
    best = _search(coarse, to_qparams, (low, high), (low, high), coarse_stages)
    return _search(fine, to_qparams, (low, high), best, fine_stages)


def _search(
    error: ErrorFn, to_qparams: QParamsFn, limits: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor], stages: Stages
) -> tuple[Tensor, Tensor]:
    (low, high), (best_low, best_high) = limits, best
    for shrink_low, shrink_high in stages:
        a = (best_low * shrink_low.to(low.device)).maximum(low)
        b = (best_high * shrink_high.to(low.device)).minimum(high)
        pick = error(*to_qparams(a, b)).argmin(0, keepdim=True)
        best_low, best_high = a.gather(0, pick)[0], b.gather(0, pick)[0]
    return best_low, best_high


def symmetric_limits(low: Tensor, high: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Give the widest range [-t, t] that is worth trying for data in [low, high].

    Args:
        low: Least values, shape [C].
        high: Greatest values, shape [C].
        quant_min: Lowest integer.
        quant_max: Highest integer.

    Returns:
        Lower and upper ends, shape [C].
    """
    t = torch.maximum(-low, high).clamp(min=0)
    if quant_max > 0:
        # Scales are ranges divided by half of the integers. With one positive integer less than negative ones, the
        # scale at which no positive value is clipped belongs to a slightly wider range.
        t = t * max(1.0, (quant_max - quant_min) / 2 / quant_max)
    return -t, t


def _down(factor: float, count: int) -> Tensor:
    """Factors 1, f, f^2, ..., shape [count, 1]."""
    return (factor ** torch.arange(count, dtype=torch.float32)).unsqueeze(1)


def _around(factor: float, half: int) -> Tensor:
    """Factors from f to 1 / f in equal ratios, shape [2 half + 1, 1]."""
    return (factor ** (torch.arange(-half, half + 1, dtype=torch.float32) / half)).unsqueeze(1)


def _pairs(a: Tensor) -> tuple[Tensor, Tensor]:
    return a.repeat_interleave(len(a), 0), a.repeat(len(a), 1)


@functools.cache
def _tied_stages() -> tuple[Stages, Stages]:
    with torch.inference_mode(False):  # to serve in all modes
        coarse = [_down(0.84, 36)]
        fine = [_around(0.84, 6), _around(0.97, 4), _around(0.992, 3)]
        return tuple((f, f) for f in coarse), tuple((f, f) for f in fine)


@functools.cache
def _pair_stages() -> tuple[Stages, Stages]:
    with torch.inference_mode(False):
        coarse = [_down(0.7, 16), _around(0.7, 3)]
        fine = [_around(f, 2) for f in (0.94, 0.975, 0.992)]
        return tuple(_pairs(f) for f in coarse), tuple(_pairs(f) for f in fine)
