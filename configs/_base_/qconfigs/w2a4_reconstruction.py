# As w4a4_mse.py, with 2-bit weights whose rounding, and 4-bit activations whose steps reconstruction learns.
_base_ = './w4a4_mse.py'

qconfig = dict(
    w_fake_quant=dict(type='mmrazor.AdaRoundFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.QDropFakeQuantize'),
    w_qscheme=dict(bit=2),
)
