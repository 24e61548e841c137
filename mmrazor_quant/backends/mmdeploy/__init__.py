"""Quantized models in mmdeploy 1.3: importing this package registers the codebase that mmdeploy asks for.

mmdeploy takes a config whose ``model.type`` starts with ``mmrazor.`` for one of the codebase ``mmrazor``. That codebase
is here; :func:`mmrazor_quant.compat.show_codebase_to_mmdeploy` has mmdeploy find it, so that naming ``mmrazor_quant``
in the ``custom_imports`` of a config is enough.
"""

from .codebase import QuantizedCodebase
from .rewriters import export_by_tracing
from .task import QuantizedTask

__all__ = ['QuantizedCodebase', 'QuantizedTask', 'export_by_tracing']
