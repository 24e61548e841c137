"""LSQ+: learned step size and learned offset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.observers import RangeObserver
from mmrazor_quant.registry import MODELS

from .fake_quantize import Call
from .learned import LearnedFakeQuantize
from .lsq import LSQFakeQuantize


@MODELS.register_module()
class LSQPlusFakeQuantize(LSQFakeQuantize):
    """LSQ+: scale and offset are parameters (Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization ...").

    The offset, which exists in asymmetric schemes only, is a real number, neither rounded to the grid nor clamped
    (eq. 1 and 2): zero need not be on the grid. In symmetric schemes, as for weights, this is LSQ.

    Args:
        *args: See :class:`LSQFakeQuantize`.
        **kwargs: See :class:`LSQFakeQuantize`.

    Attributes:
        offset: The value that integer 0 stands for, float32, shape of ``scale``; None in symmetric schemes.
    """

    offset: nn.Parameter | None

    def register_scale(self) -> None:
        """Register scale and offset as parameters."""
        super().register_scale()
        self.offset = None if self.is_symmetric else nn.Parameter(torch.zeros(1))

    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and offset; of a range that does not contain zero, exactly that range."""
        if self.offset is None:
            super().start(scale, zero_point)
            return
        # In float64: the difference of 32-bit integers need not fit their type.
        low = (self.quant_min - zero_point.double()) * scale
        scale, low = self._unwidened(scale, low.to(scale.dtype))
        self.scale.copy_(scale)
        self.offset.copy_(low - self.quant_min * ops.effective_scale(scale, self.is_pot_scale))

    def _unwidened(self, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """Give scale and lowest value of the observed range; observers widen it to contain zero."""
        if not isinstance(self.activation_post_process, RangeObserver):
            return scale, low
        start, end = self.activation_post_process.observed_range()
        away = ((start > 0) | (end < 0)) & (start < end) & torch.isfinite(start) & torch.isfinite(end)
        step = (end - start) / (self.quant_max - self.quant_min)
        return torch.where(away, step, scale), torch.where(away, start, low)

    def explicit(self, x: Any, call: Call, read: Callable[[str], Any]) -> Any:
        """Write down the calls of plain functions; see the base class."""
        if self.offset is None:
            return super().explicit(x, call, read)
        offset = read('offset')
        shifted = call(ops.shift, x, call(torch.neg, offset), self.ch_axis)
        return call(ops.shift, super().explicit(shifted, call, read), offset, self.ch_axis)

    @property
    def can_fold(self) -> bool:
        """Whether :meth:`folded` is what the forward does: without an offset, as in LSQ."""
        kind = type(self)
        plain = kind.forward is LearnedFakeQuantize.forward and kind.quantize is LSQPlusFakeQuantize.quantize
        return plain and self.offset is None

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize; see the base class."""
        if self.offset is None:
            return super().quantize(x)
        return ops.fake_quantize_offset(
            x, self.scale, self.offset, self.quant_min, self.quant_max, self.ch_axis, self.grad_factor(x),
            self.is_pot_scale,
        )  # fmt: skip
