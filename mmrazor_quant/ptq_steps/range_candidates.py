"""Ranges that one weight could have, and what error each of them makes."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from mmrazor_quant import ops
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.fake_quants import FakeQuantize
from mmrazor_quant.graph.layers import call_layer, channel_axis
from mmrazor_quant.observers import MSEObserver
from mmrazor_quant.ops.layout import channel_rows
from mmrazor_quant.ops.qparams import qparams_from_range

SHARES = tuple(1.1 - 0.03 * i for i in range(28))
"""Ranges tried, as shares of the one that clips nothing: 1.1 to 0.29."""


class RangeCandidates:
    """Candidates for scale and zero point of one weight: its own, those of least error of the weight, and more.

    Args:
        quantizer: fake quantizer of the weight.
        weight: what it quantizes, batch norm folded in.
    """

    def __init__(self, quantizer: FakeQuantizeBase, weight: Tensor) -> None:
        self.quantizer, self.weight = quantizer, weight
        is_per_channel = quantizer.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
        self.axis = quantizer.ch_axis if is_per_channel else -1
        self._outputs: Tensor | None = None
        self._reference = 0.0
        present = _in_use(quantizer)
        found = [present, self._best_for_weight(), *self._shares()]
        self.scales = torch.stack([scale.to(torch.float32) for scale, _ in found])
        self.zero_points = torch.stack([zero_point.to(present[1].dtype) for _, zero_point in found])

    def _best_for_weight(self) -> tuple[Tensor, Tensor]:
        quantizer = self.quantizer
        observer = MSEObserver(
            dtype=quantizer.dtype, qscheme=quantizer.qscheme, quant_min=quantizer.quant_min,
            quant_max=quantizer.quant_max, ch_axis=self.axis, is_pot_scale=self._is_pot_scale, exact=True,
        ).to(self.weight.device)  # fmt: skip
        # Every process has the whole weight.
        observer.is_joint = False
        observer(self.weight)
        return observer.calculate_qparams()

    def _shares(self) -> list[tuple[Tensor, Tensor]]:
        rows = channel_rows(self.weight, self.axis)
        low, high = rows.amin(1), rows.amax(1)
        quantizer = self.quantizer
        symmetric = quantizer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        rest = (quantizer.quant_min, quantizer.quant_max, symmetric, self._is_pot_scale)
        return [qparams_from_range(low * share, high * share, *rest) for share in SHARES]

    @property
    def _is_pot_scale(self) -> bool:
        return getattr(self.quantizer, 'is_pot_scale', False)

    def _difference(self, index: int) -> Tensor:
        """Returns what quantization with a candidate adds to the weight."""
        qparams = self.scales[index], self.zero_points[index]
        limits = self.quantizer.quant_min, self.quantizer.quant_max
        return ops.fake_quantize(self.weight, *qparams, *limits, self.axis) - self.weight

    def has_output_errors(self, layer: nn.Module) -> bool:
        """Tells whether each output of a layer depends on one scale only."""
        return self.axis in (-1, channel_axis(layer))

    def add_output_errors(self, layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Adds the squared error of the layer's output, for each candidate, to those of other calls.

        Args:
            layer: the layer that has the weight.
            x: its activations.
            *args: further arguments of the layer's forward.
            **kwargs: the same by name.
        """
        errors = [
            self._per_range(call_layer(layer, x, self._difference(index), None, *args, **kwargs), layer)
            for index in range(len(self.scales))
        ]
        total = torch.stack(errors)
        self._outputs = total if self._outputs is None else self._outputs + total
        reference = call_layer(layer, x, self.weight, None, *args, **kwargs)
        self._reference += float(reference.float().square().sum())

    def _per_range(self, output: Tensor, layer: nn.Module) -> Tensor:
        """Sums the squares of a layer's output over everything that has one scale; shape (scales,)."""
        axis = output.dim() - 1 - (0 if isinstance(layer, nn.Linear) else len(layer.kernel_size))
        squares = output.float().square().sum([d for d in range(output.dim()) if d != axis])
        # One scale for all outputs, one for each, or, of a grouped transposed convolution, one for those at the same
        # place in their groups.
        return squares.reshape(-1, self.scales.shape[1]).sum(0) if self.scales.shape[1] > 1 else squares.sum()[None]

    def reduce(self) -> None:
        """Adds up the errors of the outputs over all processes; each of them has to call it."""
        shape = self.scales.shape
        errors = torch.zeros(shape, device=self.weight.device) if self._outputs is None else self._outputs
        packed = torch.cat([errors.flatten(), errors.new_tensor([self._reference])])
        all_reduce(packed)
        self._reference = float(packed[-1])
        self._outputs = packed[:-1].reshape(shape) if self._reference > 0 else None

    def choose(self) -> tuple[float, float]:
        """Sets the best candidate; returns the relative squared error before and after."""
        errors, reference = self._outputs, self._reference
        if errors is None:
            errors = torch.stack(
                [channel_rows(self._difference(i), self.axis).float().square().sum(1) for i in range(len(self.scales))]
            )
            reference = float(self.weight.float().square().sum())
        best = errors.argmin(0, keepdim=True)
        scale, zero_point = (values.gather(0, best)[0] for values in (self.scales, self.zero_points))
        if isinstance(self.quantizer, FakeQuantize):
            self.quantizer.set_qparams(scale, zero_point)
        else:
            self.quantizer.scale.copy_(scale)
            self.quantizer.zero_point.copy_(zero_point)
        reference = max(reference, torch.finfo(torch.float32).tiny)
        return float(errors[0].sum()) / reference, float(errors.gather(0, best).sum()) / reference


def _in_use(quantizer: FakeQuantizeBase) -> tuple[Tensor, Tensor]:
    scale = quantizer.scale_in_use() if isinstance(quantizer, FakeQuantize) else quantizer.scale
    return scale.detach(), quantizer.zero_point.detach()
