"""Keep the quantization buffers of averaged models consistent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.engine.quant_model import bare_model
from mmrazor_quant.registry import HOOKS


@HOOKS.register_module()
class EMABuffersHook(Hook):
    """Give the copy of ``EMAHook(update_buffers=True)`` the quantization buffers of the model itself.

    mmengine averages the buffers that are floating point and leaves the others as they were in the first iteration.
    A scale that is averaged does not fit a zero point that is not, nor switches and flags of the past. The QAT loops
    register this hook by themselves.
    """

    # After EMAHook, before CheckpointHook.
    priority = 'LOW'

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Copy the buffers.

        Args:
            runner: Runner of the model.
            batch_idx: Number of the batch.
            data_batch: The batch.
            outputs: Losses.
        """
        for hook in runner.hooks:
            if isinstance(hook, EMAHook) and hook.ema_model.update_buffers:
                own, averaged = bare_model(runner), hook.ema_model.module
                for source, target in zip(_unaveraged(own), _unaveraged(averaged)):
                    target.copy_(source)


def _unaveraged(model: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers that make no sense as an average, in the order of the modules."""
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            yield from module.buffers()
        else:
            yield from (buffer for buffer in module.buffers(recurse=False) if not buffer.is_floating_point())
