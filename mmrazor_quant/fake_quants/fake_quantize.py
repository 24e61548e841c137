"""Fake quantization with parameters from an observer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.observers import ExtremesObserver, MinMaxObserver, RangeObserver
from mmrazor_quant.registry import MODELS

from .saved import drop, mismatch, scheme_record

Call = Callable[..., Any]

_UNSIZED = ('fake_quant_enabled', 'observer_enabled', 'initialized', 'scheme')
"""State whose shape does not follow the number of channels."""


@MODELS.register_module()
class FakeQuantize(FakeQuantizeBase):
    """Quantize and dequantize with a scale and zero point taken from an observer's statistics.

    It is built as torch's own ``FakeQuantize`` is, so that torch's observers, and observers and fake quantizers
    written in torch's style, can stand in for those of this package.

    Args:
        observer: Class of the observer.
        quant_min: Lowest integer.
        quant_max: Highest integer.
        **observer_kwargs: Further arguments of the observer, such as ``dtype``, ``qscheme``, ``ch_axis``.

    Attributes:
        activation_post_process: The observer.
        scale: float32, shape [1] or [C].
        zero_point: Integers, the shape of ``scale``.
        scheme: int64, shape [6]: what the scales are made for, so that a checkpoint of another scheme is noticed.
        batch_axis: Dimension of the samples; None: the tensor, a weight, has none. The quantizer of a model sets it.
        mismatch: Why the state dict loaded last was not taken over; None: it was.
    """

    scale: Tensor
    zero_point: Tensor
    scheme: Tensor
    batch_axis: int | None
    mismatch: str | None

    tensors: ClassVar[tuple[str, ...]] = ('w', 'a')
    """What the class is for: weights, activations."""

    is_dynamic: ClassVar[bool] = False
    """Whether scales are those of the very tensor."""

    def __init__(
        self,
        observer: type = MinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        self.activation_post_process = observer(quant_min=quant_min, quant_max=quant_max, **observer_kwargs)
        source = self.activation_post_process
        self.quant_min, self.quant_max = source.quant_min, source.quant_max
        self.dtype, self.qscheme = source.dtype, source.qscheme
        self.is_per_channel = self.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
        self.ch_axis = getattr(source, 'ch_axis', 0) if self.is_per_channel else -1
        self.is_symmetric = self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        self.is_pot_scale = getattr(source, 'is_pot_scale', False)
        self.batch_axis = self.mismatch = None
        self.register_buffer('scheme', torch.tensor(scheme_record(self)))
        self.register_buffer('zero_point', torch.zeros(1, dtype=ops.integer_dtype(self.quant_min, self.quant_max)))
        self.register_scale()
        self._mirror_switches()

    def register_scale(self) -> None:
        """Register ``scale`` with one channel, and what else there is of its shape; a learned scale is a parameter."""
        self.register_buffer('scale', torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Observe and fake-quantize, each if switched on.

        Args:
            x: Floating point, any shape.

        Returns:
            Shape and type of ``x``.
        """
        qparams = self._observe(x.detach()) if self._observing else (self.scale, self.zero_point)
        if self._quantizing:
            return ops.fake_quantize(x, *qparams, self.quant_min, self.quant_max, self.ch_axis)
        return x

    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Observe a tensor; returns the scale and zero point to quantize it with, if it is to be."""
        observer = self.activation_post_process
        if not self._quantizing:
            observer(x)
            return self.scale, self.zero_point
        if isinstance(observer, RangeObserver):
            return self._follow(*observer.follow(x))
        observer(x)
        return self._follow(*self.calculate_qparams())

    def _follow(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        # The new tensors are what autograd keeps: a module called twice overwrites its buffers before backward.
        self._set_qparams(scale, zero_point)
        return scale, zero_point

    @property
    def can_fold(self) -> bool:
        """Whether :meth:`folded` is what the forward does: not where a subclass has a forward of its own."""
        return type(self).forward is FakeQuantize.forward

    def folded(self, weight: Tensor, factor: Tensor, ch_axis: int) -> Tensor:
        """Fake-quantize the product of weight and factor, and divide by the factor again, each if switched on.

        Args:
            weight: Any shape.
            factor: Shape [C], without gradient.
            ch_axis: Dimension of the channels.

        Returns:
            Shape and type of ``weight``.
        """
        qparams = self.scale, self.zero_point
        if self._observing:
            shape = [-1 if d == ch_axis else 1 for d in range(weight.dim())]
            qparams = self._observe(weight.detach() * factor.reshape(shape))
        if not self._quantizing:
            return weight
        return ops.fake_quantize_folded(weight, *qparams, factor, self.quant_min, self.quant_max, ch_axis)

    def quantization(self, x: Tensor) -> ops.Quantization | None:
        """Say in numbers what the forward does to an activation, for operations that quantize their own result.

        Args:
            x: Tensor of the activation's shape.

        Returns:
            The numbers; None where the forward does something else, or more, now.
        """
        if type(self).forward is not FakeQuantize.forward or not self._quantizing:
            return None
        observer = self.activation_post_process
        if self._observing and not (isinstance(observer, ExtremesObserver) and observer.is_plain):
            return None
        observe = self._observe_extremes if self._observing else None
        return ops.Quantization(self.scale, self.zero_point, self.quant_min, self.quant_max, from_range=observe)

    def _observe_extremes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._follow(*self.activation_post_process.follow_extremes(low, high))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Give the scale and zero point that the observer's statistics call for, without using them."""
        return self.activation_post_process.calculate_qparams()

    def compute_qparams(self) -> None:
        """Set scale and zero point from the observer's statistics.

        Raises:
            ValueError: The observer saw no data, or NaN or infinite ones.
        """
        self._set_qparams(*self.calculate_qparams())

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, or the parameters they follow from, whatever the observer saw.

        Args:
            scale: float32, shape [C].
            zero_point: Integers, shape [C].
        """
        with torch.no_grad():
            self._set_qparams(scale, zero_point)

    def scale_in_use(self) -> Tensor:
        """Give the scale that the forward uses, without gradient, shape [C]."""
        return self.scale.detach()

    def settle(self) -> None:
        """Make ``scale`` and ``zero_point`` those that the forward uses, where they are computed from parameters."""

    def explicit(self, x: Any, call: Call, read: Callable[[str], Any]) -> Any:
        """Write down what the forward does as calls of plain functions, for graphs without fake quantizers.

        Args:
            x: Stands for the input.
            call: ``call(function, *arguments)`` writes down a call; returns what stands for its result.
            read: Gives what stands for a parameter or buffer of this module, by name.

        Returns:
            What stands for the result.
        """
        qparams = read('scale'), read('zero_point')
        axis = getattr(self, 'ch_axis', -1)
        return call(
            ops.dequantize, call(ops.quantize, x, *qparams, self.quant_min, self.quant_max, axis), *qparams, axis
        )

    def _set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        if scale.shape != self.scale.shape:
            self._resize(scale.numel())
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def set_channels(self, n: int) -> None:
        """Fix the shape of scale, zero point and statistics before any data.

        Args:
            n: Number of channels.

        Raises:
            ValueError: More than one channel for a per-tensor quantizer.
        """
        if n != 1 and not self.is_per_channel:
            raise ValueError(f'set_channels: got {n} for a per-tensor quantizer, allowed: 1')
        self._resize(n)
        if isinstance(self.activation_post_process, RangeObserver):
            self.activation_post_process.set_channels(n)

    def _resize(self, n: int) -> None:
        # Buffers made in inference mode could not be updated outside it.
        with torch.inference_mode(False):
            for name, tensor in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
                if name not in _UNSIZED:
                    shaped = tensor.detach()[:1].repeat(n)
                    setattr(self, name, nn.Parameter(shaped) if isinstance(tensor, nn.Parameter) else shaped)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch quantization on or off."""
        super().enable_fake_quant(enabled)
        self._quantizing = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch observation on or off."""
        super().enable_observer(enabled)
        self._observing = bool(enabled)

    @property
    def is_quantizing(self) -> bool:
        """Whether quantization is switched on."""
        return self._quantizing

    @property
    def is_idle(self) -> bool:
        """Whether it passes its input through: neither observing nor quantizing."""
        return not (self._observing or self._quantizing)

    def _mirror_switches(self) -> None:
        # Reading a buffer in forward would wait for the device.
        self._quantizing = bool(self.fake_quant_enabled[0])
        self._observing = bool(self.observer_enabled[0])

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.mismatch = mismatch(self, state_dict, prefix)
        if self.mismatch is not None:
            drop(state_dict, prefix)
        state_dict.setdefault(f'{prefix}scheme', self.scheme)
        saved = state_dict.get(prefix + 'scale')
        if saved is not None and saved.shape != self.scale.shape and saved.dim() == 1:
            self._resize(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._mirror_switches()

    def extra_repr(self) -> str:
        """Show bits, range, granularity, switches and scale."""
        bits = (self.quant_max - self.quant_min).bit_length()
        low, high = self.scale.min().item(), self.scale.max().item()
        scale = f'{low:.4g}' if low == high else f'{low:.4g}..{high:.4g}'
        parts = [f'{bits} bit', f'[{self.quant_min}, {self.quant_max}]']
        parts += [f'{self.scale.numel()} channels of axis {self.ch_axis}'] if self.is_per_channel else ['per tensor']
        parts += [f'scale={scale}', f'fake_quant={"on" if self._quantizing else "off"}']
        parts += [f'observer={"on" if self._observing else "off"}']
        return ', '.join(parts)
