"""Optional steps of post-training quantization, each of use alone."""

from .base import PTQStep, Stage, StepContext
from .bias_correction import BiasCorrection
from .build import PTQSteps, build_steps
from .cross_layer_equalization import CrossLayerEqualization
from .weight_range_mse import WeightRangeMSE

__all__ = [
    'BiasCorrection',
    'CrossLayerEqualization',
    'PTQStep',
    'PTQSteps',
    'Stage',
    'StepContext',
    'WeightRangeMSE',
    'build_steps',
]
