"""What all fake quantizers share whose parameters are trained: start values from an observer, once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.observers import RangeObserver

from .fake_quantize import FakeQuantize


class LearnedFakeQuantize(FakeQuantize):
    """Base of the fake quantizers with trained parameters.

    The observer gives their start values: at a calibration or, without one, from the first tensor that is both
    observed and quantized. From then on the observer rests; that this has happened is kept in the state dict.

    A subclass registers its parameters in :meth:`register_scale`, sets them in :meth:`start` and uses them in
    :meth:`quantize`. They exist with their final shape before an optimizer is built.

    Args:
        *args: See :class:`FakeQuantize`.
        **kwargs: See :class:`FakeQuantize`.

    Attributes:
        initialized: uint8, shape [1]: whether the parameters have their start values.
        was_plain: Whether the state dict loaded last was that of a fake quantizer without trained parameters.
    """

    initialized: Tensor

    regularized: ClassVar[bool] = False
    """Whether the method wants weight decay on its parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer('initialized', torch.zeros(1, dtype=torch.uint8))
        self.was_plain = False

    @abstractmethod
    def start(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the parameters, in place and without gradient.

        Args:
            scale: What the observer makes of the data, shape [C].
            zero_point: Integers, shape [C].
        """

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize, with gradients for ``x`` and the parameters."""

    @property
    def is_initialized(self) -> bool:
        """Whether the parameters have their start values."""
        return self._initialized

    def learned_parameters(self) -> list[nn.Parameter]:
        """Give the trained parameters."""
        return list(self.parameters(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        """Observe until the parameters have their start values, and fake-quantize, each if switched on.

        Args:
            x: Floating point, any shape.

        Returns:
            Shape and type of ``x``.
        """
        if self._needs_observation:
            self._observe(x.detach())
        return self.quantize(x) if self._quantizing else self._pass_on(x)

    @property
    def _needs_observation(self) -> bool:
        return self._observing and not (self._quantizing and self._initialized)

    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Observe a tensor; start from what was seen, by any process, if quantization is on.

        Raises:
            ValueError: NaN or infinite values to start from.
        """
        self.activation_post_process(x)
        if self._quantizing and self._has_seen_data(x):
            self._set_qparams(*self.calculate_qparams())
        return self.scale, self.zero_point

    def _has_seen_data(self, x: Tensor) -> bool:
        if not isinstance(self.activation_post_process, RangeObserver):
            return x.numel() > 0
        low, high = self.activation_post_process.observed_range()
        return not bool((low > high).any())

    def _pass_on(self, x: Tensor) -> Tensor:
        """Return ``x`` unquantized; in training, with a gradient of zero for the parameters."""
        if self.training and torch.is_grad_enabled():
            return ops.unused(x, *self.learned_parameters())
        return x

    @property
    def can_fold(self) -> bool:
        """Whether :meth:`folded` is what the forward does; a subclass that has the method says so."""
        return False

    def quantization(self, x: Tensor) -> ops.Quantization | None:
        """Say in numbers what the forward does; a subclass that has such numbers says so."""
        return None

    @torch.no_grad()
    def _set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        if scale.shape != self.scale.shape:
            self._resize(scale.numel())
        self.start(scale, zero_point)
        self.settle()
        self.initialized.fill_(1)
        self._initialized = True

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.was_plain = f'{prefix}scale' in state_dict and f'{prefix}initialized' not in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _mirror_switches(self) -> None:
        super()._mirror_switches()
        initialized = self._buffers.get('initialized')
        self._initialized = initialized is not None and bool(initialized[0])
