"""Fake quantizers: modules that round tensors to an integer grid and give them back as floats."""

from .build import build_fake_quant
from .fake_quantize import FakeQuantize

__all__ = ['FakeQuantize', 'build_fake_quant']
