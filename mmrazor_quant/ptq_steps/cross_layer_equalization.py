"""Cross-layer equalization."""

from __future__ import annotations

from collections import Counter

import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmrazor_quant.arguments import check_integer
from mmrazor_quant.graph.chains import Chains, Link, find_chains
from mmrazor_quant.graph.channel_clip import replace_by_channel_clip
from mmrazor_quant.graph.rescale import input_channels, magnitudes, output_channels, scale_inputs, scale_outputs
from mmrazor_quant.registry import TASK_UTILS

from .base import PTQStep, Stage, StepContext
from .report import log, table
from .same_outputs import TOLERANCE, SameOutputs

_TINY = torch.finfo(torch.float64).tiny

CONVERGED = 1e-3
"""Iteration ends when no factor changes by more than this share."""


@TASK_UTILS.register_module()
class CrossLayerEqualization(PTQStep):
    r"""Gives the channels of a weight tensor similar ranges (Nagel et al. 2019, "Data-free quantization", section 4.1).

    Where nothing but an activation f with f(s x) = s f(x) for s > 0, such as ReLU, stands between two layers, channel i
    of the first one's output can be divided by s_i and the second one's input multiplied by it. With r the largest
    absolute weight of a channel, batch norm folded in, eq. 11 gives both the same range:

    .. math:: s_i = \frac{1}{r^{(2)}_i} \sqrt{r^{(1)}_i r^{(2)}_i}

    Pairs that share a layer, as around a depthwise convolution, are solved for in turn until nothing changes. The
    float network computes the same as before, up to rounding; that is checked on one batch. It runs before calibration.

    It is of use for weights quantized per tensor; of weights quantized per output channel only the second layer of a
    pair sees a difference. Activations get wider ranges where weights were unequal.

    Changed are weights and biases, or scale and shift of an affine batch norm; running statistics and the names of all
    entries stay. ReLU6 and other clips to two constants are not homogeneous, but their bounds can be divided by s_i:
    such a module is replaced by a :class:`mmrazor_quant.graph.channel_clip.ChannelClip`, whose bounds are added to the
    state dict.

    Args:
        iterations: how often each pair is solved for, at most.
        clips: ``'scale'`` to equalize across ReLU6 and its kind as said, ``'skip'`` to leave such pairs alone.

    Raises:
        ValueError: a value that is not allowed.
    """

    stage = Stage.BEFORE_CALIBRATION

    def __init__(self, iterations: int = 20, clips: str = 'scale') -> None:
        self.iterations = check_integer('iterations', iterations, 1)
        if clips not in ('scale', 'skip'):
            raise ValueError(f"clips: got {clips!r}, allowed: 'scale', 'skip'")
        self.clips = clips

    def run(self, context: StepContext) -> None:
        """Equalizes all pairs of the model in place."""
        architecture = context.model.architecture
        batch = next(context.batches(), None)
        outputs = None if batch is None else SameOutputs(context.model, batch)
        chains = find_chains(architecture, scale_clips=self.clips == 'scale')
        solver = _Solver(chains.links, chains.norms)
        before = solver.evenness()
        solver.solve(self.iterations)
        for link, factor in zip(chains.links, solver.factors):
            _apply(architecture, link, factor)
        log(_summary(architecture, chains, before, solver.evenness()))
        if outputs is not None:
            _check(outputs)


