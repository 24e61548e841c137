"""Trained quantization thresholds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.registry import MODELS

from .learned import LearnedFakeQuantize


@MODELS.register_module()
class TQTFakeQuantize(LearnedFakeQuantize):
    """TQT: the logarithm of the clipping threshold is learned (Jain et al. 2020, section 3).

    The scale is the threshold, rounded up to a power of two in schemes with power-of-two scales (those of the paper),
    over 2^(b-1) if signed and 2^b if not (eq. 3); its gradient is that of eq. 6 and 8.

    Args:
        *args: See :class:`FakeQuantize`.
        **kwargs: See :class:`FakeQuantize`.

    Raises:
        ValueError: An asymmetric scheme.

    Attributes:
        log2_threshold: float32, shape of ``scale``.
    """

    log2_threshold: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.is_symmetric:
            raise ValueError('is_symmetry: got False, allowed with TQTFakeQuantize: True (thresholds are symmetric)')

    def register_scale(self) -> None:
        """Register the scale as a buffer and the threshold as a parameter."""
        super().register_scale()
        self.log2_threshold = nn.Parameter(torch.zeros(1))

    @property
    def _log2_levels(self) -> int:
        """Base-2 logarithm of the steps between zero and the threshold."""
        return (self.quant_max - self.quant_min).bit_length() - (self.quant_min < 0)

    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the threshold; of those that round up to a power-of-two scale, the one in the middle."""
        self.log2_threshold.copy_(torch.log2(scale) + self._log2_levels - (0.5 if self.is_pot_scale else 0.0))

    def _learned_scale(self) -> Tensor:
        """Compute the scale, straight through the rounding of the logarithm."""
        log2 = self.log2_threshold
        if self.is_pot_scale:
            log2 = log2 + (torch.ceil(log2) - log2).detach()
        return torch.exp2(log2 - self._log2_levels)

    @torch.no_grad()
    def settle(self) -> None:
        """Set the scale to that of the threshold."""
        self.scale.copy_(ops.effective_scale(self._learned_scale(), self.is_pot_scale))

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize; see the base class."""
        self.settle()
        return ops.fake_quantize_learned(
            x, self._learned_scale(), self.zero_point, self.quant_min, self.quant_max, self.ch_axis,
            is_pot_scale=self.is_pot_scale,
        )  # fmt: skip
