"""What the fake quantizers share that learn the range they clip to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrazor_quant import ops

from .learned import LearnedFakeQuantize


class LearnedRangeFakeQuantize(LearnedFakeQuantize):
    """Base of the fake quantizers with a learned clip range, whose scale and zero point follow from it.

    The range is [lower, upper] in asymmetric schemes, [-upper, upper] in symmetric signed and [0, upper] in symmetric
    unsigned ones.

    Args:
        *args: See :class:`FakeQuantize`.
        **kwargs: See :class:`FakeQuantize`.

    Attributes:
        upper: Upper end of the range, float32, shape of ``scale``.
        lower: Lower end, likewise; None in symmetric schemes.
    """

    upper: nn.Parameter
    lower: nn.Parameter | None

    def register_scale(self) -> None:
        """Register the scale as a buffer and the range as parameters."""
        super().register_scale()
        self.upper = nn.Parameter(torch.ones(1))
        self.lower = None if self.is_symmetric else nn.Parameter(-torch.ones(1))

    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the range to that of the grid."""
        if self.lower is None:
            self.upper.copy_(scale * self._levels)
        else:
            # In float64: the difference of 32-bit integers need not fit their type.
            zero_point, scale = zero_point.double(), scale.double()
            self.lower.copy_((self.quant_min - zero_point) * scale)
            self.upper.copy_((self.quant_max - zero_point) * scale)

    @property
    def _is_one_sided(self) -> bool:
        return self.quant_min >= 0

    @property
    def _levels(self) -> float:
        """The upper end of a symmetric range, in steps."""
        if self._is_one_sided:
            return self.quant_max
        return -self.quant_min if self.quant_max <= 0 else (self.quant_max - self.quant_min) / 2

    def range(self) -> tuple[Tensor, Tensor]:
        """Give the range that is clipped to, with gradients for the parameters.

        Returns:
            Lower and upper end, each of shape [C].
        """
        if self.lower is not None:
            return self.lower, self.upper
        return torch.zeros_like(self.upper) if self._is_one_sided else -self.upper, self.upper

    @torch.no_grad()
    def range_qparams(self) -> tuple[Tensor, Tensor]:
        """Compute scale and zero point of the range."""
        low, high = self.range()
        if self.is_symmetric and self.quant_max <= 0:  # 1 bit: the levels are -upper and 0
            low = -high.abs()
        return ops.qparams_from_range(
            low, high.abs() if self.is_symmetric else high, self.quant_min, self.quant_max, self.is_symmetric,
            self.is_pot_scale,
        )  # fmt: skip

    @torch.no_grad()
    def settle(self) -> None:
        """Set scale and zero point to those of the range."""
        scale, zero_point = self.range_qparams()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
