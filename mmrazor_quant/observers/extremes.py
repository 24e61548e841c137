"""What observers share that see of a tensor only its least and greatest values."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import RangeObserver
from .compiled_update import Advance, advance_and_quantize

_STEPS = ('update_extremes', 'observe_extremes', 'observed_range', 'running_qparams', 'to_qparams')
"""Methods that ``advance`` stands for."""


def extremes(x: Tensor, ch_axis: int) -> tuple[Tensor, Tensor]:
    """Give minimum and maximum per channel.

    Args:
        x: Any shape.
        ch_axis: Dimension of the channels; -1: per tensor.

    Returns:
        Two tensors of shape [C], or [] when per tensor; NaN where ``x`` has NaN, +inf and -inf if it is empty.
    """
    if x.numel() == 0:
        low = x.new_full(() if ch_axis == -1 else (x.shape[ch_axis],), float('inf'))
        return low, -low
    if ch_axis == -1:
        return torch.aminmax(x)
    dims = [d for d in range(x.dim()) if d != ch_axis]
    return torch.amin(x, dims), torch.amax(x, dims)


class ExtremesObserver(RangeObserver):
    """Base of the observers that only need minimum and maximum of each tensor, per tensor or per channel.

    A subclass may say in ``advance``, as a pure function of all its statistics, what its :meth:`update_extremes` and
    :meth:`observed_range` do while there are data and nothing is reduced: that can be compiled. One that overrides
    these methods does not inherit the function.
    """

    advance: ClassVar[Advance | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = next(kind for kind in cls.__mro__ if 'advance' in vars(kind))
        if any(getattr(cls, name) is not getattr(owner, name) for name in _STEPS):
            cls.advance = None

    @property
    def is_plain(self) -> bool:
        """Whether the extremes of a tensor are all that is taken from it: not where a subclass looks at it before."""
        kind = type(self)
        return kind.update is ExtremesObserver.update and kind.forward is RangeObserver.forward

    @property
    def advance_constants(self) -> tuple[float, ...]:
        """Numbers that ``advance`` takes behind the statistics."""
        return ()

    def follow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Update the statistics; see the base class."""
        has_hooks = self._forward_hooks or self._forward_pre_hooks
        if x.numel() == 0 or has_hooks or self.is_reducing or not self.is_plain:
            return super().follow(x)
        if self.is_per_channel and x.shape[self.ch_axis] != self.channels:
            return super().follow(x)
        return self.follow_extremes(*extremes(x.detach(), self.ch_axis))

    def follow_extremes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Update the statistics with the extremes of a tensor, and give scale and zero point for it.

        Args:
            low: Least values in this process, shape [C] or [].
            high: Greatest values, likewise.

        Returns:
            scale float32 and zero_point, each of shape [C], unchecked.
        """
        advance = type(self).advance
        if advance is not None and not self.is_reducing:
            statistics = [getattr(self, name) for name in self._statistics]
            scheme = self.quant_min, self.quant_max, self.is_symmetric, self.is_pot_scale, self.min_scale
            found = advance_and_quantize(advance, scheme, (low, high), statistics, self.advance_constants)
            if found is not None:
                return found
        with torch.no_grad():
            self.observe_extremes(low, high)
            return self.running_qparams()

    def update(self, x: Tensor) -> None:
        """Take in the extremes of ``x``."""
        self.update_extremes(*self.joint_extremes(*extremes(x, self.ch_axis)))

    @abstractmethod
    def update_extremes(self, low: Tensor, high: Tensor) -> None:
        """Update the statistics.

        Args:
            low: Least values, of all processes, shape [C] or [].
            high: Greatest values, likewise.
        """

    def observe_extremes(self, low: Tensor, high: Tensor) -> None:
        """Update the statistics with what a tensor's extremes are known to be.

        Args:
            low: Least value in this process, shape [].
            high: Greatest value, likewise.
        """
        self.update_extremes(*self.joint_extremes(low, high))
