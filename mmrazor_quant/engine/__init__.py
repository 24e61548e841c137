"""What drives quantization through mmengine's Runner: loops, hooks, optimizer groups."""

from mmrazor_quant.engine.hooks import CheckpointMatchHook, EMABuffersHook, QuantEvalHook
from mmrazor_quant.engine.loops import DeployLoop, PTQLoop, QATEpochBasedLoop, QATIterBasedLoop
from mmrazor_quant.engine.optim_wrapper_constructor import QuantOptimWrapperConstructor

__all__ = [
    'CheckpointMatchHook',
    'DeployLoop',
    'EMABuffersHook',
    'PTQLoop',
    'QATEpochBasedLoop',
    'QATIterBasedLoop',
    'QuantEvalHook',
    'QuantOptimWrapperConstructor',
]
