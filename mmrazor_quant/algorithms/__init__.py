"""Algorithms: what a config names as its model."""

from .general_quant import GeneralQuant

__all__ = ['GeneralQuant']
