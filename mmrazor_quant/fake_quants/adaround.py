"""Weights whose rounding, up or down, was learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrazor_quant import ops
from mmrazor_quant.registry import MODELS

from .fake_quantize import Call, FakeQuantize

_STORAGE = (torch.int8, torch.uint8, torch.int16, torch.int32)


@MODELS.register_module()
class AdaRoundFakeQuantize(FakeQuantize):
    """Weights with learned rounding (Nagel et al. 2020, "Up or Down? Adaptive Rounding ...").

    Until it is learned, by the reconstruction of a ``PTQLoop``, weights are rounded to nearest as in
    :class:`FakeQuantize`. From then on the integers are kept, in the state dict too, and the weights given are those:
    they do not follow the float weights any more, until qparams are set anew.

    Args:
        *args: See :class:`FakeQuantize`.
        **kwargs: See :class:`FakeQuantize`.

    Attributes:
        integers: The learned integers, shape of the weight, in the smallest type that holds them; shape [0] before.
    """

    integers: Tensor

    tensors: ClassVar[tuple[str, ...]] = ('w',)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer('integers', torch.empty(0, dtype=self._storage()))
        self._stand_in: Tensor | None = None

    def _storage(self) -> torch.dtype:
        fits = (t for t in _STORAGE if torch.iinfo(t).min <= self.quant_min and self.quant_max <= torch.iinfo(t).max)
        return next(fits, torch.int64)

    @property
    def is_learned(self) -> bool:
        """Whether there are learned integers."""
        return self.integers.numel() > 0

    def set_integers(self, integers: Tensor) -> None:
        """Keep learned integers.

        Args:
            integers: Whole numbers in the range of the scheme, shape of the weight, on any device.
        """
        with torch.inference_mode(False):
            self.integers = integers.detach().to(self.scale.device, self._storage(), copy=True)

    def forget_integers(self) -> None:
        """Go back to rounding to nearest."""
        self.integers = self.integers.new_empty(0)

    def stand_in(self, values: Tensor | None) -> None:
        """Give these values instead of the quantized weights, while rounding is being learned.

        Args:
            values: Shape of the weight; None: the quantized weights again.
        """
        self._stand_in = values

    def forward(self, x: Tensor) -> Tensor:
        """Observe and fake-quantize weights, each if switched on.

        Args:
            x: Weights, any shape.

        Returns:
            Shape and type of ``x``.
        """
        if self._stand_in is not None:
            return self._stand_in
        if not self.is_learned or not self._quantizing or self._observing:
            return super().forward(x)
        if self.integers.shape != x.shape:
            raise ValueError(
                f'the learned integers have shape {tuple(self.integers.shape)}, but the weight {tuple(x.shape)}'
            )
        return ops.dequantize(self.integers, self.scale, self.zero_point, self.ch_axis).to(x.dtype)

    def explicit(self, x: Any, call: Call, read: Callable[[str], Any]) -> Any:
        """Write down the calls of plain functions; see the base class."""
        if not self.is_learned:
            return super().explicit(x, call, read)
        return call(ops.dequantize, read('integers'), read('scale'), read('zero_point'), self.ch_axis)

    def _set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        self.forget_integers()
        super()._set_qparams(scale, zero_point)

    def _resize(self, n: int) -> None:
        self.forget_integers()
        super()._resize(n)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        scale, saved = (state_dict.get(prefix + name) for name in ('scale', 'integers'))
        if scale is not None and scale.dim() == 1 and scale.shape != self.scale.shape:
            self._resize(len(scale))
        self.forget_integers()
        if saved is not None:
            self.integers = torch.empty(saved.shape, dtype=self._storage(), device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
