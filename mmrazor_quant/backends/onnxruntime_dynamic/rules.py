"""ONNX Runtime on CPU, with scales of activations from the very tensor: convolutions and linear layers.

The range of a tensor is measured at run time (DynamicQuantizeLinear), which knows unsigned integers with a zero point,
one range a tensor. Only inputs of layers are quantized; results and biases are float.
"""

from mmrazor_quant.backends.rules import Limits, Rules

RULES = Rules(
    name='onnxruntime_dynamic',
    quantized=('layer', 'functional'),
    is_dynamic=(True,),
    weights=Limits(bit=8, is_symmetry=(True,), is_signed=(True,)),
    activations=Limits(
        bit=8, least_bit=8, is_symmetry=(False,), is_per_channel=(False,), is_signed=(False,), is_pot_scale=(False,)
    ),
)
