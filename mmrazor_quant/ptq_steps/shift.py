"""Measuring how quantization shifts the mean of each output channel, correcting it on the way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from mmrazor_quant.graph.rescale import output_channels


@dataclass
class _Sums:
    """What was summed up over the calls of a layer, each call weighted with its number of values per channel.

    Args:
        shift: difference of the means of quantized and float outputs, float64, shape (channels,).
        weight: sum of the weights.
    """

    shift: Tensor
    weight: float = 0.0

    def add(self, shift: Tensor, weight: float) -> None:
        """Adds one call."""
        self.shift += shift * weight
        self.weight += weight

    def mean(self) -> Tensor:
        """Returns the mean shift."""
        return self.shift / max(self.weight, 1.0)


class ShiftMeter:
    """Measures E[y_quantized] - E[y_float] per output channel of layers, and corrects the outputs on the way.

    Use :meth:`tap` as the tap of the layers. Each batch runs in float (:meth:`begin_float`), then quantized
    (:meth:`begin_quantized`), where each output is corrected: in the first pass by the mean shift so far, with this
    batch, in later ones by the result of the pass before. Calls of a layer are compared in pairs: the second one of
    the quantized run with the second one of the float run. Under data parallelism the shifts of all processes are
    averaged at the end of a pass.

    Args:
        layers: the layers to measure, in an order that is the same in all processes.

    Attributes:
        corrections: what to add to the output of each layer that was called, float64, shape (channels,).
        before: for each of them, the shift, as root mean square over channels relative to the spread of its float
            output, with the layers before it corrected and itself not.
        after: the same with itself corrected by all passes but the last; empty after one pass.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = list(layers)
        self.corrections: dict[nn.Module, Tensor] = {}
        self.before: dict[nn.Module, float] = {}
        self.after: dict[nn.Module, float] = {}
        self._float_means: dict[nn.Module, list[Tensor]] = defaultdict(list)
        self._variances = {layer: torch.zeros(2, dtype=torch.float64) for layer in self.layers}
        self._sums: dict[nn.Module, _Sums] = {}
        self._calls: Counter[nn.Module] = Counter()
        self._is_float = False

    def begin_pass(self) -> None:
        """Forgets the sums of the pass before."""
        self._sums = {layer: _Sums(torch.zeros(output_channels(layer), dtype=torch.float64)) for layer in self.layers}

    def begin_float(self) -> None:
        """Has the following calls be those of the float network on a batch."""
        self._is_float = True
        self._float_means.clear()

    def begin_quantized(self) -> None:
        """Has the following calls be those of the quantized network on the same batch."""
        self._is_float = False
        self._calls.clear()

    def tap(self, layer: nn.Module, output: Tensor) -> Tensor:
        """Measures the output of a layer; returns it, corrected if it is that of the quantized network."""
        if layer not in self._sums:
            return output
        if self._is_float:
            self._note_float(layer, output)
            return output
        self._note_quantized(layer, output)
        correction = self._correction(layer)
        return output if correction is None else output + _along_channels(correction, layer, output)

    def _note_float(self, layer: nn.Module, output: Tensor) -> None:
        variance, mean = torch.var_mean(output.float(), _other_dimensions(layer, output), correction=0)
        self._float_means[layer].append(mean.cpu().double())
        if output.numel():
            weight = float(output.numel())
            self._variances[layer] += torch.tensor([weight * float(variance.mean()), weight], dtype=torch.float64)

    def _note_quantized(self, layer: nn.Module, output: Tensor) -> None:
        call = self._calls[layer]
        self._calls[layer] += 1
        floats = self._float_means[layer]
        if call < len(floats) and output.numel():
            mean = output.float().mean(_other_dimensions(layer, output)).cpu().double()
            self._sums[layer].add(mean - floats[call], output.numel() / len(mean))

    def _correction(self, layer: nn.Module) -> Tensor | None:
        if layer in self.corrections:
            return self.corrections[layer]
        sums = self._sums[layer]
        return -sums.mean() if sums.weight else None

    def end_pass(self) -> None:
        """Makes the mean shifts of all processes the corrections."""
        for layer in self.layers:
            sums = self._sums[layer]
            reduced = torch.cat([sums.shift, torch.tensor([sums.weight], dtype=torch.float64), self._variances[layer]])
            all_reduce(reduced)
            weight, *variance = reduced[-3:].tolist()
            if weight == 0:
                continue
            shift = reduced[:-3] / weight
            spread = (variance[0] / max(variance[1], 1.0)) ** 0.5
            if layer in self.corrections:
                self.after[layer] = _relative(shift + self.corrections[layer], spread)
            else:
                self.before[layer] = _relative(shift, spread)
            self.corrections[layer] = -shift


def _relative(shift: Tensor, spread: float) -> float:
    return float(shift.square().mean().sqrt()) / max(spread, torch.finfo(torch.float32).tiny)


def _channel_dimension(layer: nn.Module, output: Tensor) -> int:
    """Returns the dimension of the channels, whether there is a batch dimension or not."""
    return output.dim() - 1 - (0 if isinstance(layer, nn.Linear) else len(layer.kernel_size))


def _other_dimensions(layer: nn.Module, output: Tensor) -> list[int]:
    axis = _channel_dimension(layer, output)
    return [dimension for dimension in range(output.dim()) if dimension != axis]


def _along_channels(values: Tensor, layer: nn.Module, output: Tensor) -> Tensor:
    shape = [1] * output.dim()
    shape[_channel_dimension(layer, output)] = -1
    return values.to(output.dtype).to(output.device).reshape(shape)
