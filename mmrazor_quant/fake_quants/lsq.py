"""Learned step size quantization."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.arguments import check_flag
from mmrazor_quant.registry import MODELS

from .learned import LearnedFakeQuantize


@MODELS.register_module()
class LSQFakeQuantize(LearnedFakeQuantize):
    """LSQ: the scale is a parameter (Esser et al. 2020, "Learned step size quantization").

    Its gradient is that of section 2.1, times g = 1 / sqrt(N Qp) of section 2.2, with N the values that share the
    scale: the weights (of the channel), or the features of one sample (and channel), whatever the batch size. The zero
    point of an asymmetric scheme keeps its start value.

    Args:
        *args: See :class:`FakeQuantize`.
        scale_grad: Whether to multiply the gradient of the scale with g.
        **kwargs: See :class:`FakeQuantize`.

    Raises:
        ValueError: ``scale_grad`` is not a flag.
    """

    scale: nn.Parameter

    def __init__(self, *args: Any, scale_grad: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale_grad = check_flag('scale_grad', scale_grad)

    def register_scale(self) -> None:
        """Register the scale as a parameter."""
        self.scale = nn.Parameter(torch.ones(1))

    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point; see the base class."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def scale_in_use(self) -> Tensor:
        """Give the scale that the forward uses: positive, and a power of two if asked for."""
        return ops.effective_scale(self.scale.detach(), self.is_pot_scale)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the parameter the scale that the forward uses."""
        self.scale.copy_(self.scale_in_use())

    def grad_factor(self, x: Tensor) -> float:
        """Compute g for a tensor."""
        if not self.scale_grad:
            return 1.0
        samples = 1 if self.batch_axis is None else x.shape[self.batch_axis]
        sharing = x.numel() / max(samples * self.scale.numel(), 1)
        highest = self.quant_max if self.quant_max > 0 else -self.quant_min
        return 1.0 / math.sqrt(max(sharing, 1.0) * highest)

    @property
    def can_fold(self) -> bool:
        """Whether :meth:`folded` is what the forward does: not where a subclass quantizes in a way of its own."""
        return self._is_plain

    @property
    def _is_plain(self) -> bool:
        kind = type(self)
        return kind.forward is LearnedFakeQuantize.forward and kind.quantize is LSQFakeQuantize.quantize

    def quantization(self, x: Tensor) -> ops.Quantization | None:
        """Say in numbers what the forward does to an activation; see the base class."""
        if not (self._is_plain and self._quantizing) or self._needs_observation:
            return None
        return ops.Quantization(
            self.scale, self.zero_point, self.quant_min, self.quant_max, self.grad_factor(x), self.is_pot_scale
        )

    def folded(self, weight: Tensor, factor: Tensor, ch_axis: int) -> Tensor:
        """Fake-quantize the product of weight and factor, and divide by the factor again; see the base class."""
        if self._needs_observation:
            shape = [-1 if d == ch_axis else 1 for d in range(weight.dim())]
            self._observe(weight.detach() * factor.reshape(shape))
        if not self._quantizing:
            return self._pass_on(weight)
        return ops.fake_quantize_folded(
            weight, self.scale, self.zero_point, factor, self.quant_min, self.quant_max, ch_axis,
            self.grad_factor(weight), self.is_pot_scale,
        )  # fmt: skip

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize; see the base class."""
        return ops.fake_quantize_learned(
            x, self.scale, self.zero_point, self.quant_min, self.quant_max, self.ch_axis, self.grad_factor(x),
            self.is_pot_scale,
        )  # fmt: skip
