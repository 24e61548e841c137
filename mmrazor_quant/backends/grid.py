"""The grid of a fake quantizer as numbers, which is all that a backend knows of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from mmrazor_quant.fake_quants import FakeQuantize, LSQPlusFakeQuantize


@dataclass(frozen=True)
class QuantGrid:
    """Real values ``(q - zero_point) * scale`` for integers q from ``quant_min`` to ``quant_max``.

    Args:
        scale: float32, shape [1] or [C].
        zero_point: int64, the same shape.
        quant_min: lowest integer.
        quant_max: highest integer.
        ch_axis: dimension of the channels; -1: per tensor.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    quant_min: int
    quant_max: int
    ch_axis: int

    @staticmethod
    def of(quantizer: nn.Module, path: str) -> QuantGrid:
        """Returns the grid that a calibrated or trained fake quantizer quantizes to.

        Args:
            quantizer: the fake quantizer.
            path: its path, for messages.

        Raises:
            ValueError: it has no such grid: its offset is not a whole number of steps.
        """
        if isinstance(quantizer, LSQPlusFakeQuantize) and quantizer.offset is not None:
            raise ValueError(
                f'{path}: the offset of an asymmetric LSQPlusFakeQuantize is no whole number of steps, which no '
                'backend can run; use LSQFakeQuantize, or a symmetric scheme'
            )
        if isinstance(quantizer, FakeQuantize):
            quantizer.settle()
            scale = quantizer.scale_in_use()
        else:
            scale = quantizer.scale
        return QuantGrid(
            scale.detach().cpu().float().numpy().reshape(-1),
            quantizer.zero_point.detach().cpu().numpy().astype(np.int64).reshape(-1),
            quantizer.quant_min,
            quantizer.quant_max,
            quantizer.ch_axis if quantizer.is_per_channel else -1,
        )

    def integers(self, values: np.ndarray) -> np.ndarray:
        """Quantizes values with the arithmetic of training: by the reciprocal of the scale.

        Args:
            values: float32, any shape.

        Returns:
            int64, the same shape.
        """
        shape = [-1 if d == self.ch_axis else 1 for d in range(values.ndim)]
        inverse = (np.float32(1.0) / self.scale).reshape(shape)
        zero_point = self.zero_point.reshape(shape)
        return np.clip(np.rint(values * inverse).astype(np.int64) + zero_point, self.quant_min, self.quant_max)
