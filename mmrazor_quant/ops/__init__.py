"""The numerics as pure functions of tensors. Nothing here knows of modules or graphs."""

from .activated import fake_quantize_activated
from .dispatch import eager_mode, fake_quantize
from .dropped import fake_quantize_dropped
from .dynamic import SHARES, dynamic_qparams, shared_rows
from .folded import fake_quantize_folded
from .immediate import immediate_mode
from .learned import (
    fake_quantize_clip,
    fake_quantize_learned,
    fake_quantize_offset,
    fake_quantize_soft,
    unused,
)
from .normalized import BatchNorm, Quantization, fake_quantize_normalized
from .qparams import MIN_SCALE, effective_scale, qparams_from_range, round_to_power_of_two
from .reference import dequantize, integer_dtype, quantize, shift

__all__ = [
    'BatchNorm',
    'MIN_SCALE',
    'Quantization',
    'SHARES',
    'dequantize',
    'dynamic_qparams',
    'eager_mode',
    'effective_scale',
    'fake_quantize',
    'fake_quantize_activated',
    'fake_quantize_clip',
    'fake_quantize_dropped',
    'fake_quantize_folded',
    'fake_quantize_learned',
    'fake_quantize_normalized',
    'fake_quantize_offset',
    'fake_quantize_soft',
    'immediate_mode',
    'integer_dtype',
    'qparams_from_range',
    'quantize',
    'round_to_power_of_two',
    'shift',
    'shared_rows',
    'unused',
]
