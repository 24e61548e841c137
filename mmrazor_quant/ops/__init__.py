"""The numerics as pure functions of tensors. Nothing here knows of modules or graphs."""

from .dispatch import eager_mode, fake_quantize
from .qparams import MIN_SCALE, qparams_from_range, round_to_power_of_two
from .reference import dequantize, integer_dtype, quantize

__all__ = [
    'MIN_SCALE',
    'dequantize',
    'eager_mode',
    'fake_quantize',
    'integer_dtype',
    'qparams_from_range',
    'quantize',
    'round_to_power_of_two',
]
