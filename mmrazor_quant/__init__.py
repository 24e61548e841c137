"""Quantization of OpenMMLab models: importing this package registers all of it under the scope ``mmrazor``."""

from mmrazor_quant import compat, engine, registry
from mmrazor_quant.version import __version__

__all__ = ['__version__', 'compat', 'engine', 'registry']
