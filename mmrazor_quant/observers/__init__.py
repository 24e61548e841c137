"""Observers: each one estimates the range that a tensor is quantized to, per tensor or per channel."""

from .base import RangeObserver
from .ema_min_max import EMAMinMaxObserver
from .ema_mse import EMAMSEObserver
from .min_max import MinMaxObserver
from .mse import MSEObserver

__all__ = ['EMAMSEObserver', 'EMAMinMaxObserver', 'MSEObserver', 'MinMaxObserver', 'RangeObserver']
