"""Ranges of weights that make the least error."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.fake_quants import DoReFaFakeQuantize, FakeQuantize
from mmrazor_quant.observers import MSEObserver
from mmrazor_quant.ops.error import value_error
from mmrazor_quant.ops.layout import channel_rows
from mmrazor_quant.registry import TASK_UTILS

from .base import PTQStep, Stage, StepContext
from .report import log, table


@TASK_UTILS.register_module()
class WeightRangeMSE(PTQStep):
    """Gives weights the range of least error sum |w - q(w)|^p, whatever their observer says.

    Each weight tensor, or each of its output channels, gets the best of the range that it has and the one that
    :class:`mmrazor_quant.observers.MSEObserver` finds, so that no error grows. The weight is the one that is
    quantized: with its batch norm folded in. It runs when the observers of the weights have set their ranges, before
    activations are observed; learned scales start from the result.

    Args:
        p: exponent of the error.

    Raises:
        ValueError: an exponent that is not a positive number.
    """

    stage = Stage.AFTER_WEIGHTS

    def __init__(self, p: float = 2.0) -> None:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not p >= 0.1:
            raise ValueError(f'p: got {p!r}, allowed: numbers >= 0.1')
        self.p = float(p)

    @torch.no_grad()
    def run(self, context: StepContext) -> None:
        """Sets the ranges of all weights of the model in place."""
        architecture = context.model.architecture
        rows, left = [], 0
        for site in context.model.inserted.weights:
            quantizer = architecture.get_submodule(site.quantizer)
            if isinstance(quantizer, DoReFaFakeQuantize):  # it computes its range from the weights by itself
                left += 1
                continue
            before, after = self._set_range(quantizer, site.value(architecture).detach())
            rows.append((site.weight, before, after))
        log(_summary(rows, left, self.p))

    def _set_range(self, quantizer: FakeQuantizeBase, weight: Tensor) -> tuple[float, float]:
        """Sets the range of one weight; returns the error before and after, relative to sum |w|^p."""
        axis = quantizer.ch_axis if _is_per_channel(quantizer) else -1
        rows = channel_rows(weight, axis).to(torch.float32)
        old = _in_use(quantizer)
        new = self._best(quantizer, weight, axis)
        before, after = (self._error(rows, quantizer, *qparams) for qparams in (old, new))
        better = after < before
        scale, zero_point = (torch.where(better, n, o.to(n.dtype)) for n, o in zip(new, old))
        _set(quantizer, scale, zero_point)
        total = rows.abs().pow(self.p).sum().clamp(min=torch.finfo(rows.dtype).tiny)
        return float(before.sum() / total), float(torch.minimum(before, after).sum() / total)

    def _best(self, quantizer: FakeQuantizeBase, weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        observer = MSEObserver(
            dtype=quantizer.dtype, qscheme=quantizer.qscheme, quant_min=quantizer.quant_min,
            quant_max=quantizer.quant_max, ch_axis=axis, is_pot_scale=getattr(quantizer, 'is_pot_scale', False),
            p=self.p, exact=True,
        ).to(weight.device)  # fmt: skip
        # Every process has the whole weight.
        observer.is_joint = False
        observer(weight)
        return observer.calculate_qparams()

    def _error(self, rows: Tensor, quantizer: FakeQuantizeBase, scale: Tensor, zero_point: Tensor) -> Tensor:
        return value_error(rows, scale[None], zero_point[None], quantizer.quant_min, quantizer.quant_max, self.p)[0]


def _is_per_channel(quantizer: FakeQuantizeBase) -> bool:
    return quantizer.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)


def _in_use(quantizer: FakeQuantizeBase) -> tuple[Tensor, Tensor]:
    scale = quantizer.scale_in_use() if isinstance(quantizer, FakeQuantize) else quantizer.scale
    return scale.detach().to(torch.float32), quantizer.zero_point.detach()


def _set(quantizer: FakeQuantizeBase, scale: Tensor, zero_point: Tensor) -> None:
    if isinstance(quantizer, FakeQuantize):
        quantizer.set_qparams(scale, zero_point)
    else:
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero_point)


def _summary(rows: list[tuple[str, float, float]], left: int, p: float) -> str:
    rows = sorted(rows, key=lambda row: row[2] - row[1])
    cells = [(name, f'{before:.3e}', f'{after:.3e}') for name, before, after in rows]
    title = f'Ranges of least error for {len(rows)} weights; error relative to the sum of |w|^{p:g}'
    shown = [table(('weight, most improved first', 'before', 'after'), cells)] if rows else []
    return '\n'.join([title, *shown, *([f'{left} weights have no range to be set'] if left else [])])
