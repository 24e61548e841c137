"""Capturing the forward of submodules as graphs over the modules themselves."""

from .errors import CaptureError, DataDependentError
from .finder import find_islands
from .island import Island, islands_of
from .tracer import CustomTracer
from .untraced import UntracedMethodRegistry

__all__ = [
    'CaptureError',
    'CustomTracer',
    'DataDependentError',
    'Island',
    'UntracedMethodRegistry',
    'find_islands',
    'islands_of',
]
