"""TensorRT, explicit quantization: int8 convolutions, linear layers and matrix products between Q/DQ pairs.

It knows signed integers with a zero point of 0 only. Nothing can stand between the two operations of a pair, so that
activations use all 256 integers. Of an addition the residual side alone is quantized: the other one is not rounded
between a convolution and the addition behind it. Results of layers are not quantized for their own sake, biases are
not integers.
"""

from mmrazor_quant.backends.rules import RESIDUAL, Limits, Rules

RULES = Rules(
    name='tensorrt',
    quantized=('layer', 'functional', 'matmul', 'add'),
    add_inputs=RESIDUAL,
    weights=Limits(bit=8, is_symmetry=(True,), is_signed=(True,)),
    activations=Limits(
        bit=8, least_bit=8, is_symmetry=(True,), is_per_channel=(False,), is_signed=(True,),
        is_symmetric_range=(False,),
    ),
)  # fmt: skip
