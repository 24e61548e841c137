"""OpenVINO on CPU: the same file as ONNX Runtime's, with additions quantized on the residual side only.

It runs a convolution and the addition behind it as one, without rounding between the two: a quantizer there would
round in training what is not rounded when deployed.
"""

from mmrazor_quant.backends.rules import RESIDUAL, Limits, Rules

RULES = Rules(
    name='openvino',
    quantized=('layer', 'functional', 'matmul', 'add'),
    add_inputs=RESIDUAL,
    quantize_bias=True,
    weights=Limits(bit=8, is_symmetry=(True,), is_signed=(True,)),
    activations=Limits(bit=8, is_per_channel=(False,)),
)
