"""Quantization of OpenMMLab models: importing this package registers all of it under the scope ``mmrazor``."""

from mmrazor_quant import (
    algorithms,
    compat,
    engine,
    fake_quants,
    observers,
    ptq_steps,
    quantizers,
    reconstruction,
    registry,
    tracing,
)
from mmrazor_quant.version import __version__

__all__ = [
    '__version__',
    'algorithms',
    'compat',
    'engine',
    'fake_quants',
    'observers',
    'ptq_steps',
    'quantizers',
    'reconstruction',
    'registry',
    'tracing',
]
