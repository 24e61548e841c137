# 8 bits for YOLOX-nano. The activations behind the stem reach far beyond the others of their tensor, 8 bits leave too
# few steps for most: that tensor gets 16. The weights of so small a network gain from a zero point and from ranges of
# least error, its activations from ranges that leave out one value in 100,000.
stem = dict(name='backbone.stage1.0.depthwise_conv.conv', a_qscheme=dict(bit=16))
qconfig = dict(
    qtype='affine',
    w_observer=dict(type='mmrazor.MSEObserver'),
    a_observer=dict(type='mmrazor.PercentileObserver', percentile=99.999),
    w_fake_quant=dict(type='mmrazor.FakeQuantize'),
    a_fake_quant=dict(type='mmrazor.FakeQuantize'),
    w_qscheme=dict(bit=8, is_symmetry=False, is_per_channel=True),
    a_qscheme=dict(bit=8, is_symmetry=False, is_per_channel=False),
    overrides=[stem],
)
