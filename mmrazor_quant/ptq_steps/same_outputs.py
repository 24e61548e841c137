"""Checking that a change of the parameters leaves what a model computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from mmengine.dist import all_reduce
from torch import Tensor, nn

from mmrazor_quant.engine.calibration import set_float
from mmrazor_quant.graph.channel_clip import follow_state_dict
from mmrazor_quant.tracing.island import islands_of

from .base import StepModel

TOLERANCE = 1e-3
"""Largest difference that is taken for rounding, relative to the largest value of a tensor."""


class SameOutputs:
    """What the islands of a float model, and the modules around them, give on one batch.

    Args:
        model: the model, before the change.
        batch: a batch as ``model.test_step`` takes it.
    """

    def __init__(self, model: StepModel, batch: Any) -> None:
        self.model, self.batch = model, batch
        set_float(model)
        # With its metadata, without which torch's observers would take it for one of an old version.
        self._state = copy.deepcopy(model.architecture.state_dict())
        self._expected = self._run()

    def largest_difference(self) -> float:
        """Returns the largest difference now, over all processes, relative to the largest value of its tensor."""
        found = self._run()
        pairs = zip(self._expected, found)
        differences = [_difference(*pair) for pair in pairs] + [float(len(found) != len(self._expected))]
        largest = torch.tensor([max(differences)])
        all_reduce(largest, 'max')
        return float(largest)

    def restore(self) -> None:
        """Gives the model the parameters back that it had before the change."""
        architecture = self.model.architecture
        follow_state_dict(architecture, self._state, '')
        architecture.load_state_dict(self._state)

    @torch.no_grad()
    def _run(self) -> list[Tensor]:
        outputs: list[Tensor] = []

        def remember(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.extend(leaf.detach().clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))

        handles = [module.register_forward_hook(remember) for module in _outside(self.model.architecture)]
        try:
            # A model may write into what it is given.
            self.model.test_step(copy.deepcopy(self.batch))
        finally:
            for handle in handles:
                handle.remove()
        return outputs


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return 1.0
    if expected.numel() == 0 or not expected.is_floating_point():
        return 0.0
    scale = expected.abs().amax().clamp(min=torch.finfo(expected.dtype).tiny)
    return float(((found - expected).abs().amax() / scale).nan_to_num(nan=0.0))


def _outside(model: nn.Module) -> list[nn.Module]:
    """Returns the islands and the modules that are in none."""
    inside = {m for island in islands_of(model).values() for m in island.modules() if m is not island}
    return [module for module in model.modules() if module not in inside]
