"""Loops for post-training quantization and quantization-aware training."""

from mmrazor_quant.engine.loops.deploy_loop import DeployLoop
from mmrazor_quant.engine.loops.ptq_loop import PTQLoop
from mmrazor_quant.engine.loops.qat_loops import QATEpochBasedLoop, QATIterBasedLoop

__all__ = ['DeployLoop', 'PTQLoop', 'QATEpochBasedLoop', 'QATIterBasedLoop']
