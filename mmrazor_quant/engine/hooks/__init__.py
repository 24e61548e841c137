"""Hooks that the loops and the tools register by themselves."""

from mmrazor_quant.engine.hooks.batch_augments_hook import BatchAugmentsHook
from mmrazor_quant.engine.hooks.checkpoint_match_hook import CheckpointMatchHook
from mmrazor_quant.engine.hooks.compiled_work_hook import CompiledWorkHook
from mmrazor_quant.engine.hooks.ema_buffers_hook import EMABuffersHook
from mmrazor_quant.engine.hooks.quant_eval_hook import QuantEvalHook

__all__ = ['BatchAugmentsHook', 'CheckpointMatchHook', 'CompiledWorkHook', 'EMABuffersHook', 'QuantEvalHook']
