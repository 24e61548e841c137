"""Empirical bias correction."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn

from mmrazor_quant.arguments import check_integer
from mmrazor_quant.engine.calibration import set_float, set_quantized
from mmrazor_quant.engine.progress import with_progress
from mmrazor_quant.graph.taps import tapped
from mmrazor_quant.registry import TASK_UTILS

from .base import PTQStep, Stage, StepContext, StepModel
from .bias_place import bias_places
from .report import log, table
from .shift import ShiftMeter


@TASK_UTILS.register_module()
class BiasCorrection(PTQStep):
    """Takes off what quantization adds to the expected output of each layer (Nagel et al. 2019, section 4.2).

    For every output channel the shift E[y_quantized] - E[y_float] is measured on the calibration data, with all layers
    before it corrected already, and subtracted from the bias (appendix D of the paper). Each batch runs in float and
    then quantized: in the first pass, each layer's output is corrected on its way by the mean shift of the batches so
    far; in later ones by the result of the pass before, whose remaining shift is measured and taken off in turn. It
    runs after calibration and reconstruction, since it changes what the float network computes.

    The correction goes into the shift of the batch norm that is folded into the layer, else into the layer's bias; into
    the running mean of a batch norm without a shift. A layer that has neither is reported. No entry is added to the
    state dict.

    Args:
        activations: whether activations are quantized as well while the shift is measured; otherwise only the shift
            that quantized weights cause is corrected.
        passes: how often the data are gone through.

    Raises:
        ValueError: a value that is not allowed.
    """

    stage = Stage.AFTER_CALIBRATION
    changes_float = True

    def __init__(self, activations: bool = True, passes: int = 2) -> None:
        if not isinstance(activations, bool):
            raise ValueError(f'activations: got {activations!r}, allowed: True, False')
        self.activations = activations
        self.passes = check_integer('passes', passes, 1)

    @torch.no_grad()
    def run(self, context: StepContext) -> None:
        """Corrects all layers of the model in place.

        Raises:
            ValueError: a shift is NaN or infinite, naming the layer.
        """
        architecture = context.model.architecture
        places, reasons = bias_places(architecture, context.model.inserted.weights)
        names = {module: name for name, module in architecture.named_modules()}
        meter = ShiftMeter(places)
        with tapped(architecture, meter.tap):
            for number in range(1, self.passes + 1):
                self._pass(context, meter, number)
        for layer, place in places.items():
            if layer not in meter.corrections:
                reasons[names[layer]] = 'no data reached it'
                continue
            if not bool(torch.isfinite(meter.corrections[layer]).all()):
                raise ValueError(f'bias correction: the outputs of {names[layer]} are NaN or infinite')
            place.add(meter.corrections[layer])
        set_quantized(context.model)
        log(_summary(names, meter, reasons))

    def _pass(self, context: StepContext, meter: ShiftMeter, number: int) -> None:
        meter.begin_pass()
        title = f'Bias correction, pass {number} of {self.passes}'
        for batch in with_progress(context.batches(), context.count, title):
            self._measure(context.model, meter, batch)
        meter.end_pass()

    def _measure(self, model: StepModel, meter: ShiftMeter, batch: Any) -> None:
        set_float(model)
        meter.begin_float()
        # A model may write into what it is given.
        model.test_step(copy.deepcopy(batch))
        model.set_quant_state(False, True, False, self.activations)
        meter.begin_quantized()
        model.test_step(batch)


def _summary(names: dict[nn.Module, str], meter: ShiftMeter, reasons: dict[str, str]) -> str:
    layers = sorted(meter.before, key=meter.before.get, reverse=True)
    rows = [(names[layer], _percent(meter.before[layer]), _percent(meter.after.get(layer))) for layer in layers]
    title = f'Bias correction of {len(rows)} layers; shift of the mean output relative to its spread'
    shown = [table(('layer, most shifted first', 'before', 'after'), rows)] if rows else []
    left = [f'{count} not corrected: {reason}' for reason, count in Counter(reasons.values()).most_common()]
    return '\n'.join([title, *shown, *left])


def _percent(share: float | None) -> str:
    return '' if share is None else f'{100 * share:.2f} %'
