"""What all observers share: their statistics as buffers, and the way from a range to scale and zero point."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mmrazor_quant.compat import UniformQuantizationObserverBase
from mmrazor_quant.ops import MIN_SCALE, qparams_from_range
from mmrazor_quant.ops.layout import channel_rows

_PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


class RangeObserver(UniformQuantizationObserverBase):
    """Base of the observers of this package.

    A subclass registers its statistics with :meth:`register_statistic`, updates them in place in :meth:`update` and
    turns them into a range in :meth:`observed_range`. Statistics have a leading dimension of channels, 1 when per
    tensor. Updating them must neither read a value into Python nor depend on one.

    Args:
        dtype: Integer type in torch's terms.
        qscheme: One of ``torch.per_{tensor,channel}_{affine,symmetric}``.
        quant_min: Lowest integer; None (only together with ``quant_max``): that of ``dtype``.
        quant_max: Highest integer.
        ch_axis: Dimension of the channels. Per tensor it is without meaning; per channel, -1 stands for 0.
        is_pot_scale: Restrict scales to powers of two.
        eps: Lower bound of the scale.
        is_dynamic: As in torch.
    """

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
        super().__init__(
            dtype=dtype, qscheme=qscheme, quant_min=quant_min, quant_max=quant_max, eps=eps, is_dynamic=is_dynamic
        )
        self.is_per_channel = qscheme in _PER_CHANNEL
        self.is_symmetric = qscheme in _SYMMETRIC
        self.ch_axis = max(ch_axis, 0) if self.is_per_channel else -1
        self.is_pot_scale = is_pot_scale
        self.min_scale = eps
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
            x: Any shape, floating point. Nothing happens if it is empty.

        Returns:
            ``x`` itself.
        """
        if x.numel() == 0:
            return x
        if self.is_per_channel and self.channels != x.shape[self.ch_axis]:
            self._adopt_channels(x.shape[self.ch_axis])
        with torch.no_grad():
            self.update(x.detach())
        return x

    def _adopt_channels(self, n: int) -> None:
        if self.channels != 1:
            raise ValueError(f'observed a tensor of {n} channels after one of {self.channels} (ch_axis={self.ch_axis})')
        self.set_channels(n)

    def rows(self, x: Tensor) -> Tensor:
        """Arrange a tensor as ``[C, values per channel]``, with C 1 when per tensor."""
        return channel_rows(x, self.ch_axis)

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Update the statistics from a detached, non-empty tensor."""

    @abstractmethod
    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Give the range that the statistics of this process stand for.

        Returns:
            Lower and upper ends, each of shape [C]. NaN or infinite where such data were seen, empty
            (lower end above the upper one) where there were no data.
        """

    def global_range(self) -> tuple[Tensor, Tensor]:
        """Give the range that all processes of a distributed run agree on; as :meth:`observed_range` if single."""
        return self.observed_range()

    def to_qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Turn ranges of any shape into scale and zero point of this observer's grid."""
        return qparams_from_range(
            low, high, self.quant_min, self.quant_max, self.is_symmetric, self.is_pot_scale, self.min_scale
        )

    def running_qparams(self) -> tuple[Tensor, Tensor]:
        """Compute scale and zero point from what this process has seen, unchecked and without a device sync.

        Returns:
            scale float32 and zero_point, each of shape [C].
        """
        return self.to_qparams(*self.observed_range())

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Compute scale and zero point from all data, checked; in a distributed run from those of all processes.

        Returns:
            scale float32 and zero_point, each of shape [C].

        Raises:
            ValueError: No data were observed, or NaN or infinite ones.
        """
        low, high = self.global_range()
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
