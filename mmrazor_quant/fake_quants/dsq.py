"""Differentiable soft quantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.arguments import check_number
from mmrazor_quant.registry import MODELS

from .learned_range import LearnedRangeFakeQuantize

MIN_ALPHA, MAX_ALPHA = 1e-3, 0.999


@MODELS.register_module()
class DSQFakeQuantize(LearnedRangeFakeQuantize):
    """DSQ: the gradient is that of a staircase of hyperbolic tangents (Gong et al. 2019).

    The forward is the hard staircase; range and sharpness of the soft one are learned (sections 3.2 and 3.3).

    Args:
        *args: See :class:`FakeQuantize`.
        alpha: Start value of the distance between soft and hard staircase, in [0.001, 0.999]; the smaller, the closer.
        **kwargs: See :class:`FakeQuantize`.

    Raises:
        ValueError: ``alpha`` out of range.
    """

    alpha: nn.Parameter

    def __init__(self, *args: Any, alpha: float = 0.2, **kwargs: Any) -> None:
        check_number('alpha', alpha, lambda v: MIN_ALPHA <= v <= MAX_ALPHA, f'numbers in [{MIN_ALPHA}, {MAX_ALPHA}]')
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize; see the base class."""
        self.settle()
        return ops.fake_quantize_soft(
            x, *self.range(), self.alpha.clamp(MIN_ALPHA, MAX_ALPHA), self.scale.clone(), self.zero_point.clone(),
            self.quant_min, self.quant_max, self.ch_axis,
        )  # fmt: skip
