"""Weights squeezed by a hyperbolic tangent."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrazor_quant import ops
from mmrazor_quant.arguments import check_flag
from mmrazor_quant.registry import MODELS

from .fake_quantize import FakeQuantize


@MODELS.register_module()
class DoReFaFakeQuantize(FakeQuantize):
    """DoReFa: weights go through tanh, are normalized to [-1, 1] and quantized there (Zhou et al. 2016, eq. 9).

    Two things differ from the paper, which trains from scratch with a batch norm behind each layer: the result is
    multiplied by the largest weight (``rescale``), so that a pretrained network stays what it is; and the grid is that
    of the scheme, with zero on it. The paper's activations, clipped to [0, 1], are ``FakeQuantize`` with
    ``FixedRangeObserver(min_val=0, max_val=1)``. What the observer saw has no part in the result.

    Args:
        *args: See :class:`FakeQuantize`.
        rescale: Whether to multiply by the largest weight (of the channel).
        **kwargs: See :class:`FakeQuantize`.

    Raises:
        ValueError: ``rescale`` is not a flag.
    """

    tensors: ClassVar[tuple[str, ...]] = ('w',)

    def __init__(self, *args: Any, rescale: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rescale = check_flag('rescale', rescale)

    def squeeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Transform weights.

        Args:
            weight: Any shape.

        Returns:
            ``m * tanh(w) / max|tanh(w)|``, and m, the largest absolute weight (1 without ``rescale``), shape [C].
        """
        squeezed = torch.tanh(weight)
        dims = [d for d in range(weight.dim()) if not self.is_per_channel or d != self.ch_axis]
        tiny = torch.finfo(weight.dtype).tiny
        largest = weight.detach().abs().amax(dims, keepdim=True) if self.rescale else torch.ones_like(weight[:1])
        squeezed = squeezed * (largest / squeezed.abs().amax(dims, keepdim=True).clamp(min=tiny))
        largest = weight.detach().abs().amax(dims) if self.rescale else weight.new_ones(self.scale.shape)
        return squeezed, largest.reshape(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Observe and fake-quantize weights, each if switched on.

        Args:
            x: Weights, any shape.

        Returns:
            Shape and type of ``x``.
        """
        if self._observing:
            self.activation_post_process(x.detach())
        if not self._quantizing:
            return x
        squeezed, largest = self.squeeze(x)
        qparams = self._qparams(largest)
        self._set_qparams(*qparams)
        return ops.fake_quantize(squeezed, *qparams, self.quant_min, self.quant_max, self.ch_axis)

    def _qparams(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        return ops.qparams_from_range(
            -largest, largest, self.quant_min, self.quant_max, self.is_symmetric, self.is_pot_scale
        )