class _Solver:
    """Finds the factors from the ranges alone, so that parameters are rounded once in the end.

    Args:
        links: the pairs of layers.
        norms: the batch norm folded into each layer, or None.

    Attributes:
        factors: for each pair the s_i, float64, shape (channels of the first layer's output,).
    """

    def __init__(self, links: list[Link], norms: dict[nn.Module, nn.Module | None]) -> None:
        self.links = links
        self.factors = [torch.ones(output_channels(link.first), dtype=torch.float64) for link in links]
        layers = {layer for link in links for layer in (link.first, link.second)}
        self._sizes = {layer: magnitudes(layer, norms[layer]) for layer in layers}

    def solve(self, iterations: int) -> None:
        """Solves for each pair in turn, until nothing changes."""
        for _ in range(iterations):
            changes = [self._solve_pair(index) for index in range(len(self.links))]
            if max(changes, default=0.0) < CONVERGED:
                return

    def _solve_pair(self, index: int) -> float:
        link = self.links[index]
        first, second = self._output_range(link.first), self._input_range(link)
        factor = _factors(first, second)
        self.factors[index] *= factor
        sizes = self._sizes[link.first]
        self._sizes[link.first] = sizes / factor.reshape(len(sizes), -1, 1)
        sizes = self._sizes[link.second]
        self._sizes[link.second] = sizes * _for_inputs(factor, link.second).reshape(len(sizes), 1, -1)
        return float((factor.log()).abs().max())

    def _output_range(self, layer: nn.Module) -> Tensor:
        return self._sizes[layer].amax(2).reshape(-1)

    def _input_range(self, link: Link) -> Tensor:
        return self._sizes[link.second].amax(1).reshape(output_channels(link.first), -1).amax(1)

    def evenness(self) -> list[tuple[float, float]]:
        """Returns for each pair the mean, over channels, of their range divided by that of the whole tensor.

        That is the mean precision of the channels, 1 at best, of the first layer's outputs and the second's inputs
        (Nagel et al. 2019, section 4.1.2).
        """
        ranges = [(self._output_range(link.first), self._input_range(link)) for link in self.links]
        return [tuple(float((each / each.max().clamp(min=_TINY)).mean()) for each in pair) for pair in ranges]


def _factors(first: Tensor, second: Tensor) -> Tensor:
    """Computes the factors of one pair (eq. 11), and others for channels without weights in one of the layers.

    An output that the second layer does not use may have any range, and gets the median one. A constant output is
    divided by no less than others are, so that it does not widen the range of the activation.

    Args:
        first: range of each output channel of the first layer, float64, shape (channels,).
        second: range of each input channel of the second layer, the same shape.

    Returns:
        s_i, positive, the same shape.
    """
    usable = (first > 0) & (second > 0)
    if not bool(usable.any()):
        return torch.ones_like(first)
    factor = torch.where(usable, first / second, 1.0).sqrt()
    typical = (first * second)[usable].sqrt().median()
    is_unused, is_constant = (first > 0) & (second == 0), (first == 0) & (second > 0)
    factor = torch.where(is_unused, (first / typical).clamp(min=1.0), factor)
    least = factor[usable].min()
    return torch.where(is_constant, (typical / second).clamp(max=1.0).maximum(least), factor)


def _for_inputs(factor: Tensor, second: nn.Module) -> Tensor:
    """Repeats the factors of channels for inputs that were laid out in a row by a flatten."""
    return factor.repeat_interleave(input_channels(second) // len(factor))


def _check(outputs: SameOutputs) -> None:
    """Takes everything back if the float outputs changed: code that was not captured uses some layer too."""
    difference = outputs.largest_difference()
    log(f'Float outputs on one batch differ by {difference:.1e} of their largest value')
    if difference > TOLERANCE:
        outputs.restore()
        MMLogger.get_current_instance().warning(
            'Cross-layer equalization: that is more than rounding, so code that was not captured uses some layer; '
            'nothing was equalized'
        )


def _apply(model: nn.Module, link: Link, factor: Tensor) -> None:
    scale_outputs(link.first, link.norm, 1 / factor)
    scale_inputs(link.second, _for_inputs(factor, link.second))
    for path in link.clips:
        replace_by_channel_clip(model, path, len(factor), link.first.weight).scale(1 / factor)


def _summary(
    model: nn.Module, chains: Chains, before: list[tuple[float, float]], after: list[tuple[float, float]]
) -> str:
    names = {module: name for name, module in model.named_modules()}
    rows = [
        (f'{names[link.first]} -> {names[link.second]}', *(f'{x:.2f} -> {y:.2f}' for x, y in zip(old, new)))
        for link, old, new in sorted(zip(chains.links, before, after), key=lambda row: sum(row[1]))
    ]
    header = ('pair, least even first', 'outputs of the first', 'inputs of the second')
    total = len(chains.links) + len(chains.reasons)
    reasons = Counter(chains.reasons.values())
    left = [f'{count} not equalized: {reason}' for reason, count in reasons.most_common()]
    title = f'Cross-layer equalization: {len(chains.links)} pairs of {total} layers; mean range of a channel, 1 at best'
    return '\n'.join([title, *([table(header, rows)] if rows else []), *left])
