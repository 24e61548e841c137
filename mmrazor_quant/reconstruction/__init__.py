"""Reconstruction: learning the rounding of weights and the steps of activations, unit by unit."""

from .methods import AdaRound, BRECQ, QDrop, Reconstruction
from .settings import Settings

__all__ = ['AdaRound', 'BRECQ', 'QDrop', 'Reconstruction', 'Settings']
