# 2-bit weights per output channel and 4-bit activations, asymmetric, whose rounding and steps reconstruction learns;
# first and last layer 8 bits.
qconfig = dict(
    qtype='affine',
    w_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    a_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    w_fake_quant=dict(type='mmrazor.AdaRoundFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.QDropFakeQuantize'),
    w_qscheme=dict(bit=2, is_symmetry=False, is_per_channel=True),
    a_qscheme=dict(bit=4, is_symmetry=False, is_per_channel=False),
    overrides=[
        dict(order='first', w_qscheme=dict(bit=8), a_qscheme=dict(bit=8)),
        dict(order='last', w_qscheme=dict(bit=8), a_qscheme=dict(bit=8)),
    ],
)
