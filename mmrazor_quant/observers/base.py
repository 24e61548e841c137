"""What all observers share: their statistics as buffers, and the way from a range to scale and zero point."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mmrazor_quant.arguments import check_flag, check_number
from mmrazor_quant.compat import UniformQuantizationObserverBase
from mmrazor_quant.ops import MIN_SCALE, qparams_from_range
from mmrazor_quant.ops.layout import channel_rows

from .distributed import reduce_extremes, reduce_sum, world_size

_PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


class RangeObserver(UniformQuantizationObserverBase):
    """Base of the observers of this package.

    A subclass registers its statistics with :meth:`register_statistic`, updates them in place in :meth:`update` and
    turns them into a range in :meth:`observed_range`. Statistics have a leading dimension of channels, 1 when per
    tensor. Updating them must neither read a value into Python nor depend on one.

    In a run under ``torch.distributed`` the processes observe their parts of each batch as if they were one tensor:
    each :meth:`update` reduces what it takes from its part with :meth:`joint_extremes` and :meth:`joint_sum`, so that
    the statistics of all processes are the same at any time. All of them therefore have to call the observer equally
    often; a process with nothing to observe calls it with an empty tensor.

    Args:
        dtype: Integer type in torch's terms.
        qscheme: One of ``torch.per_{tensor,channel}_{affine,symmetric}``.
        quant_min: Lowest integer; None (only together with ``quant_max``): that of ``dtype``.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels. Per tensor it is without meaning; per channel, -1 stands for 0.
        is_pot_scale: Restrict scales to powers of two.
        eps: Lower bound of the scale.
        is_dynamic: As in torch.

    Raises:
        ValueError: An argument that is no number, or no flag, or out of range.

    Attributes:
        is_joint: Whether the processes of a distributed run observe jointly. To be set to False where all of them see
            the same tensor, as weights are: there is nothing to reduce then.
    """

    is_joint: bool

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int | None = None,
        quant_max: int | None = None,
        ch_axis: int = -1,
        is_pot_scale: bool = False,
        eps: float = MIN_SCALE,
        is_dynamic: bool = False,
    ) -> None:
        check_number('eps', eps, lambda v: v > 0, 'positive numbers')
        check_flag('is_pot_scale', is_pot_scale)
        check_flag('is_dynamic', is_dynamic)
        super().__init__(
            dtype=dtype, qscheme=qscheme, quant_min=quant_min, quant_max=quant_max, eps=eps, is_dynamic=is_dynamic
        )
        self.is_per_channel = qscheme in _PER_CHANNEL
        self.is_symmetric = qscheme in _SYMMETRIC
        self.ch_axis = max(ch_axis, 0) if self.is_per_channel else -1
        self.is_pot_scale = is_pot_scale
        self.min_scale = eps
        self.is_joint = True
        self._statistics: dict[str, tuple[float, torch.dtype, tuple[int, ...]]] = {}

    def register_statistic(
        self, name: str, initial: float, dtype: torch.dtype = torch.float32, trailing: tuple[int, ...] = ()
    ) -> None:
        """Register a buffer of shape ``[C, *trailing]`` that reset, loading and :meth:`set_channels` know of.

        Args:
            name: Name of the buffer.
            initial: Its value before any data.
            dtype: Its type.
            trailing: Its dimensions after that of the channels.
        """
        self._statistics[name] = (initial, dtype, trailing)
        self.register_buffer(name, torch.full((1, *trailing), initial, dtype=dtype))

    @property
    def channels(self) -> int:
        """Number of channels that the statistics have."""
        return getattr(self, next(iter(self._statistics))).shape[0]

    def set_channels(self, n: int) -> None:
        """Give all statistics ``n`` channels and their initial values.

        Args:
            n: Number of channels.

        Raises:
            ValueError: More than one channel for a per-tensor observer.
        """
        if n != 1 and not self.is_per_channel:
            raise ValueError(f'set_channels: got {n} for a per-tensor observer, allowed: 1')
        # Buffers made in inference mode could not be updated outside it.
        with torch.inference_mode(False):
            for name, (initial, dtype, trailing) in self._statistics.items():
                device = getattr(self, name).device
                setattr(self, name, torch.full((n, *trailing), initial, dtype=dtype, device=device))

    def reset(self) -> None:
        """Forget all data; the number of channels stays."""
        for name, (initial, _, _) in self._statistics.items():
            getattr(self, name).fill_(initial)

    reset_min_max_vals = reset

    def forward(self, x: Tensor) -> Tensor:
        """Update the statistics.

        Args:
            x: Any shape, floating point. Nothing happens if it is empty, except that a process of a distributed run
                takes part in the reductions.

        Returns:
            ``x`` itself.

        Raises:
            ValueError: Another number of channels than before.
        """
        is_empty = x.numel() == 0
        if is_empty and not self.is_reducing:
            return x
        if self.is_per_channel and x.shape[self.ch_axis] not in (0, self.channels):
            self._adopt_channels(x.shape[self.ch_axis])
        values = self._no_values(x) if is_empty else x.detach()
        # Entering a context costs as much as a small reduction, and calibration is in this one already.
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.update(values)
        else:
            self.update(values)
        return x

    def _no_values(self, x: Tensor) -> Tensor:
        """Give a tensor without values that has all channels: an empty one may lack any of its dimensions."""
        return x.new_empty((0,) * self.ch_axis + (self.channels, 0) if self.is_per_channel else (0,))

    def _adopt_channels(self, n: int) -> None:
        if self.channels != 1:
            raise ValueError(f'observed a tensor of {n} channels after one of {self.channels} (ch_axis={self.ch_axis})')
        self.set_channels(n)

    def rows(self, x: Tensor) -> Tensor:
        """Arrange a tensor as ``[C, values per channel]``, with C 1 when per tensor."""
        return channel_rows(x, self.ch_axis)

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Update the statistics.

        Args:
            x: Detached tensor. It is empty only if :attr:`is_reducing`, where other processes may have values.
        """

    @property
    def is_reducing(self) -> bool:
        """Whether there are other processes whose observations count too."""
        return self.is_joint and world_size() > 1

    def joint_extremes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Give the extremes over all processes of what each took from its part of a batch.

        Args:
            low: Least values of this process, any shape; +inf where it has none.
            high: Greatest values, the same shape; -inf where it has none.

        Returns:
            The extremes, the same on all processes; those given if there is nothing to reduce.
        """
        return reduce_extremes(low, high) if self.is_reducing else (low, high)

    def joint_sum(self, x: Tensor) -> Tensor:
        """Give the sum over all processes of what each took from its part of a batch.

        Args:
            x: Summands of this process, any shape; 0 where it has none.

        Returns:
            The sum, the same on all processes; ``x`` itself if there is nothing to reduce.
        """
        return reduce_sum(x) if self.is_reducing else x

    @abstractmethod
    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the range that the statistics stand for.

        Returns:
            Lower and upper ends, each of shape [C]. NaN or infinite where such data were seen, empty
            (lower end above the upper one) where there were no data.
        """

    def to_qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Turn ranges of any shape into scale and zero point of this observer's grid."""
        return qparams_from_range(
            low, high, self.quant_min, self.quant_max, self.is_symmetric, self.is_pot_scale, self.min_scale
        )

    def range_of_scale(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Invert :meth:`to_qparams` for a symmetric scheme.

        Args:
            scale: Any shape, floating point.

        Returns:
            Lower and upper ends, float32, of the range that gets this scale, within rounding.
        """
        down, up = self.quant_min, self.quant_max
        if down < 0 < up:
            up = (up - down) / 2
            down = -up
        return (min(down, 0) * scale).to(torch.float32), (max(up, 0) * scale).to(torch.float32)

    def running_qparams(self) -> tuple[Tensor, Tensor]:
        """Compute scale and zero point from all data so far, unchecked and without a device sync.

        Returns:
            scale float32 and zero_point, each of shape [C].
        """
        return self.to_qparams(*self.observed_range())

    def follow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Update the statistics with a tensor, and give the scale and zero point that they call for then.

        Args:
            x: As in :meth:`forward`.

        Returns:
            As :meth:`running_qparams`.
        """
        self(x)
        return self.running_qparams()

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Compute scale and zero point from all data so far, checked.

        Returns:
            scale float32 and zero_point, each of shape [C].

        Raises:
            ValueError: No data were observed, or NaN or infinite ones.
        """
        low, high = self.observed_range()
        if bool((low > high).any()):
            raise ValueError('no data were observed')
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise ValueError('the observed data contain NaN or infinite values')
        return self.to_qparams(low, high)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Statistics adopt their number of channels from the first data, or from a checkpoint.
        for name, (initial, dtype, trailing) in self._statistics.items():
            saved = state_dict.get(prefix + name)
            current = getattr(self, name)
            if saved is not None and saved.shape != current.shape and saved.shape[1:] == trailing:
                with torch.inference_mode(False):
                    setattr(self, name, torch.full(saved.shape, initial, dtype=dtype, device=current.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show range and granularity."""
        parts = [f'[{self.quant_min}, {self.quant_max}]', 'symmetric' if self.is_symmetric else 'asymmetric']
        parts += [f'ch_axis={self.ch_axis}'] if self.is_per_channel else []
        parts += ['power-of-two scale'] if self.is_pot_scale else []
        return ', '.join(parts)
