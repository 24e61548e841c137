"""Fake quantizers: modules that round tensors to an integer grid and give them back as floats."""

from .adaround import AdaRoundFakeQuantize
from .build import build_fake_quant
from .dorefa import DoReFaFakeQuantize
from .dsq import DSQFakeQuantize
from .dynamic import DynamicFakeQuantize
from .fake_quantize import FakeQuantize
from .learned import LearnedFakeQuantize
from .lsq import LSQFakeQuantize
from .lsq_plus import LSQPlusFakeQuantize
from .pact import PACTFakeQuantize
from .qdrop import QDropFakeQuantize
from .tqt import TQTFakeQuantize

__all__ = [
    'AdaRoundFakeQuantize',
    'DSQFakeQuantize',
    'DoReFaFakeQuantize',
    'DynamicFakeQuantize',
    'FakeQuantize',
    'LSQFakeQuantize',
    'LSQPlusFakeQuantize',
    'LearnedFakeQuantize',
    'PACTFakeQuantize',
    'QDropFakeQuantize',
    'TQTFakeQuantize',
    'build_fake_quant',
]
