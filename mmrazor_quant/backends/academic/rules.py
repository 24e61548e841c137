"""No particular backend: inputs and weights of every convolution, linear layer and matrix product."""

from mmrazor_quant.backends.rules import Rules

RULES = Rules(
    name='academic',
    quantized=('layer', 'functional', 'matmul', 'einsum'),
    optional=('add',),
)
