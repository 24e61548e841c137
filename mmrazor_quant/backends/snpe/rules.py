"""The HTP of SNPE and QNN: every tensor between two operations is quantized, the network's result as well.

What has no grid there runs in float, or on another processor. Activations use all 256 integers of a byte; weights need
a zero point of 0. Biases are int32.
"""

from mmrazor_quant.backends.rules import Limits, Rules

RULES = Rules(
    name='snpe',
    quantized=('layer', 'functional', 'matmul', 'einsum', 'add', 'other'),
    quantize_results=True,
    every_result=True,
    quantize_bias=True,
    weights=Limits(bit=8, is_symmetry=(True,), is_signed=(True,)),
    activations=Limits(bit=8, least_bit=8, is_per_channel=(False,), is_symmetric_range=(False,)),
)
