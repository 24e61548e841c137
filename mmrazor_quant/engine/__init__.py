"""What drives quantization through mmengine's Runner: loops and hooks."""

from mmrazor_quant.engine.hooks import CheckpointMatchHook, QuantEvalHook
from mmrazor_quant.engine.loops import PTQLoop, QATEpochBasedLoop, QATIterBasedLoop

__all__ = ['CheckpointMatchHook', 'PTQLoop', 'QATEpochBasedLoop', 'QATIterBasedLoop', 'QuantEvalHook']
