"""Reconstruction: learning the rounding of weights and the steps of activations, unit by unit."""

from .methods import BRECQ, AdaRound, QDrop, Reconstruction
from .settings import Settings

__all__ = ['AdaRound', 'BRECQ', 'QDrop', 'Reconstruction', 'Settings']
