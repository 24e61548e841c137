"""Observers: each one estimates the range that a tensor is quantized to, per tensor or per channel."""

from .base import RangeObserver
from .ema_min_max import EMAMinMaxObserver
from .ema_mse import EMAMSEObserver
from .ema_percentile import EMAPercentileObserver
from .extremes import ExtremesObserver
from .fixed_range import FixedRangeObserver
from .histogram_observer import HistogramObserver
from .lsq import LSQObserver
from .lsq_plus import LSQPlusObserver
from .min_max import MinMaxObserver
from .mse import MSEObserver
from .percentile import PercentileObserver

__all__ = [
    'EMAMSEObserver',
    'EMAMinMaxObserver',
    'EMAPercentileObserver',
    'ExtremesObserver',
    'FixedRangeObserver',
    'HistogramObserver',
    'LSQObserver',
    'LSQPlusObserver',
    'MSEObserver',
    'MinMaxObserver',
    'PercentileObserver',
    'RangeObserver',
]
