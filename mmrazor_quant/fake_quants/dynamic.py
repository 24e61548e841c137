"""Activations quantized with the range that they have at run time."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrazor_quant import ops
from mmrazor_quant.arguments import check_choice
from mmrazor_quant.observers import MinMaxObserver
from mmrazor_quant.registry import MODELS

from .fake_quantize import Call, FakeQuantize


@MODELS.register_module()
class DynamicFakeQuantize(FakeQuantize):
    """Quantize activations with scale and zero point from the minimum and maximum of the very tensor, in each call.

    There is nothing to calibrate, and the observer plays no part. ``scale`` and ``zero_point`` are those of the last
    call with one range per tensor.

    Args:
        *args: See :class:`FakeQuantize`.
        share: Which values share a range: those of the ``'tensor'``, of one ``'sample'`` (first dimension), or of one
            ``'token'`` (last dimension: a vector of features).
        **kwargs: See :class:`FakeQuantize`.

    Raises:
        ValueError: Another ``share``, or a scheme with one scale per channel.
    """

    tensors: ClassVar[tuple[str, ...]] = ('a',)

    def __init__(self, observer: type = MinMaxObserver, *args: Any, share: str = 'tensor', **kwargs: Any) -> None:
        check_choice('share', share, ops.SHARES)
        super().__init__(observer, *args, **kwargs)
        if self.is_per_channel:
            raise ValueError('is_per_channel: got True, allowed with DynamicFakeQuantize: False, see share')
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize, if switched on.

        Args:
            x: Floating point, any shape.

        Returns:
            Shape and type of ``x``.
        """
        if not self._quantizing or x.numel() == 0:
            return x
        scale, zero_point = self.dynamic_qparams(x)
        if self.share == 'tensor':
            self._set_qparams(scale.reshape(1), zero_point.reshape(1))
        rows = ops.shared_rows(x, self.share)
        axis = -1 if self.share == 'tensor' else 0
        flat = scale.reshape(-1), zero_point.reshape(-1)
        return ops.fake_quantize(rows, *flat, self.quant_min, self.quant_max, axis).view(x.shape)

    @torch.no_grad()
    def dynamic_qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scale and zero point of a tensor; see :func:`mmrazor_quant.ops.dynamic_qparams`."""
        return ops.dynamic_qparams(x, self.share, self.quant_min, self.quant_max, self.is_symmetric, self.is_pot_scale)

    def explicit(self, x: Any, call: Call, read: Callable[[str], Any]) -> Any:
        """Write down the calls of plain functions; see the base class."""
        arguments = self.share, self.quant_min, self.quant_max, self.is_symmetric, self.is_pot_scale
        found = call(ops.dynamic_qparams, x, *arguments)
        qparams = [call(operator.getitem, found, i) for i in range(2)]
        return call(ops.dequantize, call(ops.quantize, x, *qparams, self.quant_min, self.quant_max), *qparams)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Give the scale and zero point of the last call."""
        return self.scale, self.zero_point

    @property
    def is_dynamic(self) -> bool:
        """Whether scale and zero point come from the tensor: True."""
        return True
