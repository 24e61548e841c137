"""Keep the quantization state of averaged models, and of several processes, consistent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import all_reduce, broadcast, get_rank, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmrazor_quant.compat import FakeQuantizeBase
from mmrazor_quant.engine.quant_model import bare_model
from mmrazor_quant.fake_quants import LearnedFakeQuantize
from mmrazor_quant.registry import HOOKS


@HOOKS.register_module()
class EMABuffersHook(Hook):
    """Give the copy of ``EMAHook`` the quantization state of the model itself, where an average makes no sense.

    mmengine averages the buffers that are floating point, with ``update_buffers``, and leaves the others as they were
    in the first iteration. A scale that is averaged does not fit a zero point that is not, nor switches and flags of
    the past. Learned parameters are averaged, but not with what they were before they had their start values; and
    where those come from an observer of torch, which sees only the data of its own process, all processes go on with
    those of one. The QAT loops register this hook by themselves.
    """

    # After EMAHook, before CheckpointHook.
    priority = 'LOW'

    def __init__(self) -> None:
        self._started: set[str] | None = None
        self._shared: set[str] = set()

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
        own = bare_model(runner)
        self._share_start_values(own)
        newly_started = self._newly_started(own)
        for hook in runner.hooks:
            if not isinstance(hook, EMAHook):
                continue
            averaged = hook.ema_model.module
            for path in newly_started:
                averaged.get_submodule(path).load_state_dict(own.get_submodule(path).state_dict())
            if hook.ema_model.update_buffers:
                for source, target in zip(_unaveraged(own), _unaveraged(averaged)):
                    target.copy_(source)

    def before_train(self, runner: Runner) -> None:
        """Note which learned parameters have their values already.

        Args:
            runner: Runner of the model.
        """
        self._newly_started(bare_model(runner))
        self._shared = set(self._started)

    def _share_start_values(self, model: nn.Module) -> None:
        """Give quantizers that got start values in this iteration, in any process, those of the first such process."""
        learned, world = _learned(model), get_world_size()
        waiting = [path for path in learned if path not in self._shared]
        if world == 1 or not waiting:
            return
        source = torch.tensor([get_rank() if learned[path].is_initialized else world for path in waiting])
        all_reduce(source, 'min')
        for path, rank in zip(waiting, source.tolist()):
            if rank < world:
                state = learned[path].state_dict()
                for tensor in state.values():
                    broadcast(tensor, src=rank)
                learned[path].load_state_dict(state)
                self._shared.add(path)

    def _newly_started(self, model: nn.Module) -> list[str]:
        """Return the paths of the fake quantizers that got their start values since the last call."""
        started = {path for path, quantizer in _learned(model).items() if quantizer.is_initialized}
        new = started - (started if self._started is None else self._started)
        self._started = started
        return sorted(new)


def _learned(model: nn.Module) -> dict[str, LearnedFakeQuantize]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LearnedFakeQuantize)}


def _unaveraged(model: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers that make no sense as an average, in the order of the modules."""
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            yield from module.buffers()
        else:
            yield from (buffer for buffer in module.buffers(recurse=False) if not buffer.is_floating_point())
