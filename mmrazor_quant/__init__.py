"""Quantization of OpenMMLab models: importing this package registers all of it under the scope ``mmrazor``."""

# compat comes first: it has to have run before anything loads a checkpoint or resolves a scope.
from mmrazor_quant import compat
from mmrazor_quant import registry

__version__ = '0.1.0'

__all__ = ['__version__', 'compat', 'registry']
