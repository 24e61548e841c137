"""Quantizers: where fake quantizers go, and how."""

from .custom_quantizer import CustomQuantizer
from .qconfig import QConfig

__all__ = ['CustomQuantizer', 'QConfig']
