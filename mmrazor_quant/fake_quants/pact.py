"""Parameterized clipping activation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mmrazor_quant import ops
from mmrazor_quant.registry import MODELS

from .learned_range import LearnedRangeFakeQuantize


@MODELS.register_module()
class PACTFakeQuantize(LearnedRangeFakeQuantize):
    """PACT: the range that activations are clipped to is learned (Choi et al. 2018, eq. 1 to 3).

    Its gradient is the sum over the clipped values; weight decay pulls it in. The paper has the range [0, upper]
    (symmetric, unsigned); here both ends can be learned (asymmetric), for inputs that are no ReLU's.

    Args:
        *args: See :class:`FakeQuantize`.
        **kwargs: See :class:`FakeQuantize`.
    """

    tensors: ClassVar[tuple[str, ...]] = ('a',)
    regularized: ClassVar[bool] = True

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize; see the base class."""
        self.settle()
        return ops.fake_quantize_clip(
            x, *self.range(), self.scale.clone(), self.zero_point.clone(), self.quant_min, self.quant_max, self.ch_axis
        )
