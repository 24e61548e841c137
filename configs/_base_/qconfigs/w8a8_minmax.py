# 8 bits: symmetric weights per output channel, asymmetric activations per tensor, full ranges.
qconfig = dict(
    qtype='affine',
    w_observer=dict(type='mmrazor.MinMaxObserver'),
    a_observer=dict(type='mmrazor.MinMaxObserver'),
    w_fake_quant=dict(type='mmrazor.FakeQuantize'),
    a_fake_quant=dict(type='mmrazor.FakeQuantize'),
    w_qscheme=dict(bit=8, is_symmetry=True, is_per_channel=True),
    a_qscheme=dict(bit=8, is_symmetry=False, is_per_channel=False),
)
