"""ncnn on CPU: convolutions and linear layers whose input and weight are in [-127, 127] without a zero point.

Additions, activations and pooling are float there, and so are biases: quantizers are on the inputs of layers only. What
ncnn clamps to is fixed, so activations have 8 bits; weights of fewer bits are stored in 8.
"""

from mmrazor_quant.backends.rules import Limits, Rules

RULES = Rules(
    name='ncnn',
    quantized=('layer', 'functional'),
    weights=Limits(bit=8, is_symmetry=(True,), is_signed=(True,), is_symmetric_range=(True,)),
    activations=Limits(
        bit=8, least_bit=8, is_symmetry=(True,), is_per_channel=(False,), is_signed=(True,), is_symmetric_range=(True,)
    ),
)
