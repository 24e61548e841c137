"""No particular backend: inputs and weights of every convolution, linear layer and matrix product."""

from mmrazor_quant.backends.rules import Rules
from mmrazor_quant.ops import SHARES

RULES = Rules(
    name='academic',
    quantized=('layer', 'functional', 'matmul', 'einsum'),
    optional=('add',),
    is_dynamic=(False, True),
    shares=SHARES,
    any_weight_axis=True,
)
