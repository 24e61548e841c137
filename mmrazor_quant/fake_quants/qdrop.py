"""Activations whose step is learned while a random part of them is not quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from mmrazor_quant import ops
from mmrazor_quant.registry import MODELS

from .lsq import LSQFakeQuantize

Keep = Callable[[Tensor], Tensor]
"""From activations to booleans of their shape: which elements are not quantized."""


@MODELS.register_module()
class QDropFakeQuantize(LSQFakeQuantize):
    """Activations with a learned step, of which a random part stays float during reconstruction (Wei et al. 2022).

    Outside of reconstruction nothing is dropped, and this is :class:`LSQFakeQuantize`.

    Args:
        *args: See :class:`LSQFakeQuantize`.
        **kwargs: See :class:`LSQFakeQuantize`.
    """

    tensors: ClassVar[tuple[str, ...]] = ('a',)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keep: Keep | None = None

    def drop_by(self, keep: Keep | None) -> None:
        """Say what is not to be quantized from now on.

        Args:
            keep: Chooses the elements of each input; None: all are quantized.
        """
        self._keep = keep

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize; see the base class."""
        if self._keep is None:
            return super().quantize(x)
        return ops.fake_quantize_dropped(
            x, self.scale, self.zero_point, self._keep(x), self.quant_min, self.quant_max, self.ch_axis,
            self.grad_factor(x), self.is_pot_scale,
        )  # fmt: skip
