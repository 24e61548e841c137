# LSQ, 4 bits: learned scales of symmetric weights per output channel and of activations per tensor, whose zero point
# (0 behind a ReLU) keeps its start value; first and last layer 8 bits.
qconfig = dict(
    qtype='affine',
    # Scales start where the error is least. (The start of the paper, mmrazor.LSQObserver, clips channels with few
    # large weights, such as those of an identity.)
    w_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    a_observer=dict(type='mmrazor.MSEObserver', p=2.4),
    w_fake_quant=dict(type='mmrazor.LSQFakeQuantize'),
    a_fake_quant=dict(type='mmrazor.LSQFakeQuantize'),
    w_qscheme=dict(bit=4, is_symmetry=True, is_per_channel=True),
    a_qscheme=dict(bit=4, is_symmetry=False, is_per_channel=False),
    overrides=[
        # The range of images is known; learning it would cost a gradient of the images.
        dict(
            order='first',
            w_qscheme=dict(bit=8),
            a_qscheme=dict(bit=8),
            a_observer=dict(type='mmrazor.MinMaxObserver'),
            a_fake_quant=dict(type='mmrazor.FakeQuantize'),
        ),
        dict(order='last', w_qscheme=dict(bit=8), a_qscheme=dict(bit=8)),
    ],
)
