"""ONNX Runtime on CPU: integer convolutions, linear layers, matrix products and additions between Q/DQ pairs.

Both inputs of an addition have to be quantized, and so has the result of every layer, or that layer stays float: the
last layers do, whose results are the network's. Weights need a zero point of 0. Biases of integer kernels are int32.
"""

from mmrazor_quant.backends.rules import Limits, Rules

RULES = Rules(
    name='onnxruntime',
    quantized=('layer', 'functional', 'matmul', 'add'),
    quantize_results=True,
    quantize_bias=True,
    weights=Limits(bit=8, is_symmetry=(True,), is_signed=(True,)),
    activations=Limits(bit=8, is_per_channel=(False,)),
)
