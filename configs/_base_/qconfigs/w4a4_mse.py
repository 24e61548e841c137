# 4 bits: asymmetric weights per output channel, asymmetric activations per tensor, ranges of least error
# |x - q(x)|^2.4; first and last layer 8 bits.
qconfig = dict(
    qtype='affine',
    w_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    a_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    w_fake_quant=dict(type='mmrazor.FakeQuantize'),
    a_fake_quant=dict(type='mmrazor.FakeQuantize'),
    w_qscheme=dict(bit=4, is_symmetry=False, is_per_channel=True),
    a_qscheme=dict(bit=4, is_symmetry=False, is_per_channel=False),
    overrides=[
        dict(order='first', w_qscheme=dict(bit=8), a_qscheme=dict(bit=8)),
        dict(order='last', w_qscheme=dict(bit=8), a_qscheme=dict(bit=8)),
    ],
)
