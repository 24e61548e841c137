# Integer-arithmetic-only inference (Jacob et al. 2018): 8 bits, weights in [-127, 127] with the range that they have,
# moving averages of the ranges of activations.
qconfig = dict(
    qtype='affine',
    w_observer=dict(type='mmrazor.EMAMinMaxObserver', ema_ratio=0.0),
    a_observer=dict(type='mmrazor.EMAMinMaxObserver', ema_ratio=0.99),
    w_fake_quant=dict(type='mmrazor.FakeQuantize'),
    a_fake_quant=dict(type='mmrazor.FakeQuantize'),
    w_qscheme=dict(bit=8, is_symmetry=True, is_per_channel=True, is_symmetric_range=True),
    a_qscheme=dict(bit=8, is_symmetry=False, is_per_channel=False),
)
