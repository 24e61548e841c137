"""Ranges of weights that make the least error."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mmrazor_quant.arguments import check_integer
from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.engine.calibration import set_float
from mmrazor_quant.engine.progress import Progress
from mmrazor_quant.fake_quants import DoReFaFakeQuantize, FakeQuantize
from mmrazor_quant.graph.insert import WeightSite
from mmrazor_quant.graph.taps import tapped
from mmrazor_quant.registry import TASK_UTILS

from .base import PTQStep, Stage, StepContext
from .range_candidates import RangeCandidates
from .report import log, table


@TASK_UTILS.register_module()
class WeightRangeMSE(PTQStep):
    """Gives weights the range of least squared error, whatever their observer says.

    Each weight tensor, or each of its output channels, gets the best of a number of ranges; the one that its observer
    chose is among them, so that no error grows. The weight is the one that is quantized: with its batch norm folded in.
    It runs when the observers of the weights have set their ranges, before activations are observed; learned scales
    start from the result.

    The error is that of the layer's output on float calibration data, E[((w - q(w)) x)^2], or that of the weight
    itself, (w - q(w))^2, which knows nothing of what the weight is multiplied with: clipping a few large weights looks
    cheap to it, but shifts the output. A weight that a function reads, that no data reach, or whose scales run over
    another dimension than the output channels always gets the latter.

    Args:
        error: ``'output'`` or ``'weight'``.
        batches: number of batches that output errors are summed over.

    Raises:
        ValueError: a value that is not allowed.
    """

    stage = Stage.AFTER_WEIGHTS

    def __init__(self, error: str = 'output', batches: int = 1) -> None:
        if error not in ('output', 'weight'):
            raise ValueError(f"error: got {error!r}, allowed: 'output', 'weight'")
        self.error = error
        self.batches = check_integer('batches', batches, 1)

    @torch.no_grad()
    def run(self, context: StepContext) -> None:
        """Sets the ranges of all weights of the model in place."""
        architecture = context.model.architecture
        candidates: dict[WeightSite, RangeCandidates] = {}
        for site in context.model.inserted.weights:
            quantizer = architecture.get_submodule(site.quantizer)
            if _has_range(quantizer):
                candidates[site] = RangeCandidates(quantizer, site.value(architecture).detach())
        if self.error == 'output':
            self._measure_outputs(context, candidates)
        rows = [(site.weight, *each.choose()) for site, each in candidates.items()]
        log(_summary(rows, len(context.model.inserted.weights) - len(rows)))

    def _measure_outputs(self, context: StepContext, candidates: dict[WeightSite, RangeCandidates]) -> None:
        """Runs the float model, and each layer with the error that each candidate makes, on calibration data."""
        model = context.model
        found = ((model.architecture.get_submodule(site.layer), each) for site, each in candidates.items())
        layers = {layer: each for layer, each in found if each.has_output_errors(layer)}

        count = min(self.batches, context.count)
        progress = Progress(count * len(layers), 'Ranges of weights, layer')

        def measure(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> None:
            if layer in layers and x.numel():
                layers[layer].add_output_errors(layer, x, *args, **kwargs)
                progress.advance()

        set_float(model)
        with tapped(model.architecture, input_tap=measure):
            for batch in islice(context.batches(), count):
                model.test_step(batch)
        for each in candidates.values():
            each.reduce()


def _has_range(quantizer: FakeQuantizeBase) -> bool:
    """Tells whether a quantizer uses the scale that it is given; DoReFa's computes its own from the weights."""
    return not isinstance(quantizer, DoReFaFakeQuantize) and (
        isinstance(quantizer, FakeQuantize) or hasattr(quantizer, 'scale')
    )


def _summary(rows: list[tuple[str, float, float]], left: int) -> str:
    rows = sorted(rows, key=lambda row: row[2] / max(row[1], torch.finfo(torch.float32).tiny))
    cells = [
        (name, f'{before:.3e}', f'{after:.3e}', f'{after / before:.2f}' if before else '')
        for name, before, after in rows
    ]
    title = f'Ranges of least error for {len(rows)} weights; squared error relative to the square of what it is about'
    shown = [table(('weight, most improved first', 'before', 'after', 'ratio'), cells)] if rows else []
    return '\n'.join([title, *shown, *([f'{left} weights have no range to be set'] if left else [])])
