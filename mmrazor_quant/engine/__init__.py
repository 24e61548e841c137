"""What drives quantization through mmengine's Runner: loops and hooks."""

from mmrazor_quant.engine.hooks import CheckpointMatchHook, EMABuffersHook, QuantEvalHook
from mmrazor_quant.engine.loops import PTQLoop, QATEpochBasedLoop, QATIterBasedLoop

__all__ = ['CheckpointMatchHook', 'EMABuffersHook', 'PTQLoop', 'QATEpochBasedLoop', 'QATIterBasedLoop', 'QuantEvalHook']
