# 4-bit weights, 8-bit activations, both of least error |x - q(x)|^2.4; first and last layer 8 bits.
_base_ = './w4a4_mse.py'

qconfig = dict(a_qscheme=dict(bit=8))
